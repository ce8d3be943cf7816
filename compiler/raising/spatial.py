"""Convolutions and pools with explicit padding on each of the four sides.

Matches   conv2d(pad(x, constant 0), w, b, stride, padding, dilation, groups), max_pool2d, avg_pool2d
Produces  planc::conv2d, planc::max_pool2d, planc::avg_pool2d with pads (top, left, bottom, right)
          planc::upsample2d from upsample_nearest2d by whole factors, and one form of batch_norm

A padding of TensorFlow's SAME (0 above, 1 below), and the overhang of `ceil_mode`, are then pads like any other, and so is what is left of them
in a part of the image.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from planc.compiler.dialect import OPS
from planc.compiler.program import Editor, Program
from planc.compiler.raising.match import aten, calls, rank, shape


def raise_spatial(program: Program) -> Program:
    """Turn two-dimensional convolutions and pools into the dialect's."""
    edit, count = program.edit("raise_spatial"), 0
    for node in list(edit.graph.nodes):
        if node.op != "call_function" or node.target not in _FORMS or rank(node) != 4:
            continue
        with edit.before(node):
            new = _FORMS[node.target](edit, node)
        if new is not None:
            edit.replace(node, new)
            count += 1
    return edit.done(count, count) if count else program


def _pair(value: Any, default: int) -> list[int]:
    values = [default] if value is None or value == [] else [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def _arguments(node: Node, *defaults: Any) -> list[Any]:
    """Positional arguments from the second on, with defaults for those left out."""
    given = list(node.args[1:])
    return given + list(defaults[len(given) :])


def _conv(edit: Editor, node: Node) -> Node | None:
    weight, bias, stride, padding, dilation, groups = _arguments(node, None, None, 1, 0, 1, 1)
    source: Any = node.args[0]
    dilation = _pair(dilation, 1)
    if isinstance(padding, str):
        extents = [d * (k - 1) for d, k in zip(dilation, shape(weight)[2:], strict=True)] if padding == "same" else [0, 0]
        pads = [e // 2 for e in extents] + [e - e // 2 for e in extents]
    else:
        pads = _pair(padding, 0) * 2
    if (outer := _zero_pads(source)) is not None:
        source, pads = source.args[0], [a + b for a, b in zip(pads, outer, strict=True)]
    return edit.call(OPS.conv2d.default, source, weight, bias, _pair(stride, 1), pads, dilation, groups)


def _zero_pads(node: Any) -> list[int] | None:
    """Pads (top, left, bottom, right) of a call that pads the last two dimensions with zeros, or None."""
    if not calls(node, aten.pad.default, aten.constant_pad_nd.default):
        return None
    sides, *rest = node.args[1:]
    constant = node.target is aten.constant_pad_nd.default or not rest or rest[0] == "constant"
    value = rest[0] if node.target is aten.constant_pad_nd.default and rest else rest[1] if len(rest) > 1 else 0
    if not constant or value not in (None, 0) or len(sides) > 4 or not all(isinstance(s, int) and s >= 0 for s in sides):
        return None
    left, right, top, bottom = (*sides, 0, 0)[:4]
    return [top, left, bottom, right]


def _overhang(node: Node, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil: bool) -> list[int] | None:
    """Pads with what `ceil_mode` adds below and at the right; None where sizes are not known."""
    pads = padding * 2
    if not ceil:
        return pads
    source: Any = node.args[0]
    for i in range(2):
        size, made = shape(source)[2 + i], shape(node)[2 + i]
        if not isinstance(size, int) or not isinstance(made, int):
            return None
        pads[2 + i] += max(0, (made - 1) * stride[i] + (kernel[i] - 1) * dilation[i] + 1 - size - 2 * padding[i])
    return pads


def _max_pool(edit: Editor, node: Node) -> Node | None:
    kernel, stride, padding, dilation, ceil = _arguments(node, None, None, 0, 1, False)
    kernel, dilation = _pair(kernel, 1), _pair(dilation, 1)
    stride = kernel if stride in (None, []) else _pair(stride, 1)
    pads = _overhang(node, kernel, stride, _pair(padding, 0), dilation, ceil)
    return None if pads is None else edit.call(OPS.max_pool2d.default, node.args[0], kernel, stride, pads, dilation)


def _avg_pool(edit: Editor, node: Node) -> Node | None:
    kernel, stride, padding, ceil, counted, divisor = _arguments(node, None, None, 0, False, True, None)
    kernel = _pair(kernel, 1)
    stride = kernel if stride in (None, []) else _pair(stride, 1)
    pads = _overhang(node, kernel, stride, _pair(padding, 0), [1, 1], ceil)
    hangs_over = pads is not None and pads[2:] != pads[:2]
    if pads is None or divisor is not None or (hangs_over and counted):  # the divisor would count pads, but not the overhang
        return None
    return edit.call(OPS.avg_pool2d.default, node.args[0], kernel, stride, pads, bool(counted))


def _upsample(edit: Editor, node: Node) -> Node | None:
    """Nearest neighbour by whole factors; other sizes stay as they are."""
    source: Any = node.args[0]
    sizes = list(zip(shape(node)[2:], shape(source)[2:], strict=True))
    if not all(isinstance(new, int) and isinstance(old, int) and new % old == 0 for new, old in sizes):
        return None
    return edit.call(OPS.upsample2d.default, source, [new // old for new, old in sizes])


def _norm(edit: Editor, node: Node) -> Node | None:
    """The inference form that functionalisation makes, as the plain operation."""
    source: Any = node.args[0]
    if node.args[1] != 0 or not calls(source, aten._native_batch_norm_legit_no_training.default):
        return None
    *tensors, momentum, eps = source.args
    return edit.call(aten.batch_norm.default, *tensors, False, momentum, eps, False)


_FORMS: dict[Any, Any] = {
    operator.getitem: _norm,
    aten.upsample_nearest2d.vec: _upsample,
    aten.conv2d.default: _conv,
    aten.conv2d.padding: _conv,
    aten.max_pool2d.default: _max_pool,
    aten.avg_pool2d.default: _avg_pool,
}
