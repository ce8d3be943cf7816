"""A numpy engine whose logits depend on everything that a row may see, and on nothing else.

The logits of a row are a hash of the (slot order, position, token) of its visible slots: a wrong mask, position, kept row or stale slot
changes them. A part that depends on the last one or two tokens only makes the text predictable enough for drafters. Logits lie on a coarse
grid, so ties occur. Outputs of a pass are overwritten by the next one, as the contract allows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planc.runtime.engine import Cache, EngineSpec, Floats, Ints, Outputs, Step

_M = np.uint64(0xBF58476D1CE4E5B9)
_N = np.uint64(0x94D049BB133111EB)


def _mix(h: int, size: int) -> NDArray[np.float64]:
    """Uniform numbers [size] in [0, 1) from a hash (splitmix64)."""
    with np.errstate(over="ignore"):
        z = np.uint64(h & (2**64 - 1)) + np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * _M
        z = (z ^ (z >> np.uint64(27))) * _N
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) / 2**53


class ToyCache(Cache):
    def __init__(self, batch: int, capacity: int) -> None:
        self.lengths: Ints = np.zeros(batch, dtype=np.int64)
        self.capacity = capacity
        self.slots = [[(-1, -1)] * capacity for _ in range(batch)]  # (position, token)
        self.last_rows = 0

    def keep(self, sequence: int, rows: Ints) -> None:
        length = int(self.lengths[sequence])
        assert list(rows) == sorted(set(rows.tolist())), "rows must ascend"
        assert all(0 <= row < self.last_rows for row in rows), "row was not in the last step"
        kept = [self.slots[sequence][length + int(row)] for row in rows]
        self.slots[sequence][length : length + len(kept)] = kept
        for scratch in range(length + len(kept), self.capacity):
            self.slots[sequence][scratch] = (-7, -7)
        self.lengths[sequence] = length + len(kept)

    def rollback(self, sequence: int, length: int) -> None:
        assert 0 <= length <= self.lengths[sequence]
        self.lengths[sequence] = length
        for scratch in range(length, self.capacity):
            self.slots[sequence][scratch] = (-7, -7)

    def bytes(self) -> int:
        return 16 * self.capacity * len(self.slots)

    def check(self, sequence: int, tokens: list[int]) -> None:
        """The committed slots are exactly the text without its pending token, at its positions."""
        length = int(self.lengths[sequence])
        assert self.slots[sequence][:length] == list(enumerate(tokens[:length]))


class ToyEngine:
    """`predictable` in 0..1 is the weight of the part that depends on the last tokens only."""

    def __init__(
        self,
        vocab: int = 23,
        *,
        seed: int = 0,
        predictable: float = 0.5,
        top_k: int = 4,
        trees: bool = True,
        max_length: int = 4096,
        least: int = 1,
        ragged: bool = False,
    ) -> None:
        self.spec = EngineSpec(vocab, max_length, top_k=top_k, trees=trees, ragged=ragged)
        self.seed, self.predictable, self.least = seed, predictable, least
        self.passes: list[tuple[list[int], int, bool]] = []  # lengths, rows, whether the step was a tree
        self.taken: list[list[int]] = []  # sequences of every pass
        self._handed_out: list[np.ndarray] = []

    def new_cache(self, batch: int, capacity: int) -> ToyCache:
        return ToyCache(batch, capacity)

    def logits(self, visible: list[tuple[int, int]]) -> NDArray[np.float32]:
        """Logits [V] after a list of (position, token) in slot order."""
        h = self.seed
        for position, token in visible:
            h = (h * 6364136223846793005 + position * 1442695040888963407 + token * 97 + 1) % 2**64
        one = visible[-1][1]
        two = one * 1000 + (visible[-2][1] if len(visible) > 1 else 999)
        size, w = self.spec.vocab_size, self.predictable
        mixed = w * (_mix(one * 7919 + self.seed, size) + 0.6 * _mix(two * 104729 + self.seed, size)) + (1 - w) * _mix(h, size)
        return (np.round(mixed * 32) / 4).astype(np.float32)

    def forward(self, cache: ToyCache, step: Step, *, logits: bool = False, top_k: bool = False) -> Outputs:
        for array in self._handed_out:
            array.fill(-1)
        batch, rows = step.tokens.shape
        which = list(range(len(cache.lengths))) if step.sequences is None else step.sequences.tolist()
        assert which == sorted(set(which))
        assert batch == len(which) <= len(cache.lengths)
        assert step.counts is None or (step.counts.min() >= 1 and step.counts.max() <= rows)
        assert step.least >= self.least
        assert rows >= self.least
        assert 0 <= step.logits_from < rows
        assert step.parents is None or self.spec.trees
        assert step.tokens.min() >= 0
        assert step.tokens.max() < self.spec.vocab_size
        self.passes.append((cache.lengths.tolist(), rows, step.parents is not None))
        self.taken.append(which)
        assert step.firsts is None or self.spec.ragged
        cache.last_rows = rows
        out: Floats = np.full((batch, rows - step.logits_from, self.spec.vocab_size), -1, dtype=np.float32)
        for place, b in enumerate(which):
            length, first = int(cache.lengths[b]), step.logits_from if step.firsts is None else int(step.firsts[place])
            run = max(int(step.counts[place]), step.least) if self.spec.ragged and step.counts is not None else rows
            assert length + run <= min(cache.capacity, self.spec.max_length)
            depth, paths = [0] * run, [[0]] * run
            for r in range(run):
                parent = r - 1 if step.parents is None else int(step.parents[place, r])
                assert -1 <= parent < r
                depth[r] = 0 if parent < 0 else depth[parent] + 1
                paths[r] = [r] if parent < 0 else [*paths[parent], r]
                cache.slots[b][length + r] = (length + depth[r], int(step.tokens[place, r]))
            for r in range(first, run):
                visible = cache.slots[b][:length] + [cache.slots[b][length + a] for a in paths[r]]
                out[place, r - first] = self.logits(visible)
        top_ids = np.argsort(-out, axis=-1, kind="stable")[..., : self.spec.top_k].astype(np.int64) if top_k else None
        outputs = Outputs(
            argmax=out.argmax(-1),
            logits=out if logits else None,
            top_ids=top_ids,
            top_logits=None if top_ids is None else np.take_along_axis(out, top_ids, -1),
        )
        handed = (outputs.argmax, outputs.logits, outputs.top_ids, outputs.top_logits)
        self._handed_out = [array for array in handed if array is not None]
        return outputs
