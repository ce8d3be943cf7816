"""What ATen ops become in ONNX: one table, op -> function."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from planc.backends.onnx.build import MICROSOFT, Builder, Lowering, onnx_dtype, unsupported
from planc.compiler.dialect import OPS
from planc.compiler.program import Program

aten = torch.ops.aten
TABLE: dict[Any, Lowering] = {}


def lowers(*targets: Any) -> Callable[[Lowering], Lowering]:
    """Register a lowering for ATen ops."""

    def register(function: Lowering) -> Lowering:
        TABLE.update(dict.fromkeys(targets, function))
        return function

    return register


def _number(b: Builder, value: Any, like: Node) -> Any:
    """A Python number as a constant of the result's type; nodes pass through."""
    if isinstance(value, Node):
        if (
            isinstance(value.meta["val"], torch.Tensor)
            and value.meta["val"].dtype != like.meta["val"].dtype
            and value.meta["val"].dtype is not torch.bool
        ):
            return b.op("Cast", value, to=b.dtype(like))
        return value
    dtype = {torch.float32: np.float32, torch.int64: np.int64, torch.float64: np.float64, torch.float16: np.float16, torch.bool: bool}
    return b.const(value, dtype[like.meta["val"].dtype])


def _binary(kind: str) -> Lowering:
    def lower(b: Builder, n: Node) -> str:
        left, right = n.args[:2]
        alpha = n.kwargs.get("alpha", 1)
        right = _number(b, right, n)
        if alpha != 1:
            right = b.op("Mul", right, _number(b, alpha, n))
        return b.op(kind, _number(b, left, n), right)

    return lower


for _kind, _targets in {
    "Add": (aten.add.Tensor, aten.add.Scalar),
    "Sub": (aten.sub.Tensor, aten.sub.Scalar),
    "Mul": (aten.mul.Tensor, aten.mul.Scalar),
    "Div": (aten.div.Tensor, aten.div.Scalar),
    "Pow": (aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor),
}.items():
    lowers(*_targets)(_binary(_kind))


@lowers(aten.rsub.Scalar, aten.rsub.Tensor)
def _rsub(b: Builder, n: Node) -> str:
    return b.op("Sub", _number(b, n.args[1], n), _number(b, n.args[0], n))


def _unary(kind: str, **attributes: Any) -> Lowering:
    return lambda b, n: b.op(kind, n.args[0], **attributes)


for _kind, _target in {
    "Tanh": aten.tanh.default,
    "Relu": aten.relu.default,
    "Neg": aten.neg.default,
    "Sqrt": aten.sqrt.default,
    "Exp": aten.exp.default,
    "Sigmoid": aten.sigmoid.default,
    "Cos": aten.cos.default,
    "Sin": aten.sin.default,
    "Abs": aten.abs.default,
    "Erf": aten.erf.default,
    "Log": aten.log.default,
}.items():
    lowers(_target)(_unary(_kind))


@lowers(aten.rsqrt.default)
def _rsqrt(b: Builder, n: Node) -> str:
    return b.op("Reciprocal", b.op("Sqrt", n.args[0]))


@lowers(aten.silu.default)
def _silu(b: Builder, n: Node) -> str:
    return b.op("Mul", n.args[0], b.op("Sigmoid", n.args[0]))


@lowers(aten.gelu.default)
def _gelu(b: Builder, n: Node) -> str:
    return b.op("Gelu", n.args[0], approximate=n.kwargs.get("approximate", "none"))


@lowers(aten.embedding.default)
def _embedding(b: Builder, n: Node) -> str:
    return b.op("Gather", n.args[0], n.args[1], axis=0)


def reads(program: Program, name: str) -> int:
    """How many nodes of the main graph read a parameter."""
    return sum(len(n.users) for n in program.main.nodes if n.op == "get_attr" and n.target == name)


