"""The pass argmax."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import POOL, applied, before_and_after, eager, model, one_layer, pooled, raised, token_ids

from planc.backends.reference import probe
from planc.compiler.plan import Plan
from planc.passes.argmax import Argmax
from planc.runtime.errors import PlanError


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden(before_and_after(Argmax(), one_layer()), "argmax.txt")


def test_equals_eager() -> None:
    ids = token_ids(2, 9)
    assert torch.equal(probe(applied(Argmax(), raised("gpt2")), ids)["argmax"], eager(model("gpt2"), ids).argmax(-1))


def test_lowest_id_on_ties() -> None:
    program = one_layer()
    head = program.params["lm_head.weight"]
    program = program.replace(
        params={**program.params, "lm_head.weight": head[torch.arange(len(head)) // 2 * 2]}
    )  # each odd id is the one before
    out = probe(applied(Argmax(), program), token_ids(2, 20))
    assert bool((out["logits"][..., 0:96:2] == out["logits"][..., 1:96:2]).all())
    assert bool((out["argmax"] % 2 == 0).all())


def test_refuses() -> None:
    with pytest.raises(PlanError) as refused:
        Plan.from_dict({"passes": [{"argmax": {"k": 1}}]})
    assert refused.value.code == "plan-unknown-field"


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(POOL), st.integers(1, 2), st.integers(1, 9), st.integers(0, 99))
def test_property(name: str, batch: int, rows: int, seed: int) -> None:
    _, program = pooled(name)
    out = probe(applied(Argmax(), program), token_ids(batch, rows, seed=seed))
    assert out["argmax"].shape == (batch, rows)
    assert torch.equal(out["logits"].gather(-1, out["argmax"][..., None])[..., 0], out["logits"].amax(-1))
