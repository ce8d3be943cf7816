"""Attention of a few rows over a dense segment of a cache: decoding, and verifying a tree of drafts with its ancestor mask."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from planc.backends.triton.kernels.launch import Timing, check, check_tensors, check_type, launch, power_of_two
from planc.backends.triton.kernels.segments import (
    Parts,
    attend_tile,
    check_queries,
    merge,
    rows_of,
    scores_reference,
    tile_of,
    write_part,
)

NAME = "segment_attention"
_PART = 512  # keys that one program takes at least


def reference(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, mask: Tensor | None = None) -> Parts:
    """In PyTorch, as one part."""
    visible = (torch.arange(k.shape[1], device=q.device) < lengths[:, None])[:, None].expand(-1, q.shape[1], -1)
    return scores_reference(q, k, v, visible if mask is None else visible & mask, scale)


# Bytes: B*T*G*(D + E) of keys and values, each read once for all rows and heads that share it; FLOPs: 2 B*R*H*T*(D + E). Parts of a long
# segment go to programs of their own (grid: parts x B*G), or one sequence would leave most of the device idle.


@triton.jit
def _kernel(
    q_ptr,  # [B,R,H,D] float
    k_ptr,  # [B,T,G,D], type of q
    v_ptr,  # [B,T,G,E], type of q
    lengths_ptr,  # [B] int64 or int32: keys that exist
    mask_ptr,  # [B,R,T] bool: keys that a row sees, or None
    o_ptr,  # [P,B,R,H,E] float32
    m_ptr,  # [P,B,R,H] float32
    l_ptr,  # [P,B,R,H] float32
    B,
    R,
    H,
    G,
    scale,
    q_b, q_r, q_h,
    k_b, k_t, k_g, k_d,
    v_b, v_t, v_g, v_d,
    mask_b, mask_r,
    per_part,  # keys of a part, a multiple of TILE
    MASK: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per key/value head
    WIDTH: tl.constexpr,  # D
    VALUES: tl.constexpr,  # E
    M: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    part, pair = tl.program_id(0), tl.program_id(1)
    sequence, head = (pair // G).to(tl.int64), (pair % G).to(tl.int64)
    row, query_head, exists = rows_of(pair, head * GROUP, GROUP, R, M)
    wide, deep = tl.arange(0, D), tl.arange(0, E)
    places = q_ptr + sequence * q_b + row[:, None] * q_r + query_head[:, None] * q_h + wide[None, :]
    q = tl.load(places, mask=exists[:, None] & (wide[None, :] < WIDTH), other=0.0)
    m, l, acc = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32), tl.zeros((M, E), tl.float32)  # noqa: E741
    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    for start in range(part * per_part, tl.minimum((part + 1) * per_part, length), TILE):
        key = start + tl.arange(0, TILE)
        present = key < length
        k_places = k_ptr + sequence * k_b + head * k_g + key[:, None].to(tl.int64) * k_t + wide[None, :] * k_d
        v_places = v_ptr + sequence * v_b + head * v_g + key[:, None].to(tl.int64) * v_t + deep[None, :] * v_d
        k = tl.load(k_places, mask=present[:, None] & (wide[None, :] < WIDTH), other=0.0)
        v = tl.load(v_places, mask=present[:, None] & (deep[None, :] < VALUES), other=0.0)
        visible = exists[:, None] & present[None, :]
        if MASK:
            seen = mask_ptr + sequence * mask_b + row[:, None] * mask_r + key[None, :]
            visible = visible & (tl.load(seen, mask=visible, other=0) != 0)
        m, l, acc = attend_tile(q, k, v, visible, scale, m, l, acc)  # noqa: E741
    place = ((part * B + sequence) * R + row) * H + query_head
    write_part(o_ptr, m_ptr, l_ptr, place, exists, m, l, acc, VALUES, E)


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, mask: Tensor | None = None, parts: int | None = None
) -> Parts:
    """Attend to the first `lengths` [B] keys of a segment; `merge` makes the result of this and other segments.

    q [B,R,H,D]; k [B,T,G,D] and v [B,T,G,E] with any strides (a cache [B,G,T,D] goes in as `.transpose(1, 2)`), in the type of q; mask [B,R,T] bool
    with a contiguous last axis, True where a row sees a key (ancestors in a tree). Heads up to 256 wide, R * H / G up to 128. `parts`: into how many
    the segment is cut; None: so that the device is busy.

    Raises InputError[kernel-unsupported] off a CUDA device and for other shapes or types.
    """
    check_tensors(NAME, "scaled_dot_product_attention", q, k, v, lengths, mask)
    check(
        k.dim() == v.dim() == 4 and k.shape[:3] == v.shape[:3],
        NAME,
        f"k is {list(k.shape)}, v {list(v.shape)}",
        "give [B,T,G,D] and [B,T,G,E]",
    )
    check(v.dtype == k.dtype, NAME, f"k is {k.dtype}, v {v.dtype}", "convert one of them")
    (B, T, G, D), E, (_, R, H, _) = k.shape, v.shape[3], q.shape
    tile_rows = check_queries(NAME, q, G, D, k.dtype)
    check(0 < E <= 256, NAME, f"values are {E} wide, at most 256 fit into registers", "use scaled_dot_product_attention")
    check(lengths.shape == (B,) and q.shape[0] == B, NAME, "q, k and lengths have different numbers of sequences", f"give {B} of each")
    check_type(NAME, "lengths", lengths, torch.int32, torch.int64)
    if mask is not None:
        check_type(NAME, "mask", mask, torch.bool)
        check(mask.shape == (B, R, T) and mask.stride(2) == 1, NAME, f"the mask is {list(mask.shape)}", f"give [{B}, {R}, {T}], contiguous")
    parts, tile = parts or _parts(q.device, T, B * G), tile_of(max(D, E), q.dtype)
    per_part = triton.cdiv(triton.cdiv(T, parts), tile) * tile
    out = Parts.empty(parts, q, E)
    strides = (*q.stride()[:3], *k.stride(), *v.stride(), *((0, 0) if mask is None else mask.stride()[:2]))
    launch(
        _kernel, (parts, B * G), q, k, v, lengths, mask, out.o, out.m, out.l, B, R, H, G, scale, *strides, per_part,
        MASK=mask is not None, GROUP=H // G, WIDTH=D, VALUES=E, M=tile_rows, D=power_of_two(D), E=power_of_two(E), TILE=tile,
        warps=4 if tile_rows <= 64 else 8, stages=2,
    )  # fmt: skip
    return out


def _parts(device: torch.device, keys: int, pairs: int) -> int:
    """Parts that give every multiprocessor two programs, none of them shorter than is worth a start."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(triton.cdiv(keys, _PART), triton.cdiv(2 * processors, max(1, pairs))))


def timing() -> Timing:
    """16 rows of a tree over 8192 keys, 32 heads that share 8, width 128, against PyTorch's attention with a mask."""
    B, R, H, G, T, D = 4, 16, 32, 8, 8192, 128
    q = torch.randn(B, R, H, D, device="cuda", dtype=torch.float16)
    k, v = (torch.randn(B, G, T, D, device="cuda", dtype=torch.float16).transpose(1, 2) for _ in range(2))
    lengths, mask = torch.full((B,), T, device="cuda"), torch.rand(B, R, T, device="cuda") < 0.9

    def baseline() -> Tensor:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask[:, None], enable_gqa=True)

    moved = 2 * k.numel() * 2 + mask.numel()
    return Timing(
        NAME, lambda: merge(segment_attention(q, k, v, lengths, D**-0.5, mask), q.dtype), baseline, "SDPA", moved, 4 * B * R * H * T * D
    )
