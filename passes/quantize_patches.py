"""Give every part of a patch-wise schedule its own bits: 8 where its values have outliers, else 8, 4 or 2 for each map.

Matches   the parts that `patchwise` made of a program on codes (`quantize_static`)
Produces  the same operations with fewer codes, of scales fitted to the part; the last map of a part keeps the scale that all parts share
Keeps     parts with outliers as they are, and with them the whole program where all bits are 8
Refuses   programs without parts on codes; a budget that the fewest bits exceed
Paper     QuantMCU (13): value-driven patch classification, and search by saved bit operations against lost entropy
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.fx import Node

from planc.compiler.calibration import CodeCounts, calibration_text, collect
from planc.compiler.codes import Scale, least_error
from planc.compiler.dialect import OPS
from planc.compiler.intervals import Interval
from planc.compiler.memory import Allocation, bits_of, ops_of, plan_ops
from planc.compiler.passbase import Context, Pass, Stage
from planc.compiler.patches import macs
from planc.compiler.program import Editor, Program
from planc.runtime.errors import CompileError

aten = torch.ops.aten
WIDTHS = (8, 4, 2)
WEIGHT_BITS = 8
_ALL = torch.arange(256, dtype=torch.float64)
#: operation -> where (scale, zero) of what it reads begin, and where those of what it makes
_READ = {OPS.conv2d_int8.default: {0: 8}, OPS.add_int8.default: {0: 2, 1: 4}, OPS.dequantize.default: {0: 1}}
_MADE = {OPS.quantize.default: 1, OPS.conv2d_int8.default: 10, OPS.add_int8.default: 6}


@dataclass(eq=False)
class Map:
    """Values of one part that share a scale: those that an operation computes, and the same ones elsewhere."""

    part: Interval
    makers: list[Node]
    nodes: set[Node]
    shared: bool = False  # read outside the part: its scale is everybody's
    bits: int = 8

    @cached_property
    def scale(self) -> Scale:
        """The scale that `quantize_static` gave it."""
        maker = self.makers[0]
        at = _MADE[maker.target]
        return Scale(maker.args[at], maker.args[at + 1])  # type: ignore[arg-type]

    @cached_property
    def work(self) -> int:
        """Bit operations of what reads it, for each of its bits; a sum takes one for each bit."""
        readers = {reader for node in self.nodes for reader in node.users}
        sums = sum(_elements(r) for r in readers if r.target is OPS.add_int8.default)
        return WEIGHT_BITS * sum(macs(r) for r in readers if r.target is OPS.conv2d_int8.default) + sums


@dataclass
class Part:
    """One part: its maps in the order of the data flow."""

    place: Interval
    maps: list[Map] = field(default_factory=list)


class QuantizePatches(Pass):
    """Give every part of a patch-wise schedule its own bits (QuantMCU)."""

    stage: ClassVar[Stage] = Stage.SCHEDULE
    after: ClassVar[tuple[str, ...]] = ("patchwise",)
    requires: ClassVar[tuple[str, ...]] = ("quantize_static", "patchwise")
    conflicts: ClassVar[tuple[str, ...]] = ("quantize_patches",)
    calibrates: ClassVar[bool] = True
    classes: Literal["outliers", "random"] = Field(
        "outliers", description="which parts keep 8 bits: those whose values have outliers, or as many others drawn at random"
    )
    deviations: float = Field(4.0, gt=0, description="an outlier is so many standard deviations or more from the mean of the map")
    fraction: float = Field(
        1e-3, ge=0, lt=1, description="a part has outliers in an image where more than this share of its values are some"
    )
    images: float = Field(0.5, ge=0, le=1, description="a part keeps 8 bits where it has outliers in more than this share of the images")
    entropy: float = Field(
        0.5, ge=0, le=1, description="what lost entropy counts against saved bit operations (lambda): 1 keeps 8 bits, 0 takes the fewest"
    )
    budget: int | None = Field(None, ge=1, description="most bytes of activations that may be live while the parts run, codes packed")
    seed: int = Field(0, description="of classes drawn at random")

    def apply(self, program: Program, context: Context) -> Program:
        """Classify the parts, choose bits map by map, meet the budget, and rewrite."""
        if any(change.pass_name == self.key for change in program.history):
            return program
        parts = find_parts(program)
        if not parts or not any(part.maps for part in parts):
            raise CompileError(
                "pass-refused",
                "no part of a schedule computes with codes",
                where=f"pass {self.key}",
                fix="let quantize_static and patchwise change the program first",
            )
        maps = [m for part in parts for m in part.maps]
        seen = collect(program, {m.makers[0]: {CodeCounts} for m in maps}, calibration_text(context, self.key), context.progress)
        counts = {m: seen[m.makers[0], CodeCounts].value for m in maps}
        outliers = self.classify(parts, counts)
        free = [m for part in parts if part.place not in outliers for m in part.maps if not m.shared]
        scores = self.scores(free, counts)
        for m in free:
            m.bits = max(WIDTHS, key=lambda bits, m=m: scores[m, bits])  # type: ignore[misc]  # of equals the first, which is the widest
        live = _Live(program, maps)
        if self.budget is not None:
            self._shrink(live, free, scores)
        edit = program.edit(self.key)
        narrow = [m for m in free if m.bits < WIDTHS[0]]
        for m in narrow:
            _rewrite(edit, m, _fitted(m, counts[m].sum(0)))
        before, after = (bit_operations(maps, bits) for bits in (WIDTHS[0], None))
        notes = (
            f"{len(outliers)} of {len(parts)} parts keep 8 bits; maps with "
            + ", ".join(f"{b}: {sum(m.bits == b for m in maps)}" for b in WIDTHS),
            f"bit operations of the parts {after / 1e9:.3f} G, {before / max(1, after):.2f} times fewer; {live.peak()[0]} bytes live",
        )
        return edit.done(len(maps), len(narrow), notes) if narrow else program

    def classify(self, parts: Sequence[Part], counts: Mapping[Map, Tensor]) -> set[Interval]:
        """The parts that keep 8 bits. What is looked at is the map that the parts share, where every value belongs to one part."""
        last = {p.place: next((m for m in reversed(p.maps) if m.shared), p.maps[-1]) for p in parts if p.maps}
        total = torch.stack([counts[m].sum(0) for m in last.values()]).sum(0)
        mean = (_ALL * total).sum() / total.sum()
        spread = ((_ALL - mean) ** 2 * total).sum().div(total.sum()).sqrt()
        far = (_ALL - mean).abs() > self.deviations * spread
        shares = {place: counts[m][:, far].sum(1) / counts[m].sum(1) for place, m in last.items()}
        found = {place for place, share in shares.items() if float((share > self.fraction).double().mean()) > self.images}
        if self.classes == "outliers":
            return found
        order = torch.randperm(len(last), generator=torch.Generator().manual_seed(self.seed)).tolist()
        return {list(last)[i] for i in order[: len(found)]}

    def scores(self, maps: Sequence[Map], counts: Mapping[Map, Tensor]) -> dict[tuple[Map, int], float]:
        """Saved bit operations and lost entropy of every map at every width, each as a share of the largest, and weighed."""
        saved = {(m, bits): float(m.work * (WIDTHS[0] - bits)) for m in maps for bits in WIDTHS}
        lost = dict[tuple[Map, int], float]()
        for m in maps:
            total = counts[m].sum(0)
            full = _entropy(total)
            lost |= {(m, bits): full - _entropy(_requantised(m, total, bits)) if bits < WIDTHS[0] else 0.0 for bits in WIDTHS}
        most_saved, most_lost = (max((*of.values(), 1e-12)) for of in (saved, lost))
        return {key: (1 - self.entropy) * saved[key] / most_saved - self.entropy * lost[key] / most_lost for key in saved}

    def _shrink(self, live: _Live, free: Sequence[Map], scores: Mapping[tuple[Map, int], float]) -> None:
        """Where too much is live, narrow the map with the best score, until the budget is met."""
        assert self.budget is not None
        narrower = {bits: WIDTHS[i + 1] for i, bits in enumerate(WIDTHS[:-1])}
        while (peak := live.peak())[0] > self.budget:
            wide = [m for m in peak[1] if m in set(free) and m.bits in narrower]
            if not wide:
                raise CompileError(
                    "pass-refused",
                    f"{peak[0]} bytes are live in a part with the fewest bits that its class allows, more than {self.budget}",
                    where=f"pass {self.key}",
                    fix=f"raise the budget to {peak[0]}, use a finer grid, or raise `deviations`",
                )
            best = max(wide, key=lambda m: scores[m, narrower[m.bits]])
            best.bits = narrower[best.bits]


def find_parts(program: Program) -> list[Part]:
    """The parts of a schedule with what they compute in codes."""
    parts: dict[Interval, Part] = {}
    of: dict[Node, Map] = {}
    for node in program.main.nodes:
        place = node.meta.get("part")
        value = node.meta.get("val")
        if place is None or not isinstance(value, Tensor) or value.dtype is not torch.uint8:
            continue
        part = parts.setdefault(place, Part(place))
        if node.target in _MADE:
            of[node] = Map(place, [node], {node})
            part.maps.append(of[node])
        else:  # the same codes elsewhere, perhaps of several maps
            first, *others = dict.fromkeys(of[source] for source in node.all_input_nodes)
            first.nodes.add(node)
            of[node] = first
            for other in others:
                first.makers += other.makers
                first.nodes |= other.nodes
                of |= dict.fromkeys(other.nodes, first)
                part.maps.remove(other)
    for node, m in of.items():
        m.shared = m.shared or any(reader.meta.get("part") != m.part for reader in node.users)
    return list(parts.values())


def bit_operations(maps: Iterable[Map], bits: int | None = None) -> int:
    """Multiplications of all readers times the bits of both operands; `bits` instead of those of the maps."""
    return sum(m.work * (bits or m.bits) for m in maps)


class _Live:
    """What is live while the parts run, for bits that change."""

    def __init__(self, program: Program, maps: Sequence[Map]) -> None:
        self.allocation = Allocation(packed=True)
        self.ops = ops_of(program, self.allocation)
        self.map_of = {node.name: m for m in maps for node in m.nodes}
        self.inside = {n.name for n in program.main.nodes if n.meta.get("part") is not None}

    def peak(self) -> tuple[int, list[Map]]:
        """Most bytes, and the maps that the operation there reads and makes."""
        ops = []
        for op in self.ops:
            m = self.map_of.get(op.name)
            ops.append(op if m is None else replace(op, bytes=-(-op.bytes * m.bits // 8)))
        live = [(size, name) for name, size in plan_ops(ops, self.allocation).live if name in self.inside]
        size, name = max(live)
        at = next(op for op in self.ops if op.name == name)
        return size, list(dict.fromkeys(self.map_of[n] for n in (*at.reads, name) if n in self.map_of))


def part_bytes(program: Program) -> int:
    """Most bytes that are live while the parts of a program run, codes packed; counted from the graph as it is."""
    allocation = Allocation(packed=True)
    inside = {n.name for n in program.main.nodes if n.meta.get("part") is not None}
    return max(size for name, size in plan_ops(ops_of(program, allocation), allocation).live if name in inside)


def part_bit_operations(program: Program) -> int:
    """Bit operations of the parts of a program, counted from the graph as it is."""
    total = 0
    for node in program.main.nodes:
        if node.meta.get("part") is None:
            continue
        if node.target is OPS.conv2d_int8.default:
            total += macs(node) * WEIGHT_BITS * bits_of(node.args[0])
        elif node.target is OPS.add_int8.default:
            total += _elements(node) * (bits_of(node.args[0]) + bits_of(node.args[1]))
    return total


def _elements(node: Node) -> int:
    channels, rows, columns = node.meta["val"].shape[1:]
    return int(channels) * int(rows) * int(columns)


def _fitted(m: Map, counts: Tensor, bits: int | None = None) -> Scale:
    """The scale of fewer bits for the codes that were seen."""
    numbers = m.scale.decoded(_ALL)
    seen = numbers[counts > 0]
    ends = (float(seen.min()), float(seen.max())) if len(seen) else (0.0, 0.0)
    return least_error(numbers, counts, ends, bits or m.bits)


def _requantised(m: Map, counts: Tensor, bits: int) -> Tensor:
    """How often each of the fewer codes occurs."""
    scale = _fitted(m, counts, bits)
    return torch.zeros(2**bits, dtype=torch.float64).index_add(0, scale.codes(m.scale.decoded(_ALL)).long(), counts)


def _entropy(counts: Tensor) -> float:
    """In bits."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * share.log2()).sum())


def _rewrite(edit: Editor, m: Map, scale: Scale) -> None:
    """Let everything that makes or reads a map use its new scale."""
    for maker in m.makers:
        node, at = edit[maker], _MADE[maker.target]
        low, high = (maker.args[at + 2 + i] for i in range(2))
        bounds = scale.limits(*((code - m.scale.zero) * m.scale.step if code != end else None for code, end in ((low, 0), (high, 255))))  # type: ignore[operator]
        node.args = (*node.args[:at], scale.step, scale.zero, *bounds)
    for node in m.nodes:
        for reader in node.users:
            new = edit[reader]
            for operand, at in _READ.get(reader.target, {}).items():
                if reader.args[operand] is node:
                    new.args = (*new.args[:at], scale.step, scale.zero, *new.args[at + 2 :])
            if reader.target is OPS.conv2d_int8.default and reader.args[2] is not None:
                old = edit.params[str(reader.args[2].target)]  # type: ignore[union-attr]
                edit.swap(new, 2, (old.double() * (m.scale.step / scale.step)).round().to(torch.int32), f".{reader.name}")
        if node.target is aten.constant_pad_nd.default:
            edit[node].args = (*edit[node].args[:2], scale.zero)
