"""The pass quantize_weights, against formulas written out here and against the blocks of real GGUF files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import (
    MAX_LENGTH,
    POOL,
    VOCAB,
    applied,
    apply,
    before_and_after,
    close,
    decoding,
    eager,
    make,
    model,
    one_layer,
    onnx_engine,
    pooled,
    raised,
    token_ids,
)
from torch import Tensor, nn

from planc.backends.reference import probe
from planc.compiler.dialect import OPS
from planc.compiler.passbase import Context
from planc.compiler.plan import Plan
from planc.compiler.program import ModelInfo, Program
from planc.compiler.raising import raise_program
from planc.compiler.trace import trace
from planc.compiler.weight_forms import int8_rows
from planc.passes.fuse_projections import FuseProjections
from planc.passes.quantize_weights import QuantizeWeights
from planc.passes.smooth import Smooth
from planc.runtime.engine import Step
from planc.runtime.errors import CompileError, PlanError


def kinds(program: Program) -> list[str]:
    """Names of the product and embedding ops in order."""
    names = (str(n.target) for n in program.main.nodes if n.op == "call_function")
    return [n.split(".")[1] for n in names if ".linear" in n or ".embedding" in n]


# ---- the formulas, independent of the package ----


def int8(weight: Tensor) -> Tensor:
    """What int8 with one scale per row gives back."""
    step = weight.abs().amax(-1, keepdim=True) / 127
    return torch.round(weight / step) * step


def in_blocks(weight: Tensor, bits: int, block: int) -> Tensor:
    """Each block on a grid of 2**bits values whose end is the element of largest magnitude."""
    out = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], block):
            part = weight[row, start : start + block]
            step = part[part.abs().argmax()] / -(2 ** (bits - 1))
            out[row, start : start + block] = (part / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
    return out


def changed(family: str, form: Callable[[Tensor], Tensor], *, inputs: bool, table: bool) -> nn.Module:
    """A fresh copy of the family's model with weights (and, in `int8`, activations and embedding) rounded."""
    module = make(family)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.weight = nn.Parameter(form(layer.weight))  # a new one: a tied table keeps its own
                if inputs:
                    layer.register_forward_pre_hook(lambda _, args: (int8(args[0]),))
            elif isinstance(layer, nn.Embedding) and table:
                layer.weight = nn.Parameter(form(layer.weight))
    return module


# ---- the four ----


def test_golden(golden: Callable[[str, str], None]) -> None:
    part = QuantizeWeights(
        format="int8", modules={"o_proj": "int4_blocks", "layers.0.mlp.*": "int8_blocks", "embed_tokens": "none"}, block=16
    )
    golden(before_and_after(part, one_layer()), "quantize_weights.txt")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_equals_eager(family: str) -> None:
    """int8: eager with rounded weights, embedding and linear inputs; what is left is float rounding."""
    ids = token_ids(2, 13)
    new = applied(QuantizeWeights(format="int8"), raised(family))
    assert set(kinds(new)) == {"linear_int8", "embedding_int8"}
    have = probe(new, ids)["logits"]
    close(have, eager(changed(family, int8, inputs=True, table=True), ids), 1e-5)
    assert float((have - eager(model(family), ids)).abs().max()) > 1e-3  # and it is not the float model


@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 32), (8, 16), (8, 32)])
def test_equals_eager_in_blocks(bits: int, block: int) -> None:
    """Blocks: eager with rounded weights. Llama's widths are 32 and 48, so blocks of 32 leave the down projection out."""
    ids = token_ids(2, 13)
    out = "none" if block == 32 else f"int{bits}_blocks"
    part = QuantizeWeights(format=f"int{bits}_blocks", block=block, modules={"down_proj": out})  # type: ignore[arg-type]
    new = applied(part, raised("llama"))
    assert kinds(new).count("linear_blocks") == (13 if block == 32 else 15)
    module = changed("llama", lambda w: w if w.shape[1] % block else in_blocks(w, bits, block), inputs=False, table=False)
    close(probe(new, ids)["logits"], eager(module, ids), 1e-5)


