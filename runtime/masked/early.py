"""H7: when the answer is clear, everything that is left is filled in one go (Prophet)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from planc.runtime.masked.canvas import Canvas, Slots
from planc.runtime.masked.hooks import Shape, StopHook, refuse


class GapAllIn(StopHook):
    """Fill everything as soon as the top-2 logit gap of the answer is large enough for how far decoding has come (papers/17)."""

    offset: int = Field(0, ge=0, description="first slot of the answer in the field")
    length: int | None = Field(None, ge=1, description="slots of the answer; left out: up to the end of the field")
    thresholds: tuple[float, ...] = Field((7.5, 5.0, 2.5), min_length=1, description="least gap, in the order of `knots`")
    knots: tuple[float, ...] = Field((0.33, 0.67), description="progress at which the next threshold takes over, rising")
    statistic: Literal["mean", "min"] = Field("mean", description="over the slots of the answer")
    progress: Literal["passes", "committed"] = Field("passes", description="passes of `steps`, or the share of slots that are decided")
    steps: int | None = Field(None, ge=1, description="passes that decoding would take; left out: one for every slot")

    @model_validator(mode="after")
    def _match(self) -> GapAllIn:
        if len(self.knots) != len(self.thresholds) - 1 or list(self.knots) != sorted(self.knots):
            raise ValueError("there is one knot between two thresholds, and they rise")
        return self

    def check(self, shape: Shape) -> None:
        if self.offset >= shape.field:
            raise refuse(f"the answer begins at offset {self.offset} of a field of {shape.field}", "lower `offset`")

    def region(self, canvas: Canvas) -> Slots:
        first = canvas.prompt + self.offset
        last = canvas.length if self.length is None else min(canvas.length, first + self.length)
        return np.arange(first, max(first, last))

    def all_in(self, canvas: Canvas) -> bool:
        """Slots that hold or propose an end token say nothing: the gap of padding is enormous."""
        region = self.region(canvas)
        region = region[(canvas.asked[region] == canvas.step) & ~np.isin(canvas.x0[region], list(canvas.ends))]
        if not len(region):
            return False
        done = canvas.step / (self.steps or canvas.field) if self.progress == "passes" else canvas.committed
        threshold = self.thresholds[int(np.searchsorted(self.knots, done, side="right"))]
        gaps = canvas.gap[region]
        return bool((gaps.mean() if self.statistic == "mean" else gaps.min()) >= threshold)


class StableWindow(StopHook):
    """Fill everything when no confidence of the answer has moved by more than `epsilon` for `passes` passes."""

    offset: int = Field(0, ge=0, description="first slot of the answer in the field")
    length: int | None = Field(None, ge=1, description="slots of the answer; left out: up to the end of the field")
    passes: int = Field(5, ge=2)
    epsilon: float = Field(0.05, ge=0.0)

    def start(self, canvas: Canvas) -> _Stable:
        return _Stable(self)


class _Stable:
    """The latest confidences of one row."""

    def __init__(self, part: StableWindow) -> None:
        self.part, self.seen = part, list[np.ndarray]()

    def region(self, canvas: Canvas) -> Slots:
        return GapAllIn(offset=self.part.offset, length=self.part.length).region(canvas)

    def all_in(self, canvas: Canvas) -> bool:
        region = self.region(canvas)
        if not len(region):
            return False
        self.seen = [*self.seen[1 - self.part.passes :], canvas.confidence[region].copy()]
        full = len(self.seen) == self.part.passes and len({len(s) for s in self.seen}) == 1
        return full and bool(np.ptp(np.stack(self.seen), axis=0).max() <= self.part.epsilon)
