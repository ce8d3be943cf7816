"""What the dialect becomes where ONNX Runtime's own operators may be used (`target: {ops: fast}`)."""

from __future__ import annotations

import operator

import numpy as np
import torch
from torch.fx import Node

from planc.backends.onnx.aten import TABLE as ATEN
from planc.backends.onnx.build import MICROSOFT, Builder, Lowering
from planc.backends.onnx.packed import ATTENDING
from planc.backends.onnx.quantized import TABLE as QUANTIZED
from planc.backends.onnx.standard import TABLE as STANDARD
from planc.compiler.dialect import LINEARS, OPS

aten = torch.ops.aten

LEAST_ROWS = "attention.least_rows"  # name of the constant: rows that the attention works on at least


def _add(b: Builder, n: Node) -> str | None:
    """A residual sum that feeds a norm is computed inside the norm."""
    norm = next((u for u in n.users if u.target is OPS.rms_norm.default and u.args[0] is n), None)
    left, right = n.args[:2]
    alike = all(isinstance(a, Node) and str(a.meta["val"].shape) == str(n.meta["val"].shape) for a in (left, right))
    if norm is None or not alike or n.kwargs or n.meta["val"].dim() != 3:
        return ATEN[aten.add.Tensor](b, n)
    normed, _, _, total = b.op(
        "SkipSimplifiedLayerNormalization",
        left,
        right,
        norm.args[1],
        domain=MICROSOFT,
        outputs=4,
        unused=(1, 2),  # mean and deviation, which cost time when they are asked for
        epsilon=float(norm.args[2]),
    )
    b.values[norm] = normed
    return total


def _rms_norm(b: Builder, n: Node) -> str:
    if n in b.values:  # computed with the sum before it
        return b.values[n]
    return b.op("SimplifiedLayerNormalization", n.args[0], n.args[1], axis=-1, epsilon=float(n.args[2]))


def _glu(b: Builder, n: Node) -> str:
    gate, up, activation = n.args
    if activation == "silu":
        active = b.op("QuickGelu", gate, domain=MICROSOFT, alpha=1.0)
    elif activation == "gelu_tanh":
        active = b.op("Gelu", gate, approximate="tanh")
    else:
        return STANDARD[OPS.glu.default](b, n)
    return b.op("Mul", active, up)


def flat(b: Builder, node: Node) -> str:
    """[B,R,H*D] of a value [B,R,H,D]; free where it was viewed from there."""
    source = node.args[0]
    if node.target is aten.view.default and isinstance(source, Node) and source.meta["val"].dim() == 3:
        old, new = source.meta["val"].shape, node.meta["val"].shape
        if old[2] == new[2] * new[3]:
            return b[source]
    if node in b.flat:
        return b.flat[node]
    _, _, heads, width = node.meta["val"].shape
    value = b[node]
    return b.once(("flat", node), lambda: b.op("Reshape", value, b.const([0, 0, heads * width], np.int64)))


def tables(b: Builder, cos: Node) -> tuple[str, str, str]:
    """Positions and the constant cos and sin tables [positions, D/2] behind a `cos` or `sin` node of rope_table."""
    table = cos.args[0]
    positions, frequency, scaling = table.args
    inv_freq = b.program.params[str(frequency.target)]
    both = OPS.rope_table.default(torch.arange(b.positions)[None], inv_freq, scaling)
    name = f"{frequency.target}.{scaling}"
    return b[positions], b.tensor(f"{name}.cos", both[0][0].numpy()), b.tensor(f"{name}.sin", both[1][0].numpy())


def _rope(b: Builder, n: Node) -> None:
    """Left to the attention where it can rotate itself; otherwise one RotaryEmbedding."""
    if not all(_rotates(b, u) and n in u.args[:2] for u in n.users):
        _rotate(b, n)


def _rotate(b: Builder, n: Node) -> str:
    x, cos, _ = n.args
    assert isinstance(x, Node) and isinstance(cos, Node)
    _, _, heads, width = x.meta["val"].shape
    positions, cos_table, sin_table = tables(b, cos)
    turned = 2 * int(cos.meta["val"].shape[-1])
    partial = {"num_heads": heads, "rotary_embedding_dim": turned} if turned != width else {"num_heads": heads}
    out = b.op("RotaryEmbedding", flat(b, x), positions, cos_table, sin_table, domain=MICROSOFT, **partial)
    b.flat[n] = out
    b.values[n] = b.op("Reshape", out, b.const([0, 0, heads, width], np.int64))
    return out


def _grouped(b: Builder, n: Node) -> bool:
    """Whether GroupQueryAttention can do it: keys and values equally wide, in multiples of 8, and no wish for separate products."""
    q, _, v, past_k = n.args[:4]
    width = int(q.meta["val"].shape[3])
    state = next(s for s in b.program.states if f"{s.name}.key" == past_k.target)
    return not state.split and width == v.meta["val"].shape[3] and width % 8 == 0


def _rotates(b: Builder, n: Node) -> bool:
    """Whether the attention operator turns q and k itself: both from ropes with the same tables, width a multiple of 16."""
    if n.target is not OPS.cached_attention.default or not _grouped(b, n):
        return False
    q, k = n.args[:2]
    ropes = all(isinstance(x, Node) and x.target is OPS.rope.default for x in (q, k))
    return ropes and q.args[1:] == k.args[1:] and int(q.meta["val"].shape[3]) % 16 == 0


