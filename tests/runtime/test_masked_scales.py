"""Next-scale models: windows, caches and inputs by scale, and a second model that takes over (papers/74)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from toy_masked import MASK, ToyEngine, course

from planc.runtime.decode import Decode
from planc.runtime.errors import PlanError
from planc.runtime.loops.masked import Filling
from planc.runtime.masked import Canvas, NextScale, Scales
from planc.runtime.masked.scales import bounds, levels_of, pooled, spread

SIZES = (1, 2, 4)
BOOKS = np.sort(np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32), 1)


@pytest.fixture
def books(tmp_path: Path) -> Path:
    save_file({"codebooks": BOOKS}, tmp_path / "books.safetensors")
    return tmp_path


def masked(folder: Path, **more: object) -> Decode:
    """A decode section of maps of 1, 4 and 16 slots."""
    inputs = NextScale(sizes=SIZES, file="books.safetensors", levels=5).bind(folder)
    section = {
        "window": {"scales": {"sizes": SIZES}},
        "cache": {"scale_causal": {"sizes": SIZES}},
        "select": "all",
        "inputs": inputs,
        **more,
    }
    return Decode.model_validate({"masked": section, "sampling": {"temperature": 1.0}})


def run(decode: Decode, *engines: ToyEngine, key: int = 0) -> tuple[Canvas, Filling]:
    canvas = Canvas([2], 21, MASK, key=key)
    assert decode.masked is not None
    filling = Filling(engines[0], [canvas], decode.masked, decode.sampling, engines[1:])  # type: ignore[arg-type]
    for _ in filling:
        pass
    return canvas, filling


def test_a_pass_is_a_scale(books: Path) -> None:
    engine = ToyEngine(1)
    canvas, _ = run(masked(books), engine)
    assert canvas.cost.modes == {"prefill": 1, "scale": 2}
    assert [len(commit.slots) for commit in canvas.trace] == [1, 4, 16]
    assert [set(q.slots[0].tolist()) - {22} for q in engine.queries] == [{0, 1}, set(range(2, 6)), set(range(6, 22))]
    assert engine.queries[0].segments[0].tolist() == [0, 1, *[2] * 4, *[3] * 16]


def test_slots_read_the_picture_so_far(books: Path) -> None:
    """Computed again here from the codes: averages of what the smaller scales add up to."""
    engine = ToyEngine(1)
    canvas, _ = run(masked(books), engine)
    codes, made = np.minimum(canvas.tokens[1:], 3), np.zeros((4, 4), np.float32)
    edges = bounds(SIZES)
    for scale, size in enumerate(SIZES):
        wanted = 4 + levels_of(pooled(made, size), 5).reshape(-1)
        query = engine.queries[scale]
        read = query.tokens[0][np.isin(query.slots[0], np.arange(edges[scale], edges[scale + 1]) + 1)]
        assert read.tolist() == wanted.tolist()
        made = made + spread(BOOKS[scale][codes[edges[scale] : edges[scale + 1]]].reshape(size, size), 4)
    part = NextScale(sizes=SIZES, file="books.safetensors", levels=5).bind(books)
    np.testing.assert_allclose(part.picture(canvas), made)


def test_equal_models_are_one_wherever_they_switch(books: Path) -> None:
    want, _ = run(masked(books), ToyEngine(1))
    for at in range(4):
        decode = masked(books, models={"switch": {"at": at}}, second_model="other")
        made, filling = run(decode, ToyEngine(1), ToyEngine(1))
        assert course(made) == course(want)
        assert len(filling.caches) == 1, "the cache of the model that is done is released"
    other, _ = run(masked(books, models={"switch": {"at": 1}}, second_model="other"), ToyEngine(1), ToyEngine(2))
    assert (other.tokens[:2] == want.tokens[:2]).all() and (other.tokens != want.tokens).any()
    second, _ = run(masked(books, models={"switch": {"at": 0}}, second_model="other"), ToyEngine(1), ToyEngine(2))
    alone, _ = run(masked(books), ToyEngine(2))
    assert course(second) == course(alone)


def test_maps_that_are_not_the_field_are_refused(books: Path) -> None:
    decode = masked(books)
    assert decode.masked is not None
    with pytest.raises(PlanError, match="have 21 slots, the field 20"):
        Filling(ToyEngine(), [Canvas([2], 20, MASK)], decode.masked, decode.sampling)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="2 maps and 3 codebooks"):
        NextScale(sizes=(1, 2), file="books.safetensors").bind(books)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 99))
def test_property(small: int, more: int, seed: int) -> None:
    """Averages of what was spread are what was spread; every slot of the field belongs to one scale."""
    values = np.random.default_rng(seed).normal(size=(2, 2**small, 2**small)).astype(np.float32)
    np.testing.assert_allclose(pooled(spread(values, 2 ** (small + more)), 2**small), values, rtol=1e-5, atol=1e-6)
    sizes = tuple(2**i for i in range(small + 1))
    canvas = Canvas([1], int(bounds(sizes)[-1]), MASK)
    seen = []
    while canvas.masked.any():
        start, stop, mask = Scales(sizes=sizes).place(canvas)
        assert np.flatnonzero(mask).tolist() == list(range(start, stop))
        seen += list(range(start, stop))
        canvas.tokens[start:stop] = 1
    assert seen == list(range(1, len(canvas.tokens)))
