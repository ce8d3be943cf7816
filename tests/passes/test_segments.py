"""The pass segments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import applied, apply, before_and_after, close, one_layer, pooled, raised, token_ids

from planc.backends.reference import run
from planc.passes.bidirectional import Bidirectional
from planc.passes.segments import Segments
from planc.runtime.errors import CompileError
from planc.runtime.masked.engine import HIDDEN

FULL = ["llama", "gpt2", "gpt_neox"]


def logits(program, ids, segments):  # type: ignore[no-untyped-def]
    inputs = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1]).repeat(len(ids), 1), "segments": segments}
    return run(program, {name: inputs[name] for name in program.inputs})["logits"]


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden(before_and_after(Segments(), apply(one_layer(), Bidirectional())), "segments.txt")


def test_rising_segments_are_causal() -> None:
    """A segment for every slot gives the causal model back."""
    ids = token_ids(2, 9)
    program = applied(Segments(), apply(raised("llama"), Bidirectional()))
    close(logits(program, ids, torch.arange(9).repeat(2, 1)), logits(raised("llama"), ids, None))


def test_refuses_a_causal_model() -> None:
    with pytest.raises(CompileError, match="causal: it cannot look") as refused:
        Segments().apply(raised("llama"), None)  # type: ignore[arg-type]
    assert refused.value.code == "pass-refused"
    assert "bidirectional" in str(refused.value.fix)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(FULL), st.integers(2, 9), st.integers(0, 4), st.integers(0, 99))
def test_property(name: str, length: int, spare: int, seed: int) -> None:
    """Equal segments change nothing, and hidden slots are as good as absent."""
    plain = apply(pooled(name)[1], Bidirectional())
    program = applied(Segments(), plain)
    ids = token_ids(1, length + spare, seed=seed)
    close(logits(program, ids, torch.full((1, length + spare), 7)), logits(plain, ids, None))
    segments = torch.where(torch.arange(length + spare) < length, 0, HIDDEN)[None]
    close(logits(program, ids, segments)[:, :length], logits(plain, ids[:, :length], None))
