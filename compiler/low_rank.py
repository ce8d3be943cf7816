"""A matrix as a quantised one plus one of low rank, by alternation (LQ-LoRA, Guo et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from planc.compiler.weight_forms import Stored

ROUNDS = 12  #: of the alternation at most; most matrices stop after a few
_SPARE = 10  # directions more than asked for in the randomised decomposition


@dataclass(frozen=True)
class LowRank:
    """W ~ stored + left @ right, with the error of every round, the last of which may be worse than the one kept."""

    stored: Stored
    left: Tensor  # float16 [N, r]
    right: Tensor  # float16 [r, K]
    errors: tuple[float, ...]


def decompose(
    weight: Tensor,
    rank: int,
    quantize: Callable[[Tensor], Stored],
    columns: Tensor | None = None,
    rows: Tensor | None = None,
    rounds: int = ROUNDS,
) -> LowRank:
    """Split weight [N,K]: Q = 0; L = best of `rank` for W - Q; Q = quantize(W - L); again, until the error rises. The best round is kept.

    `columns` [K] weighs errors by input, `rows` [N] by output: with the root mean squares of the inputs, and of the loss's gradients in the
    outputs, the error is that of the loss to second order, as far as all of them are uncorrelated. Factors are float16 and Q is made for the
    factors as stored.
    """
    weight = weight.float()
    columns, rows = _relative(columns, weight.shape[1]), _relative(rows, weight.shape[0])
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        quantized, best, errors = torch.zeros_like(weight), None, list[float]()
        for _ in range(rounds):
            left, right = _best(weight - quantized, rank, columns, rows)
            stored = quantize(weight - left.float() @ right.float())
            quantized = stored.weight
            errors.append(float(((weight - quantized - left.float() @ right.float()) * columns * rows[:, None]).norm()))
            if best is not None and errors[-1] >= min(errors[:-1]):
                break
            best = stored, left, right
    finally:
        torch.set_rng_state(generator_state)
    assert best is not None
    return LowRank(*best, tuple(errors))


def _relative(weights: Tensor | None, count: int) -> Tensor:
    """Weights [count] in units of their mean; a channel that calibration saw nothing of still has one."""
    return torch.ones(count) if weights is None else (weights.float() / weights.float().mean().clamp(min=1e-30)).clamp(min=1e-3)


def _best(residual: Tensor, rank: int, columns: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Factors [N,r] and [r,K] of the best approximation with columns [K] and rows [N] weighed."""
    u, s, v = torch.svd_lowrank(residual * columns * rows[:, None], q=min(rank + _SPARE, *residual.shape), niter=2)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root / rows[:, None]).half(), (root[:, None] * v[:, :rank].t() / columns).half()
