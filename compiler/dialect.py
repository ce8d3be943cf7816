"""The dialect: the few high-level operations that planc adds to ATen. Each has shapes, a torch reference and a fake kernel.

Letters: B batch, R rows of this pass, H heads, G key/value heads, D head width, C cache slots, T keys that a mask covers, K inputs, N outputs;
of images [B,C,Y,X]: C channels, Y rows, X columns.
Everything a backend must know stands in the arguments; the torch code below is the meaning that every backend is tested against.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from planc.runtime import entropy

NAMESPACE = "planc"
MASKED = torch.finfo(torch.float32).min


_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

#: the operations by their references, which torch can differentiate, as far as it can what they are made of
REFERENCES: dict[Any, Callable[..., Any]] = {}


def _op(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Define `planc::name` from its reference. Registered below autograd, which keeps a call cheap; training goes through `REFERENCES`."""

    def register(reference: Callable[..., Any]) -> Any:
        _LIBRARY.define(name + torch.library.infer_schema(reference, mutates_args=()))
        _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        op = getattr(torch.ops.planc, name)
        REFERENCES[op.default] = reference
        return op

    return register


def _wide(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    group = q.shape[2] // k.shape[2]
    keys = k.transpose(1, 2).repeat_interleave(group, dim=1)  # [B, H, T, D]
    scores = torch.matmul(q.transpose(1, 2), keys.transpose(2, 3)) * scale  # [B, H, R, T]
    return torch.tanh(scores / softcap) * softcap if softcap else scores


def _mix(scores: Tensor, v: Tensor, group: int) -> Tensor:
    values = v.transpose(1, 2).repeat_interleave(group, dim=1)
    weights = torch.softmax(scores, dim=-1).to(v.dtype)
    return torch.matmul(weights, values).transpose(1, 2).contiguous()  # [B, R, H, D]


@_op("attention", lambda q, k, v, bias, scale, causal, window, softcap: q.new_empty((*q.shape[:3], v.shape[3])))
def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool, window: int, softcap: float) -> Tensor:
    """Attention without cache. q [B,R,H,D], k and v [B,T,G,D] -> [B,R,H,D]. `bias` [B|1,H|1,R,T] is added; `window` 0 means unlimited."""
    scores = _scores(q, k, scale, softcap)
    if bias is not None:
        scores = scores + bias
    rows, keys = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])[None]
    hidden = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool)
    if causal:
        hidden = hidden | (keys > rows)
    if window:
        hidden = hidden | (keys <= rows - window)
    return _mix(_wide(scores).masked_fill(hidden.to(q.device), MASKED), v, q.shape[2] // k.shape[2])


@_op(
    "cached_attention",
    lambda q, k, v, past_k, past_v, lengths, bias, scale, window, softcap: (
        q.new_empty((*q.shape[:3], v.shape[3])),
        torch.empty_like(past_k),
        torch.empty_like(past_v),
    ),
)
def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    lengths: Tensor,
    bias: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention over a cache. q [B,R,H,D], k and v [B,R,G,D], past [B,G,C,D], lengths [B] int64 -> ([B,R,H,D], new past k, new past v).

    Row r of sequence b is written to slot lengths[b] + r and sees slots 0 .. lengths[b] + r, less what `bias` [B|1,1,R,T] hides (T >= longest
    length + R); with a window, only the last `window` of them. Where a bias is given it carries the window, in positions.
    """
    return _over_cache(q, k, v, past_k, past_v, lengths, None, bias, scale, window, softcap)


def _over_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    lengths: Tensor,
    stored: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, capacity = q.shape[1], past_k.shape[2]
    slots = lengths[:, None] + torch.arange(rows, device=q.device)  # [B, R]
    index = slots[:, None, :, None].expand(-1, k.shape[2], -1, k.shape[3])
    keys = past_k.scatter(2, index, k.transpose(1, 2))
    values = past_v.scatter(2, slots[:, None, :, None].expand(-1, v.shape[2], -1, v.shape[3]), v.transpose(1, 2))
    total = int(lengths.max()) + rows
    assert total <= capacity
    seen = torch.arange(total, device=q.device)[None, None]
    hidden = seen > slots[:, :, None]  # [B, R, T]
    if window and bias is None:
        hidden = hidden | (seen <= slots[:, :, None] - window)
    shown = [keys[:, :, :total], values[:, :, :total]]
    bias = None if bias is None else bias[..., :total]
    if stored is not None:
        shown = [torch.cat((first.expand(len(q), -1, -1, -1), rest), 2) for first, rest in zip(stored, shown, strict=True)]
        hidden = F.pad(hidden, (stored[0].shape[2], 0))
        bias = None if bias is None else F.pad(bias, (stored[0].shape[2], 0))
    scores = _scores(q, shown[0].transpose(1, 2), scale, softcap)
    if bias is not None:
        scores = scores + bias
    out = _mix(_wide(scores).masked_fill(hidden[:, None], MASKED), shown[1].transpose(1, 2), q.shape[2] // k.shape[2])
    return out, keys, values


@_op(
    "stored_attention",
    lambda q, k, v, past_k, past_v, lengths, stored_k, stored_v, bias, scale, window, softcap: (
        q.new_empty((*q.shape[:3], v.shape[3])),
        torch.empty_like(past_k),
        torch.empty_like(past_v),
    ),
)
def stored_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    lengths: Tensor,
    stored_k: Tensor,
    stored_v: Tensor,
    bias: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`cached_attention` whose rows also see all of stored_k and stored_v [B,G,S,D], which come first and are not written; B may be 1 there."""
    return _over_cache(q, k, v, past_k, past_v, lengths, (stored_k, stored_v), bias, scale, window, softcap)


def _stored_fake(codes: Tensor, width: int) -> Tensor:
    return codes.new_empty((*codes.shape[:3], width), dtype=torch.float32)


@_op("stored_int8", lambda codes, scale: _stored_fake(codes, codes.shape[3]))
def stored_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """Rows [N,G,T,D] of codes [N,G,T,D] with a scale for each row or column (`runtime/kv/stores`, as all that follow)."""
    return codes.float() * scale.float()


@_op("stored_quantized", lambda codes, scale, zero, bits, group, keys: _stored_fake(codes, codes.shape[3] * 8 // bits))
def stored_quantized(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int, keys: bool) -> Tensor:
    """Rows [N,G,T,D] of codes [N,G,T,D*bits/8] with scale and zero of `group` tokens of a channel (keys) or channels of a token (values)."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    whole = torch.bitwise_and(codes[..., None] >> shifts, 2**bits - 1).flatten(3).float()
    count, heads, tokens, width = whole.shape
    if keys:
        parts = whole.reshape(count, heads, tokens // group, group, width)
        return (parts * scale.float()[:, :, :, None] + zero.float()[:, :, :, None]).reshape(whole.shape)
    parts = whole.reshape(count, heads, tokens, width // group, group)
    return (parts * scale.float()[..., None] + zero.float()[..., None]).reshape(whole.shape)


@_op("stored_bitmap", lambda bits, values: _stored_fake(bits, bits.shape[3] * 8))
def stored_bitmap(bits: Tensor, values: Tensor) -> Tensor:
    """Rows [N,G,T,D] of bitmaps [N,G,T,D/8], low bits first, and the numbers [N,G,T,K] that they mark, in order."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    marks = torch.bitwise_and(bits[..., None] >> shifts, 1).flatten(3).long()
    places = (marks.cumsum(-1) - 1).clamp(min=0)
    return values.float().gather(-1, places) * marks


@_op("stored_corrected", lambda rows, left, right, places, deltas, axis: torch.empty_like(rows))
def stored_corrected(
    rows: Tensor, left: Tensor | None, right: Tensor | None, places: Tensor | None, deltas: Tensor | None, axis: int
) -> Tensor:
    """Rows [N,G,T,D] plus left [N,G,T,r] times right [N,G,D,r] transposed, plus `deltas` at the `places` (uint8) along `axis`."""
    out = rows.clone()
    if left is not None and right is not None:
        out = out + left.float() @ right.float().transpose(-1, -2)
    if places is not None and deltas is not None:
        out = out.scatter_add(axis, places.long(), deltas.float())
    return out


@_op(
    "segment_bias", lambda keys, own: torch.empty((keys.shape[0], 1, own.shape[1], keys.shape[1]), dtype=torch.float32, device=keys.device)
)
def segment_bias(keys: Tensor, own: Tensor) -> Tensor:
    """Additive mask [B,1,R,T]: a row of segment `own` [B,R] sees the keys of segments `keys` [B,T] that are not above its own. int64 both."""
    return torch.where(keys[:, None] > own[:, :, None], MASKED, 0.0)[:, None]


@_op("slot_write", lambda past, new, slots: torch.empty_like(past))
def slot_write(past: Tensor, new: Tensor, slots: Tensor) -> Tensor:
    """The keys or values `past` [B,G,C,D] of a canvas with `new` [B,R,G,D] at `slots` [B,R] int64."""
    index = slots[:, None, :, None].expand(-1, new.shape[2], -1, new.shape[3])
    return past.scatter(2, index, new.transpose(1, 2))


def _probe_fake(q: Tensor, k: Tensor, bias: Tensor, watched: Tensor, window: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    return q.new_empty((q.shape[0], k.shape[1])), q.new_empty((q.shape[0], k.shape[1]))


@_op("attention_probe", _probe_fake)
def attention_probe(
    q: Tensor, k: Tensor, bias: Tensor, watched: Tensor, window: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """What some rows attend to, beside an attention: q [B,R,H,D], k [B,T,G,D], bias [B,1,R,T] -> two [B,T], means over heads.

    The first is the attention of row `watched` [B] int64, the second the sum of those of the rows that `window` [B,R] weighs.
    """
    weights = torch.softmax((_scores(q, k, scale, softcap) + bias).float(), dim=-1).mean(1)  # [B, R, T]
    return weights[torch.arange(q.shape[0]), watched], (weights * window[:, :, None]).sum(1)


@_op("rms_norm", lambda x, weight, eps: torch.empty_like(x))
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., K] / root mean square * weight [K], computed in float32 (float64 for such x)."""
    wide = _wide(x)
    return (weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)).to(x.dtype)


@_op("rope_table", lambda positions, inv_freq, scaling: (_table(positions, inv_freq), _table(positions, inv_freq)))
def rope_table(positions: Tensor, inv_freq: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Rotary tables. positions [B,R] int64, inv_freq [D/2] -> cos, sin [B,R,D/2] float32, times `scaling`."""
    angles = positions[:, :, None].float() * inv_freq.float()
    return angles.cos() * scaling, angles.sin() * scaling


def _table(positions: Tensor, inv_freq: Tensor) -> Tensor:
    return positions.new_empty((*positions.shape, inv_freq.shape[0]), dtype=torch.float32)


@_op("rope", lambda x, cos, sin: torch.empty_like(x))
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 * cos.shape[-1] channels of x [B,R,H,D] in halves (not interleaved); cos, sin [B,R,D'/2]."""
    cos, sin = torch.cat((cos, cos), -1).to(x.dtype)[:, :, None], torch.cat((sin, sin), -1).to(x.dtype)[:, :, None]
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = turned.chunk(2, -1)
    return torch.cat((turned * cos + torch.cat((-high, low), -1) * sin, kept), -1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@_op("glu", lambda gate, up, activation: torch.empty_like(up))
def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Gated MLP product: activation(gate) * up, both [..., K]."""
    return ACTIVATIONS[activation](gate) * up


def _linear_fake(x: Tensor, outputs: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale per row: x [..., K] -> values -127..127 (kept in float32), scale [..., 1]. An all-zero row gets scale 1/127."""
    peak = x.abs().amax(-1, keepdim=True)
    scale = torch.where(peak > 0, peak, torch.ones_like(peak)) / 127.0
    return torch.round(x / scale), scale


@_op("linear_int8", lambda x, weight, scale, bias, step=None: _linear_fake(x, weight.shape[0]))
def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, step: Tensor | None = None) -> Tensor:
    """x [..., K] in int8 times weight [N,K] int8 with one scale [N] per output; products and sums are exact integers.

    x is quantised per row; with `step` (a scalar) every row takes that step, and what lies beyond -128..127 steps is cut off.
    """
    values, row_scale = quantize_rows(x.float()) if step is None else (torch.round(x.float() / step).clamp(-128, 127), step)
    flat = values.reshape(-1, values.shape[-1]).to(torch.int8)
    if flat.shape[1] == 1:
        # torch._int_mm on a CPU takes a single column for strided and reads past it; a second one of zeros changes no sum
        flat, weight = torch.nn.functional.pad(flat, (0, 1)), torch.nn.functional.pad(weight, (0, 1))
    sums = torch._int_mm(flat, weight.t()).float().reshape(*values.shape[:-1], -1)
    out = sums * (row_scale * scale)
    return (out if bias is None else out + bias).to(x.dtype)


def unpack_blocks(packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, block: int, inputs: int) -> Tensor:
    """Weights [N,K] float32 of the MatMulNBits layout: packed [N, K/block, block*bits/8] uint8, low nibble first; scales [N, K/block];
    zeros [N, K/block] float (in steps; default 2^(bits-1))."""
    outputs = packed.shape[0]
    if bits == 4:
        values = torch.stack((packed & 15, packed >> 4), -1).reshape(outputs, -1, block)
    else:
        values = packed.reshape(outputs, -1, block)
    zero = float(2 ** (bits - 1)) if zeros is None else zeros[:, :, None].float()
    return ((values.float() - zero) * scales[:, :, None].float()).reshape(outputs, -1)[:, :inputs]


@_op("linear_blocks", lambda x, packed, scales, zeros, bias, bits, block: _linear_fake(x, packed.shape[0]))
def linear_blocks(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, block: int) -> Tensor:
    """x [..., K] times block-quantised weights (see `unpack_blocks`). The reference keeps activations in float; a backend may round them to
    int8 per block, which is why a program with this op is compared within a bound."""
    out = torch.matmul(x, unpack_blocks(packed, scales, zeros, bits, block, x.shape[-1]).t().to(x.dtype))
    return out if bias is None else out + bias


SCALES = 256  # scales of blocks that share a coarse scale


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Codes [N,K] uint8 of bytes [N, K*bits/8], low bits first; 3 bits lie as a plane of two and a plane of one behind it."""
    if bits == 3:
        low, high = packed.split((packed.shape[1] // 3 * 2, packed.shape[1] // 3), 1)
        return unpack_codes(low, 2) | unpack_codes(high, 1) << 2
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return torch.bitwise_and(packed[:, :, None] >> shifts, 2**bits - 1).reshape(len(packed), -1)


def unpack_lookup(
    packed: Tensor, tables: Tensor, rows: Tensor | None, scales: Tensor, coarse: Tensor, offset: Tensor, bits: int, block: int, inputs: int
) -> Tensor:
    """Weights [N,K] float32 as places in tables: packed [N, K*bits/8] uint8 (see `unpack_codes`); tables [G, 2^bits] int8 in steps of 1/127;
    rows [N] uint8, the table of each row (None: the only one); the scale of block i is offset + scales[i] * coarse / 255 with scales [M,256]
    uint8, coarse [M,1] and offset [1] float32."""
    outputs = packed.shape[0]
    places = unpack_codes(packed, bits).long()
    if rows is not None:
        places = places + rows.long()[:, None] * 2**bits
    scale = (offset + scales.float() * (coarse / 255)).reshape(-1)[: outputs * inputs // block]
    return (tables.reshape(-1)[places].float().reshape(-1, block) * (scale / 127)[:, None]).reshape(outputs, inputs)


@_op(
    "linear_lookup",
    lambda x, packed, tables, rows, scales, coarse, offset, bias, bits, block: _linear_fake(x, packed.shape[0]),
)
def linear_lookup(
    x: Tensor,
    packed: Tensor,
    tables: Tensor,
    rows: Tensor | None,
    scales: Tensor,
    coarse: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    bits: int,
    block: int,
) -> Tensor:
    """x [..., K] times weights that are places in tables (see `unpack_lookup`). As in `linear_blocks`, a backend may round x to int8 per block."""
    out = torch.matmul(x, unpack_lookup(packed, tables, rows, scales, coarse, offset, bits, block, x.shape[-1]).t().to(x.dtype))
    return out if bias is None else out + bias


@_op("block_diagonal", lambda x, blocks: x.new_empty((*x.shape[:-1], blocks.shape[0] * blocks.shape[1])))
def block_diagonal(x: Tensor, blocks: Tensor) -> Tensor:
    """x [..., J*i] times a block-diagonal matrix with `blocks` [J,o,i] -> [..., J*o]; a block's rows are outputs, as in a dense layer."""
    return torch.einsum("...ji,joi->...jo", x.unflatten(-1, (blocks.shape[0], blocks.shape[2])), blocks).flatten(-2)


@_op("embedding_int8", lambda table, scale, ids: scale.new_empty((*ids.shape, table.shape[1])))
def embedding_int8(table: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    """Rows of an int8 table [V,K] with one scale [V] per row, for ids [B,R] -> [B,R,K] float32."""
    return table[ids].float() * scale[ids][..., None]


@_op("decode_bf16", lambda coded, rows, columns: coded.new_empty((rows, columns), dtype=torch.float32))
def decode_bf16(coded: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix [rows, columns] float32 of an entropy-coded container (`runtime/entropy.py`), bit for bit."""
    return torch.from_numpy(entropy.widen(entropy.decode(coded.numpy()))).reshape(rows, columns)


def _rows_fake(x: Tensor, start: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], torch.library.get_ctx().new_dynamic_size(), *x.shape[2:]))


@_op("rows_from", _rows_fake)
def rows_from(x: Tensor, start: Tensor) -> Tensor:
    """Rows start .. R-1 of x [B,R,K]; start [1] int64. Keeps the head from computing logits that nobody reads."""
    return x[:, int(start) :].clone()


def _padded(x: Tensor, pads: list[int], value: float) -> Tensor:
    """x [B,C,Y,X] with `pads` (top, left, bottom, right) of a constant; negative ones crop what the padding in front of them made."""
    top, left, bottom, right = pads
    if min(pads) < 0:  # pad first, then crop: a window that lies in the padding alone keeps one row of the image to be cropped
        grown = F.pad(x, [max(p, 0) for p in (left, right, top, bottom)], value=value)
        rows, columns = grown.shape[2] + min(bottom, 0), grown.shape[3] + min(right, 0)
        return grown[:, :, -min(top, 0) : rows, -min(left, 0) : columns]
    return F.pad(x, [left, right, top, bottom], value=value) if any(pads) else x


def _windows(size: Any, pads: int, extent: int, stride: int) -> Any:
    return (size + pads - extent) // stride + 1


def _conv_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], pads: list[int], dilation: list[int], groups: int
) -> Tensor:
    sizes = [_windows(x.shape[2 + i], pads[i] + pads[i + 2], (weight.shape[2 + i] - 1) * dilation[i] + 1, stride[i]) for i in range(2)]
    return x.new_empty((x.shape[0], weight.shape[0], *sizes))


@_op("conv2d", _conv_fake)
def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], pads: list[int], dilation: list[int], groups: int) -> Tensor:
    """Convolution of x [B,C,Y,X] with weight [N,C/groups,h,w] and zeros around: `pads` (top, left, bottom, right) may differ on every side."""
    top, left, bottom, right = pads
    if top == bottom >= 0 and left == right >= 0:
        return F.conv2d(x, weight, bias, stride, [top, left], dilation, groups)
    return F.conv2d(_padded(x, pads, 0.0), weight, bias, stride, 0, dilation, groups)


def _pool_fake(x: Tensor, kernel: list[int], stride: list[int], pads: list[int], *rest: Any) -> Tensor:
    dilation = rest[0] if rest and isinstance(rest[0], list) else [1, 1]
    sizes = [_windows(x.shape[2 + i], pads[i] + pads[i + 2], (kernel[i] - 1) * dilation[i] + 1, stride[i]) for i in range(2)]
    return x.new_empty((*x.shape[:2], *sizes))


@_op("max_pool2d", _pool_fake)
def max_pool2d(x: Tensor, kernel: list[int], stride: list[int], pads: list[int], dilation: list[int]) -> Tensor:
    """Largest value of every window of x [B,C,Y,X]; what lies outside the image, `pads` (top, left, bottom, right), is less than any value."""
    if not x.is_floating_point():
        return F.max_pool2d(_padded(x, pads, 0).float(), kernel, stride, 0, dilation).to(x.dtype)
    return F.max_pool2d(_padded(x, pads, -torch.inf), kernel, stride, 0, dilation)


@_op("avg_pool2d", _pool_fake)
def avg_pool2d(x: Tensor, kernel: list[int], stride: list[int], pads: list[int], count_pads: bool) -> Tensor:
    """Mean of every window of x [B,C,Y,X]; `pads` (top, left, bottom, right) are zeros that the divisor counts, or not."""
    sums = F.avg_pool2d(_padded(x, pads, 0.0), kernel, stride, 0, divisor_override=1)
    if count_pads:
        return sums / (kernel[0] * kernel[1])
    inside = _padded(torch.ones_like(x[:1, :1]), pads, 0.0)
    return sums / F.avg_pool2d(inside, kernel, stride, 0, divisor_override=1)


@_op("upsample2d", lambda x, factors: x.new_empty((*x.shape[:2], *(s * f for s, f in zip(x.shape[2:], factors, strict=True)))))
def upsample2d(x: Tensor, factors: list[int]) -> Tensor:
    """Every value of x [B,C,Y,X] repeated factors[0] times along rows and factors[1] times along columns (nearest neighbour)."""
    return x.repeat_interleave(factors[0], 2).repeat_interleave(factors[1], 3)


# ---- maps as codes: uint8, where a code q stands for the number (q - zero) * scale; both are float32 and integer constants of the graph ----


def _codes(steps: Tensor, zero: int, low: int, high: int) -> Tensor:
    """The nearest codes, ties to even, within low .. high."""
    return (torch.round(steps) + zero).clamp(low, high).to(torch.uint8)


@_op("quantize", lambda x, scale, zero, low, high: torch.empty_like(x, dtype=torch.uint8))
def quantize(x: Tensor, scale: float, zero: int, low: int, high: int) -> Tensor:
    """Codes low .. high (0 .. 255 at most) of float32 values."""
    return _codes(x.float() / torch.tensor(scale, dtype=torch.float32), zero, low, high)


@_op("dequantize", lambda x, scale, zero: torch.empty_like(x, dtype=torch.float32))
def dequantize(x: Tensor, scale: float, zero: int) -> Tensor:
    """The numbers, float32, that codes stand for."""
    return (x.float() - zero) * torch.tensor(scale, dtype=torch.float32)


def _conv_int8_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], pads: list[int], dilation: list[int], groups: int, *rest: Any
) -> Tensor:
    return _conv_fake(x, weight, bias, stride, pads, dilation, groups)


@_op("conv2d_int8", _conv_int8_fake)
def conv2d_int8(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    pads: list[int],
    dilation: list[int],
    groups: int,
    steps: Tensor,
    x_scale: float,
    x_zero: int,
    scale: float,
    zero: int,
    low: int,
    high: int,
) -> Tensor:
    """`conv2d` of codes x [B,C,Y,X] with weight [N,C/groups,h,w] int8 -> codes low .. high of `scale` and `zero`.

    Weights of output n are whole `steps[n]`, bias [N] int32 whole steps[n] * x_scale, and padding is the code `x_zero`. Sums are exact integers,
    rounded once, when they become codes.
    """
    largest = 255 * weight.abs().float().flatten(1).sum(1).max()  # beyond 2^24 float32 has no room for all integers
    wide = torch.float32 if largest < 2**24 else torch.float64
    sums = conv2d(x.to(wide) - x_zero, weight.to(wide), None, stride, pads, dilation, groups).double()
    if bias is not None:
        sums = sums + bias.double()[:, None, None]
    x_step, step = (torch.tensor(s, dtype=torch.float32) for s in (x_scale, scale))
    return _codes(sums.float() * (x_step * steps / step)[:, None, None], zero, low, high)


@_op("add_int8", lambda a, b, *rest: torch.empty_like(a))
def add_int8(
    a: Tensor, b: Tensor, a_scale: float, a_zero: int, b_scale: float, b_zero: int, scale: float, zero: int, low: int, high: int
) -> Tensor:
    """Codes low .. high of the sum of two maps of one shape. Backends may round near a tie otherwise: by one code."""
    first, second = ((v.double() - z) * (s / scale) for v, s, z in ((a, a_scale, a_zero), (b, b_scale, b_zero)))
    return _codes(first + second, zero, low, high)


OPS = torch.ops.planc
#: convolutions; their first seven arguments are the same
CONVOLUTIONS = (OPS.conv2d.default, OPS.conv2d_int8.default)
#: dense products; x is the first argument
LINEARS = (torch.ops.aten.linear.default, OPS.linear_int8.default, OPS.linear_blocks.default, OPS.linear_lookup.default)