def _cached_attention(b: Builder, n: Node) -> tuple[str, ...]:
    q, k, v, past_k, past_v, lengths, bias, scale, window, softcap = n.args
    state = next(s for s in b.program.states if f"{s.name}.key" == past_k.target)
    if not _grouped(b, n):
        return STANDARD[OPS.cached_attention.default](b, n)
    rows = _row_numbers(b, q) if bias is None and _rows_independent(b) else None
    total, longest = _totals(b, lengths, q, rows)
    heads = int(q.meta["val"].shape[2])
    rotate = _rotates(b, n)
    if rotate:
        positions, cos, sin = tables(b, q.args[1])
        sources = [q.args[0], k.args[0], v]
    else:
        positions, cos, sin = None, None, None
        sources = [q, k, v]
    out, keys, values = b.op(
        "GroupQueryAttention",
        *(_repeated(b, value, rows) for value in _packed(b, sources)),
        past_k,
        past_v,
        total,
        longest,
        cos,
        sin,
        _repeated(b, positions, rows),
        bias,
        domain=MICROSOFT,
        outputs=3,
        num_heads=heads,
        kv_num_heads=state.heads,
        scale=float(scale),
        local_window_size=window if window and bias is None else None,
        softcap=float(softcap) or None,
        do_rotary=int(rotate) or None,
    )
    if rows is not None:
        out = b.op("Slice", out, b.const([0], np.int64), b.size(q.meta["val"].shape[1]), b.const([1], np.int64))
    first = next(u for u in n.users if u.target is operator.getitem and u.args[1] == 0)
    b.flat[first] = out
    return out, keys, values


def _rows_independent(b: Builder) -> bool:
    """Whether every dense product gives a row the same bits however many rows share the pass: sums of integers do, sums of floats do not."""
    return all(n.target is OPS.linear_int8.default for n in b.program.main.nodes if n.target in LINEARS)


def _row_numbers(b: Builder, q: Node) -> str:
    """Rows that the attention works on: 0 .. R-1, and for a single row 0, 0.

    The attention multiplies one row by another kernel than several, with other rounding. Where nothing else in the graph depends on the
    number of rows, two equal rows there make a one-row pass agree with longer ones bit for bit, at a fraction of the cost of a second row
    everywhere. The spare row's keys lie behind the sequence's length, where nothing reads them.
    """

    def make() -> str:
        rows = b.size(q.meta["val"].shape[1])
        numbers = b.op("Range", b.const(0), b.scalar(b.op("Max", rows, least)), b.const(1))
        return b.op("Min", numbers, b.op("Sub", rows, b.const([1], np.int64)))

    least = b.tensor(LEAST_ROWS, np.array([ATTENDING], np.int64))
    return b.once(("row numbers",), make)


def _repeated(b: Builder, value: str | None, rows: str | None) -> str | None:
    return value if rows is None or value is None else b.op("Gather", value, rows, axis=1)


def _packed(b: Builder, sources: list[Node]) -> list[str | None]:
    """q, k, v as the operator wants them: one packed product where all three are slices of it in order."""
    parts = [s.args[0] if s.target is aten.view.default else None for s in sources]
    if all(isinstance(p, Node) and p.target is operator.getitem for p in parts):
        split = {p.args[0] for p in parts}
        if len(split) == 1 and [p.args[1] for p in parts] == [0, 1, 2]:
            whole = next(iter(split))
            if whole.target is aten.split_with_sizes.default and len(whole.args[1]) == 3 and whole.args[0].meta["val"].dim() == 3:
                return [b[whole.args[0]], None, None]
    return [flat(b, s) for s in sources]


def _totals(b: Builder, lengths: Node, q: Node, numbers: str | None) -> tuple[str, str]:
    """seqlens_k [B] int32 (last key of each sequence) and total_sequence_length (scalar int32)."""

    def last() -> str:
        rows = b.size(q.meta["val"].shape[1]) if numbers is None else b.op("Shape", numbers)
        keys = b.op("Add", lengths, b.op("Sub", rows, b.const([1], np.int64)))
        return b.op("Cast", keys, to=6)

    total = b.once(("last key", lengths, numbers), last)
    longest = b.once(("longest", total), lambda: b.op("Add", b.op("ReduceMax", total, keepdims=0), b.const(1, np.int32)))
    return total, longest


def _reshape(b: Builder, n: Node) -> str:
    """[B,R,H,D] of an attention -> [B,R,H*D] is what GroupQueryAttention returns already."""
    x = n.args[0]
    if x in b.flat and n.meta["val"].dim() == 3:
        return b.flat[x]
    if isinstance(x, Node) and x.target is operator.getitem and x in b.flat:
        return b.reshape(b.flat[x], n.meta["val"].shape, n.meta["val"].shape)
    return ATEN[aten.reshape.default](b, n)


def _getitem(b: Builder, n: Node) -> str:
    """Attention outputs leave the operator flat."""
    value = b.values[n.args[0]][n.args[1]]
    if n in b.flat and any(u.target not in (aten.reshape.default, aten.view.default) for u in n.users):
        _, _, heads, width = n.meta["val"].shape
        return b.op("Reshape", value, b.const([0, 0, heads, width], np.int64))
    return value


TABLE: dict[object, Lowering] = {
    **STANDARD,
    **QUANTIZED,
    aten.add.Tensor: _add,
    aten.silu.default: lambda b, n: b.op("QuickGelu", n.args[0], domain=MICROSOFT, alpha=1.0),
    aten.reshape.default: _reshape,
    aten.view.default: _reshape,
    operator.getitem: _getitem,
    OPS.rms_norm.default: _rms_norm,
    OPS.glu.default: _glu,
    OPS.rope.default: _rope,
    OPS.cached_attention.default: _cached_attention,
}
