"""The search for the sublayers to leave out (papers/43, part E), by the speed that decoding would have with them.

The paper draws sets of one size at random, with a Bayesian step now and then, and keeps the one that most often guesses the model's own
next token. Here the size is free and the measure is speed: match rate and price of a pass together (papers/A0 section 12). First every
sublayer is left out alone, then the least harmful ones together, then the best set so far is varied; a share of random sets remains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from planc.runtime.drafters.serving_search import Gates

_RANDOM = 0.15  # share of the sets that are drawn at random once the sublayers are ranked
_DEEPEST = 12  # longest chain whose speed is considered


@dataclass(frozen=True)
class Found:
    """A set, the share of tokens that it guesses right, and its speed against plain decoding."""

    gates: Gates
    match: float
    speed: float


class SkipSearch:
    """Tries sets of sublayers and remembers the best.

    Args:
        free: [units] which gates may be closed.
        match: the share of known tokens that the target guesses with these gates.
        speed: decoding speed with a match rate and gates, 1 for plain decoding.
        most: largest share of all gates that is closed.
    """

    def __init__(
        self, free: Gates, match: Callable[[Gates], float], speed: Callable[[float, Gates], float], most: float, seed: int = 0
    ) -> None:
        self._free, self._match, self._speed = np.flatnonzero(free), match, speed
        self._most = max(1, min(len(self._free), int(most * len(free))))
        self._rng = np.random.default_rng(seed)
        open_ = np.ones(len(free), dtype=np.bool_)
        self.best = Found(open_, 1.0, speed(1.0, open_))
        self.tried = 0

    def run(self, steps: int) -> Found:
        """The best set after `steps` trials."""
        alone = {int(unit): self._try([int(unit)]).match for unit in self._free[:steps]}
        ranked = sorted(alone, key=lambda unit: -alone[unit])  # least harmful first; stable, so deterministic
        for size in range(2, min(self._most, len(ranked)) + 1):
            if self.tried < steps:
                self._try(ranked[:size])
        while self.tried < steps:
            self._try(self._random() if self._rng.random() < _RANDOM else self._varied())
        return self.best

    def _try(self, closed: list[int]) -> Found:
        gates = np.ones(len(self.best.gates), dtype=np.bool_)
        gates[closed] = False
        match = self._match(gates)
        found = Found(gates, match, self._speed(match, gates))
        self.tried += 1
        if found.speed > self.best.speed:
            self.best = found
        return found

    def _random(self) -> list[int]:
        return list(map(int, self._rng.choice(self._free, int(self._rng.integers(1, self._most + 1)), replace=False)))

    def _varied(self) -> list[int]:
        """The best set with one to three sublayers flipped, which may exchange one for another."""
        closed = set(map(int, np.flatnonzero(~self.best.gates)))
        closed ^= set(map(int, self._rng.choice(self._free, min(len(self._free), int(self._rng.integers(1, 4))), replace=False)))
        return sorted(closed)[: self._most] or self._random()


def chain_speed(match: float, draft_ms: float, pass_ms: Callable[[int], float]) -> float:
    """Speed of chains of the best length against plain decoding, if every guess is right with probability `match` (papers/A0 section 12).

    `pass_ms(rows)` is the target's cost. A length of 0, plain decoding, is not among them, so that losses compare as well.
    """
    expected, speeds = 1.0, []
    for depth in range(1, _DEEPEST + 1):
        expected += match**depth
        speeds.append(expected * pass_ms(1) / (depth * draft_ms + pass_ms(1 + depth)))
    return max(speeds)