def test_int8_error_is_within_its_steps() -> None:
    """|error| <= sum_k |x_k| s_w/2 + |w_k| s_x/2 + s_w s_x/4: half a step of each factor."""
    random = torch.Generator().manual_seed(1)
    for outputs, inputs in ((5, 3), (64, 48), (7, 300)):
        x, w = (torch.randn(n, inputs, generator=random) * torch.rand(n, 1, generator=random) * 9 for n in (11, outputs))
        steps, scale = int8_rows(w).parts.values()
        assert steps is not None and scale is not None
        have = OPS.linear_int8.default(x, steps, scale, None).double()
        step_x, step_w = x.double().abs().amax(1) / 127, w.double().abs().amax(1) / 127
        bound = x.double().abs().sum(1)[:, None] * step_w / 2 + step_x[:, None] * w.double().abs().sum(1) / 2
        bound += inputs * step_x[:, None] * step_w / 4
        error = (have - x.double() @ w.double().T).abs()
        assert bool((error <= bound * (1 + 1e-5)).all())
        assert float(error.max()) > 0


def test_refuses() -> None:
    def code(part: QuantizeWeights, program: Program) -> str:
        with pytest.raises(CompileError) as caught:
            apply(program, part)
        assert caught.value.fix
        return caught.value.code

    program = raised("llama")
    assert code(QuantizeWeights(format="int4_blocks", block=32), program) == "pass-refused"  # 48 inputs
    assert code(QuantizeWeights(modules={"no_such_layer": "none"}), program) == "pass-no-match"
    assert code(QuantizeWeights(format="keep"), program) == "pass-refused"  # not from a GGUF
    for bad in (float("nan"), float("inf")):
        weight = program.params["model.layers.1.mlp.down_proj.weight"].clone()
        weight[2, 5] = bad
        broken = program.replace(params={**program.params, "model.layers.1.mlp.down_proj.weight": weight})
        for form in ("int8", "int8_blocks"):
            assert code(QuantizeWeights(format=form, block=16), broken) == "pass-refused"  # type: ignore[arg-type]
    with pytest.raises(PlanError) as refused:
        Plan.from_dict({"passes": [{"quantize_weights": {"format": "int3"}}]})
    assert refused.value.code == "plan-bad-value"


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(POOL),
    st.sampled_from(["int8", "int8_blocks", "int4_blocks", "none"]),
    st.dictionaries(st.sampled_from(["*.0.*", "*1*", "*"]), st.sampled_from(["int8", "int8_blocks", "int4_blocks", "none"]), max_size=2),
    st.booleans(),
    st.integers(0, 99),
)
def test_property(name: str, form: str, modules: dict[str, str], joined: bool, seed: int) -> None:
    _, program = pooled(name)
    program = apply(program, FuseProjections()) if joined else program
    if "*1*" in modules and name == "variant 0":
        del modules["*1*"]  # one layer: nothing is called so
    new = applied(QuantizeWeights(format=form, modules=modules, block=16), program)  # type: ignore[arg-type]
    formats = {modules.get("*", form), *modules.values()}
    if formats == {"none"}:
        assert new is program
    if new is not program:
        assert new.bytes() < program.bytes()
    ids = token_ids(1, 7, seed=seed)
    have, want = probe(new, ids)["logits"], probe(program, ids)["logits"]
    worst = {
        "int8": 0.12,
        "int8_blocks": 0.045,
        "int4_blocks": 0.85,
        "none": 0.0,
    }  # relative error of random weights; measured, twice the largest
    limit = max(worst[f] for f in formats)
    assert float((have - want).norm() / want.norm()) <= limit


def test_patterns_name_modules_whatever_passes_did_to_their_weights() -> None:
    program = apply(raised("llama"), FuseProjections(), Smooth(), context=Context(token_ids(2, 16)))
    new = applied(QuantizeWeights(format="int8", modules={"up_proj": "none", "layers.1.*.o_proj": "int8_blocks"}), program)
    left = [str(n.args[1].target) for n in new.main.nodes if n.target is torch.ops.aten.linear.default]
    assert ["gate_proj" in name and "up_proj" in name for name in left] == [True, True]
    assert [str(n.args[1].target).split(".")[2] for n in new.main.nodes if n.target is OPS.linear_blocks.default] == ["1"]


# ---- blocks of a GGUF ----