@lowers(aten.linear.default)
def _linear(b: Builder, n: Node) -> str:
    x, weight = n.args[:2]
    bias = n.args[2] if len(n.args) > 2 else None
    assert isinstance(weight, Node)
    coded = weight.target is OPS.decode_bf16.default
    if weight.op != "get_attr" and not coded:
        product = b.op("MatMul", x, b.op("Transpose", weight, perm=[1, 0]))
    elif (len(weight.users) if coded else reads(b.program, str(weight.target))) > 1:  # tied with the embedding: keep one copy
        shared = b[weight]
        product = (
            b.op("FusedMatMul", x, shared, domain=MICROSOFT, transB=1)
            if b.fused
            else b.op("MatMul", x, b.op("Transpose", shared, perm=[1, 0]))
        )
    elif coded:
        product = b.op("MatMul", x, b.coded(weight, transposed=True))
    else:
        product = b.op("MatMul", x, b.param(str(weight.target), lambda w: w.T, ".T"))
    return product if bias is None else b.op("Add", product, bias)


@lowers(OPS.block_diagonal.default)
def _block_diagonal(b: Builder, n: Node) -> str:
    """One small product per block, with the blocks as a batch."""
    x, blocks = n.args
    count, outputs, inputs = map(int, blocks.meta["val"].shape)
    lead = x.meta["val"].dim() - 1
    swapped = [*range(lead - 1), lead, lead - 1, lead + 1]  # the last axis in front and that of the blocks
    cut = b.op("Transpose", b.op("Reshape", x, b.const([0] * lead + [count, inputs], np.int64)), perm=swapped)
    product = b.op("MatMul", cut, b.param(str(blocks.target), lambda w: w.transpose(0, 2, 1), ".T"))
    return b.op("Reshape", b.op("Transpose", product, perm=swapped), b.const([0] * lead + [count * outputs], np.int64))


@lowers(aten.addmm.default)
def _addmm(b: Builder, n: Node) -> str:
    return b.op("Gemm", n.args[1], n.args[2], n.args[0])


@lowers(aten.matmul.default, aten.bmm.default, aten.mm.default)
def _matmul(b: Builder, n: Node) -> str:
    return b.op("MatMul", *n.args[:2])


@lowers(aten.layer_norm.default)
def _layer_norm(b: Builder, n: Node) -> str:
    x, axes, weight, bias = (list(n.args) + [None, None])[:4]
    eps = n.args[4] if len(n.args) > 4 else 1e-5
    if weight is None:
        weight = b.const(np.ones(axes, np.float32))
    return b.op("LayerNormalization", x, weight, bias, axis=-len(axes), epsilon=float(eps))


@lowers(
    aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.flatten.using_ints, aten._unsafe_view.default
)
def _reshape(b: Builder, n: Node) -> str:
    x = n.args[0]
    assert isinstance(x, Node)
    if n.target is aten.unsqueeze.default:
        return b.op("Unsqueeze", x, b.const([n.args[1]], np.int64))
    return b.reshape(b[x], x.meta["val"].shape, n.meta["val"].shape)


@lowers(aten.transpose.int, aten.permute.default, aten.t.default)
def _transpose(b: Builder, n: Node) -> str:
    rank = n.meta["val"].dim()
    if n.target is aten.permute.default:
        order = [int(d) % rank for d in n.args[1]]
    else:
        order = list(range(rank))
        i, j = (0, 1) if n.target is aten.t.default else (int(n.args[1]) % rank, int(n.args[2]) % rank)
        order[i], order[j] = order[j], order[i]
    return b.op("Transpose", n.args[0], perm=order)


def _is_range(n: Node) -> bool:
    return len(n.args) == 4 and all(isinstance(a, int) for a in n.args[1:])


@lowers(aten.slice.Tensor)
def _slice(b: Builder, n: Node) -> str:
    x, axis, start, end, step = (list(n.args) + [0, None, None, 1][len(n.args) - 1 :])[:5]
    inner: Any = x
    if inner.target is aten.slice.Tensor and len(inner.users) == 1 and _is_range(inner) and _is_range(n) and inner.args[1] != axis:
        ranges = [[m.args[i] for m in (inner, n)] for i in (2, 3, 1)]  # both axes at once: the range of the first is never made
        return b.op("Slice", inner.args[0], *(b.const(values, np.int64) for values in ranges))
    edges = [
        b.op("Reshape", e, b.const([1], np.int64)) if isinstance(e, Node) else b.const([d if e is None else e], np.int64)
        for e, d in ((start, 0), (end, 2**62))
    ]
    return b.op("Slice", x, *edges, b.const([axis], np.int64), b.const([step], np.int64))


