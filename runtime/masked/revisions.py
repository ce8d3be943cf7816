"""H9: decisions that are taken back."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from planc.runtime.masked.canvas import Canvas, Slots
from planc.runtime.masked.hooks import ReviseHook


def _weakest(canvas: Canvas, count: int) -> Slots:
    """The committed, unlocked slots of the window that were decided with least confidence."""
    decided = np.flatnonzero(canvas.window & ~canvas.masked & ~canvas.locked & (np.arange(len(canvas.tokens)) < canvas.length))
    return np.sort(decided[np.argsort(canvas.commit_confidence[decided], kind="stable")[:count]])


class Remdm(ReviseHook):
    """When little of a block is left, `rounds` times mask its `tokens` least sure slots again (ReMDM)."""

    rounds: int = Field(1, ge=0, description="for every block")
    tokens: int = Field(1, ge=1, description="slots a round")
    after: float = Field(0.875, gt=0.0, le=1.0, description="share of the block that is decided by then")

    def budget(self, field: int) -> int:
        return self.rounds * self.tokens * field

    def start(self, canvas: Canvas) -> _Rounds:
        return _Rounds(self)


class _Rounds:
    def __init__(self, part: Remdm) -> None:
        self.part, self._block, self._left = part, (-1, -1), 0

    def budget(self, field: int) -> int:
        return self.part.budget(field)

    def remask(self, canvas: Canvas) -> Slots:
        block = (canvas.start, canvas.stop)
        if block != self._block:
            self._block, self._left = block, self.part.rounds
        size = int(canvas.window.sum())
        if not self._left or size - len(canvas.open) < self.part.after * size:
            return np.zeros(0, dtype=np.int64)
        self._left -= 1
        return _weakest(canvas, self.part.tokens)


class RunningConfidence(ReviseHook):
    """Commit everything, then mask the least sure again, so that `tokens` more stay after every pass; use with the selection `all`."""

    tokens: int = Field(1, ge=1, description="slots more that stay after every pass")

    def budget(self, field: int) -> int:
        return field * field

    def start(self, canvas: Canvas) -> _Running:
        return _Running(self)


class _Running:
    def __init__(self, part: RunningConfidence) -> None:
        self.part, self._block, self._kept = part, (-1, -1), 0

    def budget(self, field: int) -> int:
        return self.part.budget(field)

    def remask(self, canvas: Canvas) -> Slots:
        block = (canvas.start, canvas.stop)
        if block != self._block:
            self._block, self._kept = block, 0
        self._kept += self.part.tokens
        decided = int((canvas.window & ~canvas.masked & ~canvas.locked).sum())
        return _weakest(canvas, max(0, decided - self._kept))
