"""H6: rules that choose what is committed from confidences alone. One file each for the rules that need more than a formula."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from planc.runtime.engine import Floats, Ints
from planc.runtime.masked.canvas import Canvas, Mask, Slots
from planc.runtime.masked.hooks import SelectHook, Shape, refuse


def surest(confidence: Floats, count: int) -> Mask:
    """[n] the `count` highest confidences; the lower slot first on ties."""
    chosen = np.zeros(len(confidence), dtype=bool)
    chosen[np.argsort(-confidence, kind="stable")[:count]] = True
    return chosen


class TopK(SelectHook):
    """A fixed number of slots a pass, the surest first."""

    tokens: int = Field(1, ge=1, description="slots committed in a pass")

    def select(self, canvas: Canvas, slots: Slots, confidence: Floats) -> Mask:
        return surest(confidence, self.tokens)


class Schedule(SelectHook):
    """A fixed number of passes, spread evenly over blocks and slots, the remainder first."""

    steps: int = Field(ge=1, description="passes for the whole field")

    def check(self, shape: Shape) -> None:
        if self.steps % shape.blocks:
            raise refuse(
                f"{self.steps} steps do not divide into {shape.blocks} blocks",
                f"use a multiple of {shape.blocks}, or another rule: only this one counts steps",
            )

    def select(self, canvas: Canvas, slots: Slots, confidence: Floats) -> Mask:
        size = canvas.stop - canvas.start
        steps = max(1, round(self.steps * size / canvas.field))
        done = size - len(slots)
        sizes = [size // steps + (i < size % steps) for i in range(steps)]
        bounds = np.cumsum(sizes)
        index = int(np.searchsorted(bounds, done, side="right"))
        return surest(confidence, int(bounds[min(index, steps - 1)]) - done)


class Threshold(SelectHook):
    """Every slot as sure as `tau`, and the surest in any case (Fast-dLLM)."""

    tau: float = Field(0.9, ge=0.0, description="least confidence; above 1 one slot a pass")

    def select(self, canvas: Canvas, slots: Slots, confidence: Floats) -> Mask:
        return (confidence >= self.tau) | surest(confidence, 1)


class Factor(SelectHook):
    """The longest run of the surest slots whose j-th has 1 - confidence <= factor / (j + 1) (Fast-dLLM)."""

    factor: float = Field(1.0, ge=0.0, description="how much doubt all together may have")

    def select(self, canvas: Canvas, slots: Slots, confidence: Floats) -> Mask:
        order = np.argsort(-confidence, kind="stable")
        passes = confidence[order] >= 1.0 - self.factor / (np.arange(1, len(order) + 1) + 1.0)
        passes[0] = True
        count = len(order) if passes.all() else int(np.argmin(passes))  # the first that fails stays out, the last one too
        return surest(confidence, count)


class LocalRelaxed(SelectHook):
    """Slots near one that is sure may be less so (LocalLeap)."""

    tau: float = Field(0.9, ge=0.0, description="confidence of an anchor")
    tau_relaxed: float = Field(0.75, ge=0.0, description="least confidence within `radius` of an anchor")
    radius: int = Field(4, ge=0, description="slots to either side")

    def select(self, canvas: Canvas, slots: Slots, confidence: Floats) -> Mask:
        anchors = slots[confidence >= self.tau]  # open slots only: what is committed already is no anchor
        near = (np.abs(slots[:, None] - anchors[None]) <= self.radius).any(1)
        return (confidence >= np.where(near, min(self.tau_relaxed, self.tau), self.tau)) | surest(confidence, 1)


class RunMax(SelectHook):
    """The surest slot of every run of neighbouring open slots, if it has `low`, and every slot with `tau` (hierarchical decoding of dInfer)."""

    low: float = Field(0.6, ge=0.0, description="least confidence of the best of a run")
    tau: float = Field(0.9, ge=0.0, description="confidence that is enough anywhere")

    def select(self, canvas: Canvas, slots: Slots, confidence: Floats) -> Mask:
        chosen = confidence >= self.tau
        for run in np.split(np.arange(len(slots)), np.flatnonzero(np.diff(slots) > 1) + 1):
            best = run[int(np.argmax(confidence[run]))]
            chosen[best] |= confidence[best] > self.low
        return chosen


class All(SelectHook):
    """Everything in one pass."""

    def select(self, canvas: Canvas, slots: Slots, confidence: Floats) -> Mask:
        return np.ones(len(slots), dtype=bool)


class Oracle(SelectHook):
    """Slots whose proposal is the reference's: what a perfect selection would do; for labels and as a bound."""

    reference: Annotated[tuple[int, ...], Field(min_length=1, description="token ids of the field")]

    def select(self, canvas: Canvas, slots: Slots, confidence: Floats) -> Mask:
        wanted = np.array(self.reference)[slots - canvas.prompt]
        return np.asarray(canvas.x0[slots] == wanted)

    def insist(self, canvas: Canvas, slots: Slots) -> Ints:
        """The reference's tokens, where nothing was right and the surest slot is taken."""
        return np.array(self.reference, dtype=np.int64)[slots - canvas.prompt]
