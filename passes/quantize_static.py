"""Run convolutions, and what lies between them, on 8-bit codes with scales fixed by calibration.

Matches   conv2d(x, w, b) and add(x, y), with the relu, relu6, hardtanh or clamp that alone reads them; max_pool2d, upsample2d, slice, cat and
          zero padding of such values
Produces  conv2d_int8 (int8 weights with a step for each output channel, codes in, codes out), add_int8, the same operations on codes;
          quantize and dequantize where codes begin and end
Keeps     exactness of schedules: sums are whole numbers and padding is the code of zero, so parts equal the whole bit for bit
Refuses   a program without convolutions in float32
Paper     integer-arithmetic-only inference (Jacob et al. 2018); `search`: clipping to the least squared error
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.fx import Node

from planc.compiler.calibration import Histogram, calibration_text, collect
from planc.compiler.codes import Fit, Scale, fit_scale
from planc.compiler.dialect import OPS
from planc.compiler.intervals import PADS, maps_read
from planc.compiler.passbase import Context, Pass, Stage
from planc.compiler.program import Editor, Program, module_matches
from planc.runtime.errors import CompileError

aten = torch.ops.aten
_MOVERS = {OPS.max_pool2d.default, OPS.upsample2d.default, aten.slice.Tensor, aten.cat.default, *PADS}
_BOUNDS = {aten.relu.default: (0.0, None), aten.relu6.default: (0.0, 6.0)}
Bounds = tuple[float | None, float | None]


@dataclass
class _Codes:
    """Which values become codes: the function behind every product or sum, and the values that share a scale."""

    products: dict[Node, Node] = field(default_factory=dict)  # the value that becomes codes -> the product or sum that computes it
    moved: list[Node] = field(default_factory=list)
    shares: dict[Node, Node] = field(default_factory=dict)

    def root(self, node: Node) -> Node:
        while node in self.shares:
            node = self.shares[node]
        return node

    def unite(self, a: Node, b: Node) -> None:
        if self.root(a) is not self.root(b):
            self.shares[self.root(a)] = self.root(b)


class QuantizeStatic(Pass):
    """Run convolutions on 8-bit codes with scales fixed by calibration."""

    stage: ClassVar[Stage] = Stage.NUMERICS
    conflicts: ClassVar[tuple[str, ...]] = ("quantize_static",)
    calibrates: ClassVar[bool] = True
    range: Fit = Field(
        default="peak",
        description="peak: the smallest and largest value that calibration saw are the ends of a map's range; search: the range of least squared "
        "error",
    )
    keep: tuple[str, ...] = Field(default=(), description="module patterns whose convolutions stay in float")

    def apply(self, program: Program, context: Context) -> Program:
        """Find the values that become codes, see what range they have, and rewrite what computes them."""
        if any(change.pass_name == self.key for change in program.history):
            return program
        convolutions = [n for n in program.main.nodes if n.target is OPS.conv2d.default]
        chosen = {n for n in convolutions if _is_float(n) and not self._kept(n)}
        if not chosen:
            raise CompileError(
                "pass-refused",
                "there are no convolutions in float32 to quantise",
                where=f"pass {self.key}",
                fix="remove this pass; dense layers are for quantize_weights",
            )
        codes = _find(program, chosen)
        entries = {x for conv in chosen if (x := conv.args[0]) not in codes.products and x not in codes.moved}
        wanted = {node: {Histogram} for node in (*codes.products, *entries)}
        images = calibration_text(context, self.key)
        seen = collect(program, wanted, images, context.progress)  # type: ignore[arg-type]
        groups: dict[Node, Histogram] = {}
        for node in wanted:
            groups.setdefault(codes.root(node), Histogram()).merge(seen[node, Histogram])  # type: ignore[index]
        scales = {root: fit_scale(histogram, self.range) for root, histogram in groups.items()}
        rewriter = _Rewriter(program.edit(self.key), codes, scales)
        for node in program.main.nodes:
            rewriter.step(node)
        left = len(convolutions) - len(chosen)
        notes = (f"{len(codes.products)} products and sums on codes, {len(scales)} scales, {len(images)} images",)
        return rewriter.edit.done(len(convolutions), len(chosen), (*notes, *([f"{left} convolutions stay in float"] if left else [])))

    def _kept(self, conv: Node) -> bool:
        return any(module_matches(str(conv.args[1].target), pattern) for pattern in self.keep)  # type: ignore[union-attr]


def _is_float(conv: Node) -> bool:
    parameters = [a for a in conv.args[1:3] if a is not None]
    ours = all(isinstance(a, Node) and a.op == "get_attr" for a in parameters)
    return ours and conv.meta["val"].dtype is torch.float32 and conv.args[0].meta["val"].dtype is torch.float32  # type: ignore[union-attr]


def _find(program: Program, chosen: set[Node]) -> _Codes:
    codes = _Codes()
    have: set[Node] = set()
    for node in program.main.nodes:
        maps = maps_read(node)
        if node in chosen or (_is_sum(node) and have.issuperset(maps)):
            value = _bounded(node)
            codes.products[value] = node
            have.add(value)
        elif node.target in _MOVERS and have.issuperset(maps) and _moves(node):
            codes.moved.append(node)
            have.add(node)
            for source in maps:
                codes.unite(node, source)
    return codes


def _moves(node: Node) -> bool:
    """Does a node of `_MOVERS` make no values but those that it reads, and zero?"""
    if node.target is aten.cat.default:
        return bool(node.args[1] % 4 == 1)  # type: ignore[operator]
    if node.target not in PADS:
        return True
    legacy = node.target is aten.constant_pad_nd.default
    value = node.args[2 if legacy else 3] if len(node.args) > (2 if legacy else 3) else 0
    return (legacy or len(node.args) < 3 or node.args[2] == "constant") and value in (None, 0)


def _is_sum(node: Node) -> bool:
    if node.target is not aten.add.Tensor or node.kwargs or len(maps_read(node)) != 2:
        return False
    return all(tuple(n.meta["val"].shape) == tuple(node.meta["val"].shape) for n in maps_read(node))  # type: ignore[arg-type]


def _bounds(node: Node) -> Bounds | None:
    """The interval to which a function clips its argument; None for any other function."""
    if node.target in (aten.hardtanh.default, aten.clamp.default):
        low, high = (list(node.args[1:3]) + ([-1.0, 1.0] if node.target is aten.hardtanh.default else [None, None])[len(node.args) - 1 :])[
            :2
        ]
        return (low, high) if not isinstance(low, Node) and not isinstance(high, Node) else None  # type: ignore[return-value]
    return _BOUNDS.get(node.target)


def _bounded(node: Node) -> Node:
    """The clipping function that alone reads a product, for codes clip anyway; else the product."""
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    return reader if reader is not None and _bounds(reader) is not None else node


@dataclass
class _Rewriter:
    """Builds the program on codes, node by node."""

    edit: Editor
    codes: _Codes
    scales: dict[Node, Scale]
    made: dict[Node, Node] = field(default_factory=dict)  # value -> its codes

    def step(self, node: Node) -> None:
        """Rewrite what computes one value; its readers in float read the numbers that the codes stand for."""
        if node not in self.codes.products and node not in self.codes.moved:
            return
        old, scale = self.edit[node], self.scales[self.codes.root(node)]
        product = self.codes.products.get(node)
        with self.edit.before(self.edit[product or node]):
            if product is None:
                new = self._moved(node, scale)
            elif product.target is OPS.conv2d.default:
                new = self._conv(product, scale, *scale.limits(*(_bounds(node) or (None, None))))
            else:
                new = self._sum(product, scale, *scale.limits(*(_bounds(node) or (None, None))))
            self.made[node] = new
            self.edit.replace(old, self.edit.call(OPS.dequantize.default, new, scale.step, scale.zero))

    def _read(self, x: Any) -> tuple[Node, Scale]:
        """The codes of a value; made from its numbers where they begin."""
        scale = self.scales[self.codes.root(x)]
        if x not in self.made:
            self.made[x] = self.edit.call(OPS.quantize.default, self.edit[x], scale.step, scale.zero, 0, scale.last)
        return self.made[x], scale

    def _conv(self, conv: Node, scale: Scale, low: int, high: int) -> Node:
        x, x_scale = self._read(conv.args[0])
        weight, bias, *geometry = conv.args[1:7]
        values, steps, whole = integers(
            self.edit.params[weight.target],  # type: ignore[index,union-attr]
            None if bias is None else self.edit.params[bias.target],  # type: ignore[index,union-attr]
            x_scale,
        )
        name = f"{weight.target}.{conv.name}"  # type: ignore[union-attr]
        return self.edit.call(
            OPS.conv2d_int8.default,
            x,
            self.edit.param(f"{name}.int8", values),
            None if whole is None else self.edit.param(f"{name}.bias", whole),
            *geometry,
            self.edit.param(f"{name}.steps", steps),
            x_scale.step,
            x_scale.zero,
            scale.step,
            scale.zero,
            low,
            high,
        )

    def _sum(self, node: Node, scale: Scale, low: int, high: int) -> Node:
        (a, a_scale), (b, b_scale) = (self._read(x) for x in node.args)
        steps = (a_scale.step, a_scale.zero, b_scale.step, b_scale.zero, scale.step, scale.zero)
        return self.edit.call(OPS.add_int8.default, a, b, *steps, low, high)

    def _moved(self, node: Node, scale: Scale) -> Node:
        if node.target in PADS:
            return self.edit.call(aten.constant_pad_nd.default, self._read(node.args[0])[0], node.args[1], scale.zero)
        args = torch.fx.node.map_arg(node.args, lambda n: self._read(n)[0])
        return self.edit.call(node.target, *args)  # type: ignore[arg-type]


def integers(weight: Tensor, bias: Tensor | None, x: Scale) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weights [N,...] as int8 with the step of each output [N] float32, and the bias in whole products of steps, int32."""
    peak = weight.abs().flatten(1).amax(1)
    steps = torch.where(peak > 0, peak, 1.0) / 127.0
    values = (weight / steps.reshape(-1, *[1] * (weight.dim() - 1))).round().to(torch.int8)
    if bias is None:
        return values, steps, None
    whole = (bias.double() / (steps.double() * x.step)).round().clamp(-(2**30), 2**30)
    return values, steps, whole.to(torch.int32)
