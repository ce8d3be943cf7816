"""Transposes between [B,R,H,D] and [B,H,R,D].

Matches   rms_norm(transpose(x, 1, 2)) and transpose(transpose(x, 1, 2), 1, 2)
Produces  transpose(rms_norm(x), 1, 2) and x
"""

from __future__ import annotations

from typing import Any

from planc.compiler.dialect import OPS
from planc.compiler.program import Program
from planc.compiler.raising.match import aten, calls


def cancel_transposes(program: Program) -> Program:
    """Sink transposes below per-head norms and drop those that meet their inverse."""
    edit, count = program.edit("cancel_transposes"), 0
    for node in list(edit.graph.nodes):
        if calls(node, OPS.rms_norm.default) and _swaps(node.args[0]):
            with edit.before(node):
                normed = edit.call(OPS.rms_norm.default, node.args[0].args[0], *node.args[1:])
                new = edit.call(aten.transpose.int, normed, 1, 2)
            edit.replace(node, new)
            count += 1
    for node in list(edit.graph.nodes):
        if _swaps(node) and _swaps(node.args[0]):
            edit.replace(node, node.args[0].args[0])
            count += 1
    return edit.done(count, count) if count else program


def _swaps(node: Any) -> bool:
    return calls(node, aten.transpose.int) and sorted(d % 4 for d in node.args[1:3]) == [1, 2] and node.meta["val"].dim() == 4
