"""Attention over segments of a cache: every segment gives a partial result with its log-sum-exp, and partial results are merged.

A segment is whatever one kernel reads: dense rows, pages, bitmaps. Its part holds, for every row of queries, o = sum exp(s - m) v / l with
m = max s and l = sum exp(s - m); of parts, o = sum w o / sum w with w = l exp(m - max m). An empty part has m = -inf, l = 0 and no weight.
Query heads that share a key/value head are rows of one tile, so that their keys are read once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from planc.backends.triton.kernels.launch import FLOATS, check, check_tensors, check_type, launch, power_of_two

WIDEST, ROWS = 256, 128  #: head width, and rows of queries times heads that share a key/value head; half as many with heads above 128


@dataclass(frozen=True)
class Parts:
    """Partial results of P parts for queries [B,R,H,D]."""

    o: Tensor  # [P,B,R,H,D] float32
    m: Tensor  # [P,B,R,H] float32, -inf where a part shows nothing
    l: Tensor  # noqa: E741 - the letter of the papers; [P,B,R,H] float32

    @classmethod
    def empty(cls, parts: int, q: Tensor, width: int) -> Parts:
        """Room for what a kernel writes; `width` is that of the values."""
        shape = (parts, *q.shape[:3])
        return cls(q.new_empty((*shape, width), dtype=torch.float32), *(q.new_empty(shape, dtype=torch.float32) for _ in range(2)))

    def __add__(self, other: Parts) -> Parts:
        return Parts(*(torch.cat((getattr(self, name), getattr(other, name))) for name in ("o", "m", "l")))


def merge_reference(parts: Parts) -> tuple[Tensor, Tensor]:
    """As `merge`, in PyTorch."""
    top = parts.m.amax(0)
    weight = parts.l * torch.exp(parts.m - torch.where(top == -torch.inf, torch.zeros_like(top), top))
    total = weight.sum(0)
    o = (weight[..., None] * parts.o).sum(0) / torch.where(total > 0, total, torch.ones_like(total))[..., None]
    return o, top + torch.log(total)


def scores_reference(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Parts:
    """One part in PyTorch: q [B,R,H,D], k and v [B,T,G,D], visible [B,R,T] or [B,R,H,T] bool."""
    group = q.shape[2] // k.shape[2]
    keys, values = (x.float().repeat_interleave(group, 2) for x in (k, v))  # [B,T,H,D]
    s = torch.einsum("brhd,bthd->brht", q.float(), keys) * scale
    s = s.masked_fill(~(visible if visible.dim() == 4 else visible[:, :, None]), -torch.inf)
    m = s.amax(3) if s.shape[3] else s.new_full(s.shape[:3], -torch.inf)
    p = torch.exp(s - torch.where(m == -torch.inf, torch.zeros_like(m), m)[..., None])
    total = p.sum(3)
    o = torch.einsum("brht,bthd->brhd", p, values) / torch.where(total > 0, total, torch.ones_like(total))[..., None]
    return Parts(o[None], m[None], total[None])


@triton.jit
def rows_of(pair, first_head, GROUP: tl.constexpr, R, M: tl.constexpr):
    """Rows of a tile: (row of the pass, query head, whether it exists) of tile row i; heads change slowest."""
    i = tl.arange(0, M)
    return i % R, first_head + i // R, i < GROUP * R


@triton.jit
def attend_tile(q, k, v, visible, scale, m, l, acc):  # noqa: E741
    """Take keys k [T,D] and values v [T,D] into the running result of queries q [M,D]; visible [M,T].

    float32 is multiplied as three products of tf32, which keeps its precision and the tensor cores; half precision as it is.
    """
    s = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
    s = tl.where(visible, s, float("-inf"))
    new = tl.maximum(m, tl.max(s, axis=1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp(s - safe[:, None])
    kept = tl.exp(m - safe)
    acc = tl.dot(p.to(v.dtype), v, acc * kept[:, None], input_precision="tf32x3")
    return new, l * kept + tl.sum(p, axis=1), acc


@triton.jit
def write_part(o_ptr, m_ptr, l_ptr, place, exists, m, l, acc, WIDTH: tl.constexpr, D: tl.constexpr):  # noqa: E741
    """Write rows of a part; `place` [M] is their index in [P,B,R,H]."""
    column = tl.arange(0, D)
    o = acc / tl.where(l > 0, l, 1.0)[:, None]
    tl.store(o_ptr + place[:, None] * WIDTH + column[None, :], o, mask=exists[:, None] & (column[None, :] < WIDTH))
    tl.store(m_ptr + place, m, mask=exists)
    tl.store(l_ptr + place, l, mask=exists)


@triton.jit
def _merge(o_ptr, m_ptr, l_ptr, out_ptr, lse_ptr, rows, P, WIDTH: tl.constexpr, D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, D)
    top, total, acc = -float("inf"), 0.0, tl.zeros((D,), tl.float32)
    for part in range(P):
        place = part * rows + row
        m, l = tl.load(m_ptr + place), tl.load(l_ptr + place)  # noqa: E741
        new = tl.maximum(top, m)
        safe = tl.where(new == -float("inf"), 0.0, new)
        kept, weight = tl.exp(top - safe), l * tl.exp(m - safe)
        acc = acc * kept + weight * tl.load(o_ptr + place * WIDTH + column, mask=column < WIDTH, other=0.0)
        top, total = new, total * kept + weight
    out = acc / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * WIDTH + column, out.to(out_ptr.dtype.element_ty), mask=column < WIDTH)
    tl.store(lse_ptr + row, top + tl.log(tl.where(total > 0, total, 1.0)))


def merge(parts: Parts, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The result over all parts: o [B,R,H,D] of `dtype`, and the log-sum-exp [B,R,H] float32 of all scores (-inf, and o zero, where there are none).

    Raises InputError[kernel-unsupported] off a CUDA device.
    """
    check_tensors("merge", "`merge_reference`", parts.o, parts.m, parts.l)
    check(all(part.is_contiguous() for part in (parts.o, parts.m, parts.l)), "merge", "parts are not contiguous", "add parts with +")
    shape = parts.m.shape[1:]
    out, lse = parts.o.new_empty(parts.o.shape[1:], dtype=dtype), parts.m.new_empty(shape)
    width = parts.o.shape[-1]
    launch(
        _merge, (lse.numel(),), parts.o, parts.m, parts.l, out, lse, lse.numel(), len(parts.m), WIDTH=width, D=power_of_two(width), warps=2
    )
    return out, lse


