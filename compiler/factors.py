"""W ~ A S B with an N:M-sparse core S between block-diagonal wrappers A and B (ARMOR): gradient steps on the values, exact steps on the mask."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Selection = Literal["random", "greedy", "uniform"]

_PATIENCE, _BETTER = 100, 1e-6  # stop after so many steps without a loss that is lower by this share
_EPS = 1e-5


@dataclass(frozen=True)
class Factors:
    """`left` [N/b, b, b], `core` [N, K], `right` [K/b, b, b] with left (core right) ~ weight; the loss before and after, relative to W = 0."""

    left: Tensor
    core: Tensor
    right: Tensor
    first: float
    last: float

    def dense(self) -> Tensor:
        """The matrix that they stand for, [N, K]."""
        return _product(self.left, self.core, self.right)


def factorise(
    weight: Tensor, energy: Tensor, pattern: tuple[int, int], block: int, *, steps: int, rate: float, select: Selection, seed: int
) -> Factors:
    """Minimise mean((A S B - W)^2 h), W scaled to columns and rows of length one, h = `energy` [K] of its inputs; `block` divides N and K.

    Every step is one of Adam on A, B and the values of S, and then a new choice of one N:M group per pair of blocks, with the best values for it.
    The loss is never above that of A = B = 1 and the heaviest N of every M, because the best state is kept.
    """
    columns = weight.norm(dim=0) + _EPS
    rows = (weight / columns).norm(dim=1) + _EPS
    target = weight / columns / rows[:, None]
    valid = torch.isfinite(energy) & (energy > 0)
    energy = torch.where(valid, energy, energy[valid].mean() if bool(valid.any()) else 1.0).to(weight.dtype)
    search = _Search(target, energy, pattern, block, torch.Generator().manual_seed(seed), select)
    first, best, waited = search.loss(), search.state(), 0
    optimiser = torch.optim.Adam([search.left, search.core, search.right], lr=rate)
    lowest = first
    for _ in range(steps):
        gradient = search.descend(optimiser)
        search.choose(gradient)
        loss = search.loss()
        waited = 0 if loss < lowest * (1 - _BETTER) else waited + 1
        if loss < lowest:
            lowest, best = loss, search.state()
        if waited >= _PATIENCE:
            break
    left, core, right = best
    return Factors(left * rows.reshape(-1, block, 1), core, right * columns.reshape(-1, 1, block), first, lowest)


def _product(left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    block = left.shape[1]
    half = torch.bmm(left, core.reshape(len(left), block, -1)).reshape(len(core), -1, block)  # [N, K/b, b]
    return torch.bmm(half.transpose(0, 1), right).transpose(0, 1).reshape(core.shape)


class _Search:
    """The factors of one matrix while they are sought. Letters: J, K blocks of rows and columns, b their size, M a group, G = b/M groups."""

    def __init__(
        self, target: Tensor, energy: Tensor, pattern: tuple[int, int], block: int, random: torch.Generator, select: Selection
    ) -> None:
        self.target, self.energy, self.block, self.random, self.select = target, energy, block, random, select
        self.kept, self.group = pattern
        groups = (target.pow(2) * energy).reshape(-1, self.group)
        order = groups.argsort(dim=1, descending=True, stable=True)[:, : self.kept]
        self.mask = torch.zeros_like(groups).scatter(1, order, 1.0).reshape(target.shape)
        self.core = target * self.mask
        self.left, self.right = (torch.eye(block, dtype=target.dtype).repeat(n // block, 1, 1) for n in target.shape)
        self.scale = float((target.pow(2) * energy).sum())
        self.supports = torch.tensor(list(itertools.combinations(range(self.group), self.kept)))  # [C, N]
        self.error = self._error()  # A S B - W

    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.left.clone(), self.core.clone(), self.right.clone()

    def loss(self) -> float:
        return float((self.error.pow(2) * self.energy).sum()) / self.scale

    def _error(self) -> Tensor:
        return _product(self.left, self.core, self.right) - self.target

    def descend(self, optimiser: torch.optim.Optimizer) -> Tensor:
        """One step on all values; the loss's gradient with respect to every entry of the core, in the mask or not."""
        b, weighted = self.block, self.error * self.energy * (2 / self.scale)
        by_row, by_column = (
            weighted.reshape(-1, b, weighted.shape[1]),
            weighted.reshape(len(weighted), -1, b).transpose(0, 1),
        )  # [J,b,*], [K,*,b]
        half = torch.bmm(self.left, self.core.reshape(by_row.shape)).reshape(len(weighted), -1, b).transpose(0, 1)  # A S [K, N, b]
        wide = torch.bmm(self.core.reshape(len(weighted), -1, b).transpose(0, 1), self.right).transpose(0, 1).reshape(by_row.shape)  # S B
        gradient = torch.bmm(self.left.transpose(1, 2), by_row).reshape(len(weighted), -1, b).transpose(0, 1)
        gradient = torch.bmm(gradient, self.right.transpose(1, 2)).transpose(0, 1).reshape(weighted.shape)
        self.left.grad, self.right.grad = torch.bmm(by_row, wide.transpose(1, 2)), torch.bmm(half.transpose(1, 2), by_column)
        self.core.grad = gradient * self.mask
        optimiser.step()
        self.core *= self.mask  # moments of entries that left the mask would bring them back
        self.error = self._error()
        return gradient

    def choose(self, gradient: Tensor) -> None:
        """For every pair of blocks, one group of M entries of a row: the N of them, and the values, that leave the least error of the block."""
        b, m = self.block, self.group
        j_count, k_count = len(self.left), len(self.right)
        worth = gradient.abs().reshape(j_count, b, k_count, b // m, m).sum(-1).permute(0, 2, 1, 3).reshape(j_count * k_count, -1)
        at = self._pick(worth)
        rows, groups = at // (b // m), at % (b // m)  # [J*K]
        j, k = torch.arange(j_count).repeat_interleave(k_count), torch.arange(k_count).repeat(j_count)
        own = (k * b + groups * m)[:, None] + torch.arange(m)  # columns of the core, [J*K, M]
        row = (j * b + rows)[:, None]
        a = self.left[j, :, rows]  # [J*K, b]
        right = self.right[k[:, None], groups[:, None] * m + torch.arange(m)]  # [J*K, M, b]
        values = self.core[row, own]
        root = self.energy.sqrt().reshape(k_count, b)[k]
        blocks = self.error.reshape(j_count, b, k_count, b).permute(0, 2, 1, 3).reshape(-1, b, b)
        length = a.pow(2).sum(1, keepdim=True)
        # a^T R with the group taken out of R
        pull = torch.bmm(a[:, None], blocks)[:, 0] - length * torch.bmm(values[:, None], right)[:, 0]
        scaled = right * root[:, None]
        rhs = torch.bmm(scaled, (pull * root)[:, :, None])[:, :, 0][:, self.supports]  # [J*K, C, N]
        chosen = scaled[:, self.supports]  # [J*K, C, N, b]
        gram = chosen @ chosen.transpose(-1, -2) + 1e-9 * torch.eye(self.kept, dtype=chosen.dtype)
        solved = torch.linalg.solve(gram, rhs[..., None])[..., 0]
        best = (rhs * solved).sum(-1).argmax(1)  # [J*K]
        pick = torch.arange(len(best))
        columns, new = self.supports[best], torch.zeros_like(values)
        new.scatter_(1, columns, -solved[pick, best] / (length + 1e-8))
        self.core[row, own] = new
        self.mask[row, own] = torch.zeros_like(values).scatter(1, columns, 1.0)
        change = torch.bmm((new - values)[:, None], right)  # [J*K, 1, b]
        blocks = blocks + a[:, :, None] * change
        self.error = blocks.reshape(j_count, k_count, b, b).permute(0, 2, 1, 3).reshape(self.error.shape)

    def _pick(self, worth: Tensor) -> Tensor:
        if self.select == "greedy":
            return worth.argmax(1)
        chances = torch.ones_like(worth) if self.select == "uniform" else worth + 1e-30
        return torch.multinomial(chances, 1, generator=self.random)[:, 0]
