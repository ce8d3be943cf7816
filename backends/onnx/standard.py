"""What the dialect becomes with standard operators only (`target: {ops: standard}`): runs on every ONNX runtime, follows the reference."""

from __future__ import annotations

import numpy as np
import torch
from onnx import TensorProto
from torch.fx import Node

from planc.backends.onnx.aten import TABLE as ATEN
from planc.backends.onnx.build import Builder, Lowering
from planc.backends.onnx.codes import TABLE as CODES
from planc.backends.onnx.spatial import TABLE as SPATIAL
from planc.backends.onnx.stored import TABLE as STORED
from planc.compiler.dialect import MASKED, OPS

aten = torch.ops.aten
_GELU = {"gelu": "none", "gelu_tanh": "tanh"}


def _rms_norm(b: Builder, n: Node) -> str:
    x, weight, eps = n.args
    mean = b.op("ReduceMean", b.op("Mul", x, x), b.const([-1], np.int64), keepdims=1)
    scale = b.op("Reciprocal", b.op("Sqrt", b.op("Add", mean, b.const(float(eps)))))
    return b.op("Mul", weight, b.op("Mul", x, scale))


def _rope_table(b: Builder, n: Node) -> tuple[str, str]:
    positions, frequency, scaling = n.args
    wide = b.op("Cast", b.op("Unsqueeze", positions, b.const([2], np.int64)), to=TensorProto.FLOAT)
    angles = b.op("Mul", wide, frequency)
    both = [b.op(kind, angles) for kind in ("Cos", "Sin")]
    return tuple(both) if scaling == 1.0 else tuple(b.op("Mul", v, b.const(float(scaling))) for v in both)


def _rope(b: Builder, n: Node) -> str:
    x, cos, sin = n.args
    half, width = int(cos.meta["val"].shape[-1]), int(x.meta["val"].shape[-1])
    sizes = [half, half] + ([width - 2 * half] if width > 2 * half else [])
    parts = b.op("Split", x, b.const(sizes, np.int64), axis=3, outputs=len(sizes))
    c, s = (b.once(("heads", t), lambda t=t: b.op("Unsqueeze", t, b.const([2], np.int64))) for t in (cos, sin))
    low = b.op("Sub", b.op("Mul", parts[0], c), b.op("Mul", parts[1], s))
    high = b.op("Add", b.op("Mul", parts[1], c), b.op("Mul", parts[0], s))
    return b.op("Concat", low, high, *parts[2:], axis=3)


def _glu(b: Builder, n: Node) -> str:
    gate, up, activation = n.args
    if activation == "silu":
        active = b.op("Mul", gate, b.op("Sigmoid", gate))
    elif activation == "relu":
        active = b.op("Relu", gate)
    else:
        active = b.op("Gelu", gate, approximate=_GELU[str(activation)])
    return b.op("Mul", active, up)


def _attend(b: Builder, n: Node, k: str, v: str, mask: str) -> str:
    """softmax(q k^T scale + mask) v for q [B,R,H,D], k and v [B,G,T,D]; the softmax as single steps with the sum in float64, so that masked
    keys between a tree row and its ancestors leave no trace. Query heads that share keys become more rows of one product."""
    query, value = n.args[0].meta["val"], n.args[2].meta["val"]
    heads, width, groups = int(query.shape[2]), int(query.shape[3]), int(value.shape[2])
    scale, softcap = float(n.args[-4 if n.target is OPS.attention.default else -3]), float(n.args[-1])
    rows = b.op("Mul", b.op("Transpose", n.args[0], perm=[0, 2, 1, 3]), b.const(scale))
    scores = _regroup(b, b.op("MatMul", _regroup(b, rows, groups, heads, width), b.op("Transpose", k, perm=[0, 1, 3, 2])), heads, groups)
    if softcap:
        scores = b.op("Mul", b.op("Tanh", b.op("Div", scores, b.const(softcap))), b.const(softcap))
    scores = b.op("Add", scores, mask)
    weights = b.op("Exp", b.op("Sub", scores, b.op("ReduceMax", scores, b.const([-1], np.int64), keepdims=1)))
    total = b.op("ReduceSum", b.op("Cast", weights, to=TensorProto.DOUBLE), b.const([-1], np.int64), keepdims=1)
    mixed = _regroup(b, b.op("MatMul", _regroup(b, weights, groups, heads), v), heads, groups, int(value.shape[3]))
    out = b.op("Div", mixed, b.op("Cast", total, to=TensorProto.FLOAT))
    return b.op("Transpose", out, perm=[0, 2, 1, 3])


