"""Budgets: what the result of a search may be at most, in parameters, bytes, milliseconds or units that run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

#: unit as written -> (resource, how many of its counts the unit is). Counts are integers, so that sums of costs are exact.
_UNITS: dict[str, tuple[str, int]] = {
    "params": ("params", 1),
    "nonzeros": ("nonzeros", 1),
    "B": ("bytes", 1),
    **{f"{prefix}B": ("bytes", 1000**power) for power, prefix in enumerate(("k", "M", "G"), 1)},
    **{f"{prefix}iB": ("bytes", 1024**power) for power, prefix in enumerate(("K", "M", "G"), 1)},
    "bytes": ("bytes", 1),
    "ms": ("time", 1_000_000),  # counted in nanoseconds
    "attention": ("attention", 1),
    "mlp": ("mlp", 1),
    "layers": ("layers", 1),
}


@dataclass(frozen=True)
class Bound:
    """`amount` of `unit` at most; with `percent` that share of what the unchanged model has."""

    amount: float
    unit: str
    percent: bool

    @property
    def resource(self) -> str:
        """What is counted: params, nonzeros, bytes, time (ns), attention, mlp or layers."""
        return _UNITS[self.unit][0]

    def limit(self, full: int) -> int:
        """The largest allowed count, where the unchanged model has `full`."""
        return int(self.amount / 100 * full) if self.percent else int(self.amount * _UNITS[self.unit][1])

    def show(self, count: int, full: int) -> str:
        """A count in the unit of the bound."""
        if self.percent:
            return f"{100 * count / full:.4g}% {self.unit}"
        return f"{count / _UNITS[self.unit][1]:.6g} {self.unit}"


@dataclass(frozen=True)
class Budget:
    """Bounds that hold together, on different resources."""

    bounds: tuple[Bound, ...]
    text: str

    @classmethod
    def parse(cls, text: str) -> Budget:
        """`75% params`, `60 MB`, `4.0 ms`, `26 attention, 26 mlp`. Raises ValueError with what is wrong."""
        bounds = []
        for part in text.split(","):
            found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)(%|[kM](?=\s))?\s*([A-Za-z]+)\s*", part)
            if not found or found[3] not in _UNITS or (found[2] in ("k", "M") and found[3] not in ("params", "nonzeros")):
                raise ValueError(f"a budget is `NUMBER UNIT` or `NUMBER% UNIT` with a unit of {', '.join(_UNITS)}; got {part.strip()!r}")
            factor = {"k": 1e3, "M": 1e6}.get(found[2], 1)
            bounds.append(Bound(float(found[1]) * factor, found[3], found[2] == "%"))
        if len({bound.resource for bound in bounds}) < len(bounds):
            raise ValueError(f"the budget {text!r} bounds the same thing twice")
        return cls(tuple(bounds), text)

    @property
    def resources(self) -> tuple[str, ...]:
        """What is counted, in the order of the bounds."""
        return tuple(bound.resource for bound in self.bounds)

    def limits(self, full: Mapping[str, int]) -> tuple[int, ...]:
        """The largest allowed count of each resource."""
        return tuple(bound.limit(full[bound.resource]) for bound in self.bounds)

    def show(self, counts: tuple[int, ...], full: Mapping[str, int]) -> str:
        """Counts of the resources as a budget would be written."""
        return ", ".join(bound.show(count, full[bound.resource]) for bound, count in zip(self.bounds, counts, strict=True))
