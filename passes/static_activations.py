"""Give int8 products one activation step for all rows where calibration shows that rows are alike.

Matches   linear_int8(x, ...), whose rows each take the step that their own largest value needs
Produces  linear_int8(x, ..., step) with a constant step, so that no pass has to look for the largest value of a row
Keeps     row-wise steps where rows differ: one step for all would be coarse for most of them
Refuses   a plan without int8 products
Paper     static per-tensor activation quantisation as in SmoothQuant (O3), chosen product by product
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from planc.compiler.calibration import row_peaks
from planc.compiler.dialect import OPS
from planc.compiler.passbase import Context, Pass, Stage
from planc.compiler.program import Program
from planc.runtime.errors import CompileError

STEPS = 127  # of an int8 value on either side of zero


class StaticActivations(Pass):
    """Fix the activation step of int8 products where rows are alike."""

    stage: ClassVar[Stage] = Stage.NUMERICS
    after: ClassVar[tuple[str, ...]] = ("smooth", "quantize_weights")
    requires: ClassVar[tuple[str, ...]] = ("quantize_weights",)
    calibrates: ClassVar[bool] = True
    limit: float = Field(
        default=2.5, ge=1.0, description="fix a step where the largest value of all rows is at most this times the rms of the rows' largest"
    )
    headroom: float = Field(default=1.1, ge=1.0, le=4.0, description="the step covers this times the largest value that calibration saw")

    def apply(self, program: Program, context: Context) -> Program:
        """Measure the rows of every product's input once, then fix the steps that `limit` allows."""
        if any(change.pass_name == self.key for change in program.history):
            return program
        products = [n for n in program.main.nodes if n.target is OPS.linear_int8.default]
        if not products:
            raise CompileError(
                "pass-refused",
                "there are no int8 products whose activation step could be fixed",
                where=f"pass {self.key}",
                fix="use quantize_weights with format int8, or remove this pass",
            )
        if context.calibration is None:
            raise CompileError("pass-refused", "static_activations needs text to calibrate on", fix="pass calibration=ids to compile")
        peaks = row_peaks(program, [n.args[0] for n in products], context.calibration, context.progress)
        edit, fixed = program.edit(self.key), 0
        for product in products:
            x = product.args[0]
            if not self._alike(peaks[x]):
                continue
            fixed += 1
            name = f"{x.name}.step"
            with edit.before(edit[product]):
                step = edit.param(name, edit.params.get(name, peaks[x].max() * self.headroom / STEPS))
                new = edit.call(OPS.linear_int8.default, *edit[product].args[:4], step)
            edit.replace(edit[product], new)
        return edit.done(len(products), fixed) if fixed else program

    def _alike(self, peaks: Tensor) -> bool:
        rms = peaks.double().pow(2).mean().sqrt()
        return bool(0 < peaks.max() <= self.limit * rms) and bool(torch.isfinite(peaks).all())
