"""Blocks by an upper bound of the products with their keys (papers/34, "LServe", as in "Quest")."""

from __future__ import annotations

from typing import Self

import numpy as np
from pydantic import Field, model_validator

from planc.runtime.engine import Floats
from planc.runtime.kv.selections.base import Selection, by_head
from planc.runtime.kv.stores.base import BLOCK, Payload


class Pages(Selection):
    """Reads whole blocks. Bounds are those of parts of `sub` tokens, whose extremes say more; a block is worth its best part."""

    sub: int = Field(16, ge=1, le=BLOCK, description="tokens whose keys share one bound")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if BLOCK % self.sub:
            raise ValueError(f"parts of {self.sub} tokens do not divide a block of {BLOCK}")
        return self

    def stats(self, keys: Floats) -> Payload:
        """`low` and `high` [N,G,64/sub,D] float16, rounded outwards lest the bound be none."""
        count, heads, tokens, width = keys.shape
        parts = keys.reshape(count, heads, tokens // self.sub, self.sub, width)
        return {"low": _outwards(parts.min(3), -np.inf), "high": _outwards(parts.max(3), np.inf)}

    def bounds(self, stats: Payload, queries: Floats) -> Floats:
        """[H, N*64/sub] no product of a query [H,D] with a key of the part is larger."""
        low, high = (_flat(stats[name]) for name in ("low", "high"))  # [G, parts, D]
        group = len(queries) // len(low)
        grouped = queries.reshape(len(low), group, -1)
        bounds = np.maximum(grouped, 0) @ high.swapaxes(1, 2) + np.minimum(grouped, 0) @ low.swapaxes(1, 2)
        return bounds.astype(np.float32).reshape(len(queries), -1)

    def scores(self, stats: Payload, queries: Floats, scale: float) -> Floats:
        """The best bound of a block's parts."""
        best = by_head(self.bounds(stats, queries), stats["low"].shape[1])
        scores: Floats = best.reshape(len(best), -1, BLOCK // self.sub).max(2)
        return scores


def _flat(stats: np.ndarray) -> Floats:
    """[N,G,parts,D] -> [G, N*parts, D] float32."""
    return stats.astype(np.float32).swapaxes(0, 1).reshape(stats.shape[1], -1, stats.shape[3])


def _outwards(values: Floats, way: float) -> np.ndarray:
    half = values.astype(np.float16)
    wrong = half.astype(np.float32) > values if way < 0 else half.astype(np.float32) < values
    return np.where(wrong, np.nextafter(half, np.float16(way)), half)
