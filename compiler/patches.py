"""Patch by patch: the stages of a network that can run in parts, what a schedule of parts costs, and the search for the best.

A *stage* is everything from the image to a *cut*, a value through which all that follows goes. It runs once for every cell of a *grid* over the
cut's rows and columns, each time on the part of the image that the cell needs; parts overlap, and what they compute twice is the *overhead*.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, Generic, TypeVar

import torch
from torch.fx import Node

from planc.compiler.dialect import CONVOLUTIONS, OPS
from planc.compiler.intervals import PADS, Demand, Interval, cut, demand, maps_read, rules
from planc.compiler.memory import POINTWISE, Allocation, Op, kind_of, ops_of, plan_ops
from planc.compiler.program import Program

GRID = (1, 2, 3, 4, 6)  #: rows and columns of the grids that are tried
V = TypeVar("V")
_aten = torch.ops.aten


@dataclass(frozen=True)
class Stage:
    """The nodes from the image (not among them) to the cut, all of them local."""

    image: Node
    nodes: tuple[Node, ...]

    @property
    def cut(self) -> Node:
        """The last node."""
        return self.nodes[-1]

    @property
    def size(self) -> Interval:
        """Rows and columns of the cut."""
        rows, columns = self.cut.meta["val"].shape[2:]
        return int(rows), int(columns)


@dataclass(frozen=True)
class Cell:
    """One part of a schedule."""

    rows: Demand
    columns: Demand

    @property
    def place(self) -> Interval:
        """Row and column of the cut where this part begins."""
        return next(iter(self.rows.cover.values()))[0], next(iter(self.columns.cover.values()))[0]

    def shape(self, node: Node) -> tuple[int, int, int]:
        """Channels, rows and columns of a value in this part."""
        (top, bottom), (left, right) = self.rows.cover[node], self.columns.cover[node]
        return int(node.meta["val"].shape[1]), bottom - top, right - left

    def pads(self, reader: Node, value: Node) -> list[int]:
        """Padding (top, left, bottom, right) that is left to do for a reader."""
        row, column = self.rows.edges[reader, value], self.columns.edges[reader, value]
        return [row.before, column.before, row.after, column.after]

    def window(self, reader: Node, value: Node) -> tuple[Interval, Interval]:
        """Rows and columns that a reader needs, counted from where the value of this part begins."""
        row, column = self.rows.edges[reader, value], self.columns.edges[reader, value]
        top, left = self.rows.cover[value][0], self.columns.cover[value][0]
        return (row.start - top, row.stop - top), (column.start - left, column.stop - left)


class Emitter(Generic[V]):
    """What `schedule` builds with: nodes of a graph, or operations to be counted."""

    def begin(self, cell: Cell) -> None:
        """What follows belongs to this part."""

    def crop(self, value: V, node: Node, window: tuple[Interval, Interval]) -> V:
        """A window of a value."""
        raise NotImplementedError

    def apply(self, node: Node, values: Sequence[V], cell: Cell) -> V:
        """The node on parts of its inputs."""
        raise NotImplementedError

    def join(self, values: Sequence[V], axis: int) -> V:
        """Parts side by side, along rows (2) or columns (3)."""
        raise NotImplementedError


def cells(stage: Stage, grid: Interval) -> list[list[Cell]]:
    """The parts of a grid, row by row."""
    rows = [demand(stage.nodes, 0, *part) for part in cut(stage.size[0], grid[0])]
    columns = [demand(stage.nodes, 1, *part) for part in cut(stage.size[1], grid[1])]
    return [[Cell(row, column) for column in columns] for row in rows]


def schedule(stage: Stage, image: V, parts: Sequence[Sequence[Cell]], emit: Emitter[V]) -> V:
    """The value of the cut, part by part: each is finished before the next one begins."""
    bands = []
    for row in parts:
        done = [one_part(stage, image, cell, emit) for cell in row]
        bands.append(done[0] if len(done) == 1 else emit.join(done, 3))
    return bands[0] if len(bands) == 1 else emit.join(bands, 2)


def one_part(stage: Stage, image: V, cell: Cell, emit: Emitter[V]) -> V:
    """The stage on one part of the image."""
    emit.begin(cell)
    values = {stage.image: image}
    whole = {stage.image: tuple((0, int(size)) for size in stage.image.meta["val"].shape[2:])}
    for node in stage.nodes:
        if node not in cell.rows.cover:
            continue
        inputs = []
        for source in maps_read(node):
            window = cell.window(node, source)
            if source is stage.image:  # not a part yet
                (top, _), (left, _) = cell.rows.cover[source], cell.columns.cover[source]
                window = (window[0][0] + top, window[0][1] + top), (window[1][0] + left, window[1][1] + left)
            full = whole.get(source) or tuple((0, size) for size in cell.shape(source)[1:])
            inputs.append(values[source] if window == full else emit.crop(values[source], source, window))
        values[node] = emit.apply(node, inputs, cell)
    return values[stage.cut]


# ---- cost --------------------------------------------------------------------------------------------------------------------------


def macs(node: Node) -> int:
    """Multiplications of a product, or of an attention, for one image."""
    name = getattr(node.target, "__name__", "")
    if node.target in CONVOLUTIONS:
        weight: Any = node.args[1]
        channels, rows, columns = node.meta["val"].shape[1:]
        _, per_group, height, width = weight.meta["val"].shape
        return int(channels) * int(rows) * int(columns) * int(per_group) * int(height) * int(width)
    if name == "linear.default" or name == "linear":
        weight = node.args[1]
        outputs, inputs = weight.meta["val"].shape
        positions = [s for s in node.meta["val"].shape[1:-1] if isinstance(s, int)]
        total = int(outputs) * int(inputs)
        for size in positions:
            total *= size
        return total
    if node.target in (_aten.matmul.default, _aten.bmm.default):
        return math.prod(int(s) for s in node.meta["val"].shape if isinstance(s, int)) * int(node.args[0].meta["val"].shape[-1])  # type: ignore[union-attr]
    if node.target is _aten.scaled_dot_product_attention.default or node.target is OPS.attention.default:
        rows, keys, values = ([int(s) for s in n.meta["val"].shape[1:]] for n in node.args[:3])  # type: ignore[union-attr]
        keys_axis = 0 if node.target is OPS.attention.default else -2  # q [B,R,H,D], k [B,T,G,D]; or q [B,...,R,D], k [B,...,T,D]
        return math.prod(rows[:-1]) * keys[keys_axis] * (rows[-1] + values[-1])
    return 0


def network_macs(program: Program) -> int:
    """Multiplications of all products of a program for one image."""
    return sum(macs(node) for node in program.main.nodes if node.op == "call_function")


class _Count(Emitter[str]):
    """Operations of parts, to be planned and counted."""

    def __init__(self, element_bytes: int | None) -> None:
        self.ops: list[Op] = []
        self.element_bytes = element_bytes

    def _add(self, node: Node, reads: Sequence[str], shape: Sequence[int], kind: Any = None) -> str:
        name = f"{node.name}.{len(self.ops)}"
        width = self.element_bytes or node.meta["val"].element_size()
        channels, rows, columns = shape
        kind = kind or kind_of(node)
        channel = rows * columns * width if kind == "depthwise" else 0
        self.ops.append(Op(name, tuple(reads), channels * rows * columns * width, kind, channel))
        return name

    def crop(self, value: str, node: Node, window: tuple[Interval, Interval]) -> str:
        (top, bottom), (left, right) = window
        return self._add(node, [value], (int(node.meta["val"].shape[1]), bottom - top, right - left), "compute")

    def apply(self, node: Node, values: Sequence[str], cell: Cell) -> str:
        if is_range(node):
            return values[0]
        made, window = grown(node, cell)
        done = self._add(node, values, made)
        return done if window is None else self._add(node, [done], cell.shape(node), "compute")


def is_range(node: Node) -> bool:
    """A range of rows or columns: in a part, what its reader cuts out anyway."""
    return "slice" in str(node.target) and int(node.args[1]) % 4 in (2, 3)  # type: ignore[arg-type]


def grown(node: Node, cell: Cell) -> tuple[tuple[int, int, int], tuple[Interval, Interval] | None]:
    """Shape that a node makes in a part, and the window of it that was asked for; None where that is all.

    Repeated values begin at a multiple of their factor, and a part that lies in constant padding alone is padded around one value.
    """
    channels, *sizes = cell.shape(node)
    if node.target not in (OPS.upsample2d.default, *PADS):
        return (channels, sizes[0], sizes[1]), None
    [source] = maps_read(node)
    made, window = list[int](), list[Interval]()
    factors: Any = node.args[1] if node.target is OPS.upsample2d.default else None
    for axis, half in enumerate((cell.rows, cell.columns)):
        need, (start, stop) = half.edges[node, source], half.cover[node]
        if factors is not None:
            made.append((need.stop - need.start) * factors[axis])
            first = start - need.start * factors[axis]
        else:
            made.append(max(need.before, 0) + need.stop - need.start + max(need.after, 0))
            first = max(-need.before, 0)
        window.append((first, first + stop - start))
    whole = [(0, size) for size in made] == window
    return (channels, made[0], made[1]), None if whole else (window[0], window[1])


@dataclass(frozen=True)
class Schedule:
    """A stage, a grid, and what they cost."""

    stage: Stage
    grid: Interval
    stage_peak: int  # bytes while the parts run, the cut included
    tail_peak: int  # bytes of all that follows
    stage_macs: int
    extra_macs: int  # computed twice
    network: int  # multiplications of the network without parts

    @property
    def peak(self) -> int:
        """Bytes."""
        return max(self.stage_peak, self.tail_peak)

    @property
    def overhead(self) -> float:
        """Share of the network's multiplications that is added."""
        return self.extra_macs / max(1, self.network)

    @property
    def stage_overhead(self) -> float:
        """Share of the stage's multiplications that is added."""
        return self.extra_macs / max(1, self.stage_macs)

    def line(self) -> str:
        """For people."""
        rows, columns = self.grid
        kib = " ".join(f"{name} {size / 1024:.0f} KiB" for name, size in (("parts", self.stage_peak), ("rest", self.tail_peak)))
        return f"{rows}x{columns} parts up to {self.stage.cut.name}: {kib}, multiplications {self.overhead:+.1%}"


