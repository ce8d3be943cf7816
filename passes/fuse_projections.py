"""Join dense layers that read the same input, so that one quantised input serves one large product.

Matches   linear(x, w1), linear(x, w2), ... with biases in all or none
Produces  split(linear(x, cat(w1, w2, ...)))
Keeps     every output, up to the order of sums inside the product
"""

from __future__ import annotations

import operator
from typing import ClassVar

import torch
from torch.fx import Node

from planc.compiler.dialect import OPS
from planc.compiler.passbase import EXACT, Context, Effect, Pass, Stage
from planc.compiler.program import Program

aten = torch.ops.aten


class FuseProjections(Pass):
    """Join q, k, v and gate, up; demanded by `quantize_weights`."""

    stage: ClassVar[Stage] = Stage.STRUCTURE
    after: ClassVar[tuple[str, ...]] = ("layer_parallel",)  # which looks for the single products, and leaves wider ones to join

    @property
    def effect(self) -> Effect:
        """Same sums, perhaps in another order."""
        return EXACT

    def apply(self, program: Program, context: Context) -> Program:
        """Join each group of two or more products with one input."""
        groups: dict[Node, list[Node]] = {}
        for node in program.main.nodes:
            if node.target is aten.linear.default and node.args[1].op == "get_attr" and len(node.args[1].users) == 1:
                groups.setdefault(node.args[0], []).append(node)
        joined = [nodes for nodes in groups.values() if len(nodes) > 1 and len({len(n.args) for n in nodes}) == 1]
        if not joined:
            return program
        edit = program.edit(self.key)
        for nodes in joined:
            copies = sorted((edit[n] for n in nodes), key=_role)
            with edit.before(edit[nodes[0]]):
                weights = [edit.params[str(n.args[1].target)] for n in copies]
                name = "|".join(str(n.args[1].target) for n in copies)
                parts = [edit.param(name, torch.cat(weights))]
                if len(copies[0].args) > 2:
                    biases = [edit.params[str(n.args[2].target)] for n in copies]
                    parts.append(edit.param("|".join(str(n.args[2].target) for n in copies), torch.cat(biases)))
                whole = edit.call(aten.linear.default, copies[0].args[0], *parts)
                split = edit.call(aten.split_with_sizes.default, whole, [w.shape[0] for w in weights], -1)
                for i, node in enumerate(copies):
                    edit.replace(node, edit.call(operator.getitem, split, i))
        return edit.done(len(joined), len(joined))


def _role(node: Node) -> int:
    """q before k before v, so that attention can take the joined product whole; otherwise the order of the graph."""
    reader = node
    while len(reader.users) == 1 and reader.target is not OPS.attention.default:
        following = next(iter(reader.users))
        if following.target is OPS.attention.default:
            return following.args.index(reader)
        reader = following
    return 3
