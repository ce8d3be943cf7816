"""What all builders share: nodes with a distribution, and drawing their children.

A builder decides where to draw next from what it has drawn, never from the token that it is about to draw. That makes every tree legal for
the tests of `acceptance: recursive` (papers/A0 section 5, inclusion rule), and so is any part of it in the order of drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from planc.runtime.builders.source import Source
from planc.runtime.engine import Floats
from planc.runtime.registry import PlanPart, item_of
from planc.runtime.sampling import arrivals, best, probabilities, process
from planc.runtime.trees import Cell, Draft, Kind, Proposal

if TYPE_CHECKING:
    from planc.runtime.drafters.base import Context

_RANKS = 7  # children from this rank on share an acceptance rate
_BITS = 8  # so do tokens that the draft thinks less likely than 2^-8
_FEW = 8  # children that are put in order at first


class BuilderPart(PlanPart):
    """A builder as the plan names it. It has no state: the same arguments build the same tree."""

    kind: ClassVar[str] = "builder"
    draws: ClassVar[Literal["chain", "tree"]] = "tree"

    def grow(self, source: Source, context: Context, draft: Draft, key: str) -> None:
        """Add at most `context.budget` guesses of the drafter `key` below the root of `draft`."""
        raise NotImplementedError(type(self).__name__)


if TYPE_CHECKING:
    BuilderItem = BuilderPart
else:
    BuilderItem = item_of("builder")


class Node:
    """A row of the draft with the distribution of what follows it."""

    __slots__ = ("_order", "drawn", "q", "row", "times")

    def __init__(self, row: int, q: Floats, times: NDArray[np.float64]) -> None:
        self.row, self.q, self.times = row, q, times  # q [V] float32; times [V], as `Drawing.race` gives them
        self.drawn = 0
        self._order: list[int] = []

    def order(self, count: int) -> list[int]:
        """The first `count` tokens in draw order without replacement; fewer where no more are possible."""
        if len(self._order) < count:
            self._order = [x for x in best(-self.times, max(_FEW, 2 * count)).tolist() if np.isfinite(self.times[x])]
        return self._order[:count]


class Growth:
    """One tree in the making: at most `limit` guesses more, and never more than the context allows.

    `temperature` replaces that of the sampling for the draft's distributions. `by_rank`: acceptance rates are learned for the place among
    the siblings alone, and start at these values; otherwise also for how likely the draft thinks the token, and start there.
    """

    def __init__(
        self,
        source: Source,
        context: Context,
        draft: Draft,
        key: str,
        *,
        limit: int | None = None,
        temperature: float | None = None,
        by_rank: Sequence[float] = (),
        kind: Kind = "without_replacement",
    ) -> None:
        assert not draft.proposals, "one drafter draws, or none"
        self.draft = draft
        self.tested = context.drawing is not None and context.drawing.tested
        self.greedy = context.drawing is None or context.drawing.greedy
        self._source, self._context, self._key, self._temperature = source, context, key, temperature
        self._most = len(draft) + (context.budget if limit is None else min(limit, context.budget))
        self._by_rank, self._kind = by_rank, kind

    @property
    def full(self) -> bool:
        """No guess may be added."""
        return len(self.draft) >= self._most

    @property
    def room(self) -> int:
        """Guesses that may be added."""
        return max(0, self._most - len(self.draft))

    def rank_rates(self, count: int) -> list[float]:
        """Learned acceptance rates of the first `count` ranks, where they are learned by rank."""
        return [self.draft.rates.get((self._cell(rank, 1.0),), self._prior(rank, 1.0)) for rank in range(count)]

    def root(self) -> Node:
        """The node of row 0; starts the round."""
        return self._node(0, self._source.begin(self._context.tokens))

    def expand(self, rows: Sequence[int]) -> list[Node]:
        """The nodes of these rows, from one pass of the draft model."""
        logits = self._source.expand(self.draft, rows) if rows else ()  # [n, V]
        return [self._node(row, of_row) for row, of_row in zip(rows, logits, strict=True)]

    def may_follow(self, row: int) -> bool:
        """Whether guesses below this row are of use."""
        return self.draft.depths[row] < self._context.depth and self.draft.tokens[row] not in self._context.eos

    def draw(self, node: Node) -> int | None:
        """The row of the next child of `node`; None when nothing is left to draw, or no guess may be added.

        Where the round verifies chains, a node has one child: what any builder makes is the first path of its tree.
        """
        token = None if self.full or (node.drawn and not self._context.siblings) else self._token(node)
        if token is None:
            return None
        q = float(node.q[token])
        cell, prior = self._cell(node.drawn, q), self._prior(node.drawn, q)
        node.drawn += 1
        if not self.tested:
            return self.draft.add(node.row, token, cell, prior)
        if node.row not in self.draft.proposals:
            self.draft.proposals[node.row] = Proposal(node.q, self._kind)
        return self.draft.draw(node.row, token, cell, prior)

    def _cell(self, rank: int, q: float) -> Cell:
        rank = min(rank, _RANKS)
        return (self._key, "rank", rank) if self._by_rank else (self._key, rank, min(_BITS, int(-log2(q))))

    def _prior(self, rank: int, q: float) -> float:
        return self._by_rank[min(rank, len(self._by_rank) - 1)] if self._by_rank else q

    def _token(self, node: Node) -> int | None:
        if self.tested and self._kind == "with_replacement" and node.drawn:
            assert self._context.drawing is not None
            return int(np.argmin(self._context.drawing.race(node.q, node.row, self.draft.depths[node.row], node.drawn)))
        order = node.order(node.drawn + 1)
        return order[node.drawn] if node.drawn < len(order) else None

    def _node(self, row: int, logits: Floats) -> Node:
        """Warp like the target, which gives the highest acceptance; any other warping would be as exact."""
        drawing, temperature = self._context.drawing, self._temperature
        if drawing is None:
            scores = np.asarray(logits, dtype=np.float64)
        else:
            sampling = drawing.sampling
            if temperature is not None and not self.greedy:
                sampling = sampling.model_copy(update={"temperature": temperature})
            penalised = sampling.repetition_penalty != 1.0
            scores = process(logits, sampling, {*self._context.tokens, *self.draft.path(row)} if penalised else ())
        if temperature is not None and self.greedy:
            scores = scores / temperature
        q = probabilities(scores).astype(np.float32)
        times = arrivals(q, 1.0) if drawing is None else drawing.race(q, row, self.draft.depths[row])
        return Node(row, q, times)
