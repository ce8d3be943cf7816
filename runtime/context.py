"""Which tokens of a prompt a model is shown (papers/87, "SpecPC"; papers/A4 section 7): decided by a draft's attention, before the model runs.

Letters: L prompt tokens, W last rows of it, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from planc.runtime.engine import Engine, Floats, Ints
from planc.runtime.errors import InputError
from planc.runtime.kv import KvPolicy, PolicyCache
from planc.runtime.kv.evictions import AttentionWindow
from planc.runtime.kv.evictions.base import window_attention
from planc.runtime.profile import fill_cache


class DraftAttention(BaseModel):
    """Keeps the `capacity` tokens of a prompt that the end of it attends to most, with their neighbours and the end itself.

    What is left is read as if it were the whole prompt: positions follow each other, and offsets into the original text are lost.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    capacity: int = Field(1024, ge=1, description="tokens that stay; a prompt that is no longer is left alone")
    window: int = Field(64, ge=1, description="last tokens, which judge the others and stay; the later the heavier")
    kernel: int = Field(32, ge=1, description="a score is the largest of so many neighbours")
    neighbours: int = Field(32, ge=0, description="tokens around each chosen one that stay with it, half on each side")
    first: float = Field(1 / 3, ge=0.0, lt=1.0, description="share of the draft's layers, from below, that do not judge")

    @property
    def policy(self) -> KvPolicy:
        """Of the draft's cache: it keeps the queries that judge. Nothing is ever evicted from it."""
        return KvPolicy(evict=AttentionWindow(capacity=self.window + 1, window=self.window))

    def shortened(self, draft: Engine, ids: Sequence[int]) -> list[int]:
        """The tokens of a prompt that stay, by a pass of the draft over all of it."""
        if len(ids) <= self.capacity:
            return list(ids)
        if len(ids) > draft.spec.max_length:
            message = f"the prompt has {len(ids)} tokens, and the draft model that shortens it reads {draft.spec.max_length}"
            raise InputError("prompt-too-long", message, fix="shorten the prompt")
        cache = draft.new_cache(1, len(ids) + 1)
        assert isinstance(cache, PolicyCache)
        fill_cache(draft, cache, np.array([ids]))
        layers = [layer for layer in cache.layers(0).values() if layer.spec.group]
        judging = layers[int(self.first * len(layers)) :]
        scores = self.scores(((layer.queries, layer.key[0, :, : layer.rows], layer.spec.scale) for layer in judging), len(ids))
        return [ids[i] for i in self.kept(scores)]

    def scores(self, layers: Iterable[tuple[Floats, Floats, float]], length: int) -> Floats:
        """[L] what each token is worth, from the last queries [W,H,D], the keys [G,L,D] and the scale of each judging layer."""
        best = np.zeros(length, np.float32)
        for queries, keys, scale in layers:
            attention = window_attention(queries, keys, scale, 0.0)  # [G, W*H/G, L]
            weights = np.linspace(0.0, 1.0, len(queries), dtype=np.float32).repeat(queries.shape[1] // len(keys))
            best = np.maximum(best, (attention * weights[:, None]).max((0, 1)))
        left = self.kernel // 2
        padded = np.pad(best, (left, self.kernel - 1 - left))
        smooth: Floats = np.lib.stride_tricks.sliding_window_view(padded, self.kernel).max(-1)
        return smooth

    def kept(self, scores: Floats) -> Ints:
        """The tokens that stay, ascending."""
        length = len(scores)
        if length <= self.capacity:
            return np.arange(length)
        last = np.arange(max(0, length - self.window), length)
        reach = self.neighbours // 2
        steps = np.array(sorted(range(-reach, reach + 1), key=abs))  # the nearest first
        best = np.argsort(-scores, kind="stable")[: self.capacity]
        wanted = np.concatenate([last, (best[:, None] + steps).clip(0, length - 1).reshape(-1)])
        _, first = np.unique(wanted, return_index=True)
        chosen: Ints = np.sort(wanted[np.sort(first)][: self.capacity])
        return chosen
