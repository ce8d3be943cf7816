"""Batches through fused attention: every row of a packed pass equals, bit for bit, the row of its sequence alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import FAMILIES, MAX_LENGTH, VOCAB, apply, decoding, onnx_engine, raised, token_ids

from planc.backends.onnx.engine import OnnxEngine
from planc.backends.onnx.lanes import LANES_FILE, write_lanes
from planc.backends.onnx.lower import lower
from planc.passes.fuse_projections import FuseProjections
from planc.passes.quantize_weights import QuantizeWeights
from planc.passes.tap import Tap
from planc.runtime.engine import Outputs, Step

LEAST = 2


class Alone:
    """The same sequences, each in a cache of its own."""

    def __init__(self, engine: OnnxEngine, batch: int, capacity: int) -> None:
        self.engine, self.caches = engine, [engine.new_cache(1, capacity) for _ in range(batch)]

    def forward(self, step: Step) -> list[Outputs]:
        assert step.sequences is not None
        assert step.counts is not None
        found = []
        for place, b in enumerate(step.sequences):
            rows = max(LEAST, int(step.counts[place]))
            parents = None if step.parents is None else step.parents[place : place + 1, :rows]
            one = Step(step.tokens[place : place + 1, :rows], parents, min(step.logits_from, rows - LEAST))
            found.append(self.engine.forward(self.caches[b], one, logits=True, top_k=True))
        return found


def random_step(rng: np.random.Generator, batch: int, trees: bool) -> Step:
    """A ragged step of some of the sequences."""
    which = np.sort(rng.choice(batch, int(rng.integers(2, batch + 1)), replace=False))
    counts = rng.integers(1, 7, len(which))
    rows = max(LEAST, int(counts.max()))
    parents = np.tile(np.arange(-1, rows - 1), (len(which), 1))
    if trees:
        for line, count in zip(parents, counts, strict=True):
            line[1:count] = [int(rng.integers(0, r)) for r in range(1, count)]
    tokens = rng.integers(0, VOCAB, (len(which), rows))
    firsts = np.array([rng.integers(0, max(1, count - LEAST + 1)) for count in counts]) if rng.random() < 0.5 else None
    return Step(tokens, parents if trees else None, sequences=which, counts=counts, least=LEAST, firsts=firsts)


def compare(engine: OnnxEngine, seed: int, passes: int = 6, batch: int = 5, trees: bool = False) -> None:
    """Random ragged passes over random subsets, with rows kept and rolled back."""
    rng = np.random.default_rng(seed)
    cache, alone = engine.new_cache(batch, 64), Alone(engine, batch, 64)
    for _ in range(passes):
        step = random_step(rng, batch, trees)
        assert step.sequences is not None
        assert step.counts is not None
        out = engine.forward(cache, step, logits=True, top_k=True)
        for place, (b, one) in enumerate(zip(step.sequences, alone.forward(step), strict=True)):
            count = int(step.counts[place])
            first = 0 if step.firsts is None else int(step.firsts[place])
            for name in ("argmax", "logits", "top_ids"):
                assert np.array_equal(getattr(out, name)[place, : count - first], getattr(one, name)[0, first:count]), name
            for name, tap in one.taps.items():
                assert np.array_equal(out.taps[name][place, :count], tap[0, :count])
            kept = (
                np.sort(rng.choice(count, int(rng.integers(1, count + 1)), replace=False))
                if trees
                else np.arange(rng.integers(0, count + 1))
            )
            for held, sequence in ((cache, int(b)), (alone.caches[b], 0)):
                held.keep(sequence, kept)
            if rng.random() < 0.3:  # a sequence leaves, and its place is used again
                length = int(rng.integers(0, cache.lengths[b] + 1))
                cache.rollback(int(b), length)
                alone.caches[b].rollback(0, length)


@pytest.mark.parametrize("trees", ["none", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, trees: str, tmp_path: Path) -> None:
    engine = onnx_engine(decoding(raised(family), trees), tmp_path, lanes=3)  # type: ignore[arg-type]
    if engine.lane_count:
        compare(engine, 1, trees=trees == "fused")
    else:
        assert not (tmp_path / LANES_FILE).exists()


def test_quantised_with_taps(tmp_path: Path) -> None:
    program = decoding(apply(raised("llama"), QuantizeWeights(format="int8"), Tap(layers=(0, 1))))
    compare(onnx_engine(program, tmp_path, lanes=4), 2)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> OnnxEngine:
    return onnx_engine(decoding(raised("llama")), tmp_path_factory.mktemp("lanes"), lanes=4)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), batch=st.integers(2, 9))
def test_property(engine: OnnxEngine, seed: int, batch: int) -> None:
    compare(engine, seed, passes=3, batch=batch)


def test_prompts_of_different_length_give_the_outputs_of_their_last_rows(engine: OnnxEngine) -> None:
    cache, tokens = engine.new_cache(2, 32), np.arange(20).reshape(2, 10)
    step = Step(tokens, logits_from=8, counts=np.array([10, 9]), least=LEAST)
    out = engine.forward(cache, step, logits=True)
    assert out.logits is not None and out.logits.shape == (2, 2, VOCAB)
    for b, count in ((0, 10), (1, 9)):
        one = engine.forward(engine.new_cache(1, 32), Step(tokens[b : b + 1, :count], logits_from=count - 2), logits=True)
        assert one.logits is not None
        assert np.array_equal(out.logits[b, count - 9], one.logits[0, -1])


def test_attention_that_is_not_fused_has_no_lanes(tmp_path: Path) -> None:
    lower(decoding(raised("llama"), "split"), tmp_path, positions=64)
    assert write_lanes(tmp_path, 4) == 0


def test_more_rows_than_positions_go_in_several_passes(tmp_path: Path) -> None:
    engine = onnx_engine(decoding(raised("llama")), tmp_path, lanes=3)
    cache, tokens = engine.new_cache(3, MAX_LENGTH), token_ids(3, MAX_LENGTH // 2).numpy()
    out = engine.forward(cache, Step(tokens, logits_from=tokens.shape[1] - 2), logits=True)
    assert out.logits is not None and out.logits.shape == (3, 2, VOCAB)
    for b in range(3):
        one = engine.forward(engine.new_cache(1, MAX_LENGTH), Step(tokens[b : b + 1], logits_from=tokens.shape[1] - 2), logits=True)
        assert one.logits is not None
        assert np.array_equal(out.logits[b], one.logits[0])


def test_groups_of_lanes_do_not_share_their_outputs(tmp_path: Path) -> None:
    """More sequences than lanes, one row each: what the first group returned is still there after the second has run."""
    program = decoding(apply(raised("llama"), FuseProjections(), QuantizeWeights(format="int8")))
    engine = onnx_engine(program, tmp_path, lanes=2)
    cache, ids = engine.new_cache(5, 40), token_ids(5, 9).numpy()
    engine.forward(cache, Step(ids[:, :8]))
    for b in range(5):
        cache.keep(b, np.arange(8))
    together = engine.forward(cache, Step(ids[:, 8:]), logits=True).logits
    assert together is not None
    for b in range(5):
        alone = engine.new_cache(1, 40)
        engine.forward(alone, Step(ids[b : b + 1, :8]))
        alone.keep(0, np.arange(8))
        assert np.array_equal(together[b], engine.forward(alone, Step(ids[b : b + 1, 8:]), logits=True).logits[0])  # type: ignore[index]