def _regroup(b: Builder, value: str, new: int, old: int, width: int = 0) -> str:
    """[B,old,R,X] -> [B,new,R*old/new,X]; `width` is X where it is known."""
    return value if new == old else b.op("Reshape", value, b.const([0, new, -1, width], np.int64))


def _range(b: Builder, size: str) -> str:
    return b.once(("range", size), lambda: b.op("Range", b.const(0, np.int64), b.scalar(size), b.const(1, np.int64)))


def _hidden(b: Builder, keys: str, slots: str, window: int, causal: bool = True) -> str:
    """Additive mask [B|1,1,R,T]; keys [T], slots [B|1,R]."""
    rows = b.once(("rows", slots), lambda: b.op("Unsqueeze", slots, b.const([1, 3], np.int64)))
    hidden = b.op("Greater", keys, rows) if causal else None
    if window:
        old = b.op("LessOrEqual", keys, b.op("Sub", rows, b.const(window, np.int64)))
        hidden = old if hidden is None else b.op("Or", hidden, old)
    if hidden is None:
        return b.const(0.0)
    return b.op("Where", hidden, b.const(float(MASKED)), b.const(0.0))


def _attention(b: Builder, n: Node) -> str:
    q, k, v, bias, _, causal, window, _ = n.args
    rows = _range(b, b.size(q.meta["val"].shape[1]))
    keys = _range(b, b.size(k.meta["val"].shape[1]))
    slots = b.once(("slots", rows), lambda: b.op("Unsqueeze", rows, b.const([0], np.int64)))
    mask = b.once(("mask", keys, slots, window, causal), lambda: _hidden(b, keys, slots, window, causal))
    if bias is not None:
        mask = b.op("Add", mask, bias)
    turned = [b.op("Transpose", x, perm=[0, 2, 1, 3]) for x in (k, v)]
    return _attend(b, n, turned[0], turned[1], mask)


def _cached_attention(b: Builder, n: Node) -> tuple[str, str, str]:
    q, k, v, past_k, past_v, lengths, bias, _, window, _ = n.args
    rows = b.size(q.meta["val"].shape[1])
    slots = b.once(
        ("slots", lengths),
        lambda: b.op("Add", b.op("Unsqueeze", lengths, b.const([1], np.int64)), b.op("Unsqueeze", _range(b, rows), b.const([0], np.int64))),
    )
    total = b.once(("total", lengths), lambda: b.op("Add", b.op("ReduceMax", lengths, keepdims=1), rows))
    seen = _range(b, total)
    mask = b.once(("mask", lengths, window, bias), lambda: _mask(b, seen, slots, window, bias))
    states = [_write(b, past, new, slots) for past, new in ((past_k, k), (past_v, v))]
    visible = [b.op("Slice", s, b.const([0], np.int64), total, b.const([2], np.int64)) for s in states]
    return _attend(b, n, visible[0], visible[1], mask), states[0], states[1]


def _stored_attention(b: Builder, n: Node) -> tuple[str, str, str]:
    """Stored rows come before the others, and nothing hides them."""
    q, k, v, past_k, past_v, lengths, stored_k, stored_v, bias, _, window, _ = n.args
    rows = b.size(q.meta["val"].shape[1])
    slots = b.once(
        ("slots", lengths),
        lambda: b.op("Add", b.op("Unsqueeze", lengths, b.const([1], np.int64)), b.op("Unsqueeze", _range(b, rows), b.const([0], np.int64))),
    )
    total = b.once(("total", lengths), lambda: b.op("Add", b.op("ReduceMax", lengths, keepdims=1), rows))
    mask = b.once(("mask", lengths, window, bias), lambda: _mask(b, _range(b, total), slots, window, bias))
    shown = b.once(("stored mask", mask), lambda: _before(b, mask, b.op("Shape", stored_k, start=2, end=3), rows))
    states = [_write(b, past, new, slots) for past, new in ((past_k, k), (past_v, v))]
    visible = [b.op("Slice", s, b.const([0], np.int64), total, b.const([2], np.int64)) for s in states]
    joined = [b.op("Concat", stored, own, axis=2) for stored, own in zip((stored_k, stored_v), visible, strict=True)]
    return _attend(b, n, joined[0], joined[1], shown), states[0], states[1]


