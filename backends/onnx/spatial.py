"""What operations on images [B,C,Y,X] become: standard operators alone, in every form of the backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.fx import Node

from planc.backends.onnx.build import Builder, Lowering, unsupported
from planc.compiler.dialect import OPS

aten = torch.ops.aten


def cropped(b: Builder, x: Any, pads: list[int], outside: np.generic) -> tuple[Any, list[int]]:
    """x and the pads left to do: where one is negative, padding and cropping become nodes of their own, for no operator takes it."""
    if min(pads) >= 0:
        return x, pads
    top, left, bottom, right = (max(p, 0) for p in pads)
    grown = b.op("Pad", x, b.const([0, 0, top, left, 0, 0, bottom, right], np.int64), b.const(outside), mode="constant")
    start, end = [-min(p, 0) for p in pads[:2]], [min(p, 0) or 2**62 for p in pads[2:]]
    return b.op("Slice", grown, b.const(start, np.int64), b.const(end, np.int64), b.const([2, 3], np.int64)), [0, 0, 0, 0]


def _conv(b: Builder, n: Node) -> str:
    x, weight, bias, stride, pads, dilation, groups = n.args
    x, pads = cropped(b, x, list(pads), np.float32(0))
    return b.op("Conv", x, weight, bias, strides=list(stride), pads=pads, dilations=list(dilation), group=groups)


def _max_pool(b: Builder, n: Node) -> str:
    x, kernel, stride, pads, dilation = n.args
    least = np.float32(-np.inf) if n.meta["val"].is_floating_point() else np.uint8(0)
    x, pads = cropped(b, x, list(pads), least)
    if any(p >= k for p, k in zip(pads, [*kernel, *kernel], strict=True)):  # the operator wants pads smaller than the kernel
        top, left, bottom, right = pads
        x = b.op("Pad", x, b.const([0, 0, top, left, 0, 0, bottom, right], np.int64), b.const(least), mode="constant")
        pads = [0, 0, 0, 0]
    return b.op("MaxPool", x, kernel_shape=list(kernel), strides=list(stride), pads=pads, dilations=list(dilation))


def _avg_pool(b: Builder, n: Node) -> str:
    x, kernel, stride, pads, counted = n.args
    if min(pads) < 0 or any(p >= k for p, k in zip(pads, [*kernel, *kernel], strict=True)):
        raise unsupported(n, "windows that lie in the padding alone")
    return b.op("AveragePool", x, kernel_shape=list(kernel), strides=list(stride), pads=list(pads), count_include_pad=int(counted))


def _pad(b: Builder, n: Node) -> str:
    x, sides, *rest = n.args
    legacy = n.target is aten.constant_pad_nd.default
    mode = "constant" if legacy or not rest else rest[0]
    value = (rest[0] if rest else 0) if legacy else (rest[1] if len(rest) > 1 else None) or 0
    rank = n.meta["val"].dim()
    before, after = [0] * rank, [0] * rank
    for i in range(len(sides) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = int(sides[2 * i]), int(sides[2 * i + 1])
    names = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    kind = np.float32 if n.meta["val"].is_floating_point() else np.uint8
    return b.op("Pad", x, b.const(before + after, np.int64), b.const(kind(value)), mode=names[str(mode)])


def _hardtanh(b: Builder, n: Node) -> str:
    low, high = (n.args[1:] + (-1.0, 1.0)[len(n.args) - 1 :])[:2]
    return b.op("Clip", n.args[0], b.const(np.float32(low)), b.const(np.float32(high)))


def _clamp(b: Builder, n: Node) -> str:
    low, high = (*n.args[1:], None, None)[:2]
    return b.op("Clip", n.args[0], *(None if v is None else b.const(np.float32(v)) for v in (low, high)))


def _batch_norm(b: Builder, n: Node) -> str:
    x, weight, bias, mean, variance = n.args[:5]
    if n.args[5]:
        raise unsupported(n, "batch statistics")
    channels = int(n.meta["val"].shape[1])
    weight = b.const(np.ones(channels, np.float32)) if weight is None else weight
    bias = b.const(np.zeros(channels, np.float32)) if bias is None else bias
    return b.op("BatchNormalization", x, weight, bias, mean, variance, epsilon=float(n.args[7]))


def _adaptive(b: Builder, n: Node) -> str:
    source: Any = n.args[0]
    sizes = [int(s) for s in n.meta["val"].shape[2:]]
    if sizes == [1, 1]:
        return b.op("GlobalAveragePool", source)
    kernel = [int(have) // want for have, want in zip(source.meta["val"].shape[2:], sizes, strict=True)]
    if any(int(have) % want for have, want in zip(source.meta["val"].shape[2:], sizes, strict=True)):
        raise unsupported(n, "windows of different sizes")
    return b.op("AveragePool", source, kernel_shape=kernel, strides=kernel)


def _ceil_pool(b: Builder, n: Node) -> str:
    """What raising left as it was: the divisor counts pads, but not the overhang of `ceil_mode`, as the operator's does."""
    kernel, stride, padding, ceil, counted, divisor = (list(n.args[1:]) + [None, None, 0, False, True, None][len(n.args) - 1 :])[:6]
    if divisor is not None:
        raise unsupported(n, "a divisor of its own")
    kernel, stride, padding = ([v] * 2 if isinstance(v, int) else list(v) * (2 // len(v)) for v in (kernel, stride or kernel, padding))
    return b.op(
        "AveragePool",
        n.args[0],
        kernel_shape=kernel,
        strides=stride,
        pads=padding * 2,
        ceil_mode=int(ceil),
        count_include_pad=int(counted),
    )


def _nearest(b: Builder, n: Node) -> str:
    source: Any = n.args[0]
    sizes = [1.0, 1.0, *(int(new) / int(old) for new, old in zip(n.meta["val"].shape[2:], source.meta["val"].shape[2:], strict=True))]
    return b.op(
        "Resize",
        source,
        None,
        b.const(sizes, np.float32),
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


def _bilinear(b: Builder, n: Node) -> str:
    source: Any = n.args[0]
    sizes = [1.0, 1.0, *(int(new) / int(old) for new, old in zip(n.meta["val"].shape[2:], source.meta["val"].shape[2:], strict=True))]
    corners = "align_corners" if n.args[2] else "half_pixel"
    return b.op("Resize", source, None, b.const(sizes, np.float32), mode="linear", coordinate_transformation_mode=corners)


def _attention(b: Builder, n: Node) -> str:
    """q, k, v [B,H,R,D], all keys visible."""
    q, k, v, mask, dropout, causal = (list(n.args) + [None, 0.0, False][len(n.args) - 3 :])[:6]
    if mask is not None or causal or dropout:
        raise unsupported(n, "a mask")
    scale = n.kwargs.get("scale") or int(q.meta["val"].shape[-1]) ** -0.5
    order = [*range(k.meta["val"].dim() - 2), k.meta["val"].dim() - 1, k.meta["val"].dim() - 2]
    scores = b.op("MatMul", b.op("Mul", q, b.const(float(scale))), b.op("Transpose", k, perm=order))
    return b.op("MatMul", b.op("Softmax", scores, axis=-1), v)


def _hard(kind: str) -> Lowering:
    if kind == "HardSigmoid":
        return lambda b, n: b.op(kind, n.args[0], alpha=1 / 6, beta=0.5)
    return lambda b, n: b.op(kind, n.args[0])


TABLE: dict[Any, Lowering] = {
    OPS.conv2d.default: _conv,
    OPS.max_pool2d.default: _max_pool,
    OPS.avg_pool2d.default: _avg_pool,
    aten.avg_pool2d.default: _ceil_pool,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
    aten.hardtanh.default: _hardtanh,
    aten.relu6.default: lambda b, n: b.op("Clip", n.args[0], b.const(np.float32(0)), b.const(np.float32(6))),
    aten.clamp.default: _clamp,
    aten.hardswish.default: _hard("HardSwish"),
    aten.hardsigmoid.default: _hard("HardSigmoid"),
    aten.batch_norm.default: _batch_norm,
    aten.adaptive_avg_pool2d.default: _adaptive,
    OPS.upsample2d.default: _nearest,
    aten.upsample_nearest2d.vec: _nearest,
    aten.upsample_bilinear2d.vec: _bilinear,
    aten.scaled_dot_product_attention.default: _attention,
}
