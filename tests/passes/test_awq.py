"""The pass awq."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import POOL, applied, apply, before_and_after, close, eager, model, one_layer, pooled, raised, token_ids

from planc.backends.reference import probe
from planc.compiler.passbase import Context
from planc.compiler.program import Program
from planc.passes.awq import Awq
from planc.passes.quantize_weights import QuantizeWeights
from planc.runtime.errors import CompileError

TEXT = Context(token_ids(3, 32, seed=5))


def loud(program: Program) -> Program:
    """Norms whose first channels are ten times as loud, as in trained models."""
    params = {
        n: v * torch.where(torch.arange(len(v)) < 3, 10.0, 1.0) if n.endswith("layernorm.weight") else v for n, v in program.params.items()
    }
    return program.replace(params=params)


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden(before_and_after(Awq(block=16), loud(one_layer()), TEXT), "awq.txt")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_equals_eager(family: str) -> None:
    close(probe(applied(Awq(block=16), raised(family), TEXT), token_ids(2, 9))["logits"], eager(model(family), token_ids(2, 9)), 2e-5)


def test_rounding_costs_less_after_it() -> None:
    program, part = loud(raised("llama")), QuantizeWeights(format="int4_blocks", block=16)
    ids = token_ids(4, 16, seed=8)
    wanted = probe(program, ids)["logits"]
    plain, scaled = (
        float((probe(apply(p, part), ids)["logits"] - wanted).norm()) for p in (program, apply(program, Awq(block=16), context=TEXT))
    )
    assert scaled < 0.9 * plain


def test_refuses_without_text() -> None:
    with pytest.raises(CompileError) as caught:
        apply(raised("llama"), Awq())
    assert caught.value.code == "pass-refused"


@settings(max_examples=6, deadline=None)
@given(st.sampled_from(POOL), st.integers(0, 99))
def test_property(name: str, seed: int) -> None:
    _, program = pooled(name)
    ids = token_ids(1, 7, seed=seed)
    close(probe(applied(Awq(block=16, format="nf4"), program, TEXT), ids)["logits"], probe(program, ids)["logits"], 2e-4)
