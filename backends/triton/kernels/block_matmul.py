"""Product with weights in 4-bit blocks for few rows: the layout of `linear_blocks` (and of MatMulNBits), dequantised in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from planc.backends.triton.kernels.launch import FLOATS, Timing, check, check_tensors, check_type, launch
from planc.compiler.dialect import unpack_blocks

NAME, ROWS = "block_matmul", 128


def reference(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """In PyTorch, through the whole matrix in float32."""
    block = 2 * packed.shape[2]
    out = x.float() @ unpack_blocks(packed, scales, zeros, 4, block, x.shape[1]).t()
    return (out if bias is None else out + bias.float()).to(x.dtype)


# Bytes: N*K/2 for the steps and N*K/block scales (and zeros); FLOPs: 2 M*N*K, and two operations to dequantise a weight. Even inputs lie in low
# nibbles and odd ones in high nibbles, so the sum is split in two products instead of putting nibbles in order.


@triton.jit
def _kernel(
    x_ptr,  # [M,K] float
    packed_ptr,  # [N, K/2] uint8
    scales_ptr,  # [N, K/BLOCK] float
    zeros_ptr,  # [N, K/BLOCK] float in steps, or None: 8
    bias_ptr,  # [N] float, or None
    out_ptr,  # [M,N], type of x
    M,
    N,
    K,
    stride_x,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,  # weights per scale
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BYTES: tl.constexpr,  # of a row that are taken at once
):
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K // 2, BYTES):
        places = start + tl.arange(0, BYTES)
        inside = (outputs[None, :] < N) & (places[:, None] < K // 2)
        both = tl.load(packed_ptr + outputs[None, :] * (K // 2) + places[:, None], mask=inside, other=0)
        blocks = outputs[None, :] * (K // BLOCK) + places[:, None] // (BLOCK // 2)
        scale = tl.load(scales_ptr + blocks, mask=inside, other=0.0).to(tl.float32)
        zero = 8.0
        if ZEROS:
            zero = tl.load(zeros_ptr + blocks, mask=inside, other=0.0).to(tl.float32)
        even = (((both & 15).to(tl.float32) - zero) * scale).to(x_ptr.dtype.element_ty)
        odd = (((both >> 4).to(tl.float32) - zero) * scale).to(x_ptr.dtype.element_ty)
        x_places = x_ptr + rows[:, None].to(tl.int64) * stride_x + 2 * places[None, :]
        present = (rows[:, None] < M) & (places[None, :] < K // 2)
        sums = tl.dot(tl.load(x_places, mask=present, other=0.0), even, sums, input_precision="tf32x3")
        sums = tl.dot(tl.load(x_places + 1, mask=present, other=0.0), odd, sums, input_precision="tf32x3")
    if BIAS:
        sums += tl.load(bias_ptr + outputs, mask=outputs < N, other=0.0).to(tl.float32)[None, :]
    inside = (rows[:, None] < M) & (outputs[None, :] < N)
    tl.store(out_ptr + rows[:, None].to(tl.int64) * N + outputs[None, :], sums.to(out_ptr.dtype.element_ty), mask=inside)


def block_matmul(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x [M,K] float times weights in blocks, [M,N] in the type of x, sums in float32.

    packed [N, K/block, block/2] uint8, low nibble first, blocks of 16 to 256; scales and zeros [N, K/block] float, zeros in steps (None: 8); bias
    [N]. Rows of x and all of the weights are contiguous. Up to 128 rows.

    Raises InputError[kernel-unsupported] off a CUDA device and for other shapes or types.
    """
    check_tensors(NAME, "`planc.backends.reference`", x, packed, scales, zeros, bias)
    check_type(NAME, "x", x, *FLOATS)
    check_type(NAME, "packed", packed, torch.uint8)
    check(x.dim() == 2 and x.stride(1) == 1, NAME, "x is not a matrix with contiguous rows", "use x.contiguous()")
    check(
        packed.dim() == 3 and packed.is_contiguous(),
        NAME,
        f"packed has shape {list(packed.shape)}",
        "give [N, K/block, block/2], contiguous",
    )
    (M, K), (N, count, half) = x.shape, packed.shape
    known = half in (8, 16, 32, 64, 128)
    check(known, NAME, f"{half} bytes per block are no block of 16, 32, 64, 128 or 256 weights", "pack 4-bit steps in such blocks")
    check(count * 2 * half == K, NAME, f"x has {K} inputs, the blocks {count * 2 * half}", "give matching matrices")
    for name, part in (("scales", scales), ("zeros", zeros)):
        check(
            part is None or (part.shape == (N, count) and part.is_contiguous()), NAME, f"{name} are not [N, K/block]", "give one per block"
        )
    check(bias is None or bias.shape == (N,), NAME, "the bias has another number of outputs", f"give {N} values")
    check(M <= ROWS, NAME, f"{M} rows, at most {ROWS} are few", "dequantise with `unpack_blocks` and multiply")
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    block_m = 16 if M <= 16 else 32
    launch(
        _kernel, (triton.cdiv(N, 16), triton.cdiv(M, block_m)), x, packed, scales, zeros, bias, out, M, N, K, x.stride(0),
        ZEROS=zeros is not None, BIAS=bias is not None, BLOCK=2 * half, BLOCK_M=block_m, BLOCK_N=16, BYTES=64, warps=4, stages=4,
    )  # fmt: skip
    return out


def timing() -> Timing:
    """One row times a matrix of 14336 outputs and 4096 inputs in blocks of 32, against the product in float16."""
    N, K = 14336, 4096
    x = torch.randn(1, K, device="cuda", dtype=torch.float16)
    packed = torch.randint(0, 256, (N, K // 32, 16), dtype=torch.uint8, device="cuda")
    scales = torch.rand(N, K // 32, device="cuda", dtype=torch.float16)
    wide = torch.randn(N, K, device="cuda", dtype=torch.float16)
    return Timing(
        NAME,
        lambda: block_matmul(x, packed, scales),
        lambda: x @ wide.t(),
        "cuBLAS float16",
        N * K // 2 + N * K // 16 + 2 * (N + K),
        2 * N * K,
    )
