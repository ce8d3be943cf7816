"""Gated linear units.

Matches   activation(gate) * up, activation one of silu, gelu, gelu (tanh), relu
Produces  planc.glu(gate, up, activation)
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from planc.compiler.dialect import OPS
from planc.compiler.program import Program
from planc.compiler.raising.match import aten, calls, operands, shape


def raise_glu(program: Program) -> Program:
    """Recognise the product of a gated MLP."""
    edit, count = program.edit("raise_glu"), 0
    for node in list(edit.graph.nodes):
        pair = operands(node, aten.mul.Tensor, lambda n: _activation(n) is not None)
        if pair is None or not isinstance(pair[1], Node) or shape(pair[0]) != shape(pair[1]):
            continue
        with edit.before(node):
            new = edit.call(OPS.glu.default, pair[0].args[0], pair[1], _activation(pair[0]))
        edit.replace(node, new)
        count += 1
    return edit.done(count, count) if count else program


def _activation(node: Any) -> str | None:
    if calls(node, aten.silu.default):
        return "silu"
    if calls(node, aten.relu.default):
        return "relu"
    if calls(node, aten.gelu.default):
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return None
