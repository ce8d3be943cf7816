"""Decoder layers: found by module path, confirmed by what goes in and out."""

from __future__ import annotations

import pytest
import torch
from models_tiny import decoding, one_layer, raised
from torch import Tensor, nn

from planc.compiler.blocks import find_blocks, layer_path, module_paths
from planc.compiler.dialect import OPS, attention
from planc.compiler.program import ModelInfo
from planc.compiler.trace import trace_module
from planc.runtime.errors import CompileError

aten = torch.ops.aten


def test_entry_and_exit() -> None:
    program = raised("llama")
    nodes = {n.name: n for n in program.main.nodes}
    first, second = find_blocks(program)
    assert (first.index, second.index) == (0, 1)
    assert first.path == "model.layers.0"
    assert nodes[first.entry].target is aten.embedding.default
    assert nodes[first.exit].target is aten.add.Tensor
    assert second.entry == first.exit
    assert next(iter(nodes[second.exit].users)).target is OPS.rms_norm.default  # the last norm


def test_a_cache_does_not_count_as_hidden_state() -> None:
    program = decoding(raised("llama"), "fused")
    assert [(b.entry, b.exit) for b in find_blocks(program)] == [(b.entry, b.exit) for b in find_blocks(raised("llama"))]


def test_paths() -> None:
    node = next(n for n in one_layer().main.nodes if n.target is OPS.attention.default)
    assert list(module_paths(node)) == ["model", "model.model", "model.layers.0", "model.layers.0.self_attn"]
    assert layer_path(node) == "model.layers.0"
    assert layer_path(next(iter(one_layer().main.nodes))) == ""


def test_two_values_that_leave_a_layer() -> None:
    edit = raised("llama").edit("test")
    inner = next(n for n in edit.graph.nodes if n.target is OPS.glu.default)
    edit.outputs(inner=inner)
    with pytest.raises(CompileError) as caught:
        find_blocks(edit.done(1, 1))
    assert caught.value.code == "raise-missing"
    assert "model.layers.0" in caught.value.message
    assert inner.name in caught.value.message


def test_two_values_that_enter_a_layer() -> None:
    edit = raised("llama").edit("test")
    embedding = next(n for n in edit.graph.nodes if n.target is aten.embedding.default)
    last = [n for n in edit.graph.nodes if n.target is aten.add.Tensor][-1]
    last.update_arg(0, embedding)  # the second layer's last sum reads the embedding as well
    with pytest.raises(CompileError) as caught:
        find_blocks(edit.done(1, 1))
    assert caught.value.code == "raise-missing"


class _Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return attention(x, x, x, None, 1.0, True, 0, 0.0)


def test_attention_outside_of_layers() -> None:
    program = trace_module(_Flat(), (torch.randn(1, 4, 2, 8),), ModelInfo("flat", 0, 9))
    with pytest.raises(CompileError) as caught:
        find_blocks(program)
    assert caught.value.code == "raise-missing"
    assert "ModuleList" in (caught.value.fix or "")
