"""Output the k most likely tokens of each row.

Matches   the output `logits`        Produces  the outputs `top_ids` [B,R,k] int64, most likely first, and `top_logits` [B,R,k]
"""

from __future__ import annotations

import operator
from typing import ClassVar

import torch
from pydantic import Field

from planc.compiler.passbase import EXACT, Context, Effect, Pass, Stage
from planc.compiler.program import Program
from planc.runtime.errors import CompileError


class TopK(Pass):
    """Add the outputs `top_ids` and `top_logits`, so that drafters read k ids and how likely they are instead of all logits."""

    stage: ClassVar[Stage] = Stage.OUTPUTS
    k: int = Field(default=8, ge=1)

    @property
    def effect(self) -> Effect:
        """Only adds outputs."""
        return EXACT

    def apply(self, program: Program, context: Context) -> Program:
        """One TopK behind the logits."""
        if "top_ids" in program.outputs:
            return program
        if self.k > program.info.vocab_size:
            raise CompileError(
                "pass-refused", f"top_k of {self.k} is more than the vocabulary of {program.info.vocab_size}", fix="use a smaller k"
            )
        edit = program.edit(self.key)
        logits = edit[program.outputs["logits"]]
        with edit.after(logits):
            both = edit.call(torch.ops.aten.topk.default, logits, self.k)
        with edit.after(both):
            edit.outputs(top_ids=edit.call(operator.getitem, both, 1), top_logits=edit.call(operator.getitem, both, 0))
        return edit.done(1, 1)
