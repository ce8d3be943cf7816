"""The pass top_k."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import POOL, VOCAB, applied, apply, before_and_after, eager, model, one_layer, pooled, raised, token_ids

from planc.backends.reference import probe
from planc.compiler.plan import Plan
from planc.passes.top_k import TopK
from planc.runtime.errors import CompileError, PlanError


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden(before_and_after(TopK(k=3), one_layer()), "top_k.txt")


def test_equals_eager() -> None:
    ids = token_ids(2, 9)
    have = probe(applied(TopK(k=5), raised("llama")), ids)["top_ids"]
    assert have.dtype == torch.int64
    assert torch.equal(have, eager(model("llama"), ids).topk(5).indices)


def test_refuses() -> None:
    with pytest.raises(CompileError) as caught:
        apply(raised("llama"), TopK(k=VOCAB + 1))
    assert caught.value.code == "pass-refused"
    assert str(VOCAB) in caught.value.message
    with pytest.raises(PlanError) as refused:
        Plan.from_dict({"passes": [{"top_k": {"k": 0}}]})
    assert refused.value.code == "plan-bad-value"


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(POOL), st.integers(1, VOCAB), st.integers(0, 99))
def test_property(name: str, k: int, seed: int) -> None:
    _, program = pooled(name)
    out = probe(applied(TopK(k=k), program), token_ids(1, 5, seed=seed))
    chosen = out["logits"].gather(-1, out["top_ids"])
    assert bool((chosen[..., 1:] <= chosen[..., :-1]).all())  # most likely first
    hidden = out["logits"].scatter(-1, out["top_ids"], -torch.inf)  # nothing that was left out is better
    assert bool((hidden.amax(-1) <= chosen[..., -1]).all())
    assert all(len(set(row)) == k for row in out["top_ids"].reshape(-1, k).tolist())
