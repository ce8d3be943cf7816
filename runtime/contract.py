"""The contract of an artifact: what was changed, how exact the result is and what a pass costs on the machine that measured it.

Everything here is data (pydantic models of the manifest); `profile.py` fills the cost table and `exactness.py` the exactness.
"""

from __future__ import annotations

import os
import platform
from bisect import bisect_right
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

Level = Literal["bitwise", "tokens", "distribution", "bounded", "lossy"]

#: Levels from the strongest promise to the weakest.
LEVELS: tuple[Level, ...] = ("bitwise", "tokens", "distribution", "bounded", "lossy")

#: Instruction sets that decide which kernels a CPU backend takes.
FLAGS_OF_INTEREST = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "sve",
)

#: Distributions whose versions can change a measured number or a bit of a result.
LIBRARIES = ("planc", "numpy", "onnxruntime", "tokenizers", "torch", "transformers")


_FAR = 1024  # the table is extended to this many times its largest point


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def weakest(*levels: Level) -> Level:
    """The weakest of some promises: what a combination of them can promise."""
    return max(levels, key=LEVELS.index)


class CostTable(_Model):
    """Milliseconds of one pass on a grid of batch sizes, past lengths and rows; read it with `ms`.

    A pass is never cheaper with more rows or more past than with less, so measurement noise that says otherwise is smoothed away
    (isotonic regression) before the table is read.
    """

    rows: tuple[int, ...] = Field(min_length=1)
    past: tuple[int, ...] = Field(min_length=1)
    batch: tuple[int, ...] = Field(default=(1,), min_length=1)
    measured: tuple[tuple[tuple[float, ...], ...], ...]  # [batch][past][rows] ms, as measured

    _grid: list[list[list[float]]] = PrivateAttr(default_factory=list)  # [batch][past][rows] repaired, with one point more on both axes
    _axes: tuple[tuple[int, ...], tuple[int, ...]] = PrivateAttr(default=((), ()))  # past, rows of the grid

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("rows", "past", "batch"):
            axis: tuple[int, ...] = getattr(self, name)
            if any(b <= a for a, b in zip(axis, axis[1:], strict=False)) or axis[0] < (0 if name == "past" else 1):
                raise ValueError(f"{name} must ascend from {0 if name == 'past' else 1}")
        shape = {(len(self.measured), len(plane), len(line)) for plane in self.measured for line in plane}
        if shape != {(len(self.batch), len(self.past), len(self.rows))}:
            raise ValueError(f"measured must be [{len(self.batch)}][{len(self.past)}][{len(self.rows)}]")
        if not all(0 < ms < float("inf") for plane in self.measured for line in plane for ms in line):
            raise ValueError("measured milliseconds must be positive and finite")
        self._axes = (*self.past, _FAR * (self.past[-1] + 1)), (*self.rows, _FAR * self.rows[-1])
        self._grid = [_extend(_repair([list(line) for line in plane]), *self._axes) for plane in self.measured]
        return self

    def ms(self, rows: int, past: int, batch: int = 1) -> float:
        """Milliseconds of a pass with `rows` rows per sequence behind `past` cached tokens.

        Linear between measured points and beyond the last ones; constant below the first ones. A batch beyond a table of batch 1 is
        read as that many more rows, which is what a dense model on one device pays.
        """
        if len(self.batch) == 1 and batch != self.batch[0]:
            rows, batch = max(1, round(rows * batch / self.batch[0])), self.batch[0]
        low, high, weight = _bracket(self.batch, batch)
        at_low = self._at(low, rows, past)
        return at_low if low == high else max(1e-6, at_low + weight * (self._at(high, rows, past) - at_low))

    def _at(self, plane: int, rows: int, past: int) -> float:
        grid = self._grid[plane]
        p0, p1, pw = _bracket(self._axes[0], past)
        r0, r1, rw = _bracket(self._axes[1], rows)
        near = grid[p0][r0] + rw * (grid[p0][r1] - grid[p0][r0])
        far = grid[p1][r0] + rw * (grid[p1][r1] - grid[p1][r0])
        return max(1e-6, near + pw * (far - near))


def _bracket(axis: Sequence[int], value: float) -> tuple[int, int, float]:
    """Indices of the grid points to interpolate between and the weight of the second."""
    if len(axis) == 1 or value <= axis[0]:
        return 0, 0, 0.0
    high = min(bisect_right(axis, value), len(axis) - 1)
    return high - 1, high, (value - axis[high - 1]) / (axis[high] - axis[high - 1])