Q8_0, Q4_0, Q4_1 = (gguf.GGMLQuantizationType[name] for name in ("Q8_0", "Q4_0", "Q4_1"))
_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in the order of Llama files: the halves of each head take turns."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def in_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `interleaved`."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, kind: Callable[[str], gguf.GGMLQuantizationType], tied: bool = False) -> Program:
    """Write a tiny Llama's products as blocks into a GGUF and give the program of the same, dequantised weights."""
    module = make("llama", hidden_size=64, intermediate_size=96, tie_word_embeddings=tied)
    writer = gguf.GGUFWriter(str(path), "llama")
    state = dict(module.named_parameters())
    places = {f"model.layers.{i}.{ours}": f"blk.{i}.{theirs}" for i in range(2) for ours, theirs in _NAMES.items()}
    places |= {"model.embed_tokens": "token_embd"} | ({} if tied else {"lm_head": "output"})
    for ours, theirs in places.items():
        weight = state[f"{ours}.weight"].detach()
        heads = 4 if "q_proj" in ours else 2 if "k_proj" in ours else 0
        values = interleaved(weight.numpy(), heads) if heads else weight.numpy()
        raw = gguf.quants.quantize(np.ascontiguousarray(values), kind(ours))
        writer.add_tensor(f"{theirs}.weight", raw, raw_dtype=kind(ours))
        back = gguf.quants.dequantize(raw, kind(ours))
        with torch.no_grad():
            weight.copy_(torch.from_numpy(in_order(back, heads) if heads else back))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return raise_program(trace(module, ModelInfo("llama", VOCAB, MAX_LENGTH, (2,), path)))


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("kind", [Q8_0, Q4_0, Q4_1], ids=lambda k: k.name)
def test_keep_takes_the_blocks_as_they_are(kind: gguf.GGMLQuantizationType, joined: bool, tmp_path: Path) -> None:
    program = write(tmp_path / "tiny.gguf", lambda _: kind)
    program = apply(program, FuseProjections()) if joined else program
    new = applied(QuantizeWeights(format="keep"), program)
    assert kinds(new) == ["embedding"] + ["linear_blocks"] * (9 if joined else 15)
    ids = token_ids(2, 13)
    close(probe(new, ids)["logits"], probe(program, ids)["logits"], 1e-5)  # nothing is rounded again
    products = [n for n in new.main.nodes if n.target is OPS.linear_blocks.default]
    assert {n.args[5] for n in products} == {8 if kind is Q8_0 else 4}
    assert all((n.args[3] is not None) == (kind is Q4_1) for n in products)


def test_keep_reads_the_embedding_for_a_tied_head(tmp_path: Path) -> None:
    program = write(tmp_path / "tiny.gguf", lambda _: Q8_0, tied=True)
    new = applied(QuantizeWeights(format="keep"), program)
    assert kinds(new)[-1] == "linear_blocks"
    close(probe(new, token_ids(1, 9))["logits"], probe(program, token_ids(1, 9))["logits"], 1e-5)


def test_keep_leaves_what_does_not_fit_as_float(tmp_path: Path) -> None:
    """Another type in the file, and a joined product with parts of two formats."""
    program = write(
        tmp_path / "tiny.gguf", lambda name: gguf.GGMLQuantizationType.F16 if "down_proj" in name else Q4_0 if "v_proj" in name else Q8_0
    )
    new = applied(QuantizeWeights(format="keep"), apply(program, FuseProjections()))
    assert kinds(new).count("linear") == 4
    notes = new.history[-1].notes
    assert [note.split(" ")[0].count("|") for note in notes] == [2, 0, 2, 0]
    assert all("float kept" in note for note in notes)
    close(probe(new, token_ids(1, 9))["logits"], probe(program, token_ids(1, 9))["logits"], 1e-5)


def test_keep_refuses_weights_that_a_pass_has_changed(tmp_path: Path) -> None:
    program = write(tmp_path / "tiny.gguf", lambda _: Q4_0)
    smoothed = apply(program, Smooth(), context=Context(token_ids(2, 16)))
    with pytest.raises(CompileError) as caught:
        apply(smoothed, QuantizeWeights(format="keep"))
    assert caught.value.code == "pass-refused"


# ---- tables, low rank, budgets, GPTQ ----

