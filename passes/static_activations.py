"""Give int8 products one activation step for all rows where calibration shows that this costs next to nothing.

Matches   linear_int8(x, ...), whose rows each take the step that their own largest value needs
Produces  linear_int8(x, ..., step) with a constant step, so that no pass has to look for the largest value of a row
Keeps     row-wise steps where few rows or channels are much larger than the rest, for whose sake one step would be coarse for all
Refuses   a plan without int8 products
Paper     static per-tensor activation quantisation as in SmoothQuant (O3), chosen product by product
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from planc.compiler.calibration import Moments, Peaks, calibration_text, collect
from planc.compiler.dialect import OPS
from planc.compiler.passbase import Context, Pass, Stage
from planc.compiler.program import Program
from planc.runtime.errors import CompileError

STEPS = 127  # of an int8 value on either side of zero


class StaticActivations(Pass):
    """Fix the activation step of int8 products where that costs next to nothing."""

    stage: ClassVar[Stage] = Stage.NUMERICS
    after: ClassVar[tuple[str, ...]] = ("smooth", "quantize_weights")
    requires: ClassVar[tuple[str, ...]] = ("quantize_weights",)
    calibrates: ClassVar[bool] = True
    noise: float = Field(
        default=0.0025, gt=0.0, le=1.0, description="fix a step where its rounding adds at most this share of the input's mean square"
    )
    headroom: float = Field(default=1.1, ge=1.0, le=4.0, description="the step covers this times the largest value that calibration saw")

    def apply(self, program: Program, context: Context) -> Program:
        """Measure the inputs of all products, then fix the steps that `noise` allows."""
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
        wanted = {n.args[0]: {Moments, Peaks} for n in products}
        statistics = collect(program, wanted, calibration_text(context, self.key), context.progress)
        steps = {x: statistics[x, Peaks].value.max() * self.headroom / STEPS for x in wanted}
        edit, fixed = program.edit(self.key), 0
        for product in products:
            x = product.args[0]
            # rounding to a step is noise of step^2 / 12; the bound is false for NaN and for an input that is always zero
            if not 0 < float(steps[x]) ** 2 / 12 <= self.noise * float(statistics[x, Moments].mean_square.mean()):
                continue
            fixed += 1
            name = f"{x.name}.step"
            with edit.before(edit[product]):
                step = edit.param(name, edit.params.get(name, steps[x]))
                new = edit.call(OPS.linear_int8.default, *edit[product].args[:4], step)
            edit.replace(edit[product], new)
        return edit.done(len(products), fixed) if fixed else program
