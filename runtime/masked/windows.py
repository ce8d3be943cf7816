"""H1: the part of the canvas that is being filled."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from planc.runtime.masked.canvas import Canvas, Mask
from planc.runtime.masked.hooks import Shape, WindowHook, refuse


def _span(canvas: Canvas, start: int, stop: int) -> tuple[int, int, Mask]:
    at = np.arange(len(canvas.tokens))
    return start, stop, (at >= start) & (at < stop)


class Whole(WindowHook):
    """All slots at once."""

    def place(self, canvas: Canvas) -> tuple[int, int, Mask]:
        return _span(canvas, canvas.prompt, canvas.length)


class Blocks(WindowHook):
    """Blocks of slots from left to right, each finished before the next (LLaDA's semi-autoregressive decoding)."""

    size: int = Field(32, ge=1, description="slots of a block")

    def blocks(self, field: int) -> int:
        return max(1, field // self.size)

    def check(self, shape: Shape) -> None:
        if shape.field % self.size:
            message = f"blocks of {self.size} slots do not divide a field of {shape.field}"
            raise refuse(message, f"use max_new_tokens: {max(1, round(shape.field / self.size)) * self.size}, or another size")

    def number(self, canvas: Canvas) -> int:
        left = np.flatnonzero(canvas.masked)
        first = int(left[0]) if len(left) else canvas.length - 1
        return (first - canvas.prompt) // self.size

    def place(self, canvas: Canvas) -> tuple[int, int, Mask]:
        start = canvas.prompt + self.number(canvas) * self.size
        return _span(canvas, start, min(start + self.size, canvas.length))


class Sliding(WindowHook):
    """The leftmost `width` masked slots."""

    width: int = Field(16, ge=1, description="masked slots that are looked at")

    def place(self, canvas: Canvas) -> tuple[int, int, Mask]:
        left = np.flatnonzero(canvas.masked)[: self.width]
        mask = np.zeros(len(canvas.tokens), dtype=bool)
        mask[left] = True
        return (int(left[0]), int(left[-1]) + 1, mask) if len(left) else (canvas.prompt, canvas.length, mask)
