"""Schedules: how much is removed when. Every step scores the weights anew, as they are by then."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from pydantic import Field

from planc.runtime.registry import PlanPart


class Schedule(PlanPart):
    """The way to the final share."""

    kind: ClassVar[str] = "schedule"

    @abstractmethod
    def shares(self, final: float) -> list[float]:
        """The share that is gone after each step; the last is `final`."""


class AtOnce(Schedule):
    """One step."""

    def shares(self, final: float) -> list[float]:
        """The final share alone."""
        return [final]


class Cubic(Schedule):
    """Fast while much is left that nobody misses, slow at the end (Zhu and Gupta 2017)."""

    steps: int = Field(default=8, ge=1, description="steps after the first")
    initial: float = Field(default=0.0, ge=0.0, lt=1.0, description="share that the first step removes")

    def shares(self, final: float) -> list[float]:
        """s_f + (s_i - s_f) (1 - t/n)^3 for t = 0 .. n."""
        first = min(self.initial, final)
        return [final + (first - final) * (1 - t / self.steps) ** 3 for t in range(self.steps + 1)]
