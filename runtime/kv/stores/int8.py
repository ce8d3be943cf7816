"""Rows in int8 with one scale each: the default of a CPU, because rows stay addressable and the error is small (papers/A4 section 5.2)."""

from __future__ import annotations

import numpy as np

from planc.runtime.engine import Floats
from planc.runtime.kv.stores.base import Part, Payload, Store


class Int8(Store):
    """Symmetric int8, one scale per row and head."""

    def encode(self, rows: Floats, part: Part, fitted: Payload) -> Payload:
        """`codes` [N,G,T,D] int8 and `scale` [N,G,T,1] float16."""
        scale = (np.abs(rows).max(-1, keepdims=True) / 127.0).astype(np.float16)
        steps = np.maximum(scale.astype(np.float32), np.finfo(np.float16).tiny)
        return {"codes": np.clip(np.rint(rows / steps), -127, 127).astype(np.int8), "scale": scale}

    def decode(self, payload: Payload, part: Part, fitted: Payload) -> Floats:
        """Codes times scale."""
        rows: Floats = payload["codes"].astype(np.float32) * payload["scale"].astype(np.float32)
        return rows
