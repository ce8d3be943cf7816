"""The printer: stable text, one node per line."""

from __future__ import annotations

import re

import torch
from models_tiny import decoding, info, make, one_layer, raised

from planc.compiler.passbase import Context
from planc.compiler.printer import show
from planc.compiler.raising import raise_program
from planc.compiler.trace import trace
from planc.passes.kv_cache import KvCache


def test_the_same_program_prints_the_same() -> None:
    again = raise_program(trace(make("llama", num_hidden_layers=1), info("llama")))
    assert show(again) == show(one_layer())  # a second trace: no addresses, no counters of the process


def test_every_node_has_its_line() -> None:
    program = decoding(raised("gemma3"), "fused")
    text = show(program)
    lines = text.splitlines()
    assert lines[0] == "graph main:"
    assert len(lines) == 1 + len(program.main.nodes)
    for node, line in zip(program.main.nodes, lines[1:], strict=True):
        assert line.startswith("  return " if node.op == "output" else f"  %{node.name}: ")
    assert not re.search(r"0x[0-9a-f]{4}|\bs\d+\b|\bu\d+\b|torch\.|\?", text)  # no address, raw symbol or unknown type


def test_types_arguments_and_makers() -> None:
    text = show(KvCache(trees="fused").apply(one_layer(), Context()))
    for line in (
        "  %input_ids: i64[B, R] = input input_ids",
        "  %model_layers_0_mlp_up_proj_weight: f32[48, 32] = param model.layers.0.mlp.up_proj.weight",
        "  %embedding: f32[B, R, 32] = aten.embedding(%model_embed_tokens_weight, %input_ids, 0)",
        "  %glu_default: f32[B, R, 48] = planc.glu(%linear_4, %linear_5, 'silu')  # raise_glu",
        "  %lengths: i64[B] = input lengths",
        "  %past_0_key: f32[B, 2, S2, 8] = input past.0.key",
        "  return logits=%linear_7, present.0.key=%getitem_3, present.0.value=%getitem_4",
    ):
        assert line in text.splitlines(), f"{line!r} is not in\n{text}"


def test_products_of_sizes_and_dtypes() -> None:
    edit = one_layer().edit("test")
    ids = next(n for n in edit.graph.nodes if n.target == "input_ids")
    with edit.after(ids):
        flat = edit.call(torch.ops.aten.view.default, ids, [-1])
    with edit.after(flat):
        edit.outputs(flat=edit.call(torch.ops.aten._to_copy.default, flat), logits=None)
    text = show(edit.done(1, 1))
    assert "%view_default: i64[B*R]" in text
    edit = one_layer().edit("test")
    with edit.after(edit[one_layer().outputs["logits"]]):
        edit.outputs(half=edit.call(torch.ops.aten.to.dtype, edit[one_layer().outputs["logits"]], torch.float16))
    assert ": f16[B, R, 97] = aten.to.dtype(%linear_7, f16)  # test" in show(edit.done(1, 1))
