"""The pass train_low_rank."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import POOL, applied, apply, before_and_after, close, one_layer, pooled, raised, token_ids
from torch import Tensor

from planc.backends.reference import probe
from planc.compiler.passbase import Context
from planc.compiler.plan import Plan
from planc.compiler.program import Program
from planc.passes.quantize_weights import QuantizeWeights
from planc.passes.train_low_rank import TrainLowRank
from planc.runtime.errors import CompileError, PlanError

TEXT = Context(token_ids(4, 24, seed=3))
SPLIT = QuantizeWeights(format="nf2", block=16, low_rank=4)


def loss(program: Program, ids: Tensor) -> float:
    """Mean negative log-likelihood of the next token."""
    logits = probe(program, ids)["logits"][:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden(before_and_after(TrainLowRank(steps=2), apply(one_layer(), SPLIT, context=TEXT), TEXT), "train_low_rank.txt")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
def test_equals_eager(family: str) -> None:
    """A rate of next to nothing: the program is what it was, but for factors that went through float32."""
    program = apply(raised(family), SPLIT)
    new, ids = applied(TrainLowRank(steps=1, rate=1e-12), program, TEXT), token_ids(2, 9)
    close(probe(new, ids)["logits"], probe(program, ids)["logits"], 1e-6)


@pytest.mark.parametrize("head", ["nf2", "int8", "none"])
def test_learns_the_text_and_leaves_the_rest(head: str) -> None:
    """The loss that it lowers is the one of the program as it is run: what stands in for quantised products computes the same."""
    ids = token_ids(2, 24, seed=3)
    program = apply(raised("llama"), SPLIT.model_copy(update={"modules": {"lm_head": head}}))
    new = applied(TrainLowRank(steps=30, rate=3e-3), program, Context(ids))
    said = [float(part) for part in new.history[-1].notes[0].split(" in ")[0].removeprefix("loss ").split(" -> ")]
    assert said[0] == pytest.approx(loss(program, ids), rel=0.1)
    assert loss(new, ids) < 0.8 * loss(program, ids)
    changed = {name for name, value in program.params.items() if not torch.equal(value, new.params[name])}
    assert changed == {name for name in program.params if name.endswith((".left", ".right"))}
    assert all(new.params[name].dtype == value.dtype for name, value in program.params.items())


def test_refuses() -> None:
    for program, text, code in (
        (raised("llama"), TEXT, "pass-refused"),
        (apply(raised("llama"), SPLIT), Context(), "pass-refused"),
        (apply(raised("llama"), SPLIT), Context(token_ids(4, 1)), "calibration-short"),
    ):
        with pytest.raises(CompileError) as caught:
            apply(program, TrainLowRank(), context=text)
        assert caught.value.code == code and caught.value.fix
    with pytest.raises(PlanError) as refused:
        Plan.from_dict({"passes": ["train_low_rank"]})
    assert refused.value.code == "plan-requires"


@settings(max_examples=3, deadline=None)
@given(st.sampled_from(POOL), st.sampled_from(["nf3", "int4_blocks", "codebook2"]), st.integers(0, 99))
def test_property(name: str, form: str, seed: int) -> None:
    """One small step along the gradient of a sequence lowers its loss."""
    _, program = pooled(name)
    program = apply(program, QuantizeWeights(format=form, block=16, low_rank=3))  # type: ignore[arg-type]
    ids = token_ids(1, 16, seed=seed)
    assert loss(applied(TrainLowRank(steps=1, rate=1e-3), program, Context(ids)), ids) < loss(program, ids)
