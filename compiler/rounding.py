"""Rounding of weights to given levels with the errors of one input made good by the others (GPTQ, Frantar et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from planc.compiler.calibration import Gram
from planc.runtime.errors import CompileError

#: weights in units of their scale, [N, n] -> the nearest levels, same shape and units
Nearest = Callable[[Tensor], Tensor]

#: scales that are tried, in shares of the one at which a block's largest magnitude is the end of the range. Negative: the other end
_SHARES = (*(x / 20 for x in range(12, 23)), *(-x / 20 for x in range(18, 25)))

_COLUMNS = 32  # that are rounded before their errors are carried to the rest: few enough to stay in the cache


def gptq(weight: Tensor, gram: Tensor, scale: Tensor, nearest: Nearest, damp: float = 0.01) -> Tensor:
    """Levels [N,K] float32, in units of `scale` [N,K], that bring x W^T close for inputs with Gram matrix `gram` [K,K] = sum of x^T x.

    Columns are rounded one by one, those with the largest inputs first; what rounding changes is compensated in the columns still to come, by the
    inverse of the Gram matrix. Scales are fixed before, so the order of columns leaves blocks as they lie. A channel that calibration never saw
    is rounded to nearest.

    Raises CompileError[pass-refused] when the Gram matrix has no Cholesky factor even with `damp` times 1000 of its mean diagonal added.
    """
    order = torch.argsort(gram.diagonal(), descending=True)
    factor = _factor(gram[order][:, order].double(), damp)
    left, step = weight.float().t()[order].clone(), scale.float().t()[order]  # [K,N]: a column of the weight is contiguous
    levels = torch.empty_like(left)
    for start in range(0, len(left), _COLUMNS):
        stop = min(start + _COLUMNS, len(left))
        errors = torch.empty(stop - start, left.shape[1])
        for k in range(start, stop):
            levels[k] = nearest((left[k] / step[k])[:, None])[:, 0]
            errors[k - start] = error = (left[k] - levels[k] * step[k]) / factor[k, k]
            left[k + 1 : stop].addr_(factor[k, k + 1 : stop], error, alpha=-1)
        left[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return levels[torch.argsort(order)].t().contiguous()


def _factor(gram: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped matrix, float32."""
    diagonal = gram.diagonal().clone()
    gram = gram + torch.diag((diagonal == 0).double())
    for more in (1, 10, 100, 1000):
        damped = gram + damp * more * diagonal.mean().clamp(min=1e-12) * torch.eye(len(gram), dtype=gram.dtype)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                factor: Tensor = inverse.float()
                return factor
    raise CompileError(
        "pass-refused",
        "the inputs that calibration saw have no usable Gram matrix",
        fix="calibrate on more text, or set `rounding: nearest`",
    )


def fitted_scales(weight: Tensor, peaks: Tensor, nearest: Nearest, importance: Tensor, *, signed: bool) -> Tensor:
    """Scales [N,M] of the blocks of `weight` [N,K], M blocks in a row, with the least squared error of each block.

    Around the scale `peaks` [N,M] that takes in a block's largest magnitude, several are tried; for the levels that each leads to the best scale
    is known (least squares), and the best of all is kept. Errors are weighed by `importance` [K] >= 0 of the inputs. `signed`: the levels are not
    symmetric, so that a negative scale may be better.
    """
    block = weight.shape[1] // peaks.shape[1]

    def blocks(values: Tensor) -> Tensor:
        return values.reshape(*peaks.shape, block)

    weighed = (weight * importance).float()
    best, gain = peaks.clone(), torch.zeros_like(peaks)
    for share in (1.0, *(s for s in _SHARES if s != 1 and (signed or s > 0))):  # 1 first: others must be better than it
        levels = nearest(weight / (peaks * share).repeat_interleave(block, 1))
        product, square = blocks(weighed * levels).sum(2), blocks(levels * levels * importance).sum(2)
        scale = torch.where(square > 0, product / square.clamp(min=1e-30), peaks)
        better = (product * scale > gain) & (signed | (scale > 0))
        best, gain = torch.where(better, scale, best), torch.where(better, product * scale, gain)
    return best


def second_moments(gram: Gram) -> Tensor:
    """E[x^T x] [K,K] as far as n rows tell it: products of different channels are shrunk by n / (n + K), the squares are kept.

    From few rows, channels seem to hang together that do not, and GPTQ would make errors good where there is nothing to make good.
    """
    mean = gram.value / gram.count
    share = gram.count / (gram.count + len(mean))
    return mean * share + torch.diag(mean.diagonal() * (1 - share))


def output_error(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """Sum of squared differences of the outputs for the inputs behind `gram`: tr(D G D^T) with D the difference of the weights."""
    difference = (weight - rounded).double()
    return float((difference @ gram.double() * difference).sum())
