"""H10: what an end token means for what is left of the canvas."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from planc.runtime.masked.canvas import Canvas
from planc.runtime.masked.hooks import EndHook


class BlockEnd(EndHook):
    """Once a finished block holds an end token, the rest is end tokens."""

    def fill(self, canvas: Canvas) -> int | None:
        block = canvas.tokens[canvas.start : canvas.stop]
        if canvas.masked[canvas.prompt : canvas.stop].any():
            return None
        return next((int(token) for token in block if int(token) in canvas.ends), None)


class Truncate(EndHook):
    """Cut the canvas behind an end token, so that padding is not denoised (end-of-text prediction, papers/09)."""

    mode: Literal["committed", "predicted"] = Field("committed", description="the end token is decided, or proposed with `confidence`")
    confidence: float = Field(0.9, ge=0.0, le=1.0, description="predicted: least confidence of the proposal")

    def cut(self, canvas: Canvas) -> int | None:
        ends = list(canvas.ends)
        at = np.arange(len(canvas.tokens))
        field = (at >= canvas.prompt) & (at < canvas.length)
        found = field & np.isin(canvas.tokens, ends)
        if self.mode == "predicted":
            fresh = canvas.asked == canvas.step
            found |= field & canvas.masked & fresh & np.isin(canvas.x0, ends) & (canvas.confidence >= self.confidence)
        return int(np.argmax(found)) + 1 if found.any() and np.argmax(found) + 1 < canvas.length else None
