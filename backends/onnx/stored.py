"""Blocks that a cache stored (`runtime/kv/stores`), decoded by standard operators: one layer at a time is dense, and only during a pass."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto
from torch.fx import Node

from planc.backends.onnx.build import Builder, Lowering
from planc.compiler.dialect import OPS


def _float(b: Builder, value: object) -> str:
    return str(b.op("Cast", value, to=TensorProto.FLOAT))


def _shape(b: Builder, *sizes: int) -> str:
    """A shape whose zeros stand for sizes that stay."""
    return b.const(list(sizes), np.int64)


def _unpacked(b: Builder, packed: Node, bits: int) -> str:
    """Codes [N,G,T,D] uint8 of bytes [N,G,T,D*bits/8], low bits first."""
    if bits == 8:
        return b[packed]
    heads, tokens, width = packed.meta["val"].shape[1:]
    shifts = b.const(np.arange(0, 8, bits), np.uint8)
    parts = b.op("BitShift", b.op("Unsqueeze", packed, b.const([4], np.int64)), shifts, direction="RIGHT")
    codes = b.op("BitwiseAnd", parts, b.const(2**bits - 1, np.uint8))
    return str(b.op("Reshape", codes, _shape(b, -1, heads, tokens, width * 8 // bits)))


def _int8(b: Builder, n: Node) -> str:
    codes, scale = n.args
    return str(b.op("Mul", _float(b, codes), _float(b, scale)))


def _quantized(b: Builder, n: Node) -> str:
    packed, scale, zero, bits, group, keys = n.args
    heads, tokens, width = n.meta["val"].shape[1:]
    codes = _float(b, _unpacked(b, packed, bits))
    grouped = (-1, heads, tokens // group, group, width) if keys else (-1, heads, tokens, width // group, group)
    wide = [b.op("Unsqueeze", _float(b, x), b.const([3 if keys else 4], np.int64)) for x in (scale, zero)]
    rows = b.op("Add", b.op("Mul", b.op("Reshape", codes, _shape(b, *grouped)), wide[0]), wide[1])
    return str(b.op("Reshape", rows, _shape(b, -1, heads, tokens, width)))


def _bitmap(b: Builder, n: Node) -> str:
    bits, values = n.args
    marks = b.op("Cast", _unpacked(b, bits, 1), to=TensorProto.INT32)
    counts = b.op("CumSum", marks, b.const(3, np.int64))
    places = b.op("Max", b.op("Sub", counts, b.const(1, np.int32)), b.const(0, np.int32))
    return str(b.op("Mul", b.op("GatherElements", _float(b, values), places, axis=3), _float(b, marks)))


def _corrected(b: Builder, n: Node) -> str:
    rows, left, right, places, deltas, axis = n.args
    out = b[rows]
    if left is not None:
        turned = b.op("Transpose", _float(b, right), perm=[0, 1, 3, 2])
        out = b.op("Add", out, b.op("MatMul", _float(b, left), turned))
    if places is not None:
        indices = b.op("Cast", places, to=TensorProto.INT64)
        out = b.op("ScatterElements", out, indices, _float(b, deltas), axis=axis, reduction="add")
    return str(out)


TABLE: dict[object, Lowering] = {
    OPS.stored_int8.default: _int8,
    OPS.stored_quantized.default: _quantized,
    OPS.stored_bitmap.default: _bitmap,
    OPS.stored_corrected.default: _corrected,
}
