"""Rows without their smallest numbers: a bitmap and what it marks (papers/10, "Mustafar"; papers/A4 section 5.1)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from planc.runtime.engine import Floats
from planc.runtime.kv.stores.base import Part, Payload, Store
from planc.runtime.kv.stores.int8 import Int8


class Bitmap(Store):
    """Keeps the `keep` numbers of largest magnitude of every key and value; the stride is constant, so every row has its place."""

    keep: int = Field(ge=1, description="numbers that stay of each row and head")
    dtype: Literal["float32", "float16", "int8"] = Field("float16", description="format of those numbers; int8: with one scale per row")
    mask: Literal["magnitude", "random", "channels"] = Field(
        "magnitude",
        description="which ones: those of largest magnitude; to compare with: any, or the same channels for all rows of a block",
    )

    def check(self, width: int) -> str | None:
        """Bitmaps are bytes."""
        if self.keep > width:
            return f"heads of width {width} have no {self.keep} numbers to keep"
        return None if width % 8 == 0 else f"a width of {width} is no multiple of 8"

    def encode(self, rows: Floats, part: Part, fitted: Payload) -> Payload:
        """`bits` [N,G,T,D/8] uint8, low bits first, and `values` [N,G,T,keep], in int8 with `scale` [N,G,T,1].

        The bitmap is made from the mask, not from what is not zero: a zero may be among what is kept.
        """
        kept = _MASKS[self.mask](rows, self.keep)
        bits, values = np.packbits(kept, axis=-1, bitorder="little"), rows[kept].reshape(*rows.shape[:-1], self.keep)
        if self.dtype != "int8":
            return {"bits": bits, "values": values.astype(self.dtype)}
        own = Int8().encode(values, part, {})
        return {"bits": bits, "values": own["codes"], "scale": own["scale"]}

    def decode(self, payload: Payload, part: Part, fitted: Payload) -> Floats:
        """Zeros where the bitmap has none."""
        kept = np.unpackbits(payload["bits"], axis=-1, bitorder="little").astype(bool)
        rows: Floats = np.zeros(kept.shape, np.float32)
        rows[kept] = payload["values"].reshape(-1)
        return rows * payload["scale"].astype(np.float32) if "scale" in payload else rows


def magnitude(rows: Floats, keep: int) -> NDArray[np.bool_]:
    """The `keep` largest magnitudes of each row [...,D]; of equal ones the lower channels."""
    order = np.argsort(-np.abs(rows), axis=-1, kind="stable")[..., :keep]
    return _marked(rows, order)


def random(rows: Floats, keep: int) -> NDArray[np.bool_]:
    """Any `keep` channels, seeded by the shape alone."""
    noise = np.random.default_rng(0).random(rows.shape)
    return _marked(rows, np.argsort(noise, axis=-1)[..., :keep])


def channels(rows: Floats, keep: int) -> NDArray[np.bool_]:
    """The `keep` channels of largest mean magnitude over the rows of a block, for all its rows."""
    mean = np.broadcast_to(np.abs(rows).mean(-2, keepdims=True), rows.shape)
    return magnitude(mean, keep)


def _marked(rows: Floats, order: np.ndarray) -> NDArray[np.bool_]:
    kept = np.zeros(rows.shape, bool)
    np.put_along_axis(kept, order, True, axis=-1)
    return kept


_MASKS = {"magnitude": magnitude, "random": random, "channels": channels}
