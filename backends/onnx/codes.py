"""What operations on codes become: quantised operators in the QDQ form, which ONNX Runtime and other runtimes fuse into integer kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.fx import Node

from planc.backends.onnx.build import Builder, Lowering
from planc.backends.onnx.spatial import cropped
from planc.compiler.dialect import OPS


def _numbers(b: Builder, codes: Any, scale: float, zero: int) -> str:
    return b.once(
        ("numbers", codes, scale, zero),
        lambda: b.op("DequantizeLinear", codes, b.const(np.float32(scale)), b.const(np.uint8(zero))),
    )


def _codes(b: Builder, numbers: Any, scale: float, zero: int, low: int, high: int) -> str:
    codes: str = b.op("QuantizeLinear", numbers, b.const(np.float32(scale)), b.const(np.uint8(zero)))
    return codes if (low, high) == (0, 255) else b.op("Clip", codes, b.const(np.uint8(low)), b.const(np.uint8(high)))


def _conv(b: Builder, n: Node) -> str:
    x, weight, bias, stride, pads, dilation, groups, steps, x_scale, x_zero, *codes = n.args
    x, pads = cropped(b, x, list(pads), np.uint8(x_zero))
    name = str(weight.target)
    zeros = b.tensor(f"{name}.zeros", np.zeros(len(b.array(name)), np.int8))
    kernel = b.op("DequantizeLinear", weight, steps, zeros, axis=0)
    if bias is not None:
        step = np.float32(x_scale) * b.array(str(steps.target))
        whole = b.tensor(f"{bias.target}.zeros", np.zeros(len(step), np.int32))
        bias = b.op("DequantizeLinear", bias, b.tensor(f"{bias.target}.steps", step), whole, axis=0)
    numbers = _numbers(b, x, x_scale, x_zero)
    return _codes(b, b.op("Conv", numbers, kernel, bias, strides=list(stride), pads=pads, dilations=list(dilation), group=groups), *codes)


def _add(b: Builder, n: Node) -> str:
    x, y, x_scale, x_zero, y_scale, y_zero, *codes = n.args
    return _codes(b, b.op("Add", _numbers(b, x, x_scale, x_zero), _numbers(b, y, y_scale, y_zero)), *codes)


TABLE: dict[Any, Lowering] = {
    OPS.quantize.default: lambda b, n: _codes(b, *n.args),
    OPS.dequantize.default: lambda b, n: _numbers(b, *n.args),
    OPS.conv2d_int8.default: _conv,
    OPS.add_int8.default: _add,
}
