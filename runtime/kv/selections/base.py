"""What a selection is: which stored rows the next passes read (papers/A4 sections 1 and 6). It looks at queries and changes nothing.

Letters: N blocks, G key/value heads, H query heads, U units of a block, D head width.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from planc.runtime.engine import Floats
from planc.runtime.kv.stores.base import BLOCK, Payload
from planc.runtime.registry import PlanPart


class Selection(PlanPart):
    """Reads at most `budget` stored tokens, chosen anew every `interval` tokens by the query of the last one."""

    kind: ClassVar[str] = "kv_select"
    unit: ClassVar[int] = BLOCK  # rows that are read together
    budget: int = Field(ge=BLOCK, description="stored tokens that a pass reads, besides the dense window")
    interval: int = Field(4, ge=1, description="committed tokens between two choices")

    def stats(self, keys: Floats) -> Payload:
        """What is remembered of turned keys [N,G,64,D], taken before they are stored; arrays [N,G,...]."""
        raise NotImplementedError

    def resident(self, keys: Floats) -> np.ndarray:
        """Units [G,m] of a prompt's keys [N,G,64,D] that every pass reads, as they are."""
        return np.empty((keys.shape[1], 0), np.int64)

    def scores(self, stats: Payload, queries: Floats, scale: float) -> Floats:
        """[G, N*U] what units promise to the queries [H,D] of one token."""
        raise NotImplementedError

    def choose(self, stats: Payload, queries: Floats, scale: float, resident: np.ndarray) -> np.ndarray:
        """The units [G,n] that are read, ascending; never one that is resident."""
        scores = self.scores(stats, queries, scale)
        if resident.shape[1]:
            np.put_along_axis(scores, resident, -np.inf, 1)
        count = min(self.budget // self.unit, scores.shape[1] - resident.shape[1])
        best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
        return np.sort(best, axis=1)


def by_head(scores: Floats, heads: int) -> Floats:
    """The most that any query head [H,X] of a key/value head [G,X] promises."""
    best: Floats = scores.reshape(heads, -1, scores.shape[1]).max(1)
    return best