def tile_of(width: int, dtype: torch.dtype) -> int:
    """Keys that are taken at once, so that two tiles of keys and of values fit into the memory of a multiprocessor."""
    return 64 if width * dtype.itemsize <= 256 else 32


def check_queries(kernel: str, q: Tensor, heads: int, width: int, dtype: torch.dtype) -> int:
    """Check queries [B,R,H,D] against `heads` key/value heads of a width; gives the rows of a tile."""
    check_type(kernel, "q", q, *FLOATS)
    check(q.dim() == 4 and q.stride(3) == 1, kernel, f"q has shape {list(q.shape)}", "give [B,R,H,D] with a contiguous last axis")
    check(q.dtype == dtype, kernel, f"q is {q.dtype}, the cache {dtype}", "convert one of them")
    check(q.shape[3] == width, kernel, f"queries are {q.shape[3]} wide, keys {width}", "give matching heads")
    check(0 < width <= WIDEST, kernel, f"heads are {width} wide, at most {WIDEST} fit into registers", "use scaled_dot_product_attention")
    check(q.shape[2] % heads == 0, kernel, f"{q.shape[2]} query heads do not share {heads} key/value heads", "give a multiple of them")
    rows, most = q.shape[1] * (q.shape[2] // heads), ROWS if width <= 128 else ROWS // 2
    fix = "attend to fewer rows at once, or use scaled_dot_product_attention for prompts"
    problem = f"{q.shape[1]} rows of {q.shape[2] // heads} heads are {rows} rows per key/value head, at most {most} fit"
    check(0 < rows <= most, kernel, problem, fix)
    return power_of_two(rows)
