"""Repairs: what makes up for pruned weights. They take a layer and a mask and give new weights and what is added to the bias."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from planc.compiler.calibration import Gram32, Moments, Statistic, WithinVariance
from planc.compiler.program import describe
from planc.passes.pruning.filters import filters
from planc.passes.pruning.layer import Layer
from planc.passes.pruning.scores import DAMP
from planc.runtime.errors import CompileError
from planc.runtime.registry import PlanPart

_SWEEPS = 300  # of coordinate descent at most


class Repair(PlanPart):
    """What to do about the error of a mask."""

    kind: ClassVar[str] = "repair"
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()

    def repaired(self, layer: Layer, keep: Tensor, block: int) -> tuple[Tensor, Tensor | None]:
        """Weights that are zero outside `keep` (bool, shaped like the weights), and what is added to the bias [N] or None.

        `block` is M of an N:M pattern, inside which the number of weights must stay; 0 without one.
        """
        raise NotImplementedError


class Nothing(Repair):
    """Leave the other weights as they are."""

    def repaired(self, layer: Layer, keep: Tensor, block: int) -> tuple[Tensor, Tensor | None]:
        """The mask alone."""
        return layer.weight * keep, None


class MeanBias(Repair):
    """Add what the pruned weights gave on average to the bias, so that the mean of every output stays (FLAP)."""

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Moments})

    def repaired(self, layer: Layer, keep: Tensor, block: int) -> tuple[Tensor, Tensor | None]:
        """b + sum over pruned weights of w_ij E[x_j]."""
        new = layer.weight * keep
        return new, _lost(layer, new)


class LeastSquares(Repair):
    """Let the channels that stay stand in for those that go, by regression on calibration data with a constant, or on their filters (UDFC)."""

    data: Literal["calibration", "none"] = Field(
        default="calibration", description="none: channels are alike as far as the filters and biases that make them are; no data is needed"
    )
    damp: float = Field(default=DAMP, gt=0, description="share of the mean diagonal that is added to the covariance")
    bias_weight: float = Field(default=0.01, ge=0, description="data none: how much biases count beside filters (a1 of the paper)")
    ridge: float = Field(default=0.008, ge=0, description="data none: share of the mean squared filter that is added (a2 of the paper)")
    nonneg: bool = Field(default=False, description="no channel stands in for another with a negative factor, which a ReLU would cut off")
    limit: float = Field(default=4.0, gt=0, description="largest factor; activations that saturate do not follow large ones")

    @property
    def needs(self) -> frozenset[type[Statistic]]:  # type: ignore[override]
        """Nothing, or the covariance of the inputs."""
        return frozenset({Moments, Gram32} if self.data == "calibration" else ())

    def repaired(self, layer: Layer, keep: Tensor, block: int) -> tuple[Tensor, Tensor | None]:
        """W_K + W_P C_PK C_KK^-1 with the covariance C of the input, or the inner products of its filters."""
        stays = keep.movedim(1, 0).flatten(1).any(1)
        if not bool((keep == stays.reshape(1, -1, *[1] * (keep.dim() - 2))).all()):
            message = "least_squares needs masks of whole input channels"
            raise CompileError("pass-refused", message, node=describe(layer.node), fix="use granularity `channels`, or repair `obs_update`")
        by = self.factors(layer, stays)
        new = layer.weight.double() * keep
        new[:, stays] += torch.einsum("np...,kp->nk...", layer.weight[:, ~stays].double(), by)
        new = new.to(layer.weight.dtype)
        return new, _lost(layer, new) if self.data == "calibration" else None

    def factors(self, layer: Layer, stays: Tensor) -> Tensor:
        """What each channel that stays gives for each that goes, [kept, pruned] float64."""
        if self.data == "calibration":
            mean = layer.statistic(Moments).mean
            alike = layer.channel_products(self.damp) - torch.outer(mean, mean)
        else:
            gram, bias = filters(layer.x, layer.params)
            ridge = self.ridge * gram.diagonal()[stays].mean() * torch.eye(len(gram), dtype=gram.dtype)
            alike = gram + self.bias_weight * torch.outer(bias, bias) + ridge
        among, between = alike[stays][:, stays], alike[stays][:, ~stays]
        by = _nonnegative(among, between) if self.nonneg else torch.linalg.solve(among, between)
        return by.clamp(-self.limit, self.limit)


def _nonnegative(among: Tensor, between: Tensor) -> Tensor:
    """argmin_{s >= 0} s^T among s - 2 between^T s for every column of `between` [K, P], one row of s after the other until none moves."""
    by = torch.zeros_like(between)
    for _ in range(_SWEEPS):
        most = 0.0
        for i in range(len(by)):
            new = (by[i] + (between[i] - among[i] @ by) / among[i, i]).clamp(min=0)
            most = max(most, float((new - by[i]).abs().max()))
            by[i] = new
        if most < 1e-9:
            break
    return by


class ObsUpdate(Repair):
    """Spread the error of every pruned weight over the later ones of its row, column by column (SparseGPT, Frantar and Alistarh 2023)."""

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Gram32})
    damp: float = Field(default=DAMP, gt=0, description="share of the mean diagonal that is added to the Hessian")
    columns: int = Field(default=128, ge=1, description="columns that are updated at once before the error is spread to the rest")

    def repaired(self, layer: Layer, keep: Tensor, block: int) -> tuple[Tensor, Tensor | None]:
        """w_k -= (w_j / U_jj) U_jk for a pruned w_j and every later k."""
        factor, w = layer.inverse_factor(self.damp), layer.weight.double()
        for start in range(0, w.shape[1], self.columns):
            end = min(start + self.columns, w.shape[1])
            errors = torch.zeros(len(w), end - start, dtype=w.dtype)
            for j in range(start, end):
                errors[:, j - start] = w[:, j] * ~keep[:, j] / factor[j, j]
                w[:, j:end] -= torch.outer(errors[:, j - start], factor[j, j:end])
            w[:, end:] -= errors @ factor[start:end, end:]
        return (w * keep).to(layer.weight.dtype), None


class Swap(Repair):
    """Exchange pruned and kept weights one by one until the mean of every output is what it was; no value changes (DSnoT, Zhang et al. 2023)."""

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Moments, WithinVariance})
    cycles: int = Field(default=50, ge=0, description="exchanges per output row at most")
    threshold: float = Field(default=5e-5, ge=0, description="error of an output's mean, per token, at which its row is done")
    var_power: float = Field(default=1.0, ge=0, description="how much a small variance of its input speaks for reviving a weight")
    keep_sign: bool = Field(default=True, description="stop a row before its error changes sign")

    def repaired(self, layer: Layer, keep: Tensor, block: int) -> tuple[Tensor, Tensor | None]:
        """A mask with as many weights in every row (and in every N:M block)."""
        if layer.weight.dim() != 2:
            raise CompileError(
                "pass-refused", "swap needs dense layers", node=describe(layer.node), fix="leave convolutions out by `modules`"
            )
        return layer.weight * self.swapped(layer, keep, block), None

    def swapped(self, layer: Layer, keep: Tensor, block: int) -> Tensor:
        """The mask after the exchanges, bool [N, K]."""
        moments = layer.statistic(Moments)
        given = layer.weight.double() * moments.mean  # [N, K]: what each weight adds to its output on average
        worth = layer.weight.double().abs() * moments.mean_square.sqrt()
        key = given / (layer.statistic(WithinVariance).value + 1e-12) ** self.var_power
        error = (given * ~keep).sum(1)  # what each row lacks
        sign, keep = error.sign(), keep.clone()
        # a row only ever revives weights that give what it lacks, and kills some that give the opposite: orders by row and never by turn
        revive = (key * sign[:, None]).masked_fill(keep, -torch.inf)
        kill = worth.masked_fill(~keep | (given * sign[:, None] >= 0), torch.inf)
        turns = min(self.cycles, keep.shape[1])
        revived = revive.topk(turns, dim=1).indices
        killed = kill.topk(turns, dim=1, largest=False).indices
        rows = torch.arange(len(keep))
        active = error.abs() > self.threshold
        for turn in range(turns):
            grow, drop = revived[:, turn], killed[:, turn]
            if block:  # the weakest weight of the same block gives way
                members = (grow // block * block)[:, None] + torch.arange(block)
                drop = members.gather(1, worth.masked_fill(~keep, torch.inf).gather(1, members).argmin(1, keepdim=True))[:, 0]
            new = error + given[rows, drop] - given[rows, grow]
            active &= (revive[rows, grow] > 0) & keep[rows, drop]
            if not block:
                active &= kill[rows, drop] < torch.inf
            if self.keep_sign or block:
                active &= (new * sign >= 0) & (new.abs() < error.abs())
            if not active.any():
                break
            at = rows[active]
            keep[at, grow[at]] = True
            keep[at, drop[at]] = False
            error = torch.where(active, new, error)
            active &= (error.abs() > self.threshold) & (error.sign() == sign)
        return keep


def _lost(layer: Layer, new: Tensor) -> Tensor:
    """What the outputs lack on average, [N]."""
    difference = (
        (layer.weight.double() - new.double()).flatten(2).sum(2) if layer.weight.dim() > 2 else layer.weight.double() - new.double()
    )
    return (difference @ layer.statistic(Moments).mean).to(layer.weight.dtype)
