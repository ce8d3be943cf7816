"""Few bits, and what they lose: a low-rank form of the error, and outliers as they were (papers/67, "GEAR"; papers/A4 section 5.3)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from planc.runtime.engine import Floats
from planc.runtime.kv.stores.base import Part, Payload
from planc.runtime.kv.stores.int8 import Int8
from planc.runtime.kv.stores.quantized import Quantized

_LOOPS = 3  # of the power iteration


class Gear(Quantized):
    """`Quantized` plus, per block and head, the error's best `rank` directions and a share of `outliers`."""

    rank: int = Field(4, ge=0, le=64, description="directions of the quantisation error that are kept")
    factors: Literal["float16", "int8"] = Field("float16", description="format of the directions; int8: with one scale each")
    outliers: float = Field(0.0, ge=0.0, le=0.5, description="share of the numbers kept apart: half of them largest, half smallest")

    def encode(self, rows: Floats, part: Part, fitted: Payload) -> Payload:
        """That of `Quantized`, and `left` [N,G,T,rank], `right` [N,G,D,rank], in int8 with scales [N,G,1,rank], and the outliers: `places` and
        `deltas` [N,G,o,D] of keys, [N,G,T,o] of values."""
        axis = 2 if part == "key" else 3  # outliers are sought along the tokens of a channel, or the channels of a token
        places = self._places(rows, axis)
        plain = rows.copy()
        np.put_along_axis(plain, places, np.broadcast_to(rows.mean(axis, keepdims=True), places.shape), axis)
        payload = super().encode(plain, part, fitted)
        coarse = super().decode(payload, part, fitted)
        error = rows - coarse
        if places.shape[axis]:
            payload |= {"places": places.astype(np.uint8), "deltas": np.take_along_axis(error, places, axis).astype(np.float16)}
            np.put_along_axis(error, places, 0.0, axis)
        if self.rank:
            left, right = power_iteration(error, min(self.rank, *rows.shape[2:]))
            for name, factor in (("left", left), ("right", right)):
                if self.factors == "int8":
                    own = Int8().encode(factor.swapaxes(-1, -2), part, {})
                    payload |= {name: np.ascontiguousarray(own["codes"].swapaxes(-1, -2)), f"{name}_scale": own["scale"].swapaxes(-1, -2)}
                else:
                    payload[name] = factor.astype(np.float16)
        return payload

    def decode(self, payload: Payload, part: Part, fitted: Payload) -> Floats:
        """Backbone plus error plus outliers."""
        rows = super().decode(payload, part, fitted)
        if "left" in payload:
            rows = rows + _factor(payload, "left") @ _factor(payload, "right").swapaxes(-1, -2)
        if "places" in payload:
            axis, places = 2 if part == "key" else 3, payload["places"].astype(np.int64)
            found = np.take_along_axis(rows, places, axis)
            np.put_along_axis(rows, places, found + payload["deltas"].astype(np.float32), axis)
        return rows

    def _places(self, rows: Floats, axis: int) -> np.ndarray:
        """Where the outliers of each line along `axis` stand."""
        count = round(rows.shape[axis] * self.outliers / 2)
        order = np.argsort(rows, axis=axis, kind="stable")
        size = rows.shape[axis]
        return np.concatenate([order.take(range(count), axis), order.take(range(size - count, size), axis)], axis)


def _factor(payload: Payload, name: str) -> Floats:
    factor: Floats = payload[name].astype(np.float32)
    return factor * payload[f"{name}_scale"].astype(np.float32) if f"{name}_scale" in payload else factor


def power_iteration(error: Floats, rank: int) -> tuple[Floats, Floats]:
    """`left` [...,T,rank] and `right` [...,D,rank] with left @ right.T the best such form of `error` [...,T,D], nearly. Seeded."""
    right = np.random.default_rng(0).standard_normal((error.shape[-1], rank)).astype(np.float32)
    right = np.broadcast_to(right, (*error.shape[:-2], *right.shape))
    left = error @ right
    for loop in range(_LOOPS):
        last = loop == _LOOPS - 1
        left = error @ (np.linalg.qr(right)[0] if last else right)
        if last:
            left = np.linalg.qr(left)[0]
        right = error.swapaxes(-1, -2) @ left
    return left, right
