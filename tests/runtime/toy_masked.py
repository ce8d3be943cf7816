"""A masked model that is a formula: what a slot may become depends on its place and on all tokens, as they were when they last went through it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planc.runtime.decode import Decode
from planc.runtime.loops.masked import Filling
from planc.runtime.masked import Canvas
from planc.runtime.masked.engine import MaskedSpec, Query, Reply, SlotCache, reply_of

VOCAB, END = 12, 0
MASK = VOCAB - 1
PROMPT = [3, 1, 4]


class ToyEngine:
    """Layers are one; a cached token stays what it was when it was last queried. `loves_masks`: without the guard, MASK would always win."""

    def __init__(self, seed: int = 0, sharp: float = 2.0, loves_masks: bool = False, tracked: int = 4) -> None:
        self.spec = MaskedSpec(VOCAB, 64, MASK, 1, tracked=tracked, slot_bytes=8)
        rng = np.random.default_rng(seed)
        self.own = rng.normal(size=(64, VOCAB)).astype(np.float32) * sharp
        self.near = rng.normal(size=(VOCAB, VOCAB)).astype(np.float32) * sharp
        self.loves_masks = loves_masks
        self.queries: list[Query] = []

    def new_cache(self, rows: int, slots: int) -> SlotCache:
        return SlotCache({"past.0.key": np.full((rows, slots + 1), -1.0)}, slots)

    def forward(self, cache: SlotCache, query: Query, *, logits: bool = False) -> Reply:
        self.queries.append(query)
        slots = query.segments.shape[1]
        if query.cached:
            seen = cache.state["past.0.key"]
            seen[query.rows[:, None], query.slots] = query.tokens
            tokens = seen[query.rows, :slots].astype(int)
        else:
            tokens = query.tokens
        found = np.stack([self._row(*row) for row in zip(tokens, query.segments, query.slots, strict=True)])
        found[..., MASK] = 50.0 if self.loves_masks else found[..., MASK]
        found[..., MASK] = -np.inf
        return reply_of(found, query.tracked)

    def _row(self, tokens: np.ndarray, segments: np.ndarray, slots: np.ndarray) -> np.ndarray:
        known = np.flatnonzero((segments < 2**30) & (tokens != MASK) & (tokens >= 0))
        places = np.minimum(slots, len(tokens) - 1)
        near = 1.0 / (1.0 + np.abs(places[:, None] - known[None]))
        return np.asarray(self.own[places] + near @ self.near[tokens[known]], dtype=np.float32)


def fill(
    engine: ToyEngine, masked: dict[str, object], *, rows: int = 1, field: int = 16, prompts: Sequence[list[int]] = (), **sampling: object
) -> list[Canvas]:
    """Canvases filled by a section `masked`."""
    decode = Decode.model_validate({"masked": masked, "sampling": sampling})
    assert decode.masked is not None
    given = prompts or [[*PROMPT, key % 5] for key in range(rows)]
    canvases = [Canvas(prompt, field, MASK, ends=(END,), seed=decode.sampling.seed, key=key) for key, prompt in enumerate(given)]
    for _ in Filling(engine, canvases, decode.masked, decode.sampling):  # type: ignore[arg-type]
        pass
    return canvases


def course(canvas: Canvas) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """What was written when."""
    return [(commit.step, commit.slots, commit.tokens) for commit in canvas.trace]
