"""Attention over the pages of a cache that were selected for the queries, and the bound by which they are selected (LServe, Quest)."""

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

NAME = "page_attention"


def page_bounds(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Upper bound of the scores of queries q [B,R,H,D] with the keys of each page, [B,G,N], the largest over rows and heads that share keys.

    low and high [B,N,G,D] are the least and the largest value of each channel in the N pages: no key scores above
    sum_d max(q_d low_d, q_d high_d). `top_k` of this selects pages for `page_attention`.
    """
    B, R, H, D = q.shape
    G = low.shape[2]
    rows = q.reshape(B, R, G, H // G, D).float().permute(0, 2, 1, 3, 4).flatten(2, 3)  # [B,G,R*H/G,D]
    low, high = (x.float().permute(0, 2, 3, 1) for x in (low, high))  # [B,G,D,N]
    return (rows.clamp(min=0) @ high + rows.clamp(max=0) @ low).amax(2)


def reference(q: Tensor, k: Tensor, v: Tensor, pages: Tensor, lengths: Tensor, scale: float) -> Parts:
    """In PyTorch, as one part."""
    B, _, H, _ = q.shape
    G, size, group = k.shape[2], k.shape[1], H // k.shape[2]
    parts = []
    for head in range(G):
        index = pages[:, head].long()  # [B,S]
        keys, values = (x[index.clamp(min=0), :, head].reshape(B, -1, 1, x.shape[3]) for x in (k, v))
        there = (torch.arange(size, device=q.device) < lengths[index.clamp(min=0)][..., None]) & (index >= 0)[..., None]
        visible = there.reshape(B, 1, -1).expand(-1, q.shape[1], -1)
        parts.append(scores_reference(q[:, :, head * group : (head + 1) * group], keys, values, visible, scale))
    return Parts(*(torch.cat([getattr(p, name) for p in parts], 3) for name in ("o", "m", "l")))


# Bytes: B*G*S*page*2 D of the selected pages, whatever the length of the cache; FLOPs: 4 B*R*H*S*page*D. A page is a tile, its keys lie side by
# side per head, so reads are as wide as in a dense cache.


@triton.jit
def _kernel(
    q_ptr,  # [B,R,H,D] float
    k_ptr,  # [N,PAGE,G,D], type of q: a pool of pages
    v_ptr,  # [N,PAGE,G,D]
    pages_ptr,  # [B,G,S] int32: numbers of pages, -1 for none
    lengths_ptr,  # [N] int32: rows of each page that exist
    o_ptr,  # [P,B,R,H,D] float32
    m_ptr,  # [P,B,R,H] float32
    l_ptr,  # [P,B,R,H] float32
    B, R, H, G, S, scale,
    q_b, q_r, q_h,
    k_n, k_t, k_g,
    v_n, v_t, v_g,
    per_part,  # pages of a part
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    part, pair = tl.program_id(0), tl.program_id(1)
    sequence, head = (pair // G).to(tl.int64), (pair % G).to(tl.int64)
    row, query_head, exists = rows_of(pair, head * GROUP, GROUP, R, M)
    wide, key = tl.arange(0, D), tl.arange(0, PAGE)
    places = q_ptr + sequence * q_b + row[:, None] * q_r + query_head[:, None] * q_h + wide[None, :]
    q = tl.load(places, mask=exists[:, None] & (wide[None, :] < WIDTH), other=0.0)
    m, l, acc = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32), tl.zeros((M, D), tl.float32)  # noqa: E741
    for slot in range(part * per_part, tl.minimum((part + 1) * per_part, S)):
        page = tl.load(pages_ptr + pair * S + slot).to(tl.int64)
        length = tl.load(lengths_ptr + page, mask=page >= 0, other=0)
        inside = (key < length)[:, None] & (wide[None, :] < WIDTH)
        k = tl.load(k_ptr + page * k_n + key[:, None] * k_t + head * k_g + wide[None, :], mask=inside, other=0.0)
        v = tl.load(v_ptr + page * v_n + key[:, None] * v_t + head * v_g + wide[None, :], mask=inside, other=0.0)
        m, l, acc = attend_tile(q, k, v, exists[:, None] & (key < length)[None, :], scale, m, l, acc)  # noqa: E741
    place = ((part * B + sequence) * R + row) * H + query_head
    write_part(o_ptr, m_ptr, l_ptr, place, exists, m, l, acc, WIDTH, D)


def page_attention(q: Tensor, k: Tensor, v: Tensor, pages: Tensor, lengths: Tensor, scale: float, parts: int = 1) -> Parts:
    """Attend to selected pages; `merge` makes the result of this and other segments.

    q [B,R,H,D]; k and v [N,page,G,D] in the type of q, a pool of pages of 16 to 128 rows with a contiguous last axis; pages [B,G,S] int32,
    contiguous: the pages that the heads of a group read, in any order, -1 for none; lengths [N] int32: rows that exist in each page.
    `parts`: programs that share the pages of a sequence and head.

    Raises InputError[kernel-unsupported] off a CUDA device and for other shapes or types.
    """
    check_tensors(NAME, "`page_attention.reference`", q, k, v, pages, lengths)
    check(
        k.shape == v.shape and k.dim() == 4 and k.dtype == v.dtype,
        NAME,
        f"k is {list(k.shape)}, v {list(v.shape)}",
        "give [N,page,G,D] of one type",
    )
    check(k.stride(3) == v.stride(3) == 1, NAME, "the last axis of k or v is not contiguous", "use .contiguous()")
    (N, size, G, D), (B, R, H, _) = k.shape, q.shape
    tile_rows = check_queries(NAME, q, G, D, k.dtype)
    check(size in (16, 32, 64, 128), NAME, f"pages have {size} rows", "use pages of 16, 32, 64 or 128 rows")
    for name, part in (("pages", pages), ("lengths", lengths)):
        check_type(NAME, name, part, torch.int32)
        check(part.is_contiguous(), NAME, f"{name} are not contiguous", "use .contiguous()")
    check(pages.dim() == 3 and pages.shape[:2] == (B, G), NAME, f"pages are {list(pages.shape)}", f"give [{B}, {G}, S]")
    check(lengths.shape == (N,), NAME, f"there are {N} pages and {len(lengths)} lengths", "give one for each page")
    out, count = Parts.empty(parts, q, D), pages.shape[2]
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    launch(
        _kernel, (parts, B * G), q, k, v, pages, lengths, out.o, out.m, out.l, B, R, H, G, count, scale, *strides, triton.cdiv(count, parts),
        GROUP=H // G, WIDTH=D, PAGE=size, M=tile_rows, D=power_of_two(D), warps=4 if tile_rows <= 64 else 8,
        stages=2 if size <= tile_of(D, q.dtype) else 1,
    )  # fmt: skip
    return out


def timing() -> Timing:
    """One row, 64 of 2048 pages of 64 keys, 32 heads that share 8, width 128, against PyTorch's attention over the whole cache."""
    B, H, G, D, page, count, selected = 4, 32, 8, 128, 64, 2048, 64
    q = torch.randn(B, 1, H, D, device="cuda", dtype=torch.float16)
    k, v = (torch.randn(B * count, page, G, D, device="cuda", dtype=torch.float16) for _ in range(2))
    pages = torch.randint(0, B * count, (B, G, selected), device="cuda", dtype=torch.int32)
    lengths = torch.full((B * count,), page, device="cuda", dtype=torch.int32)
    whole = [x.reshape(B, count * page, G, D).transpose(1, 2) for x in (k, v)]

    def baseline() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), *whole, enable_gqa=True)

    moved, flops = B * G * selected * page * D * 2 * 2, 4 * B * H * selected * page * D
    run = lambda: merge(page_attention(q, k, v, pages, lengths, D**-0.5, 8), q.dtype)  # noqa: E731
    return Timing(NAME, run, baseline, "SDPA over all pages", moved, flops)
