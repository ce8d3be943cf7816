"""Let every attention see all slots.

Matches   attention(q, k, v), causal        Produces  the same, not causal
Keeps     everything else                   Refuses   a sliding window
"""

from __future__ import annotations

from typing import ClassVar

from planc.compiler.dialect import OPS
from planc.compiler.passbase import Context, Pass, Stage
from planc.compiler.program import Program, describe
from planc.runtime.errors import CompileError


class Bidirectional(Pass):
    """Make causal attention see all slots: for models that were trained on to fill masks."""

    stage: ClassVar[Stage] = Stage.STRUCTURE
    conflicts: ClassVar[tuple[str, ...]] = ("bidirectional",)

    def apply(self, program: Program, context: Context) -> Program:
        """One argument per attention."""
        if not any(n.target is OPS.attention.default and n.args[5] for n in program.main.nodes):
            return program
        edit = program.edit(self.key)
        nodes = [n for n in edit.graph.nodes if n.target is OPS.attention.default and n.args[5]]
        for node in nodes:
            if node.args[6]:
                raise CompileError("pass-refused", "attention with a sliding window has no form that sees all slots", node=describe(node))
            node.update_arg(5, False)
            node.meta["pass"] = self.key
        return edit.done(len(nodes), len(nodes))
