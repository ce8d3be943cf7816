"""From logits to a token: one function for plain decoding, every row of a tree and the bonus row, so that all mean the same distribution.

Sampling is coupled (papers/A0 section 6): the noise belongs to (seed, sequence, absolute position), not to the pass, so the sampled text
does not depend on how many tokens were verified at once and can be compared token by token. Other uses of chance have streams of their own
(`Purpose`), independent of these and of each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from planc.runtime.decode import Sampling

_HEAD = 1024  # candidates that top-p sorts before it falls back to sorting the vocabulary


class Purpose(IntEnum):
    """What a stream of random numbers is for."""

    SAMPLE = 0  # the target's own choice at a place
    DRAW = 1  # guesses of a draft
    TEST = 2  # the tests that accept or reject them


def process(logits: NDArray[np.floating], sampling: Sampling, seen: Iterable[int] = ()) -> NDArray[np.float64]:
    """Scores [V] whose softmax is the distribution to sample from; tokens that are excluded have -inf.

    `logits` [V] are one row's raw logits, `seen` the ids on that row's own path (prompt included). Order: repetition penalty, temperature,
    top-k, top-p, min-p. On equal scores the lower id counts as the likelier. Temperature 0 leaves the scores unwarped: take their argmax.
    """
    scores = np.asarray(logits, dtype=np.float64).copy()  # [V]
    if sampling.repetition_penalty != 1.0:
        ids = np.fromiter(set(seen), dtype=np.int64)
        values = scores[ids]
        scores[ids] = np.where(values < 0, values * sampling.repetition_penalty, values / sampling.repetition_penalty)
    if sampling.temperature == 0.0:
        return scores
    scores /= sampling.temperature
    if 0 < sampling.top_k < scores.size:
        _keep_only(scores, best(scores, sampling.top_k))
    if sampling.top_p < 1.0:
        _keep_only(scores, _nucleus(scores, sampling.top_p))
    if sampling.min_p > 0.0:
        scores[scores < scores.max() + np.log(sampling.min_p)] = -np.inf
    return scores


def noise(seed: int, sequence: int, position: int, size: int) -> NDArray[np.float64]:
    """Standard Gumbel noise [size] of one place in one text; a function of its arguments only (Philox is counter-based)."""
    return -np.log(_exponential(seed, sequence, position, size))


def uniforms(seed: int, sequence: int, position: int, size: int, purpose: Purpose, node: int = 0) -> NDArray[np.float64]:
    """Uniform numbers [size] in [0, 1) of one place, purpose and node; different arguments give independent streams."""
    key, counter = np.array([seed, sequence], dtype=np.uint64), np.array([0, node, purpose, position], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).random(size)


def probabilities(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Softmax [V] of processed scores."""
    weights = np.exp(scores - scores.max())
    return np.asarray(weights / weights.sum())


class Sampler:
    """Chooses tokens for one plan. Holds no state: the same arguments give the same token."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling

    @property
    def needs_logits(self) -> bool:
        """False when the argmax that the engine returns is all that is needed."""
        return self.sampling.temperature > 0.0 or self.tracks_text

    @property
    def tracks_text(self) -> bool:
        """True when a choice depends on the tokens before it."""
        return self.sampling.repetition_penalty != 1.0

    def choose(self, logits: NDArray[np.floating], sequence: int, position: int, seen: Iterable[int] = ()) -> int:
        """The token at absolute `position` of text `sequence`, given the logits [V] of the row before it."""
        scores = process(logits, self.sampling, seen)
        if self.sampling.temperature == 0.0:
            return int(np.argmax(scores))
        return self.sample(np.exp(scores - scores.max()), sequence, position)

    def sample(self, weights: NDArray[np.float64], sequence: int, position: int) -> int:
        """A token drawn in proportion to `weights` [V] with the noise of the place."""
        return int(np.argmin(arrivals(weights, _exponential(self.sampling.seed, sequence, position, weights.size))))


@dataclass(frozen=True, slots=True)
class Drawing:
    """How guesses shall be drawn from a draft's distributions in one round of one text.

    `tested`: the guesses will be tested against the distribution that they were drawn from, so they need noise of their own, fresh in every
    round: a round's place (the committed length, which grows) and the parent's row key it. Keyed by position alone, noise that already
    decided which guesses an earlier round had would come back, and the text would lean towards it. Not `tested`: guesses are matched with
    the target's own choices, so the draft uses the noise with which the target will choose (papers/A0 section 6).
    """

    sampling: Sampling
    text: int = 0  # keys the noise, as in `Sampler.choose`
    place: int = 0  # absolute position of the token after the root
    tested: bool = False

    @property
    def greedy(self) -> bool:
        """No noise at all: the likeliest guess is the first."""
        return self.sampling.temperature == 0.0

    def race(self, q: NDArray[np.floating], row: int, depth: int, draw: int = 0) -> NDArray[np.float64]:
        """Arrival times [V]: tokens by rising time are drawn from q without replacement; -log(time) is log q + Gumbel noise.

        `row` and `depth` are the parent's, `draw` counts races at the same node. Tokens with q = 0 never arrive (inf). Greedily the times
        are 1 / q.
        """
        seed, size = self.sampling.seed, q.size
        if self.greedy:
            return arrivals(q, 1.0)
        if self.tested:
            return arrivals(q, _as_exponential(uniforms(seed, self.text, self.place, size, Purpose.DRAW, row + (draw << 32))))
        return arrivals(q, _exponential(seed, self.text, self.place + depth, size))


def arrivals(weights: NDArray[np.floating], time: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Who arrives first is a sample: argmax(log p + G) with G = -log(E) is argmin(E / p), one logarithm less per token."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.asarray(time / weights)  # [V], inf where excluded


def _exponential(seed: int, sequence: int, position: int, size: int) -> NDArray[np.float64]:
    return _as_exponential(uniforms(seed, sequence, position, size, Purpose.SAMPLE))


def _as_exponential(u: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(-np.log1p(-(u + 2.0**-54)))  # shifted into (0, 1): finite Gumbels, no 0 / 0


def best(scores: NDArray[np.floating[Any]], count: int) -> NDArray[np.int64]:
    """Ids of the `count` highest scores, falling; the lower id first on a tie, also at the cut."""
    if count < scores.size:
        floor = np.partition(scores, scores.size - count)[scores.size - count]
        ids = np.flatnonzero(scores >= floor)  # ascending ids, so a stable sort settles ties
    else:
        ids = np.arange(scores.size)
    return np.asarray(ids[np.argsort(-scores[ids], kind="stable")][:count], dtype=np.int64)


def _nucleus(scores: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Ids of the fewest likeliest tokens that together have at least `top_p`; never none."""
    weights = np.exp(scores - scores.max())
    total = weights.sum()
    for count in (min(_HEAD, scores.size), scores.size):
        ids = best(scores, count)
        mass = np.cumsum(weights[ids])
        inside = int(np.searchsorted(mass, top_p * total)) + 1
        if inside <= count:
            return ids[:inside]
    return ids


def _keep_only(scores: NDArray[np.float64], ids: NDArray[np.int64]) -> None:
    kept = scores[ids]
    scores.fill(-np.inf)
    scores[ids] = kept
