"""Run the first layers of an image network part by part, so that their large maps never exist as a whole.

Matches   y = f(x), x the image, f of operations whose output at a place depends on a window of their input
Produces  y = cat(cat(f(x[window]), ...), ...): f once for every cell of a grid over y, with the pads that are left at the image's border
Keeps     outputs: equal bit for bit where sums are exact, else up to the rounding of kernels that depends on the size
Refuses   a split behind an operation that needs all of its input; a budget that no split and grid meet
Paper     MCUNetV2 (25); QuantMCU (13)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field
from torch.fx import Node

from planc.compiler.dialect import CONVOLUTIONS, OPS
from planc.compiler.intervals import PADS, Interval, maps_read
from planc.compiler.memory import Allocation
from planc.compiler.passbase import EXACT, Context, Effect, Pass, Stage
from planc.compiler.patches import GRID, Cell, Emitter, Schedule, Search, cells, grown, is_range, schedule
from planc.compiler.patches import Stage as PatchStage
from planc.compiler.program import Editor, Program, describe, module_path
from planc.runtime.errors import CompileError

aten = torch.ops.aten
_PADDED = {**dict.fromkeys(CONVOLUTIONS, 4), OPS.max_pool2d.default: 3, OPS.avg_pool2d.default: 3}  # operation -> place of its pads


class Patchwise(Pass):
    """Run the first layers of an image network part by part, within a memory budget."""

    stage: ClassVar[Stage] = Stage.SCHEDULE
    conflicts: ClassVar[tuple[str, ...]] = ("patchwise",)
    split: str = Field("auto", description="auto, or the last module (or node) that runs in parts, such as _blocks.3")
    grid: Literal["auto"] | tuple[int, int] = Field("auto", description="auto, or rows and columns of the grid of parts")
    budget: int | None = Field(None, ge=1, description="most bytes of activations; the fewest multiplications that meet it are chosen")
    overhead: float = Field(0.1, ge=0, description="without a budget: most multiplications added, as a share; the least memory is chosen")
    inplace_depthwise: bool = Field(False, description="plan for a runtime whose depthwise convolutions and sums write over their input")
    fuse_residual: bool = Field(False, description="plan for a runtime that adds a product to the residual where that lies")
    element_bytes: int | None = Field(None, ge=1, description="plan for elements of so many bytes; left out: the type's own")

    @property
    def effect(self) -> Effect:
        """The same sums; only kernels that choose their order by the size of a map round otherwise."""
        return EXACT

    @property
    def allocation(self) -> Allocation:
        """What memory is planned for."""
        return Allocation(inplace_depthwise=self.inplace_depthwise, fuse_residual=self.fuse_residual, element_bytes=self.element_bytes)

    def apply(self, program: Program, context: Context) -> Program:
        """Find the schedule and unroll it."""
        if any(change.pass_name == self.key for change in program.history) or self.grid == (1, 1):
            return program
        search = Search(program, self.allocation)
        chosen = self.choose(search)
        if chosen is None:
            return program
        edit = program.edit(self.key)
        cut = edit[chosen.stage.cut]
        with edit.before(cut.next):  # behind everything that the parts read
            new = schedule(chosen.stage, edit[chosen.stage.image], cells(chosen.stage, chosen.grid), _Nodes(edit))
        edit.replace(cut, new)
        parts = chosen.grid[0] * chosen.grid[1]
        before = f"without parts {search.full_peak / 1024:.0f} KiB"
        return edit.done(len(chosen.stage.nodes), len(chosen.stage.nodes), (f"{parts} parts, {chosen.line()}", before))

    def choose(self, search: Search) -> Schedule | None:
        """The schedule that the options ask for; None for the program as it is.

        Raises CompileError[pass-refused] for a split that does not exist or is not possible, and for a budget that nothing meets.
        """
        stages, stop = search.found
        if self.split != "auto":
            stages = [self._named(search.program, stages, stop)]  # type: ignore[assignment]
        if not stages:
            why = f"{stop.target} needs all of its input" if stop is not None else "no value carries all that follows"
            message = f"no layer can run in parts: {why}"
            raise CompileError("pass-refused", message, node=describe(stop) if stop is not None else None, fix="remove patchwise")
        grids = [(rows, columns) for rows in GRID for columns in GRID] if self.grid == "auto" else [self.grid]
        if all(g[0] > s.size[0] or g[1] > s.size[1] for g in grids for s in stages):
            raise CompileError(
                "pass-refused", f"the grid {self.grid} is finer than every cut", where=f"pass {self.key}", fix="use fewer parts"
            )
        if self.budget is None:
            found = search.smallest(stages, grids, math.inf if self.grid != "auto" else self.overhead)
            return found if found is not None and (self.grid != "auto" or found.peak < search.full_peak) else None
        if self.grid == "auto" and search.full_peak <= self.budget:
            return None
        if (found := search.cheapest(stages, grids, self.budget)) is not None:
            return found
        raise self._infeasible(search, search.smallest(stages, grids, math.inf), stop)

    def _named(self, program: Program, stages: Sequence[PatchStage], stop: Node | None) -> PatchStage:
        """The last cut inside the module, or at the node, that `split` names."""
        inside = [s for s in stages if self.split in (s.cut.name, _path(s.cut)) or _path(s.cut).startswith(f"{self.split}.")]
        if inside:
            return inside[-1]
        exists = any(self.split == n.name or f"{_path(n)}.".startswith(f"{self.split}.") for n in program.main.nodes)
        last = f"; the last possible is {_path(stages[-1].cut) or stages[-1].cut.name}" if stages else ""
        reason = f"{stop.target} needs all of its input" if exists and stop is not None else "no cut of the graph lies there"
        raise CompileError(
            "pass-refused",
            f"the layers up to {self.split!r} cannot run in parts: {reason if exists else 'there is no such module or node'}{last}",
            node=describe(stop) if exists and stop is not None else None,
            fix="name an earlier module, or use `split: auto`",
        )

    def _infeasible(self, search: Search, best: Schedule | None, stop: Node | None) -> CompileError:
        parts = best is not None and best.peak < search.full_peak
        least = best.peak if best is not None and parts else search.full_peak
        limit = f"; no part reaches beyond {describe(stop)}, which needs all of its input" if stop is not None else ""
        return CompileError(
            "pass-refused",
            f"no split and grid need at most {self.budget} bytes: the least possible is {least}"
            + (f" ({best.line()})" if best is not None and parts else "")
            + limit,
            where=f"pass {self.key}",
            node=describe(best.stage.cut) if best is not None else None,
            fix=f"raise the budget to {least}, or make the image smaller",
        )


def _path(node: Node) -> str:
    return module_path(node).removeprefix("model").removeprefix(".")


V = TypeVar("V")


class Unroll(Emitter[V]):
    """Does or builds the parts of a stage: `call` on values, with weights from `lookup`."""

    def call(self, target: Any, *args: Any) -> V:
        """An operation on values."""
        raise NotImplementedError

    def lookup(self, node: Node) -> V:
        """A parameter."""
        raise NotImplementedError

    def size(self, value: V, axis: int) -> int:
        """Positions of a value along an axis."""
        raise NotImplementedError

    def crop(self, value: V, node: Node, window: tuple[Interval, Interval]) -> V:
        """A range of every axis that is longer than it."""
        for axis, (start, stop) in enumerate(window, 2):
            if (start, stop) != (0, self.size(value, axis)):
                value = self.call(aten.slice.Tensor, value, axis, start, stop)
        return value

    def apply(self, node: Node, values: Sequence[V], cell: Cell) -> V:
        """The same operation with the pads that are left to do."""
        if is_range(node):
            return values[0]
        maps = maps_read(node)
        given = dict(zip(maps, values, strict=True))
        args = [torch.fx.node.map_arg(a, lambda n: given[n] if n in given else self.lookup(n)) for a in node.args]
        if node.target in _PADDED:
            args[_PADDED[node.target]] = cell.pads(node, maps[0])
        elif node.target in PADS:
            top, left, bottom, right = (max(p, 0) for p in cell.pads(node, maps[0]))
            args[1] = [left, right, top, bottom]
        made = self.call(node.target, *args)
        _, window = grown(node, cell)
        return made if window is None else self.crop(made, node, window)

    def join(self, values: Sequence[V], axis: int) -> V:
        """Side by side."""
        return self.call(aten.cat.default, list(values), axis)


class _Nodes(Unroll[Node]):
    """Builds the parts as nodes of the program; weights are shared."""

    def __init__(self, edit: Editor) -> None:
        self.edit = edit
        self.part: Interval | None = None

    def begin(self, cell: Cell) -> None:
        self.part = cell.place

    def call(self, target: Any, *args: Any) -> Node:
        node = self.edit.call(target, *args)
        if self.part is not None:
            node.meta["part"] = self.part
        return node

    def join(self, values: Sequence[Node], axis: int) -> Node:
        self.part = None
        return super().join(values, axis)

    def lookup(self, node: Node) -> Node:
        return self.edit[node]

    def size(self, value: Node, axis: int) -> int:
        return int(value.meta["val"].shape[axis])
