"""What an eviction is: which rows of the prompt stay when it ends (papers/A4 sections 1 and 6). What it drops is gone.

Letters: W rows whose queries judge, G key/value heads, H query heads, T rows of the prompt, D head width.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from planc.runtime.engine import Floats
from planc.runtime.kv.attend import grouped
from planc.runtime.registry import PlanPart


class Eviction(PlanPart):
    """Keeps `capacity` rows of the prompt per key/value head: the last `window` and the best of the others."""

    kind: ClassVar[str] = "kv_evict"
    capacity: int = Field(ge=1, description="rows of the prompt that stay, per layer and head")
    window: int = Field(32, ge=1, description="last rows of the prompt, which judge the others and stay")

    @property
    def guesses(self) -> int:
        """Tokens behind the prompt that are guessed, whose queries judge, too."""
        return 0

    def scores(self, attention: Floats) -> Floats:
        """[G,T] what the rows before the window are worth, from their shares [G,X,T] of the attention of all judging queries."""
        raise NotImplementedError

    def keep(self, queries: Floats, keys: Floats, prompt: int, scale: float, softcap: float) -> np.ndarray:
        """The rows [G, capacity] that stay, ascending.

        `queries` [W+n,H,D] are those of the last rows of `keys` [G,T+n,D]; the first `prompt` keys are the prompt's, n are guessed.
        """
        heads, judged = len(keys), prompt - min(self.window, prompt)
        if prompt <= self.capacity:
            return np.broadcast_to(np.arange(prompt), (heads, prompt))
        attention = window_attention(queries, keys, scale, softcap)[:, :, :judged]
        best = np.argsort(-self.scores(attention), axis=1, kind="stable")[:, : self.capacity - (prompt - judged)]
        last = np.broadcast_to(np.arange(judged, prompt), (heads, prompt - judged))
        return np.concatenate([np.sort(best, axis=1), last], axis=1)


def window_attention(queries: Floats, keys: Floats, scale: float, softcap: float) -> Floats:
    """Attention [G, W*H/G, T] of the queries [W,H,D] of the last W of the keys [G,T,D] over all of them, causal."""
    rows, total = len(queries), keys.shape[1]
    scores = grouped(queries, len(keys)) @ keys.swapaxes(1, 2) * np.float32(scale)
    if softcap:
        scores = np.tanh(scores / softcap) * softcap
    places = np.repeat(np.arange(total - rows, total), queries.shape[1] // len(keys))
    scores = np.where(np.arange(total) > places[:, None], -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    attention: Floats = weights / weights.sum(-1, keepdims=True)
    return attention


def pooled(scores: Floats, kernel: int, *, largest: bool) -> Floats:
    """Mean or maximum over `kernel` (odd) neighbours [G,T]; what lies outside counts as zero, as in the papers' code."""
    side = kernel // 2
    padded = np.pad(scores, ((0, 0), (side, side)))
    around = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=1)
    found: Floats = around.max(-1) if largest else around.mean(-1)
    return found


def odd(kernel: int) -> int:
    """Refuse a kernel without a middle."""
    if kernel % 2 == 0:
        raise ValueError(f"a kernel of {kernel} has no middle; use an odd number")
    return kernel
