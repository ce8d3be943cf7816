"""Output the most likely token of each row.

Matches   the output `logits`        Produces  the output `argmax` [B,R], the lowest id on ties
"""

from __future__ import annotations

from typing import ClassVar

import torch

from planc.compiler.passbase import EXACT, Context, Effect, Pass, Stage
from planc.compiler.program import Program


class Argmax(Pass):
    """Add the output `argmax`; inserted automatically for decoding."""

    stage: ClassVar[Stage] = Stage.OUTPUTS

    @property
    def effect(self) -> Effect:
        """Only adds an output."""
        return EXACT

    def apply(self, program: Program, context: Context) -> Program:
        """One ArgMax behind the logits."""
        if "argmax" in program.outputs:
            return program
        edit = program.edit(self.key)
        logits = edit[program.outputs["logits"]]
        with edit.after(logits):
            edit.outputs(argmax=edit.call(torch.ops.aten.argmax.default, logits, -1))
        return edit.done(1, 1)
