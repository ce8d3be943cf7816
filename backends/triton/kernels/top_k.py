"""The k largest of every row of logits, with their places: what a drafter learns from without a copy of all logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from planc.backends.triton.kernels.launch import FLOATS, Timing, check, check_tensors, check_type, launch, power_of_two

NAME, MOST, _CHUNK = "top_k", 64, 4096


def reference(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """In PyTorch: equal values in the order of their places, which `torch.topk` leaves open."""
    order = torch.sort(x.float(), dim=1, descending=True, stable=True).indices[:, :k]
    return x.gather(1, order), order


# Bytes: M*V values once, and k candidates of each chunk of 4096; FLOPs: none to speak of, k comparisons of each value. Value and place are one
# 64-bit key, so that a maximum settles ties (the lower place first) and a taken key is gone.


@triton.jit
def _chunks(
    x_ptr,  # [M,V] float
    keys_ptr,  # [M, chunks, k] int64
    V,
    stride,
    k,
    BLOCK: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = chunk * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + place, mask=place < V, other=0.0).to(tl.float32)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # the two zeros are equal
    bits = tl.where(x != x, 0x7FFFFFFF, bits)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # whole numbers in the order of the values
    key = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64)
    key = tl.where(place < V, key, -0x7FFFFFFFFFFFFFFF)
    out = keys_ptr + (row * tl.num_programs(1) + chunk) * k
    for i in range(k):
        best = tl.max(key)
        tl.store(out + i, best)
        key = tl.where(key == best, -0x7FFFFFFFFFFFFFFF, key)


@triton.jit
def _rows(
    keys_ptr,  # [M,C] int64
    x_ptr,  # [M,V] float
    values_ptr,  # [M,k], type of x
    ids_ptr,  # [M,k] int64
    C,
    stride,
    k,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    key = tl.load(keys_ptr + row * C + place, mask=place < C, other=-0x7FFFFFFFFFFFFFFF)
    for i in range(k):
        best = tl.max(key)
        found = 0x7FFFFFFF - (best & 0xFFFFFFFF)
        tl.store(ids_ptr + row * k + i, found)
        tl.store(values_ptr + row * k + i, tl.load(x_ptr + row * stride + found))
        key = tl.where(key == best, -0x7FFFFFFFFFFFFFFF, key)


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values [M,k], type of x, and places [M,k] int64 of the k <= 64 largest of each row of x [M,V], largest first, equal ones in order.

    Rows of x are contiguous. NaN counts as larger than everything. Raises InputError[kernel-unsupported] off a CUDA device, for k beyond 64 or V.
    """
    check_tensors(NAME, "`torch.topk`", x)
    check_type(NAME, "x", x, *FLOATS)
    check(x.dim() == 2 and x.stride(1) == 1, NAME, f"x has shape {list(x.shape)}", "give rows [M,V] that are contiguous")
    M, V = x.shape
    check(0 < k <= min(MOST, V), NAME, f"k is {k}, of {V} values at most {min(MOST, V)} can be asked for", "use `torch.topk`")
    chunks = triton.cdiv(V, _CHUNK)
    check(chunks * k <= 32768, NAME, f"{chunks * k} candidates of a row do not fit into registers", "use `torch.topk`")
    keys = torch.empty(M, chunks, k, dtype=torch.int64, device=x.device)
    values, ids = x.new_empty(M, k), torch.empty(M, k, dtype=torch.int64, device=x.device)
    launch(_chunks, (M, chunks), x, keys, V, x.stride(0), k, BLOCK=min(_CHUNK, power_of_two(V)), warps=8)
    launch(_rows, (M,), keys, x, values, ids, chunks * k, x.stride(0), k, BLOCK=power_of_two(chunks * k), warps=4)
    return values, ids


def timing() -> Timing:
    """The 8 largest of 128256 logits in 16 rows, against torch.topk."""
    x = torch.randn(16, 128256, device="cuda", dtype=torch.float16)
    return Timing(NAME, lambda: top_k(x, 8), lambda: torch.topk(x, 8, dim=1), "torch.topk", 2 * x.numel(), 0)
