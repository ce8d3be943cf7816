"""Prompts shortened by a draft's attention (papers/87)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planc.runtime.context import DraftAttention
from planc.runtime.decode import Decode
from planc.runtime.kv.evictions.base import window_attention


def test_scores_by_hand() -> None:
    random = np.random.default_rng(0)
    context = DraftAttention(capacity=4, window=5, kernel=3)
    layers = [(random.standard_normal((5, 4, 8)), random.standard_normal((2, 20, 8)), 0.3) for _ in range(2)]
    best = np.zeros(20)
    for queries, keys, scale in layers:
        attention = window_attention(queries, keys, scale, 0.0)
        for head in range(2):
            for row in range(5):
                for query in range(2):
                    best = np.maximum(best, attention[head, row * 2 + query] * row / 4)
    smooth = [max(best[max(0, i - 1) : i + 2]) for i in range(20)]
    assert np.allclose(context.scores(layers, 20), smooth, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(1, 80), st.integers(1, 40), st.integers(0, 12), st.integers(0, 99))
def test_kept_tokens(length: int, capacity: int, window: int, neighbours: int, seed: int) -> None:
    scores = np.random.default_rng(seed).random(length).astype(np.float32)
    kept = DraftAttention(capacity=capacity, window=window, neighbours=neighbours).kept(scores)
    assert len(kept) == min(length, capacity) and np.all(np.diff(kept) > 0) and kept[0] >= 0 and kept[-1] < length
    if length > capacity:
        last = np.arange(max(0, length - window), length)[:capacity]
        assert np.isin(last, kept).all()
        if capacity > min(window, length):
            assert int(scores.argmax()) in kept


def test_neighbours_come_nearest_first() -> None:
    scores = np.zeros(50, np.float32)
    scores[10] = 1.0
    kept = DraftAttention(capacity=7, window=2, neighbours=8).kept(scores)
    assert kept.tolist() == [8, 9, 10, 11, 12, 48, 49]


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ({}, "the plan has none"),
        ({"speculative": {"drafter": "prompt_lookup"}}, "the plan has none"),
        ({"speculative": {"drafter": {"draft_model": {"artifact": "there"}}}, "batching": {}}, "one by one"),
        ({"speculative": {"drafter": {"draft_model": {"passes": ["argmax"], "fuzzy": ["argmax"]}}}}, "would share"),
    ],
)
def test_refuses(rest: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Decode.model_validate({"context": {}, **rest})
