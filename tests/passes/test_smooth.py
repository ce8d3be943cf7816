"""The pass smooth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import POOL, applied, apply, before_and_after, close, eager, model, one_layer, pooled, raised, token_ids

from planc.backends.reference import probe
from planc.compiler.passbase import Context
from planc.compiler.plan import Plan
from planc.compiler.program import Program
from planc.passes.fuse_projections import FuseProjections
from planc.passes.quantize_weights import QuantizeWeights
from planc.passes.smooth import Smooth
from planc.runtime.errors import CompileError, PlanError

TEXT = Context(token_ids(4, 32, seed=7))
TOLERANCE = Smooth().effect.tolerance

#: Values whose channels can be scaled, in two layers: two norms, the attention, the gated product; and the last norm. GPT-2 has a view behind its
#: last norm; the value heads of GPT-NeoX are interleaved with queries and keys.
SITES = {"llama": 2 * 4 + 1, "qwen2": 2 * 4 + 1, "gemma2": 2 * 4 + 1, "gpt2": 2 * 3, "opt": 2 * 3 + 1, "gpt_neox": 2 * 2 + 1}


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden(before_and_after(Smooth(), one_layer(), TEXT), "smooth.txt")


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "opt", "gpt_neox", "phi3"])
def test_equals_eager(family: str, joined: bool) -> None:
    program = apply(raised(family), FuseProjections()) if joined else raised(family)
    new = applied(Smooth(), program, TEXT)
    ids = token_ids(2, 19)
    close(probe(new, ids)["logits"], eager(model(family), ids), TOLERANCE)
    assert any(name.endswith("*s") for name in new.params)


@pytest.mark.parametrize("family", SITES)
def test_sites(family: str) -> None:
    assert apply(raised(family), Smooth(), context=TEXT).history[-1].rewritten == SITES[family]


def with_outliers(program: Program) -> Program:
    """The same with a few channels of every norm 60 times as loud and the weights behind it that much smaller for them."""
    params = {}
    for name, value in program.params.items():
        loud = value.clone()
        if name.endswith("norm.weight"):
            loud[3::11] *= 60
        elif value.dim() == 2 and value.shape[1] == 32 and "embed" not in name and "o_proj" not in name:
            loud[:, 3::11] /= 60
        params[name] = loud
    return program.replace(params=params)


def test_less_is_lost_by_quantising() -> None:
    ids, program = token_ids(2, 16), with_outliers(raised("llama"))
    want = probe(program, ids)["logits"]
    close(want, eager(model("llama"), ids), 1e-5)
    error = [
        float((probe(apply(p, QuantizeWeights(format="int8")), ids)["logits"] - want).pow(2).mean().sqrt())
        for p in (program, apply(program, Smooth(), context=TEXT))
    ]
    assert error[1] < 0.5 * error[0]


def test_a_value_with_another_reader_is_left_alone() -> None:
    edit = one_layer().edit("test")
    norms = [n for n in edit.graph.nodes if "rms_norm" in str(n.target)]
    edit.outputs(seen=norms[0])
    program = edit.done(1, 1)
    ids, new = token_ids(1, 9), apply(program, Smooth(), context=TEXT)
    assert new.history[-1].rewritten == 4
    assert torch.equal(probe(new, ids)["seen"], probe(program, ids)["seen"])


def test_refuses() -> None:
    with pytest.raises(CompileError) as caught:
        apply(one_layer(), Smooth())
    assert caught.value.code == "pass-refused"
    assert "calibration" in (caught.value.fix or "")
    with pytest.raises(PlanError) as refused:
        Plan.from_dict({"passes": [{"smooth": {"alpha": 1.5}}]})
    assert refused.value.code == "plan-bad-value"


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(POOL), st.booleans(), st.floats(0, 1), st.integers(0, 99))
def test_property(name: str, joined: bool, alpha: float, seed: int) -> None:
    module, program = pooled(name)
    program = apply(program, FuseProjections()) if joined else program
    ids = token_ids(2, 9, seed=seed)
    new = applied(Smooth(alpha=alpha), program, Context(token_ids(2, 16, seed=seed)))
    close(probe(new, ids)["logits"], eager(module, ids), TOLERANCE)
    assert new.bytes() >= program.bytes()
