"""What a pruning method is made of: a score, an allocation and a repair. Each is a part of the plan; the pass `prune` puts them together."""

from __future__ import annotations

from planc.passes.pruning.allocations import Allocation, Everywhere, Rows, Uniform
from planc.passes.pruning.layer import Layer
from planc.passes.pruning.repairs import LeastSquares, MeanBias, Nothing, ObsUpdate, Repair, Swap
from planc.passes.pruning.scores import Fluctuation, Magnitude, Obs, Score, Wanda

__all__ = [
    "Allocation",
    "Everywhere",
    "Fluctuation",
    "Layer",
    "LeastSquares",
    "Magnitude",
    "MeanBias",
    "Nothing",
    "Obs",
    "ObsUpdate",
    "Repair",
    "Rows",
    "Score",
    "Swap",
    "Uniform",
    "Wanda",
]
