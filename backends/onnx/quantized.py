"""What quantised products become in ONNX."""

from __future__ import annotations

import numpy as np
import torch
from onnx import TensorProto
from torch.fx import Node

from planc.backends.onnx.build import MICROSOFT, Builder, Lowering
from planc.compiler.dialect import OPS

aten = torch.ops.aten


def quantized_rows(b: Builder, x: Node) -> tuple[str, str]:
    """x [..., K] float as uint8 around 128, and the scale of each row [..., 1]. Products that read the same x share both.

    QuantizeLinear with one block per row does division, rounding and shift in one node. A row of zeros has scale 0: whatever integers it
    becomes are multiplied by 0 again.
    """

    def make() -> str:
        width, rank = int(x.meta["val"].shape[-1]), x.meta["val"].dim()
        scale = b.op("Mul", b.op("ReduceMax", b.op("Abs", x), b.const([-1], np.int64), keepdims=1), b.const(1.0 / 127.0))
        sizes = str(x.meta["val"].shape[:-1])
        zeros = b.once(("row zeros", sizes), lambda: b.op("Expand", b.const([128], np.uint8), b.op("Shape", scale)))
        values = b.op("QuantizeLinear", x, scale, zeros, axis=rank - 1, block_size=width)
        b.rows[x] = (values, scale)
        return values

    b.once(("rows", x), make)
    return b.rows[x]


def _fixed_step(b: Builder, x: Node, step: Node) -> str:
    """x [..., K] float as uint8 around 128 with one step for all rows."""
    return b.once(("fixed step", x, str(step.target)), lambda: b.op("QuantizeLinear", x, step, b.const(128, np.uint8)))


def _linear_int8(b: Builder, n: Node) -> str:
    x, weight, scale, bias, step = _int8_arguments(n)
    stored, middle = b.param(str(weight.target), lambda w: w.T, ".T"), b.const(128, np.uint8)
    if step is not None:
        out = b.op("MatMulIntegerToFloat", _fixed_step(b, x, step), stored, step, scale, middle, domain=MICROSOFT)
    else:
        values, row_scale = quantized_rows(b, x)
        product = b.op("MatMulIntegerToFloat", values, stored, b.const(1.0), scale, middle, domain=MICROSOFT)
        out = b.op("Mul", product, row_scale)
    return out if bias is None else b.op("Add", out, bias)


def _linear_int8_standard(b: Builder, n: Node) -> str:
    x, weight, scale, bias, step = _int8_arguments(n)
    values, row_scale = quantized_rows(b, x) if step is None else (_fixed_step(b, x, step), b[step])
    sums = b.op("MatMulInteger", values, b.param(str(weight.target), lambda w: w.T, ".T"), b.const(128, np.uint8))
    out = b.op("Mul", b.op("Mul", b.op("Cast", sums, to=TensorProto.FLOAT), scale), row_scale)
    return out if bias is None else b.op("Add", out, bias)


def _int8_arguments(n: Node) -> tuple[Node, Node, Node, Node | None, Node | None]:
    """x, weight, scale, bias, step of a linear_int8."""
    x, weight, scale, bias, step = (*n.args, None)[:5]
    assert isinstance(x, Node) and isinstance(weight, Node) and isinstance(scale, Node)
    assert not isinstance(bias, tuple | list) and not isinstance(step, tuple | list)
    return x, weight, scale, bias, step  # type: ignore[return-value]


