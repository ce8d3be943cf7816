"""Models that fill a canvas of masked slots: the engine contract, the state of a row, and the policies that a plan can name (papers/A2)."""

from __future__ import annotations

from planc.runtime.masked.caching import BlockCausal, Dual, Prefix, Uncached
from planc.runtime.masked.canvas import Canvas, Commit, Cost
from planc.runtime.masked.credit import Credit
from planc.runtime.masked.early import GapAllIn, StableWindow
from planc.runtime.masked.elastic import Elastic
from planc.runtime.masked.endings import BlockEnd, Truncate
from planc.runtime.masked.gumbel import GumbelTopK, Local
from planc.runtime.masked.hooks import (
    CacheHook,
    EndHook,
    FusionHook,
    InputsHook,
    ModelHook,
    ReviseHook,
    SelectHook,
    Shape,
    StopHook,
    WindowHook,
)
from planc.runtime.masked.learned_filter import LearnedFilter
from planc.runtime.masked.revisions import Remdm, RunningConfidence
from planc.runtime.masked.scales import NextScale, ScaleCausal, Scales, Switch
from planc.runtime.masked.selections import All, Factor, LocalRelaxed, Oracle, RunMax, Schedule, Threshold, TopK
from planc.runtime.masked.windows import Blocks, Sliding, Whole

__all__ = [
    "All",
    "BlockCausal",
    "BlockEnd",
    "Blocks",
    "CacheHook",
    "Canvas",
    "Commit",
    "Cost",
    "Credit",
    "Dual",
    "Elastic",
    "EndHook",
    "Factor",
    "FusionHook",
    "GapAllIn",
    "GumbelTopK",
    "InputsHook",
    "LearnedFilter",
    "Local",
    "LocalRelaxed",
    "ModelHook",
    "NextScale",
    "Oracle",
    "Prefix",
    "Remdm",
    "ReviseHook",
    "RunMax",
    "RunningConfidence",
    "ScaleCausal",
    "Scales",
    "Schedule",
    "SelectHook",
    "Shape",
    "Sliding",
    "StableWindow",
    "StopHook",
    "Switch",
    "Threshold",
    "TopK",
    "Truncate",
    "Uncached",
    "Whole",
    "WindowHook",
]
