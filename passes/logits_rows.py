"""Compute logits only for the rows that are asked for.

Matches   the product that makes the logits
Produces  the same product over rows_from(x, logits_from)
Keeps     the logits of those rows
Refuses   logits that do not come from one dense product
"""

from __future__ import annotations

from typing import ClassVar

import torch

from planc.compiler.blocks import head_of
from planc.compiler.dialect import OPS
from planc.compiler.passbase import EXACT, Context, Effect, Pass, Stage
from planc.compiler.program import Program


class LogitsRows(Pass):
    """Add the input `logits_from` [1]; inserted automatically for decoding."""

    stage: ClassVar[Stage] = Stage.OUTPUTS

    @property
    def effect(self) -> Effect:
        """Rows that stay are the same."""
        return EXACT

    def apply(self, program: Program, context: Context) -> Program:
        """Cut the rows in front of the head."""
        if "logits_from" in program.inputs:
            return program
        edit = program.edit(self.key)
        start = edit.input("logits_from", torch.int64, 1)
        head = edit[head_of(program)]
        with edit.before(head):
            rows = edit.call(OPS.rows_from.default, head.args[0], start)
        head.args = (rows, *head.args[1:])
        edit.refresh(rows)
        return edit.done(1, 1)
