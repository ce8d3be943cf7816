"""Fold per-channel scales through the graph so that activations quantise well.

Matches   linear(producer(x)), producer one of rms_norm, layer_norm (weight and bias), glu (its up product), attention (its value product)
Produces  linear with columns * s, producer with channels / s
Keeps     the function, exactly but for rounding
Paper     SmoothQuant (Xiao et al. 2023) gives the folding. The scales here are s = sqrt(rms(x) / ||W column||): with one quantisation step per
          row and per output, the expected error is a product of two sums that Cauchy-Schwarz minimises there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from planc.compiler.calibration import Moments
from planc.compiler.folding import Site, fold_scales
from planc.compiler.passbase import Context, Effect, Pass, Stage
from planc.compiler.program import Program


class Smooth(Pass):
    """Move activation outliers into the weights before quantisation."""

    stage: ClassVar[Stage] = Stage.NUMERICS
    calibrates: ClassVar[bool] = True
    alpha: float = Field(
        default=0.5, ge=0.0, le=1.0, description="0 keeps activations, 1 flattens them fully; s = rms(x)^alpha / ||W||^(1-alpha)"
    )

    @property
    def effect(self) -> Effect:
        """Exact up to rounding of the scales."""
        return Effect("exact", 2e-4)

    def apply(self, program: Program, context: Context) -> Program:
        """Measure the inputs once, then fold."""
        return fold_scales(program, context, self.key, Moments, self._scale)

    def _scale(self, site: Site, weights: Sequence[Tensor], moments: Moments) -> Tensor:
        columns = torch.stack([w.double().pow(2).sum(0) for w in weights]).sum(0).sqrt()
        rms, columns = (site.shared(v).clamp(min=1e-6) for v in (moments.mean_square.sqrt(), columns))
        scale = rms**self.alpha / columns ** (1 - self.alpha)
        return (scale / scale.log().mean().exp()).clamp(1e-3, 1e3).float()
