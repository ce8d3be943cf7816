"""Which part of its input an operation on images needs for a part of its output: interval arithmetic over a graph, one axis at a time.

A part of an image is the product of an interval of rows and one of columns, so everything below is about a single axis: output positions
[a, b) of an operation need input positions [lo, hi). What of it lies outside the input is padding, and is padding in the part as well, at every
layer: that is what makes a part equal to the same part of the whole, bit for bit where sums are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.fx import Node

from planc.compiler.dialect import CONVOLUTIONS, OPS
from planc.compiler.memory import POINTWISE

aten = torch.ops.aten
Interval = tuple[int, int]
PADS = (aten.pad.default, aten.constant_pad_nd.default)
_LOCAL = POINTWISE | {aten.batch_norm.default, OPS.quantize.default, OPS.dequantize.default, OPS.add_int8.default}


@dataclass(frozen=True)
class Rule:
    """What an operation reads along one axis: windows of `extent` every `stride`, the first at -pad; or, enlarged by `factor`, one position."""

    stride: int = 1
    extent: int = 1
    pad: int = 0
    factor: int = 1

    def needs(self, start: int, stop: int) -> Interval:
        """Input positions for the output positions [start, stop), which may lie outside the input."""
        if self.factor > 1:
            return start // self.factor, (stop - 1) // self.factor + 1
        return start * self.stride - self.pad, (stop - 1) * self.stride - self.pad + self.extent


@dataclass(frozen=True)
class Need:
    """Positions [start, stop) of an input that exist, and how many pads are missing on both sides of them."""

    start: int
    stop: int
    before: int
    after: int

    @classmethod
    def clipped(cls, lo: int, hi: int, size: int) -> Need:
        """[lo, hi) of an axis of `size` positions. A window outside takes one position, which a negative pad crops again."""
        start, stop = max(lo, 0), min(hi, size)
        if start >= stop:
            start = 0 if hi <= 0 else size - 1
            stop = start + 1
        return cls(start, stop, start - lo, hi - stop)


def rules(node: Node) -> tuple[Rule, Rule] | None:
    """The rules of a node for rows and columns; None when a part of its output may need all of its input."""
    if not _is_map(node):
        return None
    target = node.target
    if target in CONVOLUTIONS:
        weight: Any = node.args[1]
        stride, pads, dilation = node.args[3:6]
        return _windows(weight.meta["val"].shape[2:], stride, pads, dilation)
    if target is OPS.max_pool2d.default:
        kernel, stride, pads, dilation = node.args[1:5]
        return _windows(kernel, stride, pads, dilation)
    if target is OPS.avg_pool2d.default:
        kernel, stride, pads = node.args[1:4]
        return _windows(kernel, stride, pads)
    if target is OPS.upsample2d.default:
        factors: Any = node.args[1]
        return Rule(factor=factors[0]), Rule(factor=factors[1])
    if target in _LOCAL:
        sizes = {tuple(n.meta["val"].shape[2:]) for n in maps_read(node)}
        return (Rule(), Rule()) if sizes == {tuple(node.meta["val"].shape[2:])} and _parameters_fit(node) else None
    if target is aten.cat.default and node.args[1] % 4 == 1:  # type: ignore[operator]
        return Rule(), Rule()
    if target in PADS:
        return _pad_rules(node)
    if target is aten.slice.Tensor:
        return _slice_rules(node)
    return None


def _windows(kernel: Any, stride: Any, pads: Any, dilation: Any = (1, 1)) -> tuple[Rule, Rule]:
    rows, columns = (Rule(int(stride[i]), (int(kernel[i]) - 1) * int(dilation[i]) + 1, int(pads[i])) for i in range(2))
    return rows, columns


def _pad_rules(node: Node) -> tuple[Rule, Rule] | None:
    """Constant padding of rows and columns."""
    sides: Any = node.args[1]
    constant = node.target is aten.constant_pad_nd.default or len(node.args) < 3 or node.args[2] == "constant"
    if not constant or len(sides) > 4 or min(sides) < 0:
        return None
    left, _, top, _ = (*sides, 0, 0)[:4]
    return Rule(pad=top), Rule(pad=left)


def _slice_rules(node: Node) -> tuple[Rule, Rule] | None:
    """A range of rows, of columns or of channels."""
    source, axis, start, _, step = (list(node.args) + [0, None, None, 1][len(node.args) - 1 :])[:5]
    start = 0 if start is None else start
    if step != 1 or not isinstance(start, int) or axis % 4 == 0:  # type: ignore[operator]
        return None
    if axis % 4 == 1:  # type: ignore[operator]
        return Rule(), Rule()
    size = source.meta["val"].shape[axis]  # type: ignore[union-attr]
    cut = Rule(pad=-(max(0, start + size) if start < 0 else min(start, size)))
    return (cut, Rule()) if axis % 4 == 2 else (Rule(), cut)  # type: ignore[operator]


def _is_map(node: Any) -> bool:
    """A value [B,C,Y,X] with known rows and columns."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and value.dim() == 4 and all(isinstance(s, int) for s in value.shape[1:])


def maps_read(node: Node) -> list[Node]:
    """The values [B,C,Y,X] that a node reads, parameters aside."""
    return [n for n in node.all_input_nodes if n.op != "get_attr"]


def _parameters_fit(node: Node) -> bool:
    """Are all parameters of a function of one value at a time the same for every position?"""
    parameters = [n.meta["val"] for n in node.all_input_nodes if n.op == "get_attr"]
    if node.target is aten.batch_norm.default:
        return True
    return all(p.dim() < 2 or tuple(p.shape[-2:]) == (1, 1) for p in parameters) and all(p.dim() != 1 or p.numel() == 1 for p in parameters)


@dataclass(frozen=True)
class Demand:
    """What one interval of a stage's output needs of every value before it, along one axis."""

    cover: Mapping[Node, Interval]  # value -> positions of it that are computed
    edges: Mapping[tuple[Node, Node], Need]  # (reader, value) -> positions of the value that the reader needs

    @cached_property
    def form(self) -> tuple[Any, ...]:
        """All sizes and pads: demands of the same form take the same work and memory, wherever they lie."""
        windows = ((n.start - self.cover[source][0], n.stop - n.start, n.before, n.after) for (_, source), n in self.edges.items())
        return (*(stop - start for start, stop in self.cover.values()), *windows)


def demand(nodes: Sequence[Node], axis: int, start: int, stop: int, rule: Callable[[Node], Any] = rules) -> Demand:
    """Walk back from the last of `nodes` (local, in topological order); axis 0 is rows, 1 columns. `rule` may remember `rules`."""
    target = nodes[-1]
    cover: dict[Node, Interval] = {target: (start, stop)}
    edges: dict[tuple[Node, Node], Need] = {}
    for node in reversed(nodes):
        if node not in cover:
            continue
        both = rule(node)
        assert both is not None
        for source in maps_read(node):
            lo, hi = both[axis].needs(*cover[node])
            need = Need.clipped(lo, hi, int(source.meta["val"].shape[2 + axis]))
            edges[node, source] = need
            low, high = cover.get(source, (need.start, need.stop))
            cover[source] = (min(low, need.start), max(high, need.stop))
    return Demand(cover, edges)


def cut(size: int, parts: int) -> list[Interval]:
    """`size` positions in `parts` intervals as equal as can be."""
    return [(size * i // parts, size * (i + 1) // parts) for i in range(parts)]
