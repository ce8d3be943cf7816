"""Codes of maps: which numbers the 2^bits codes of an image network's values stand for, fitted to what calibration saw of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from planc.compiler.calibration import Histogram

Fit = Literal["peak", "search"]
_SHARES = tuple(1 - i / 80 for i in range(65))  # of the largest range, among which `search` looks


@dataclass(frozen=True)
class Scale:
    """A code q of 0 .. 2^bits - 1 stands for (q - zero) * step. Zero is a code, so that padding is exact; `step` is a float32 number."""

    step: float
    zero: int
    bits: int = 8

    @property
    def last(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    def code(self, value: float | None, default: int) -> int:
        """The code of a number, or of an end of the range for None."""
        return default if value is None else max(0, min(self.last, round(value / self.step) + self.zero))

    def limits(self, low: float | None, high: float | None) -> tuple[int, int]:
        """The codes of a function's bounds."""
        return self.code(low, 0), self.code(high, self.last)

    @classmethod
    def of(cls, low: float, high: float, bits: int = 8) -> Scale:
        """For numbers low .. high, of which zero must be one; a range of nothing gets a step of one."""
        low, high = min(low, 0.0), max(high, 0.0)
        last = 2**bits - 1
        step = float(torch.tensor((high - low) / last, dtype=torch.float32))
        return cls(step, round(-low / step), bits) if step > 0 else cls(1.0, 0, bits)

    def codes(self, values: Tensor) -> Tensor:
        """The codes of numbers, in their type."""
        return ((values / self.step).round() + self.zero).clamp(0, self.last)

    def decoded(self, codes: Tensor) -> Tensor:
        """The numbers that codes stand for."""
        return (codes - self.zero) * self.step


def fit_scale(histogram: Histogram, fit: Fit, bits: int = 8) -> Scale:
    """The scale for the values of a histogram: of all of them, or of the part of their range that gives the least squared error."""
    widest = Scale.of(histogram.low, histogram.high, bits)
    return widest if fit == "peak" else least_error(histogram.centres, histogram.counts, (histogram.low, histogram.high), bits)


def least_error(values: Tensor, counts: Tensor, ends: Sequence[float], bits: int) -> Scale:
    """Of the parts of the range `ends`, the one whose codes give `values` [N] that occur `counts` [N] times the least squared error."""
    seen = counts > 0
    values, counts = values[seen].double(), counts[seen].double()
    scales = [Scale.of(ends[0] * share, ends[1] * share, bits) for share in _SHARES]
    steps, zeros = (torch.tensor([getattr(s, name) for s in scales], dtype=torch.float64)[:, None] for name in ("step", "zero"))
    decoded = ((values / steps).round() + zeros).clamp(0, 2**bits - 1).sub(zeros) * steps  # [shares, N]
    return scales[int(((decoded - values) ** 2 * counts).sum(1).argmin())]
