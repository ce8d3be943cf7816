"""Compute logits only for the rows that are asked for.

Matches   the product that makes the logits
Produces  the same product over rows_from(x, logits_from)
Keeps     the logits of those rows
Refuses   logits that do not come from one dense product
"""

from __future__ import annotations

from typing import ClassVar

import torch

from planc.compiler.dialect import LINEARS, OPS
from planc.compiler.passbase import EXACT, Context, Effect, Pass, Stage
from planc.compiler.program import Program, describe
from planc.runtime.errors import CompileError


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
        head = edit[program.outputs["logits"]]
        while head.target not in LINEARS:
            if not head.all_input_nodes or head.op != "call_function":
                raise CompileError("raise-missing", "the logits do not come from a dense product", node=describe(head))
            head = head.all_input_nodes[0]
        with edit.before(head):
            rows = edit.call(OPS.rows_from.default, head.args[0], start)
        head.args = (rows, *head.args[1:])
        edit.refresh(rows)
        return edit.done(1, 1)
