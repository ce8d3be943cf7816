"""addmm over a flattened view -> linear.

Matches   view(addmm(bias, view(x, [-1, K]), weight[K, N]), [B, R, N])   (Conv1D of GPT-2)
Produces  linear(x, weight.T, bias)
"""

from __future__ import annotations

from planc.compiler.program import Program
from planc.compiler.raising.match import aten, calls, is_param, shape


def raise_linear(program: Program) -> Program:
    """Turn Conv1D products into `aten.linear`, so that every dense layer looks alike."""
    edit, count = program.edit("raise_linear"), 0
    for node in list(edit.graph.nodes):
        if not calls(node, aten.view.default, aten.reshape.default) or not calls(node.args[0], aten.addmm.default):
            continue
        product = node.args[0]
        bias, flat, weight = product.args[:3]
        if not (is_param(weight) and is_param(bias) and calls(flat, aten.view.default, aten.reshape.default)):
            continue
        x = flat.args[0]
        if shape(x)[:-1] != shape(node)[:-1] or len(product.users) != 1:
            continue
        with edit.before(product):
            turned = edit.param(f"{weight.target}.T", edit.params[str(weight.target)].t().contiguous())
            new = edit.call(aten.linear.default, x, turned, bias)
        edit.replace(node, new)
        count += 1
    return edit.done(count, count) if count else program
