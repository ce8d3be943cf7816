"""The pass slot_cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import MAX_LENGTH, VOCAB, applied, apply, before_and_after, close, one_layer, pooled, raised, token_ids

from planc.backends.masked_reference import reference_engine
from planc.backends.reference import run
from planc.compiler.masked import forms_of
from planc.passes.bidirectional import Bidirectional
from planc.passes.slot_cache import SlotCache
from planc.runtime.errors import CompileError
from planc.runtime.masked.engine import MaskedEngine, MaskedSpec, Query

FULL = ["llama", "gpt2", "variant 2"]


@cache
def engine_of(name: str) -> tuple[MaskedEngine, object]:
    program = apply(pooled(name)[1], Bidirectional())
    program = program.replace(info=program.info.__class__(name, VOCAB, MAX_LENGTH, mask_id=1))
    forms = forms_of(program, by_layer=True)
    return reference_engine(forms, MaskedSpec(VOCAB, MAX_LENGTH, 1, len(forms["slots"].states), by_layer=True)), program


def query(ids: np.ndarray, slots: np.ndarray, *, cached: bool = True) -> Query:
    total = ids.shape[1]
    tokens = np.concatenate([ids, np.zeros_like(ids[:, :1])], 1)
    return Query(np.arange(len(ids)), np.take_along_axis(tokens, slots, 1), slots, np.zeros((len(ids), total), np.int64), cached)


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden(before_and_after(SlotCache(probe=True), apply(one_layer(), Bidirectional())), "slot_cache.txt")


@pytest.mark.parametrize("name", FULL)
def test_a_query_of_all_slots_is_the_whole_model(name: str) -> None:
    """By slots and layer by layer, and whatever the cache held before."""
    engine, program = engine_of(name)
    ids = token_ids(1, 9).numpy()
    want = run(program, {"input_ids": torch.from_numpy(ids), "position_ids": torch.arange(9)[None]})["logits"].numpy()  # type: ignore[arg-type]
    want[..., 1] = -1e30
    cache = engine.new_cache(1, 9)
    everything = query(ids, np.arange(9)[None])
    engine.forward(cache, query(ids[:, ::-1].copy(), np.arange(9)[None]))
    close(engine.forward(cache, everything, logits=True).logits, want)  # type: ignore[arg-type]
    reply, refreshed, slots = engine.forward_by_layer(
        cache,
        query(ids, np.arange(9)[None]),
        everything,
        np.zeros(engine.spec.layers, np.int64),
        np.ones(9, bool),
        lambda layer, probe: False,
    )
    close(reply.top, want.max(-1))
    assert refreshed == 0 and slots.tolist() == list(range(9))


def test_refuses_a_causal_model() -> None:
    with pytest.raises(CompileError, match="causal: it cannot look"):
        SlotCache().apply(raised("llama"), None)  # type: ignore[arg-type]


def test_keeps_the_outputs() -> None:
    applied(SlotCache(), apply(raised("gpt2"), Bidirectional()))


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(FULL), st.integers(2, 10), st.data())
def test_property(name: str, total: int, data: st.DataObject) -> None:
    """Any slots, when nothing has changed since they were cached, say what they said; padding says nothing and is not seen."""
    engine, _ = engine_of(name)
    ids = token_ids(2, total, seed=data.draw(st.integers(0, 99))).numpy()
    cache = engine.new_cache(2, total)
    whole = engine.forward(cache, query(ids, np.arange(total).repeat(2).reshape(total, 2).T))
    slots = np.array(sorted(data.draw(st.sets(st.integers(0, total - 1), min_size=1))))
    padded = np.concatenate([slots, np.full(data.draw(st.integers(0, 3)), total)])
    reply = engine.forward(cache, query(ids, np.stack([padded, padded])))
    close(reply.total[:, : len(slots)], whole.total[:, slots])
    first = engine.forward(engine.new_cache(2, total), query(ids, np.arange(total).repeat(2).reshape(total, 2).T))
    close(whole.top, first.top)
