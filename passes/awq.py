"""Scale up the weights of channels with large inputs before they are rounded, by as much as pays.

Matches   linear(producer(x)), producer as for smooth
Produces  linear with columns * s, producer with channels / s; s = rms(x)^alpha, alpha searched for each producer
Keeps     the function, exactly but for rounding
Paper     AWQ, Activation-aware Weight Quantization (Lin et al. 2023); the error of outputs is computed from the Gram matrix of the inputs
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from planc.compiler.calibration import Gram32
from planc.compiler.folding import Site, fold_scales
from planc.compiler.passbase import Context, Effect, Pass, Stage
from planc.compiler.program import Program
from planc.compiler.rounding import output_error, second_moments
from planc.compiler.weight_forms import Format, store

_ALPHAS = tuple(i / 20 for i in range(20))
_SAMPLE = 256  # rows of each product on which an alpha is judged


class Awq(Pass):
    """Protect the weights that large inputs meet; give it the format that quantize_weights will use."""

    stage: ClassVar[Stage] = Stage.NUMERICS
    conflicts: ClassVar[tuple[str, ...]] = ("smooth",)
    calibrates: ClassVar[bool] = True
    format: Literal["int4_blocks", "int8_blocks", "nf2", "nf3", "nf4"] = Field(
        default="int4_blocks", description="format whose error is judged"
    )
    block: Literal[16, 32, 64, 128] = Field(default=32, description="its block")

    @property
    def effect(self) -> Effect:
        """Exact up to rounding of the scales."""
        return Effect("exact", 2e-4)

    def apply(self, program: Program, context: Context) -> Program:
        """One run over the text, then the best alpha of each site; alpha 0 leaves a site as it is."""
        return fold_scales(program, context, self.key, Gram32, self._scale)

    def _scale(self, site: Site, weights: Sequence[Tensor], seen: Gram32) -> Tensor | None:
        """The scale of the best alpha; None where no scale is better, or the format's blocks do not fit."""
        if weights[0].shape[1] % self.block:
            return None
        gram = second_moments(seen)
        form: Format = self.format
        rows = [w[:: max(1, len(w) // _SAMPLE)] for w in weights]
        rms = site.shared(gram.diagonal().clamp(min=0).sqrt()).clamp(min=1e-6)
        best, least = None, float("inf")
        for alpha in _ALPHAS:
            scale = rms**alpha
            scale = (scale / (scale.max() * scale.min()).sqrt()).clamp(1e-3, 1e3)
            wide = site.spread(scale)
            error = sum(output_error(w, store(w * wide, form, self.block).weight / wide, gram) for w in rows)
            if error < least:
                best, least = (scale if alpha else None), error
        return best
