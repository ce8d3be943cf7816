"""Root-mean-square norms.

Matches   w * (x * rsqrt(mean(x ** 2, -1) + eps)), w a parameter or (parameter + 1), factors in any order
Produces  planc.rms_norm(x, w, eps); (parameter + 1) is folded into a new parameter
"""

from __future__ import annotations

import torch
from torch.fx import Node

from planc.compiler.dialect import OPS
from planc.compiler.program import Editor, Program
from planc.compiler.raising.match import aten, calls, is_param, operands, rank


def raise_rms_norm(program: Program) -> Program:
    """Recognise rms_norm; a normalisation without weight gets a weight of ones."""
    edit, count = program.edit("raise_rms_norm"), 0
    for node in list(edit.graph.nodes):
        if (found := _normalised(node)) is None:
            continue
        x, eps = found
        last, weight = node, None
        if len(node.users) == 1:
            user = next(iter(node.users))
            if (pair := operands(user, aten.mul.Tensor, lambda a, n=node: a is not n)) and (weight := _weight(edit, pair[0])) is not None:
                last = user
        with edit.before(last):
            if weight is None:
                width = node.meta["val"].shape[-1]
                weight = edit.param(f"{node.name}.ones", torch.ones(int(width)))
            new = edit.call(OPS.rms_norm.default, x, weight, eps)
        edit.replace(last, new)
        count += 1
    return edit.done(count, count) if count else program


def _normalised(node: Node) -> tuple[Node, float] | None:
    """x and eps when `node` is x * rsqrt(mean(x ** 2, -1, keepdim) + eps)."""
    pair = operands(node, aten.mul.Tensor, lambda a: calls(a, aten.rsqrt.default))
    if pair is None or not calls(total := pair[0].args[0], aten.add.Tensor) or not isinstance(eps := total.args[1], float):
        return None
    mean, x = total.args[0], pair[1]
    if not calls(mean, aten.mean.dim) or tuple(mean.args[1]) not in ((-1,), (rank(x) - 1,)) or not mean.args[2]:
        return None
    square = mean.args[0]
    squared = (calls(square, aten.pow.Tensor_Scalar) and square.args[1] == 2 and square.args[0]) or (
        calls(square, aten.mul.Tensor) and square.args[0] is square.args[1] and square.args[0]
    )
    return (x, eps) if squared is x else None


def _weight(edit: Editor, factor: Node) -> Node | None:
    if is_param(factor) and rank(factor) == 1:
        return factor
    if calls(factor, aten.add.Tensor) and is_param(factor.args[0]) and factor.args[1] == 1.0 and rank(factor) == 1:
        name = f"{factor.args[0].target}+1"
        with edit.before(factor):
            value = edit.params[name] if name in edit.params else edit.params[str(factor.args[0].target)] + 1.0
            return edit.param(name, value)
    return None
