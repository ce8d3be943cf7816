"""The pass static_activations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import POOL, applied, apply, before_and_after, close, one_layer, pooled, raised, token_ids
from torch import Tensor
from torch.fx import Node

from planc.backends.reference import probe
from planc.compiler.calibration import Moments, Peaks, collect
from planc.compiler.dialect import OPS
from planc.compiler.passbase import Context
from planc.compiler.plan import Plan
from planc.compiler.program import Program
from planc.passes.fuse_projections import FuseProjections
from planc.passes.quantize_weights import QuantizeWeights
from planc.passes.static_activations import StaticActivations
from planc.runtime.errors import CompileError, PlanError

TEXT = Context(token_ids(3, 24, seed=5))
INT8 = QuantizeWeights(format="int8")
ALL = StaticActivations(noise=1.0)


def products(program: Program) -> list[Node]:
    return [n for n in program.main.nodes if n.target is OPS.linear_int8.default]


def fixed(program: Program) -> dict[str, float]:
    """Weight -> step of the products that have one."""
    return {str(n.args[1].target): float(program.params[str(n.args[4].target)]) for n in products(program) if len(n.args) > 4}


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden(before_and_after(StaticActivations(noise=1e-4), apply(one_layer(), INT8), TEXT), "static_activations.txt")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
def test_equals_eager(family: str) -> None:
    """Within the rounding of the coarser steps of the row-wise program, which is compared with eager itself in its own test."""
    before = apply(raised(family), FuseProjections(), INT8)
    after = applied(ALL, before, TEXT)
    assert len(fixed(after)) == len(products(before))
    ids = TEXT.calibration
    assert ids is not None
    want, have = (probe(p, ids)["logits"] for p in (before, after))
    assert 0 < float((have - want).pow(2).mean().sqrt()) < 0.1 * float(want.pow(2).mean().sqrt())


def test_the_step_is_what_calibration_saw() -> None:
    before = apply(raised("llama"), INT8)
    assert TEXT.calibration is not None
    seen = collect(before, {n.args[0]: {Peaks} for n in products(before)}, TEXT.calibration)
    after = applied(StaticActivations(noise=1.0, headroom=2.0), before, TEXT)
    want = {str(n.args[1].target): float(seen[n.args[0], Peaks].value.max()) * 2 / 127 for n in products(before)}
    assert fixed(after) == pytest.approx(want)


def test_inputs_for_which_one_step_is_coarse_keep_row_wise_steps() -> None:
    """The noise is step^2 / 12 by the mean square of the input; what is above the limit stays as it was."""
    before = apply(raised("gpt2"), INT8)
    ids = TEXT.calibration
    assert ids is not None
    inputs = {str(n.args[1].target): n.args[0] for n in products(before)}
    seen = collect(before, {x: {Moments, Peaks} for x in inputs.values()}, ids)
    peaks = {name: float(seen[x, Peaks].value.max()) for name, x in inputs.items()}
    noise = {name: (peak * 1.1 / 127) ** 2 / 12 / float(seen[inputs[name], Moments].mean_square.mean()) for name, peak in peaks.items()}
    limit = sorted(noise.values())[len(noise) // 2]
    after = applied(StaticActivations(noise=limit * 1.0001), before, TEXT)
    assert set(fixed(after)) == {name for name, value in noise.items() if value <= limit * 1.0001} and 0 < len(fixed(after)) < len(noise)


def test_values_beyond_the_step_are_cut_off() -> None:
    weight, scale, step = torch.tensor([[1]], dtype=torch.int8), torch.ones(1), torch.tensor(0.5)
    x = torch.tensor([[-1000.0], [-64.0], [0.2], [0.3], [63.5], [1000.0]])
    assert OPS.linear_int8.default(x, weight, scale, None, step).flatten().tolist() == [-64.0, -64.0, 0.0, 0.5, 63.5, 63.5]


def test_refuses() -> None:
    with pytest.raises(PlanError) as refused:
        Plan.from_dict({"passes": [{"static_activations": {}}]})
    assert refused.value.code == "plan-requires"
    for program, context, word in ((raised("llama"), TEXT, "quantize_weights"), (apply(raised("llama"), INT8), Context(), "calibration")):
        with pytest.raises(CompileError) as caught:
            apply(program, ALL, context=context)
        assert caught.value.code == "pass-refused" and word in (caught.value.fix or "")


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(POOL), st.floats(1e-5, 0.01), st.floats(1, 3), st.integers(0, 99))
def test_property(name: str, noise: float, headroom: float, seed: int) -> None:
    """No product is lost; a row's result does not depend on the other rows."""
    before = apply(pooled(name)[1], FuseProjections(), INT8)
    text = token_ids(2, 16, seed=seed)
    after = applied(StaticActivations(noise=noise, headroom=headroom), before, Context(text))
    assert len(products(after)) == len(products(before))
    ids = token_ids(1, 9, seed=seed + 1)

    def logits(program: Program, part: Tensor) -> Tensor:
        return probe(program, part)["logits"]

    close(logits(after, ids)[:, :5], logits(after, ids[:, :5]), 0.05)  # a sum in another order may round to another step
