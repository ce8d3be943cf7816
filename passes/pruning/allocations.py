"""Allocations: how a budget is shared out. They choose what is removed, by scores and costs alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from planc.runtime.errors import CompileError
from planc.runtime.registry import PlanPart


class Allocation(PlanPart):
    """Which part of the model gives how much."""

    kind: ClassVar[str] = "allocation"

    @abstractmethod
    def weights(self, scores: Sequence[Tensor], share: float) -> list[Tensor]:
        """Remove this share of the weights of matrices with these scores [R, n]; True where one goes."""

    @abstractmethod
    def units(self, scores: Sequence[Tensor], costs: Sequence[Tensor], share: float) -> list[Tensor]:
        """Remove units worth `share` of all parameters, one unit of a group staying; scores and costs [size]; True where one goes."""


class Rows(Allocation):
    """Every output row gives the same share, as in Wanda; units: as `uniform`."""

    def weights(self, scores: Sequence[Tensor], share: float) -> list[Tensor]:
        """The nearest count in every row."""
        return [lowest(s, round(share * s.shape[1])) for s in scores]

    def units(self, scores: Sequence[Tensor], costs: Sequence[Tensor], share: float) -> list[Tensor]:
        """The same share of every group."""
        return [part for s, c in zip(scores, costs, strict=True) for part in cheapest([s], [c], share)]


class Uniform(Rows):
    """Every matrix or group gives the same share."""

    def weights(self, scores: Sequence[Tensor], share: float) -> list[Tensor]:
        """The nearest count in every matrix."""
        return [lowest(s.reshape(1, -1), round(share * s.numel())).reshape(s.shape) for s in scores]


class Everywhere(Allocation):
    """One threshold for the whole model."""

    def weights(self, scores: Sequence[Tensor], share: float) -> list[Tensor]:
        """The nearest count of all."""
        every = torch.cat([s.reshape(-1) for s in scores])
        parts = lowest(every[None], round(share * len(every)))[0].split([s.numel() for s in scores])
        return [part.reshape(s.shape) for part, s in zip(parts, scores, strict=True)]

    def units(self, scores: Sequence[Tensor], costs: Sequence[Tensor], share: float) -> list[Tensor]:
        """Ranked over all groups."""
        return cheapest(scores, costs, share)


def lowest(scores: Tensor, count: int) -> Tensor:
    """The `count` lowest of each row of scores [R, n], the first of equal ones; bool [R, n]."""
    if not count:
        return torch.zeros(scores.shape, dtype=torch.bool)
    scores = scores.nan_to_num(nan=-torch.inf)
    limit = scores.kthvalue(count, dim=1, keepdim=True).values
    below, equal = scores < limit, scores == limit
    return below | equal & (equal.cumsum(1, dtype=torch.int32) <= count - below.sum(1, keepdim=True))


def cheapest(scores: Sequence[Tensor], costs: Sequence[Tensor], share: float) -> list[Tensor]:
    """Units in order of their score until their cost is nearest to `share` of all; the best of every group stays."""
    stay = [torch.arange(len(s)) == int(s.argmax()) for s in scores]
    every, cost, kept = (torch.cat(list(parts)) for parts in (scores, costs, stay))
    order = every.nan_to_num(nan=-torch.inf).argsort(stable=True)
    order = order[~kept[order]]
    spent = torch.cat((torch.zeros(1, dtype=cost.dtype), cost[order].cumsum(0)))
    total = int(cost.sum())
    if share * total - int(spent[-1]) > int(cost.max()) / 2:
        most = int(spent[-1]) / total
        raise CompileError(
            "prune-budget",
            f"{share:.1%} of the parameters cannot be removed: at least one head or channel stays in every layer",
            fix=f"the most that can be removed is a sparsity of {int(most * 10_000) / 10_000}",
        )
    count = int((spent - share * total).abs().argmin())
    gone = torch.zeros(len(every), dtype=torch.bool)
    gone[order[:count]] = True
    return list(gone.split([len(s) for s in scores]))