def _linear_blocks(b: Builder, n: Node) -> str:
    """MatMulNBits, whose fast path knows only whole zero points: w = s * (q - 8) + (8 - zero) * s, and the second part is constant inside a
    block, so it becomes a small product with the block sums of x."""
    x, packed, scales, zeros, bias, bits, block = n.args
    width = int(block)
    inputs, outputs = int(x.meta["val"].shape[-1]), int(packed.meta["val"].shape[0])
    flat_scales = b.param(str(scales.target), lambda s: s.reshape(-1), ".flat")
    out = b.op(
        "MatMulNBits",
        x,
        packed,
        flat_scales,
        None,
        None,
        bias,
        domain=MICROSOFT,
        K=inputs,
        N=outputs,
        bits=bits,
        block_size=width,
        accuracy_level=4,
    )
    if zeros is None:
        return out
    middle = 2 ** (int(bits) - 1)
    shift = ((middle - b.array(str(zeros.target))) * b.array(str(scales.target))).T
    cut = b.op("Reshape", x, b.const([0] * (x.meta["val"].dim() - 1) + [inputs // width, width], np.int64))
    sums = b.op("ReduceSum", cut, b.const([-1], np.int64), keepdims=0)
    rest = b.op("MatMul", sums, b.tensor(f"{packed.target}.shift", np.ascontiguousarray(shift, dtype=np.float32)))
    return b.op("Add", out, rest)


def _unpacked(b: Builder, packed: str, bits: int, size: int) -> str:
    """Codes [N,K] uint8 of packed bytes, see `unpack_codes`."""
    if bits == 3:
        low, high = b.op("Split", packed, b.const([size // 4, size // 8], np.int64), axis=1, outputs=2)
        above = b.op("BitShift", _unpacked(b, high, 1, size), b.const(2, np.uint8), direction="LEFT")
        return b.op("BitwiseOr", _unpacked(b, low, 2, size), above)
    shifted = b.op("BitShift", b.op("Unsqueeze", packed, b.const([2], np.int64)), b.const(range(0, 8, bits), np.uint8), direction="RIGHT")
    return b.op("Reshape", b.op("BitwiseAnd", shifted, b.const(2**bits - 1, np.uint8)), b.const([0, size], np.int64))


def lookup_parts(b: Builder, n: Node) -> tuple[str, str]:
    """Weights of a linear_lookup as steps around 128, [N,K] uint8, and the scale of each block, flat.

    Everything here hangs on constants: ONNX Runtime computes it once, when the session is made. Files stay small; memory is that of int8.
    """
    x, packed, tables, rows, scales, coarse, offset, _, bits, block = n.args
    size, count = int(x.meta["val"].shape[-1]), int(packed.meta["val"].shape[0])
    places = b.op("Cast", _unpacked(b, b[packed], int(bits), size), to=TensorProto.INT32)
    if rows is not None:
        first = b.op("Mul", b.op("Cast", rows, to=TensorProto.INT32), b.const(2 ** int(bits), np.int32))
        places = b.op("Add", places, b.op("Unsqueeze", first, b.const([1], np.int64)))
    steps = b.op(
        "Gather", b.param(str(tables.target), lambda t: (t.reshape(-1).astype(np.int16) + 128).astype(np.uint8), ".steps"), places, axis=0
    )
    fine = b.op("Mul", b.op("Cast", scales, to=TensorProto.FLOAT), b.op("Div", coarse, b.const(255.0)))
    flat = b.op("Reshape", b.op("Div", b.op("Add", offset, fine), b.const(127.0)), b.const([-1], np.int64))
    return steps, b.op("Slice", flat, b.const([0], np.int64), b.const([count * size // int(block)], np.int64))


def _linear_lookup(b: Builder, n: Node) -> str:
    """MatMulNBits in 8 bits: entries of tables are whole steps."""
    x, packed, bias, block = n.args[0], n.args[1], n.args[7], int(n.args[9])
    size, count = int(x.meta["val"].shape[-1]), int(packed.meta["val"].shape[0])
    steps, scales = lookup_parts(b, n)
    steps = b.op("Reshape", steps, b.const([count, size // block, block], np.int64))
    options = {"K": size, "N": count, "bits": 8, "block_size": block, "accuracy_level": 4}
    return b.op("MatMulNBits", x, steps, scales, None, None, bias, domain=MICROSOFT, **options)


def _linear_lookup_standard(b: Builder, n: Node) -> str:
    x, packed, bias, block = n.args[0], n.args[1], n.args[7], int(n.args[9])
    size, count = int(x.meta["val"].shape[-1]), int(packed.meta["val"].shape[0])
    steps, scales = lookup_parts(b, n)
    cut = b.op("Reshape", b.op("Sub", b.op("Cast", steps, to=TensorProto.FLOAT), b.const(128.0)), b.const([-1, block], np.int64))
    weight = b.op("Mul", cut, b.op("Unsqueeze", scales, b.const([1], np.int64)))
    out = b.op("MatMul", x, b.op("Transpose", b.op("Reshape", weight, b.const([count, size], np.int64)), perm=[1, 0]))
    return out if bias is None else b.op("Add", out, bias)


def _embedding_int8(b: Builder, n: Node) -> str:
    table, scale, ids = n.args
    rows = b.op("Cast", b.op("Gather", table, ids, axis=0), to=TensorProto.FLOAT)
    return b.op("Mul", rows, b.op("Unsqueeze", b.op("Gather", scale, ids, axis=0), b.const([-1], np.int64)))


def _decode_bf16(b: Builder, n: Node) -> str | None:
    """A matrix that one product reads is stored in the product's own order instead, see `_linear` in aten.py."""
    alone = len(n.users) == 1 and next(iter(n.users)).target is aten.linear.default
    return None if alone else b.coded(n)


TABLE: dict[object, Lowering] = {
    OPS.linear_int8.default: _linear_int8,
    OPS.linear_blocks.default: _linear_blocks,
    OPS.linear_lookup.default: _linear_lookup,
    OPS.embedding_int8.default: _embedding_int8,
    OPS.decode_bf16.default: _decode_bf16,
}


def _linear_blocks_standard(b: Builder, n: Node) -> str:
    """DequantizeLinear per block, then a plain product: standard from opset 21 on."""
    x, packed, scales, zeros, bias, bits, block = n.args
    inputs = int(x.meta["val"].shape[-1])

    def unpack(p: np.ndarray) -> np.ndarray:
        values = np.stack((p & 15, p >> 4), -1) if bits == 4 else p
        return np.asarray(values.reshape(p.shape[0], -1)[:, :inputs].T, dtype=np.uint8)

    width = int(block)
    stored = b.param(str(packed.target), unpack, ".steps")
    zero = None if zeros is None else b.array(str(zeros.target))
    offset = np.float32(2 ** (int(bits) - 1)) if zero is None else np.repeat(zero, width, 1)[:, :inputs].T.astype(np.float32)
    spread = b.param(str(scales.target), lambda s: np.ascontiguousarray(np.repeat(s, width, 1)[:, :inputs].T), ".spread")
    shift = b.const(float(offset)) if zero is None else b.tensor(f"{zeros.target}.spread", np.ascontiguousarray(offset))
    weight = b.op("Mul", b.op("Sub", b.op("Cast", stored, to=TensorProto.FLOAT), shift), spread)
    out = b.op("MatMul", x, weight)
    return out if bias is None else b.op("Add", out, bias)


STANDARD_TABLE: dict[object, Lowering] = {
    **TABLE,
    OPS.linear_int8.default: _linear_int8_standard,
    OPS.linear_blocks.default: _linear_blocks_standard,
    OPS.linear_lookup.default: _linear_lookup_standard,
}
