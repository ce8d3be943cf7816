"""H6 and H2 of masked image generators: MaskGIT's noisy choice by a schedule, and ReCAP's cheap steps on a group of slots (papers/57)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from planc.runtime.engine import Floats
from planc.runtime.masked.caching import everything
from planc.runtime.masked.canvas import Canvas, Mask, Slots
from planc.runtime.masked.hooks import Ask, CacheHook, SelectHook, Shape, refuse


class GumbelTopK(SelectHook):
    """As many slots as a schedule says, ranked by log confidence plus Gumbel noise that falls to nothing (MaskGIT).

    With `locals`, a step ranks the slots of itself and of so many steps that follow, which then commit theirs in that order: the group whose other
    steps the cache `local` runs alone.
    """

    steps: int = Field(16, ge=1, description="passes for the whole field")
    shape: Literal["cosine", "power"] = Field(
        "cosine", description="share that is masked after i of T steps: cos(pi/2 i/T), or 1 - (i/T)^2.5"
    )
    noise: float = Field(4.0, ge=0.0, description="of the ranking, at the beginning; falls linearly to 0")
    full_first: int = Field(0, ge=0, description="steps before groups begin")
    locals: int = Field(0, ge=0, description="steps of a group behind its first")

    @model_validator(mode="after")
    def _fits(self) -> GumbelTopK:
        if self.full_first > self.steps:
            raise ValueError(f"{self.full_first} first steps of {self.steps}")
        return self

    def check(self, shape: Shape) -> None:
        if self.steps > shape.field or shape.blocks != 1:
            raise refuse(
                f"{self.steps} steps over {shape.blocks} blocks do not fill {shape.field} slots",
                "use `window: whole`, and no more steps than slots",
            )

    def counts(self, field: int) -> list[int]:
        """Slots of every step; at least one each."""
        at = np.arange(self.steps + 1) / self.steps
        ratio = np.cos(np.pi / 2 * at) if self.shape == "cosine" else 1.0 - at**2.5
        left = np.floor(ratio * field + 1e-9).astype(int)
        left[0], left[-1] = field, 0
        for i in range(self.steps - 1, 0, -1):  # every later step has something left to do
            left[i] = max(left[i], self.steps - i)
        for i in range(1, self.steps + 1):
            left[i] = min(left[i], left[i - 1] - 1)
        return [int(a - b) for a, b in zip(left, left[1:], strict=False)]

    def start(self, canvas: Canvas) -> _Ranking:
        return _Ranking(self, int(canvas.masked.sum()))


class _Ranking:
    """Where the schedule of one row stands."""

    def __init__(self, part: GumbelTopK, field: int) -> None:
        self.part, self.counts, self.step = part, part.counts(field), 0
        self.queue: Slots = np.zeros(0, dtype=np.int64)  # of the group, in order

    def select(self, canvas: Canvas, slots: Slots, confidence: Floats) -> Mask:
        """The next slice of the group, or a new group and its first slice."""
        if not len(self.queue):
            size = 1 if self.step < self.part.full_first else 1 + self.part.locals
            share = 1.0 - min(1.0, (self.step + size) / self.part.steps)
            score = np.log(np.maximum(confidence, 1e-30)) + self.part.noise * share * canvas.rng.gumbel(size=len(slots))
            order = np.argsort(-score, kind="stable")
            self.queue = slots[order[: sum(self.counts[self.step : self.step + size])]]
        count = self.counts[min(self.step, len(self.counts) - 1)]
        chosen, self.queue, self.step = self.queue[:count], self.queue[count:], self.step + 1
        return np.isin(slots, chosen)

    def reserve(self, canvas: Canvas) -> Slots:
        """What is left of the group."""
        return self.queue

    def insist(self, canvas: Canvas, slots: Slots) -> None:
        """The model's own proposals are written."""


class Local(CacheHook):
    """Steps that commit what an earlier one has reserved run that group and the prompt alone, with all other keys and values as they were (ReCAP)."""

    def start(self, canvas: Canvas) -> _Group:
        return _Group()


class _Group:
    """The group of one row: what is reserved and what its first step wrote."""

    def __init__(self) -> None:
        self.slots: Slots = np.zeros(0, dtype=np.int64)

    def query(self, canvas: Canvas) -> Ask:
        if not len(canvas.reserved):
            self.slots = canvas.reserved
            return Ask(everything(canvas), "fill")
        if not len(self.slots):
            self.slots = np.union1d(canvas.reserved, sorted(canvas.changed)).astype(np.int64)
        return Ask(np.union1d(np.arange(canvas.prompt), self.slots), "local")