def _isotonic(values: list[float]) -> list[float]:
    """Least-squares fit that never falls (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (b, nb), (a, na) = pools.pop(), pools.pop()
            pools.append(((a * na + b * nb) / (na + nb), na + nb))
    return [mean for mean, count in pools for _ in range(count)]


def _repair(grid: list[list[float]]) -> list[list[float]]:
    """Monotone along both axes: [past][rows]. Fitting columns of rows that never fall keeps the rows so (isotonic regression is monotone)."""
    by_rows = [_isotonic(line) for line in grid]
    by_past = [_isotonic([line[i] for line in by_rows]) for i in range(len(grid[0]))]
    return [[column[p] for column in by_past] for p in range(len(grid))]


def _extend(grid: list[list[float]], past: Sequence[int], rows: Sequence[int]) -> list[list[float]]:
    """Add the far points of both axes, on the line through the last two measured ones.

    The slopes are smoothed across the other axis first, or lines that differ by noise would cross far out.
    """
    slopes = _isotonic([(line[-1] - line[-2]) / (rows[-2] - rows[-3]) if len(line) > 1 else 0.0 for line in grid])
    grid = [[*line, line[-1] + slope * (rows[-1] - rows[-2])] for line, slope in zip(grid, slopes, strict=True)]
    if len(grid) == 1:
        return [*grid, grid[-1]]
    slopes = _isotonic([(b - a) / (past[-2] - past[-3]) for a, b in zip(grid[-2], grid[-1], strict=True)])
    return [*grid, [ms + slope * (past[-1] - past[-2]) for ms, slope in zip(grid[-1], slopes, strict=True)]]


class Exactness(_Model):
    """What the probe of `exactness.py` saw: may a verified draft differ from plain decoding with the same minimum of rows?

    `bitwise`: all row logits equal bit for bit. `tokens`: logits differ, no argmax did. `distribution`: sampled output keeps its law.
    `bounded`: a stated bound holds. `lossy`: argmaxes differed, or the method changes tokens by design.
    """

    level: Level  # what the plan as compiled can promise
    chains: Level
    trees: Level | None = None  # None: the engine takes no trees
    batch: Level | None = None  # a prompt in a batch against the same prompt alone; None: not probed
    min_rows: int = Field(default=1, ge=1)  # passes with fewer rows are padded where exactness is claimed
    tree_block: int | None = None  # a tree may not cross a multiple of this many keys
    probes: int = 0  # rows compared
    flips: int = 0  # rows whose argmax differed
    smallest_gap: float | None = None  # smallest top-2 logit gap among the probed rows
    largest_difference: float = 0.0  # largest |logit difference| among the probed rows
    note: str = ""

    def sampled(self) -> Exactness:
        """What is left of it where draws are tested: the text of a seed is not plain decoding's, its distribution is."""
        note = "; ".join(filter(None, (self.note, "draws are tested, so that a seed gives another text than plain decoding")))
        return self.model_copy(update={"level": weakest(self.level, "distribution"), "note": note})

    def line(self) -> str:
        """One line for people."""
        parts = [f"{self.level} (chains {self.chains}, trees {self.trees or 'not taken'}, at least {self.min_rows} rows a pass"]
        parts.append(f"{self.probes} rows probed, {self.flips} argmax flips, largest difference {self.largest_difference:.3g}")
        if self.smallest_gap is not None:
            parts.append(f"smallest top-2 gap {self.smallest_gap:.3g}")
        return ", ".join(parts) + ")" + (f"; {self.note}" if self.note else "")


class PassEffect(_Model):
    """What one pass of the plan did to the program, and how far its outputs moved on the samples."""

    name: str
    declared: str  # the effect that the pass declares: exact, bounded or changes
    nodes_before: int = 0
    nodes_after: int = 0
    params_bytes_before: int = 0
    params_bytes_after: int = 0
    counts: dict[str, int] = Field(default_factory=dict)  # what the pass counted: matched, rewritten, refused ...
    largest_difference: float | None = None  # of the outputs on the samples; None when not probed
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


class Contract(_Model):
    """What an artifact promises, and where the promise was measured."""

    exactness: Exactness | None = None
    cost: CostTable | None = None
    effects: tuple[PassEffect, ...] = ()
    hardware: dict[str, Any] = Field(default_factory=dict)


def version_of(distribution: str) -> str | None:
    """Installed version of a distribution, without importing it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def hardware() -> dict[str, Any]:
    """CPU name, cores, instruction sets of interest, memory and library versions of this machine."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found: dict[str, Any] = {
        "cpu": name,
        "cores": os.cpu_count() or 1,
        "usable_cores": usable,
        "flags": [flag for flag in FLAGS_OF_INTEREST if flag in flags],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in LIBRARIES if (version := version_of(name))},
    }
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        found["memory_mb"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20
    return found
