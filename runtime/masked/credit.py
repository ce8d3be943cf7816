"""H4: CreditDecoding. A token that stays the likeliest of its slot over several passes gains credit, and with it probability."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from planc.runtime.engine import Floats, Ints
from planc.runtime.masked.canvas import Canvas, Slots
from planc.runtime.masked.engine import Reply
from planc.runtime.masked.hooks import FusionHook

Wide = NDArray[np.float64]


class Credit(FusionHook):
    """Decayed credit of the tokens that were the likeliest, added to the logits as alpha log(1 + credit) (papers/53).

    Kept for the `tracked_tokens` latest such tokens of a slot, which is exact while there are no more of them: then the softmax over the
    vocabulary follows from the plain one and those few logits.
    """

    alpha: float = Field(0.65, ge=0.0, description="weight of the credit; 0 is off")
    beta: float = Field(0.7, ge=0.0, lt=1.0, description="what is left of a credit after a pass")
    gamma: float = Field(0.2, ge=0.0, description="exponent of the probability that is credited")
    tracked_tokens: int = Field(4, ge=1, le=16, description="tokens of a slot that can hold credit")

    @property
    def tracked(self) -> int:
        return self.tracked_tokens

    def start(self, canvas: Canvas) -> CreditOf:
        return CreditOf(self, len(canvas.tokens))


class CreditOf:
    """The credits of one row."""

    def __init__(self, part: Credit, slots: int) -> None:
        self.part, self.tracked = part, part.tracked
        self.ids: Ints = np.full((slots, part.tracked), -1, dtype=np.int64)
        self.credits: Floats = np.zeros((slots, part.tracked), dtype=np.float32)
        self.overflows = self.changed = 0  # slots that lost a token for want of room; proposals that credit changed
        self._block = (-1, -1)

    def track(self, canvas: Canvas, slots: Slots) -> Ints:
        """[Q, K]; slots without credit name token 0, whose logit is then not used."""
        return np.maximum(self.ids[slots], 0)

    def fuse(self, canvas: Canvas, slots: Slots, reply: Reply) -> Reply:
        """Update first, by the plain probabilities, then add: also the first pass has credit."""
        assert reply.tracked is not None
        if (canvas.start, canvas.stop) != self._block:  # credit belongs to a block, and to the meaning of its slots
            self._block = (canvas.start, canvas.stop)
            self.ids[:], self.credits[:] = -1, 0.0
        inside = np.flatnonzero(canvas.masked[slots] & canvas.window[slots])
        logits = np.where(self.ids[slots] >= 0, reply.tracked, -np.inf).astype(np.float64)  # [Q, K]
        self.credits[slots[inside]] *= self.part.beta
        for i in inside:
            self._credit(int(slots[i]), int(reply.best[i]), float(np.exp(reply.top[i] - reply.total[i])), logits[i], float(reply.top[i]))
        return self._fused(slots, reply, logits, inside)

    def _credit(self, slot: int, token: int, probability: float, logits: Wide, top: float) -> None:
        ids, values = self.ids[slot], self.credits[slot]
        found = np.flatnonzero(ids == token)
        if len(found):
            k = int(found[0])
        else:
            k = int(np.argmin(np.where(ids < 0, -1.0, values)))
            self.overflows += bool(ids[k] >= 0)
            ids[k], values[k] = token, 0.0
        logits[k] = top
        values[k] += probability**self.part.gamma

    def _fused(self, slots: Slots, reply: Reply, logits: Wide, inside: Slots) -> Reply:
        boost = np.zeros_like(logits)
        boost[inside] = self.part.alpha * np.log1p(self.credits[slots[inside]])
        raised = logits + boost  # [Q, K]
        plain, grown = (np.exp(v - reply.total[:, None].astype(np.float64)) for v in (logits, raised))
        share = 1.0 + (grown - plain).sum(-1)  # of the new sum of exponentials in the old one
        known = np.where(np.isfinite(logits), logits, 0.0)
        moments = (grown * (known + boost) - plain * known).sum(-1)
        order = np.lexsort((self.ids[slots], -raised), axis=-1)  # by logit, then by id
        best_k = order[:, 0]
        rows = np.arange(len(slots))
        won = raised[rows, best_k] >= reply.top
        best = np.where(won, self.ids[slots][rows, best_k], reply.best)
        top = np.where(won, raised[rows, best_k], reply.top)
        others = raised.copy()
        others[rows[won], best_k[won]] = -np.inf
        second = np.maximum(others.max(-1), reply.second)
        self.changed += int((best != reply.best)[inside].sum())
        fused = None if reply.logits is None else self._added(slots, reply.logits, boost)
        total = reply.total + np.log(share)
        return Reply(best, _f(top), _f(second), _f(total), _f((reply.mean + moments) / share), reply.tracked, fused)

    def _added(self, slots: Slots, logits: Floats, boost: Wide) -> Floats:
        fused = logits.copy()
        rows, ks = np.nonzero(boost)
        fused[rows, self.ids[slots][rows, ks]] += boost[rows, ks].astype(np.float32)
        return fused


def _f(values: NDArray[np.floating]) -> Floats:
    return np.asarray(values, dtype=np.float32)