class Search:
    """All schedules of a program under an allocation."""

    def __init__(self, program: Program, allocation: Allocation) -> None:
        self.program, self.allocation = program, allocation
        self.network = network_macs(program)
        self.ops = ops_of(program, allocation)
        self._tails: dict[str, int] = {}
        self._halves: dict[Any, dict[Any, tuple[Demand, int]]] = {}
        self._rules: dict[Node, Any] = {}

    @cached_property
    def full_peak(self) -> int:
        """Bytes of the program as it is."""
        return plan_ops(self.ops, self.allocation).peak

    @cached_property
    def found(self) -> tuple[tuple[Stage, ...], Node | None]:
        """Every stage, and the first operation that cannot be done in parts; None when all can."""
        image = next(n for n in self.program.main.nodes if n.op == "placeholder")
        stages, nodes, live = list[Stage](), list[Node](), {image}
        pending = {n: sum("sym_size" not in str(user.target) for user in n.users) for n in self.program.main.nodes}
        for node in self.program.main.nodes:
            if node.op != "call_function" or "sym_size" in str(node.target):
                continue
            if rules(node) is None or not live.issuperset(maps_read(node)):
                return tuple(stages), node
            nodes.append(node)
            live.add(node)
            for source in node.all_input_nodes:
                pending[source] -= 1
            live = {value for value in live if pending[value]}
            fused = len(node.users) == 1 and (reader := next(iter(node.users))).target in POINTWISE and len(maps_read(reader)) == 1
            if live == {node} and not fused and node.target is not OPS.dequantize.default:  # codes are cut, they are smaller
                stages.append(Stage(image, tuple(nodes)))
        return tuple(stages), None

    def halves(self, stage: Stage, axis: int, parts: int) -> dict[Any, tuple[Demand, int]]:
        """The demands of a stage's parts along one axis, one of each form with how many there are."""
        key = (stage.cut, axis, parts)
        if key not in self._halves:
            forms: dict[Any, tuple[Demand, int]] = {}
            for part in cut(stage.size[axis], parts):
                one = demand(stage.nodes, axis, *part, rule=self._rule)
                forms[one.form] = (one, forms[one.form][1] + 1 if one.form in forms else 1)
            self._halves[key] = forms
        return self._halves[key]

    def _rule(self, node: Node) -> Any:
        if node not in self._rules:
            self._rules[node] = rules(node)
        return self._rules[node]

    def extra_macs(self, stage: Stage, grid: Interval) -> int:
        """Multiplications that a grid adds: halos that are computed more than once."""
        rows, columns = (self.halves(stage, axis, grid[axis]).values() for axis in range(2))
        total = 0
        for node in stage.nodes:
            if (whole := macs(node)) == 0:
                continue
            sizes = node.meta["val"].shape[2:]
            covered = [sum((d.cover[node][1] - d.cover[node][0]) * n for d, n in half if node in d.cover) for half in (rows, columns)]
            total += whole * covered[0] * covered[1] // (int(sizes[0]) * int(sizes[1])) - whole
        return total

    def evaluate(self, stage: Stage, grid: Interval) -> Schedule:
        """What a schedule costs."""
        channels, (rows, columns) = int(stage.cut.meta["val"].shape[1]), stage.size
        width = self.allocation.element_bytes or stage.cut.meta["val"].element_size()
        peak = 0
        for i, ((row, down), (column, across)) in enumerate(product(*(self.halves(stage, axis, grid[axis]).values() for axis in range(2)))):
            # the cut's memory is taken once the first part is done; whoever is not the first works beside it
            for held in [False] * (i == 0) + [True] * (i > 0 or down * across > 1):
                count = _Count(self.allocation.element_bytes)
                count.ops += [Op("image", (), 0, "input"), *([Op("first", (), 0)] if held else [])]
                last = one_part(stage, "image", Cell(row, column), count)
                whole = Op("stage", ("first", last) if held else (last,), channels * rows * columns * width, "concat")
                peak = max(peak, plan_ops([*count.ops, whole, Op("end", ("stage",), 0)], self.allocation).peak)
        full = sum(macs(node) for node in stage.nodes)
        return Schedule(stage, grid, peak, self.tail(stage), full, self.extra_macs(stage, grid), self.network)

    def tail(self, stage: Stage) -> int:
        """Peak of all that follows a stage."""
        name = stage.cut.name
        if name not in self._tails:
            at = next(i for i, op in enumerate(self.ops) if op.name == name)
            self._tails[name] = plan_ops([Op(name, (), self.ops[at].bytes), *self.ops[at + 1 :]], self.allocation).peak
        return self._tails[name]

    def cheapest(self, stages: Sequence[Stage], grids: Sequence[Interval], budget: int) -> Schedule | None:
        """Of the schedules that need at most `budget` bytes, the one with the fewest multiplications."""
        pairs = [(s, g) for s, g in _pairs(stages, grids) if self.tail(s) <= budget]
        for stage, grid in sorted(pairs, key=lambda pair: self.extra_macs(*pair)):  # sorted keeps the order of equals: fewer parts first
            if (found := self.evaluate(stage, grid)).peak <= budget:
                return found
        return None

    def smallest(self, stages: Sequence[Stage], grids: Sequence[Interval], overhead: float) -> Schedule | None:
        """Of the schedules that add at most `overhead` (a share of the network) multiplications, the one with the lowest peak."""
        pairs = [(s, g) for s, g in _pairs(stages, grids) if self.extra_macs(s, g) <= overhead * max(1, self.network)]
        best: Schedule | None = None
        for stage, grid in sorted(pairs, key=lambda pair: (self.tail(pair[0]), self.extra_macs(*pair))):
            if best is not None and self.tail(stage) >= best.peak:
                break  # what follows needs as much already
            found = self.evaluate(stage, grid)
            if best is None or (found.peak, found.extra_macs) < (best.peak, best.extra_macs):
                best = found
        return best


def _pairs(stages: Sequence[Stage], grids: Sequence[Interval]) -> list[tuple[Stage, Interval]]:
    """All stages with all grids that are no finer than their cut."""
    return [
        (s, g) for s in stages for g in sorted(grids, key=lambda g: g[0] * g[1]) if g[0] <= s.size[0] and g[1] <= s.size[1] and g != (1, 1)
    ]
