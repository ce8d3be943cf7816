"""The search for the sublayers to leave out, while text is served (papers/43, part E).

Sets of one size are drawn at random, and now and then where a Gaussian process over all sets tried so far is most hopeful; a set that guesses
more of the text just committed takes the place of the one in use. Unlike in the paper some sets differ from the best one by a single exchange,
and the best one is scored again on every new text: an easy text must not leave a score behind that no set can reach on the next.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from planc.runtime.engine import Floats

Gates = NDArray[np.bool_]  # [units] whether each sublayer runs

_POOL, _MEMORY = 256, 256  # sets among which a Bayesian step chooses; newest scores that it knows
_NOISE, _KAPPA = 1e-2, 2.5  # of the Gaussian process: variance of a score beside that of all scores; weight of what is uncertain


class Serving(BaseModel):
    """Options of the search while text is served."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratio: float = Field(0.45, gt=0.0, lt=1.0, description="share of the sublayers between the first and the last layer that is left out")
    window: int = Field(32, ge=2, description="newest tokens on which a set is scored")
    interval: int = Field(1, ge=1, description="rounds between two sets")
    stop: float = Field(0.95, ge=0.0, description="score at which the search ends")
    patience: int = Field(300, ge=1, description="sets without a better one after which it ends")
    most: int = Field(1000, ge=1, description="sets after which it ends")
    bayes: int = Field(25, ge=0, description="every so many sets one is proposed by a Gaussian process; 0: never")
    swaps: float = Field(0.5, ge=0.0, le=1.0, description="share of the other sets that exchange one sublayer of the best set")
    objective: Literal["match", "speed"] = Field("match", description="score: share of tokens guessed, or decoding speed against plain")
    seed: int = Field(0, description="of the random choices")


class ServingSearch:
    """Proposes sets and keeps the best.

    Args:
        options: see `Serving`.
        free: [units] which gates may be closed.
        start: [units] the set that is used until a better one is found; as many gates are closed in all others.
    """

    def __init__(self, options: Serving, free: Gates, start: Gates) -> None:
        self.options, self.best = options, start
        self.score: float | None = None  # of the best set, on the text that it was last scored on
        self.tried, self._failed = 0, 0
        self._free, self._size = np.flatnonzero(free), int((~start).sum())
        self._rng = np.random.default_rng(options.seed)
        self._sets, self._scores = list[Gates](), list[float]()

    @property
    def done(self) -> bool:
        """Whether the search has ended."""
        options = self.options
        good = self.score is not None and self.score > options.stop
        return good or self._failed > options.patience or self.tried >= options.most

    def renew(self) -> None:
        """Another text begins: what the best set scored says little about it."""
        self.score = None

    def next(self) -> Gates:
        """The set to score next: the best one where its score is not known."""
        if self.score is None:
            return self.best
        if self.options.bayes and (self.tried + 1) % self.options.bayes == 0:
            pool = np.array([self._swapped() if i % 2 else self._random() for i in range(_POOL)])
            return np.asarray(pool[int(self._hope(pool).argmax())])
        return self._swapped() if self._rng.random() < self.options.swaps else self._random()

    def learn(self, gates: Gates, score: float) -> bool:
        """A set was scored; True when it is the new best one."""
        if self.score is None:
            self.score = score
            return False
        self.tried += 1
        self._sets.append(gates)
        self._scores.append(score)
        better = score > self.score
        self._failed = 0 if better else self._failed + 1
        if better:
            self.best, self.score = gates, score
        return better

    def _random(self) -> Gates:
        gates = np.ones(len(self.best), dtype=np.bool_)
        gates[self._rng.choice(self._free, self._size, replace=False)] = False
        return gates

    def _swapped(self) -> Gates:
        """The best set with one of its sublayers back in place of another."""
        gates, open_ = self.best.copy(), self._free[self.best[self._free]]
        if len(open_) and self._size:
            gates[self._rng.choice(np.flatnonzero(~gates))] = True
            gates[self._rng.choice(open_)] = False
        return gates

    def _hope(self, pool: NDArray[np.bool_]) -> Floats:
        """Upper confidence bound [P] of the scores of sets [P, units], by a Gaussian process whose covariance falls with every gate that differs."""
        if not self._scores:
            return np.zeros(len(pool), dtype=np.float32)
        known, scores = np.array(self._sets[-_MEMORY:]), np.array(self._scores[-_MEMORY:])
        scale = max(1, self._size)

        def kernel(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> NDArray[np.float64]:
            return np.asarray(np.exp(-(a[:, None] != b[None]).sum(-1) / scale))

        across = kernel(pool, known)
        weights = np.linalg.solve(kernel(known, known) + _NOISE * np.eye(len(known)), across.T)  # [known, P]
        mean = scores.mean() + (scores - scores.mean()) @ weights
        spread = np.sqrt(np.maximum(0.0, 1.0 - (across.T * weights).sum(0)))
        return np.asarray(mean + _KAPPA * scores.std() * spread, dtype=np.float32)
