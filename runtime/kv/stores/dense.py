"""Blocks as they are, in one of three float formats."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from planc.runtime.engine import Floats
from planc.runtime.kv.stores.base import Part, Payload, Store


class Dense(Store):
    """Rows in float32, float16 or bfloat16."""

    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="format of the numbers")

    def encode(self, rows: Floats, part: Part, fitted: Payload) -> Payload:
        """One array `rows`; bfloat16 as the upper halves of float32, rounded to nearest even."""
        if self.dtype != "bfloat16":
            return {"rows": rows.astype(self.dtype)}
        bits = np.ascontiguousarray(rows, np.float32).view(np.uint32)
        return {"rows": ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)}

    def decode(self, payload: Payload, part: Part, fitted: Payload) -> Floats:
        """Widened."""
        rows = payload["rows"]
        return (rows.astype(np.uint32) << 16).view(np.float32) if rows.dtype == np.uint16 else rows.astype(np.float32)
