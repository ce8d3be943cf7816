"""Chunks of eight tokens by their mean key (papers/76, "ShadowKV")."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from planc.runtime.engine import Floats
from planc.runtime.kv.selections.base import Selection, by_head
from planc.runtime.kv.stores.base import BLOCK, Payload

CHUNK = 8  # tokens of a chunk


class Landmarks(Selection):
    """Reads chunks whose mean key gets most attention. Chunks of the prompt that their mean describes worst stay as they are."""

    unit: ClassVar[int] = CHUNK
    interval: int = Field(1, ge=1, description="committed tokens between two choices")
    outliers: int = Field(8, ge=0, description="chunks of the prompt per head that every pass reads, as they are")

    def stats(self, keys: Floats) -> Payload:
        """`mean` [N,G,8,D] float16."""
        return {"mean": _chunks(keys).mean(3).astype(np.float16)}

    def resident(self, keys: Floats) -> np.ndarray:
        """The chunks with the key that points furthest away from its chunk's mean."""
        chunks = _chunks(keys)
        mean = chunks.mean(3, keepdims=True)
        lengths = np.linalg.norm(chunks, axis=-1) * np.linalg.norm(mean, axis=-1)
        cosine = (chunks * mean).sum(-1) / np.maximum(lengths, np.finfo(np.float32).tiny)
        worst = cosine.min(3).swapaxes(0, 1).reshape(keys.shape[1], -1)  # [G, N*8]
        return np.sort(np.argsort(worst, axis=1, kind="stable")[:, : self.outliers], axis=1)

    def scores(self, stats: Payload, queries: Floats, scale: float) -> Floats:
        """The share of attention that a chunk's mean key gets among all of them."""
        mean = stats["mean"].astype(np.float32).swapaxes(0, 1)
        mean = mean.reshape(mean.shape[0], -1, mean.shape[3])  # [G, N*8, D]
        logits = queries.reshape(len(mean), -1, queries.shape[1]) @ mean.swapaxes(1, 2) * scale
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return by_head((weights / weights.sum(-1, keepdims=True)).reshape(len(queries), -1), len(mean))


def _chunks(keys: Floats) -> Floats:
    """[N,G,64,D] -> [N,G,8,8,D]."""
    count, heads, _, width = keys.shape
    return keys.reshape(count, heads, BLOCK // CHUNK, CHUNK, width)