def _before(b: Builder, mask: str, stored: str, rows: str) -> str:
    """The mask with a zero in front for every stored row."""
    shape = b.op("Concat", b.const([1, 1], np.int64), rows, stored, axis=0)
    return b.op("Concat", b.op("Expand", b.const(0.0), shape), mask, axis=3)


def _mask(b: Builder, seen: str, slots: str, window: int, bias: Node | None) -> str:
    hidden = _hidden(b, seen, slots, 0 if bias is not None else window)
    return hidden if bias is None else b.op("Add", hidden, bias)


def _write(b: Builder, past: Node, new: Node, slots: str) -> str:
    """The cache with k or v [B,R,G,D] written to the slots [B,R]."""
    turned = b.op("Transpose", new, perm=[0, 2, 1, 3])
    wide = b.once(("index", slots), lambda: b.op("Unsqueeze", slots, b.const([1, 3], np.int64)))
    index = b.op("Expand", wide, b.op("Shape", turned))
    return b.op("ScatterElements", past, index, turned, axis=2)


def _segment_bias(b: Builder, n: Node) -> str:
    keys, own = (b.op("Unsqueeze", x, b.const(axes, np.int64)) for x, axes in zip(n.args, ([1, 2], [1, 3]), strict=True))
    return b.op("Where", b.op("Greater", keys, own), b.const(float(MASKED)), b.const(0.0))


def _slot_write(b: Builder, n: Node) -> str:
    past, new, slots = n.args
    return _write(b, past, new, b[slots])


def _attention_probe(b: Builder, n: Node) -> tuple[str, str]:
    """Scores of all rows of the pass, which is short where this is used."""
    q, k, bias, watched, window, scale, softcap = n.args
    heads, width, groups = int(q.meta["val"].shape[2]), int(q.meta["val"].shape[3]), int(k.meta["val"].shape[2])
    rows = b.op("Mul", b.op("Transpose", q, perm=[0, 2, 1, 3]), b.const(float(scale)))
    keys = b.op("Transpose", k, perm=[0, 2, 3, 1])
    scores = _regroup(b, b.op("MatMul", _regroup(b, rows, groups, heads, width), keys), heads, groups)
    if softcap:
        scores = b.op("Mul", b.op("Tanh", b.op("Div", scores, b.const(float(softcap)))), b.const(float(softcap)))
    weights = b.op("ReduceMean", b.op("Softmax", b.op("Add", scores, bias), axis=-1), b.const([1], np.int64), keepdims=0)  # [B, R, T]
    row = b.op("GatherND", weights, b.op("Unsqueeze", watched, b.const([1], np.int64)), batch_dims=1)
    sums = b.op("Squeeze", b.op("MatMul", b.op("Unsqueeze", window, b.const([1], np.int64)), weights), b.const([1], np.int64))
    return row, sums


def _rows_from(b: Builder, n: Node) -> str:
    return b.op("Slice", n.args[0], n.args[1], b.const([2**62], np.int64), b.const([1], np.int64))


TABLE: dict[object, Lowering] = {
    **ATEN,
    **SPATIAL,
    **CODES,
    **STORED,
    OPS.rms_norm.default: _rms_norm,
    OPS.rope_table.default: _rope_table,
    OPS.rope.default: _rope,
    OPS.glu.default: _glu,
    OPS.attention.default: _attention,
    OPS.cached_attention.default: _cached_attention,
    OPS.stored_attention.default: _stored_attention,
    OPS.rows_from.default: _rows_from,
    OPS.segment_bias.default: _segment_bias,
    OPS.slot_write.default: _slot_write,
    OPS.attention_probe.default: _attention_probe,
}
