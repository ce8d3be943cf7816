"""RMSNorm and int8 quantisation of rows in one pass over them: what stands in front of a product in row-wise int8."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from planc.backends.triton.kernels.launch import FLOATS, Timing, check, check_tensors, check_type, launch, power_of_two
from planc.compiler.dialect import quantize_rows
from planc.compiler.dialect import rms_norm as eager_norm

NAME, LONGEST = "rms_quantize", 32768


def reference(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """In PyTorch: normalise in float32, then the largest magnitude of a row becomes 127 steps."""
    wide = x.float()
    values, scale = quantize_rows(wide if weight is None else eager_norm(wide, weight.float(), eps))
    return values.to(torch.int8), scale[..., 0]


# Bytes: M*K*(size of x + 1) + 4 M + K*(size of the weight); FLOPs: about 6 M*K. One program holds a row in registers and reads it once.


@triton.jit
def _kernel(
    x_ptr,  # [M,K] float
    weight_ptr,  # [K] float, or None
    values_ptr,  # [M,K] int8, contiguous
    scale_ptr,  # [M] float32
    K,
    stride,  # of the rows of x
    eps,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,  # >= K
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < K
    x = tl.load(x_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        x = x * (1.0 / tl.sqrt_rn(tl.sum(x * x) / K + eps))
        x = x * tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    peak = tl.max(tl.abs(x))
    scale = tl.div_rn(tl.where(peak > 0, peak, 1.0), 127.0)
    # adding and taking away 1.5 * 2^23 rounds to the nearest whole number, ties to even
    steps = tl.div_rn(x, scale + tl.zeros_like(x)) + 12582912.0 - 12582912.0
    tl.store(values_ptr + row * K + column, steps.to(tl.int8), mask=inside)
    tl.store(scale_ptr + row, scale)


def rms_quantize(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """x [M,K] float, its rows contiguous, to int8 values [M,K] and a float32 scale [M] for each row; with `weight` [K] the rows are normalised first.

    Raises InputError[kernel-unsupported] off a CUDA device, for rows longer than 32768 and for types that are no floats.
    """
    check_tensors(NAME, "`rms_quantize.reference`", x, weight)
    check_type(NAME, "x", x, *FLOATS)
    check(
        x.dim() == 2 and x.stride(1) == 1,
        NAME,
        f"x has shape {list(x.shape)} and strides {x.stride()}",
        "give rows [M,K] that are contiguous",
    )
    M, K = x.shape
    check(0 < K <= LONGEST, NAME, f"rows have {K} values, at most {LONGEST} fit into registers", "use `rms_quantize.reference`")
    check(weight is None or weight.shape == (K,), NAME, "the weight does not have a value for each column", f"give {K} values")
    values, scale = torch.empty(M, K, dtype=torch.int8, device=x.device), torch.empty(M, dtype=torch.float32, device=x.device)
    block = power_of_two(K)
    launch(
        _kernel, (M,), x, weight, values, scale, K, x.stride(0), eps, NORM=weight is not None, BLOCK=block, warps=4 if block <= 4096 else 8
    )
    return values, scale


def timing() -> Timing:
    """2048 rows of 4096 values, against the reference as torch.compile makes it."""
    x, weight = torch.randn(2048, 4096, device="cuda", dtype=torch.float16), torch.ones(4096, device="cuda", dtype=torch.float16)
    fused = torch.compile(reference)
    return Timing(
        NAME, lambda: rms_quantize(x, weight), lambda: fused(x, weight), "torch.compile", x.numel() * 3 + 4 * 2048 + 2 * 4096, 6 * x.numel()
    )