TEXT = Context(token_ids(4, 32, seed=9))
OPTIONS: tuple[dict[str, object], ...] = (
    {"format": "nf2"},
    {"format": "nf3", "low_rank": 4},
    {"format": "nf4", "rounding": "gptq", "scales": "search"},
    {"format": "nf4", "budget": 4.8, "weigh": True},
    {"format": "codebook3", "tables": 3, "learn": 3},
    {"format": "int4_blocks", "low_rank": 3, "rounding": "gptq"},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_onnx_follows_the_reference(options: dict[str, object], tmp_path: Path) -> None:
    """Standard operators to float rounding; MatMulNBits rounds activations to int8 in blocks."""
    part = QuantizeWeights.model_validate({"block": 16, **options})
    new, ids = applied(part, raised("llama"), TEXT), token_ids(1, 9)
    wanted = probe(new, ids)["logits"]
    for ops, tolerance in (("standard", 1e-5), ("fast", 0.05)):
        (tmp_path / ops).mkdir()
        engine = onnx_engine(decoding(new), tmp_path / ops, ops)  # type: ignore[arg-type]
        logits = engine.forward(engine.new_cache(1, 16), Step(ids.numpy()), logits=True).logits
        assert logits is not None
        close(logits, wanted, tolerance)


def test_a_budget_is_kept_and_one_that_is_too_small_names_the_least() -> None:
    new = applied(QuantizeWeights(format="nf3", block=16, budget=4.8), raised("llama"))
    names = {str(n.args[1].target).removesuffix(".codes") for n in new.main.nodes if n.target is OPS.linear_lookup.default}
    parts = [v for n, v in new.params.items() if n.rpartition(".")[0] in names]
    assert sum(8 * v.numel() * v.element_size() for v in parts) <= 4.8 * sum(raised("llama").params[n].numel() for n in names)
    assert new.history[-1].notes[0].endswith("}")
    with pytest.raises(CompileError) as caught:
        apply(raised("llama"), QuantizeWeights(format="nf3", block=16, budget=1.0))
    assert caught.value.code == "pass-refused" and caught.value.fix
    least = float(caught.value.fix.split("`")[1].split()[1])
    assert apply(raised("llama"), QuantizeWeights(format="nf3", block=16, budget=least)).history


def test_gptq_calibrates_behind_what_is_rounded_already() -> None:
    """The second of two products of one layer is rounded as if the program had the first one rounded: in one run and in two it is the same."""
    program, last = raised("llama"), "layers.1.mlp.down_proj"
    options: dict[str, object] = {"format": "int4_blocks", "block": 16, "rounding": "gptq", "scales": "search"}
    whole = apply(program, QuantizeWeights.model_validate(options), context=TEXT)
    first = apply(program, QuantizeWeights.model_validate({**options, "modules": {last: "none", "lm_head": "none"}}), context=TEXT)
    both = apply(first, QuantizeWeights.model_validate({**options, "modules": {"lm_head": "none"}}), context=TEXT)
    name = f"model.{last}.weight.int4"
    assert torch.equal(both.params[name], whole.params[name])
    alone = {"*": "none"}
    fresh = apply(program, QuantizeWeights.model_validate({**options, "modules": {last: "int4_blocks", **alone}}), context=TEXT)
    assert not torch.equal(fresh.params[name], whole.params[name])  # on the text as the float prefix makes it, others are chosen


def test_gptq_with_searched_scales_costs_less_than_rounding_to_nearest() -> None:
    program = raised("llama")
    ids = token_ids(4, 16, seed=8)
    wanted = probe(program, ids)["logits"]
    errors = []
    for options in ({}, {"rounding": "gptq"}, {"rounding": "gptq", "scales": "search"}):
        part = QuantizeWeights.model_validate({"format": "int4_blocks", "block": 16, **options})
        errors.append(float((probe(apply(program, part, context=Context(token_ids(16, 32, seed=9))), ids)["logits"] - wanted).norm()))
    assert errors[1] < 0.95 * errors[0] and errors[2] < 0.9 * errors[0], errors


def test_options_that_nothing_reads_are_refused() -> None:
    for options in (
        {"budget": 3.0},
        {"learn": 3},
        {"format": "codebook4", "scales": "search"},
        {"low_rank": 8},
        {"format": "int4_blocks", "budget": 3.0},
        {"format": "nf4", "low_rank": -1},
    ):
        with pytest.raises(PlanError) as caught:
            Plan.from_dict({"passes": [{"quantize_weights": options}]})
        assert caught.value.code == "plan-bad-value"
    for options in ({"rounding": "gptq"}, {"format": "nf4", "block": 16, "weigh": True}):
        with pytest.raises(CompileError) as refused:
            apply(raised("llama"), QuantizeWeights.model_validate(options))
        assert refused.value.code == "pass-refused"  # no text
