"""Row-wise int8 product for few rows: x in int8 with a scale per row, weights in int8 with a scale per output, exact integer sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from planc.backends.triton.kernels.launch import FLOATS, Timing, check, check_tensors, check_type, launch

NAME, ROWS = "int8_matmul", 128


def reference(
    x: Tensor,
    row_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """In PyTorch, with sums in float64, which is exact for up to 2^39 inputs."""
    out = (x.double() @ weight.double().t()).float() * (row_scale[:, None] * scale)
    out = out if bias is None else out + bias.float()
    return (out if residual is None else out + residual.float()).to(dtype)


# Bytes: N*K for the weights, of which every program reads its own outputs' rows once, and little beside; FLOPs: 2 M*N*K. With M <= 16 the
# tensor cores compute a tile of 16 rows whether they are there or not, and the weights' bytes decide; a tile of 16 outputs gives narrow layers
# enough programs to fill the device.


@triton.jit
def _kernel(
    x_ptr,  # [M,K] int8
    row_scale_ptr,  # [M] float32
    weight_ptr,  # [N,K] int8
    scale_ptr,  # [N] float32
    bias_ptr,  # [N] float, or None
    residual_ptr,  # [M,N] float, or None
    out_ptr,  # [M,N] float
    M,
    N,
    K,
    stride_x,
    stride_weight,
    stride_residual,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    x_rows = x_ptr + rows[:, None].to(tl.int64) * stride_x
    weight_rows = weight_ptr + outputs[None, :].to(tl.int64) * stride_weight
    for start in range(0, K, BLOCK_K):
        inputs = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + inputs[None, :], mask=(rows[:, None] < M) & (inputs[None, :] < K), other=0)
        weight = tl.load(weight_rows + inputs[:, None], mask=(outputs[None, :] < N) & (inputs[:, None] < K), other=0)
        sums = tl.dot(x, weight, sums, out_dtype=tl.int32)
    row_scale = tl.load(row_scale_ptr + rows, mask=rows < M, other=0.0)
    scale = tl.load(scale_ptr + outputs, mask=outputs < N, other=0.0)
    out = sums.to(tl.float32) * (row_scale[:, None] * scale[None, :])
    inside = (rows[:, None] < M) & (outputs[None, :] < N)
    if BIAS:
        out += tl.load(bias_ptr + outputs, mask=outputs < N, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        places = residual_ptr + rows[:, None].to(tl.int64) * stride_residual + outputs[None, :]
        out += tl.load(places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows[:, None].to(tl.int64) * N + outputs[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


def int8_matmul(
    x: Tensor,
    row_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(x * row_scale) @ (weight * scale)^T + bias + residual, [M,N] of `dtype`.

    x [M,K] int8 and row_scale [M] float32 as `rms_quantize` makes them, weight [N,K] int8, scale [N] float32, bias [N] and residual [M,N] float;
    the last axis of each is contiguous. Up to 128 rows: beyond that a GEMM with larger tiles is faster.

    Raises InputError[kernel-unsupported] off a CUDA device and for other shapes or types.
    """
    check_tensors(NAME, "`planc.backends.reference`", x, row_scale, weight, scale, bias, residual)
    for name, tensor in (("x", x), ("weight", weight)):
        check_type(NAME, name, tensor, torch.int8)
        check(tensor.dim() == 2 and tensor.stride(1) == 1, NAME, f"{name} is not a matrix with contiguous rows", f"use {name}.contiguous()")
    check(dtype in FLOATS, NAME, f"the result cannot be {dtype}", "use float16, bfloat16 or float32")
    (M, K), N = x.shape, weight.shape[0]
    check(weight.shape[1] == K, NAME, f"x has {K} inputs, the weight {weight.shape[1]}", "give matching matrices")
    check(row_scale.shape == (M,) and scale.shape == (N,), NAME, "there must be a scale for each row and each output", f"give {M} and {N}")
    check(M <= ROWS, NAME, f"{M} rows, at most {ROWS} are few", "use `torch._int_mm`")
    check(bias is None or bias.shape == (N,), NAME, "the bias has another number of outputs", f"give {N} values")
    given = residual is None or (residual.shape == (M, N) and residual.stride(1) == 1)
    check(given, NAME, "the residual is not [M,N] with contiguous rows", "use residual.contiguous()")
    out = torch.empty(M, N, dtype=dtype, device=x.device)
    block_m = 16 if M <= 16 else 32
    strides = (x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0))
    launch(
        _kernel, (triton.cdiv(N, 16), triton.cdiv(M, block_m)), x, row_scale, weight, scale, bias, residual, out, M, N, K, *strides,
        BIAS=bias is not None, RESIDUAL=residual is not None, BLOCK_M=block_m, BLOCK_N=16, BLOCK_K=256, warps=4, stages=4,
    )  # fmt: skip
    return out


def timing() -> Timing:
    """One row times a matrix of 14336 outputs and 4096 inputs, against the product in float16."""
    N, K = 14336, 4096
    x, weight = (torch.randint(-127, 128, (rows, K), dtype=torch.int8, device="cuda") for rows in (1, N))
    row_scale, scale = torch.rand(1, device="cuda"), torch.rand(N, device="cuda")
    wide_x, wide = torch.randn(1, K, device="cuda", dtype=torch.float16), torch.randn(N, K, device="cuda", dtype=torch.float16)
    return Timing(
        NAME, lambda: int8_matmul(x, row_scale, weight, scale), lambda: wide_x @ wide.t(), "cuBLAS float16", N * K + 8 * N + K, 2 * N * K
    )
