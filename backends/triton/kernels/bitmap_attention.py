"""Rows of a cache with their largest values alone, behind bitmaps, and attention over them (Mustafar).

A row of D channels keeps its n largest magnitudes: bits [D/32] int32, channel c in bit c % 32 of word c // 32, and the n values in the order of
their channels. 2 n + D/8 bytes in float16 instead of 2 D, and every row can be found without offsets. Rows of a head lie one behind the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from planc.backends.triton.kernels.launch import FLOATS, Timing, check, check_tensors, check_type, launch
from planc.backends.triton.kernels.segments import (
    Parts,
    attend_tile,
    check_queries,
    merge,
    rows_of,
    scores_reference,
    write_part,
)

NAME, _PART = "bitmap_attention", 512  # keys that one program takes at least
WIDTHS = (32, 64, 128, 256)


@dataclass(frozen=True)
class Bitmap:
    """Rows [B,G,T] of `width` channels."""

    bits: Tensor  # [B,G,T,D/32] int32, contiguous
    values: Tensor  # [B,G,T,n] float, contiguous

    @property
    def width(self) -> int:
        """Channels of a row, D."""
        return 32 * self.bits.shape[3]

    def bytes(self) -> int:
        """Bytes of both."""
        return sum(t.numel() * t.element_size() for t in (self.bits, self.values))


def encode_reference(x: Tensor, keep: int) -> Bitmap:
    """As `bitmap_encode`, in PyTorch."""
    x = x.transpose(1, 2).contiguous()
    order = torch.sort(x.float().abs(), dim=3, descending=True, stable=True).indices[..., :keep].sort(3).values
    kept = torch.zeros(x.shape, dtype=torch.int64, device=x.device).scatter_(3, order, 1)
    words = (kept.unflatten(3, (-1, 32)) << torch.arange(32, device=x.device)).sum(4)
    return Bitmap(torch.where(words >= 2**31, words - 2**32, words).to(torch.int32), x.gather(3, order))


def decode_reference(rows: Bitmap) -> Tensor:
    """The rows [B,T,G,D], zero where nothing was kept."""
    kept = ((rows.bits.long()[..., None] >> torch.arange(32, device=rows.bits.device)) & 1).flatten(3)
    values = rows.values.gather(3, (kept.cumsum(3) - 1).clamp(min=0))
    return torch.where(kept == 1, values, torch.zeros_like(values)).transpose(1, 2)


def reference(q: Tensor, k: Bitmap, v: Bitmap, lengths: Tensor, scale: float) -> Parts:
    """Attention in PyTorch, as one part."""
    visible = (torch.arange(k.bits.shape[2], device=q.device) < lengths[:, None])[:, None].expand(-1, q.shape[1], -1)
    return scores_reference(q, decode_reference(k), decode_reference(v), visible, scale)


# Encoding, per tile of rows. Bytes: 2 D read and 2 n + D/8 written a row. The smallest magnitude that is kept is found bit by bit: the largest
# pattern that at least n magnitudes reach. No sort, no size that depends on the data.


@triton.jit
def _encode(
    x_ptr,  # [B,T,G,D] float
    bits_ptr,  # [B*G,T, D/32] int32
    values_ptr,  # [B*G,T, KEEP], type of x
    T,
    G,
    x_b,
    x_t,
    x_g,
    KEEP: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    pair, token = tl.program_id(1).to(tl.int64), (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    channel, there = tl.arange(0, D), token < T
    places = x_ptr + (pair // G) * x_b + (pair % G) * x_g + token[:, None] * x_t + channel[None, :]
    x = tl.load(places, mask=there[:, None], other=0.0)
    size = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    least = tl.zeros((TILE,), tl.int32)
    for i in range(31):
        tried = least | (1 << (30 - i))
        enough = tl.sum((size >= tried[:, None]).to(tl.int32), axis=1) >= KEEP
        least = tl.where(enough, tried, least)
    above, equal = (size > least[:, None]).to(tl.int32), (size == least[:, None]).to(tl.int32)
    room = KEEP - tl.sum(above, axis=1)
    kept = above | (equal & (tl.cumsum(equal, axis=1) <= room[:, None]).to(tl.int32))
    rank = tl.cumsum(kept, axis=1) - kept
    row = pair * T + token
    tl.store(values_ptr + row[:, None] * KEEP + rank, x, mask=(kept == 1) & there[:, None])
    words = tl.sum(tl.reshape(kept << (channel % 32)[None, :], (TILE, D // 32, 32)), axis=2)
    word = tl.arange(0, D // 32)
    tl.store(bits_ptr + row[:, None] * (D // 32) + word[None, :], words, mask=there[:, None])


def bitmap_encode(x: Tensor, keep: int) -> Bitmap:
    """The `keep` largest magnitudes of each row of x [B,T,G,D] float; of equal ones those of lower channels. D is 32, 64, 128 or 256.

    Raises InputError[kernel-unsupported] off a CUDA device and for other shapes or types.
    """
    check_tensors("bitmap_encode", "`encode_reference`", x)
    check_type("bitmap_encode", "x", x, *FLOATS)
    check(
        x.dim() == 4 and x.shape[3] in WIDTHS, "bitmap_encode", f"x has shape {list(x.shape)}", "give rows of 32, 64, 128 or 256 channels"
    )
    check(x.stride(3) == 1, "bitmap_encode", "the last axis of x is not contiguous", "use x.contiguous()")
    B, T, G, D = x.shape
    check(0 < keep <= D, "bitmap_encode", f"{keep} of {D} values cannot be kept", f"keep 1 to {D}")
    bits, values = torch.empty(B, G, T, D // 32, dtype=torch.int32, device=x.device), x.new_empty(B, G, T, keep)
    tile = 4096 // D  # rows whose magnitudes, ranks and masks stay in registers
    launch(_encode, (triton.cdiv(T, tile), B * G), x, bits, values, T, G, *x.stride()[:3], KEEP=keep, D=D, TILE=tile)
    return Bitmap(bits, values)


# Attention. Bytes: T*G*(2 n + D/8) for keys and as much for values, read once for all rows and heads that share them; FLOPs: 4 R*H*T*D, zeros
# included: rows are spread in registers and multiplied as dense ones. Values of a row lie side by side, so gathering them reads full lines.


@triton.jit
def _spread(bits_ptr, values_ptr, row, present, KEEP: tl.constexpr, D: tl.constexpr):
    """Rows [T,D] of a bitmap; row [T] int64."""
    channel = tl.arange(0, D)
    words = tl.load(bits_ptr + row[:, None] * (D // 32) + channel[None, :] // 32, mask=present[:, None], other=0)
    kept = (words >> (channel % 32)[None, :]) & 1
    rank = tl.cumsum(kept, axis=1) - kept
    return tl.load(values_ptr + row[:, None] * KEEP + rank, mask=kept == 1, other=0.0)


@triton.jit
def _attend(
    q_ptr,  # [B,R,H,D] float
    k_bits_ptr,  # [B,G,T,D/32] int32
    k_values_ptr,  # [B,G,T,KEEP_K], type of q
    v_bits_ptr,  # [B,G,T,D/32] int32
    v_values_ptr,  # [B,G,T,KEEP_V]
    lengths_ptr,  # [B] int64 or int32
    o_ptr,  # [P,B,R,H,D] float32
    m_ptr,  # [P,B,R,H] float32
    l_ptr,  # [P,B,R,H] float32
    B, R, H, G, T, scale,
    q_b, q_r, q_h,
    per_part,
    KEEP_K: tl.constexpr,
    KEEP_V: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    part, pair = tl.program_id(0), tl.program_id(1)
    sequence, head = (pair // G).to(tl.int64), (pair % G).to(tl.int64)
    row, query_head, exists = rows_of(pair, head * GROUP, GROUP, R, M)
    places = q_ptr + sequence * q_b + row[:, None] * q_r + query_head[:, None] * q_h + tl.arange(0, D)[None, :]
    q = tl.load(places, mask=exists[:, None], other=0.0)
    m, l, acc = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32), tl.zeros((M, D), tl.float32)  # noqa: E741
    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    for start in range(part * per_part, tl.minimum((part + 1) * per_part, length), TILE):
        key = start + tl.arange(0, TILE)
        present, place = key < length, pair.to(tl.int64) * T + key
        k = _spread(k_bits_ptr, k_values_ptr, place, present, KEEP_K, D)
        v = _spread(v_bits_ptr, v_values_ptr, place, present, KEEP_V, D)
        m, l, acc = attend_tile(q, k, v, exists[:, None] & present[None, :], scale, m, l, acc)  # noqa: E741
    place = ((part * B + sequence) * R + row) * H + query_head
    write_part(o_ptr, m_ptr, l_ptr, place, exists, m, l, acc, D, D)


def bitmap_attention(q: Tensor, k: Bitmap, v: Bitmap, lengths: Tensor, scale: float, parts: int | None = None) -> Parts:
    """Attend to the first `lengths` [B] rows of a cache of bitmaps; `merge` makes the result of this and other segments.

    q [B,R,H,D], in the type of the values; R * H / G up to 128. `parts`: into how many the segment is cut; None: one for 512 keys.

    Raises InputError[kernel-unsupported] off a CUDA device and for other shapes or types.
    """
    tensors = (q, k.bits, k.values, v.bits, v.values, lengths)
    check_tensors(NAME, "`bitmap_attention.reference`", *tensors)
    check(
        k.bits.shape == v.bits.shape and k.values.dtype == v.values.dtype,
        NAME,
        "k and v are not alike",
        "encode rows of one shape and type",
    )
    check(all(t.is_contiguous() for t in tensors[1:]), NAME, "bitmaps are not contiguous", "use .contiguous()")
    (B, G, T, _), D, (_, R, H, _) = k.bits.shape, k.width, q.shape
    tile_rows = check_queries(NAME, q, G, D, k.values.dtype)
    check(D in WIDTHS, NAME, f"heads are {D} wide", "use heads of 32, 64, 128 or 256")
    check(lengths.shape == (B,) and q.shape[0] == B, NAME, "q, k and lengths have different numbers of sequences", f"give {B} of each")
    check_type(NAME, "lengths", lengths, torch.int32, torch.int64)
    parts, tile = parts or max(1, triton.cdiv(T, _PART)), 64 if D <= 64 else 32  # ranks take registers, too
    out, per_part = Parts.empty(parts, q, D), triton.cdiv(triton.cdiv(T, parts), tile) * tile
    launch(
        _attend, (parts, B * G), *tensors, out.o, out.m, out.l, B, R, H, G, T, scale, *q.stride()[:3], per_part,
        KEEP_K=k.values.shape[3], KEEP_V=v.values.shape[3], GROUP=H // G, M=tile_rows, D=D, TILE=tile, warps=4 if tile_rows <= 64 else 8, stages=2,
    )  # fmt: skip
    return out


def timing() -> Timing:
    """One row over 8192 keys of 128 channels of which 40 are kept, 32 heads that share 8, against attention over the dense cache."""
    B, H, G, T, D, keep = 8, 32, 8, 8192, 128, 40
    q = torch.randn(B, 1, H, D, device="cuda", dtype=torch.float16)
    k, v = (torch.randn(B, T, G, D, device="cuda", dtype=torch.float16) for _ in range(2))
    lengths = torch.full((B,), T, device="cuda")
    k_rows, v_rows = bitmap_encode(k, keep), bitmap_encode(v, keep)

    def baseline() -> Tensor:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads, enable_gqa=True)

    run = lambda: merge(bitmap_attention(q, k_rows, v_rows, lengths, D**-0.5), q.dtype)  # noqa: E731
    return Timing(NAME, run, baseline, "SDPA over the dense cache", k_rows.bytes() + v_rows.bytes(), 4 * B * H * T * D)