@lowers(aten.select.int)
def _select(b: Builder, n: Node) -> str:
    return b.op("Gather", n.args[0], b.const(n.args[2], np.int64), axis=n.args[1])


@lowers(aten.index_select.default)
def _index_select(b: Builder, n: Node) -> str:
    x, axis, index = n.args
    last = n.meta["val"].dim() - 1
    if axis % (last + 1) != last:
        return b.op("Gather", x, index, axis=axis)
    # along the last axis Gather would copy number by number, which takes four times as long
    others = b.op("Shape", x, start=0, end=last)  # some of these sizes, such as the rows of logits, are known only when it runs
    everywhere = b.op("Expand", index, b.op("Concat", others, b.op("Shape", index), axis=0))
    return b.op("GatherElements", x, everywhere, axis=axis)


@lowers(aten.split.Tensor, aten.chunk.default, aten.split_with_sizes.default)
def _split(b: Builder, n: Node) -> tuple[str, ...]:
    axis = n.args[2] if len(n.args) > 2 else 0
    sizes = [int(v.shape[axis]) for v in n.meta["val"]]
    out = b.op("Split", n.args[0], b.const(sizes, np.int64), axis=axis, outputs=len(sizes))
    return out if len(sizes) > 1 else (out,)


@lowers(aten.unbind.int)
def _unbind(b: Builder, n: Node) -> tuple[str, ...]:
    axis = n.args[1] if len(n.args) > 1 else 0
    return tuple(b.op("Gather", n.args[0], b.const(i, np.int64), axis=axis) for i in range(len(n.meta["val"])))


@lowers(aten.gather.default)
def _gather(b: Builder, n: Node) -> str:
    return b.op("GatherElements", n.args[0], n.args[2], axis=int(n.args[1]))


@lowers(operator.getitem)
def _getitem(b: Builder, n: Node) -> str:
    return b.values[n.args[0]][n.args[1]]


@lowers(aten.cat.default)
def _cat(b: Builder, n: Node) -> str:
    return b.op("Concat", *n.args[0], axis=n.args[1] if len(n.args) > 1 else 0)


@lowers(aten.expand.default)
def _expand(b: Builder, n: Node) -> str:
    parts = [b.size(s) for s in n.meta["val"].shape]
    return b.op("Expand", n.args[0], b.op("Concat", *parts, axis=0))


@lowers(aten.mean.dim, aten.sum.dim_IntList)
def _reduce(b: Builder, n: Node) -> str:
    kind = "ReduceMean" if n.target is aten.mean.dim else "ReduceSum"
    keep = bool(n.args[2]) if len(n.args) > 2 else False
    return b.op(kind, n.args[0], b.const(list(n.args[1]), np.int64), keepdims=int(keep))


@lowers(aten.softmax.int, aten._softmax.default)
def _softmax(b: Builder, n: Node) -> str:
    return b.op("Softmax", n.args[0], axis=n.args[1])


@lowers(aten.argmax.default)
def _argmax(b: Builder, n: Node) -> str:
    x, axis = n.args
    assert isinstance(x, Node)
    top = next((u for u in x.users if u.target is aten.topk.default and u in b.values), None)
    if top is not None and axis in (-1, x.meta["val"].dim() - 1):  # the first of the top k, which is the lowest on ties here as well
        return b.op("Gather", b.values[top][1], b.const(0, np.int64), axis=x.meta["val"].dim() - 1)
    return b.op("ArgMax", n.args[0], axis=n.args[1], keepdims=0, select_last_index=0)


@lowers(aten.topk.default)
def _topk(b: Builder, n: Node) -> tuple[str, ...]:
    return b.op("TopK", n.args[0], b.const([n.args[1]], np.int64), axis=-1, outputs=2)


@lowers(aten.to.dtype, aten._to_copy.default, aten.type_as.default)
def _cast(b: Builder, n: Node) -> str:
    return b.op("Cast", n.args[0], to=onnx_dtype(n.meta["val"].dtype))


@lowers(aten.contiguous.default, aten.clone.default, aten.dropout.default, aten.detach.default)
def _same(b: Builder, n: Node) -> str:
    if n.target is aten.dropout.default and n.args[2] and n.args[1]:
        raise unsupported(n, "active dropout")
    return b[n.args[0]]
