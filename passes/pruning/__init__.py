"""What a pruning method is made of: a score, an allocation, a schedule and a repair: parts of the plan that the pass `prune` puts together."""

from __future__ import annotations

from planc.passes.pruning.allocations import Allocation, Everywhere, Rows, Uniform
from planc.passes.pruning.layer import Layer
from planc.passes.pruning.repairs import LeastSquares, MeanBias, Nothing, ObsUpdate, Repair, Swap
from planc.passes.pruning.schedules import AtOnce, Cubic, Schedule
from planc.passes.pruning.scores import Fluctuation, Magnitude, Obs, Score, Wanda

__all__ = [
    "Allocation",
    "AtOnce",
    "Cubic",
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
    "Schedule",
    "Score",
    "Swap",
    "Uniform",
    "Wanda",
]
