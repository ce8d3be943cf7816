"""Rotary embedding outside the graph: keys are kept turned, and a low-rank form needs them as they were before (papers/A4 section 5.4)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from planc.runtime.engine import Floats


class Rope(BaseModel):
    """How a layer turns its keys; the first 2 * len(inv_freq) channels, in halves, as the dialect's `rope`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inv_freq: tuple[float, ...]
    scaling: float = 1.0  # that the tables are multiplied with

    def turn(self, rows: Floats, positions: NDArray[np.integer], *, back: bool = False) -> Floats:
        """Rows [...,D] turned to their positions [...], or back from them."""
        angles = np.asarray(positions, np.float32)[..., None] * np.asarray(self.inv_freq, np.float32)
        cos, sin = np.cos(angles), np.sin(angles)
        scale = np.float32(1.0 / self.scaling if back else self.scaling)
        if back:
            sin = -sin
        half = cos.shape[-1]
        low, high = rows[..., :half], rows[..., half : 2 * half]
        turned = np.concatenate([(low * cos - high * sin) * scale, (high * cos + low * sin) * scale, rows[..., 2 * half :]], -1)
        return turned.astype(np.float32)
