"""Rotary position embedding.

Matches   x * unsqueeze(cos, 1) + cat(-x[.., half:], x[.., :half]) * unsqueeze(sin, 1), x [B,H,R,D] or its first channels, cos and sin computed
          from the positions and one frequency vector alone
Produces  transpose(planc.rope(transpose(x), *planc.rope_table(positions, inv_freq, scaling)))
The tables are recognised by walking back to (positions, frequencies) and confirmed by evaluating them on sample positions.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planc.compiler.dialect import OPS
from planc.compiler.program import Editor, Program
from planc.compiler.raising.match import aten, calls, operands, rank, shape


def raise_rope(program: Program) -> Program:
    """Recognise rotary embeddings of whole or partial heads."""
    edit, count = program.edit("raise_rope"), 0
    tables: dict[tuple[Node, Node], tuple[Node, Node] | None] = {}
    for node in list(edit.graph.nodes):
        if (found := _rotated(node)) is None:
            continue
        x, cos, sin = found
        if (cos, sin) not in tables:
            tables[cos, sin] = _table(edit, cos, sin)
        if (table := tables[cos, sin]) is None:
            continue
        whole, last = _whole_head(x, node)
        with edit.before(last):
            turned = edit.call(OPS.rope.default, edit.call(aten.transpose.int, whole, 1, 2), *table)
            new = edit.call(aten.transpose.int, turned, 1, 2)
        edit.replace(last, new)
        count += 1
    return edit.done(count, count) if count else program


def _rotated(node: Node) -> tuple[Node, Node, Node] | None:
    """(x, cos, sin) when `node` is the rotated x; cos and sin before their unsqueeze."""
    if not calls(node, aten.add.Tensor) or rank(node) != 4:
        return None
    for straight, crossed in (node.args[:2], node.args[1::-1]):
        a = operands(straight, aten.mul.Tensor, lambda n: calls(n, aten.unsqueeze.default))
        b = operands(crossed, aten.mul.Tensor, lambda n: calls(n, aten.unsqueeze.default))
        if a is None or b is None or a[0].args[1] != 1 or b[0].args[1] != 1 or not calls(b[1], aten.cat.default):
            continue
        x, parts = a[1], b[1].args[0]
        if len(parts) == 2 and calls(parts[0], aten.neg.default) and _halves(x, parts[1], parts[0].args[0]):
            return x, a[0].args[0], b[0].args[0]
    return None


def _halves(x: Node, low: Any, high: Any) -> bool:
    half = shape(x)[-1] // 2
    return all(calls(n, aten.slice.Tensor) and n.args[0] is x and n.args[1] == 3 for n in (low, high)) and (
        (low.args[2], low.args[3], high.args[2]) == (0, half, half)
    )


def _whole_head(x: Node, node: Node) -> tuple[Node, Node]:
    """Where only the first channels turn (cat(rotated, rest)), the whole head and the cat; otherwise x and node."""
    users = list(node.users)
    if len(users) == 1 and calls(users[0], aten.cat.default) and len(users[0].args[0]) == 2:
        rest = users[0].args[0][1]
        width = shape(x)[-1]
        if calls(rest, aten.slice.Tensor) and rest.args[1] == 3 and rest.args[2] == width:
            if calls(x, aten.slice.Tensor) and x.args[0] is rest.args[0] and x.args[1:4] == (3, 0, width):
                return rest.args[0], users[0]
            if x is rest.args[0]:  # the rest is empty
                return x, users[0]
    return x, node


def _table(edit: Editor, cos: Node, sin: Node) -> tuple[Node, Node] | None:
    """Nodes of cos and sin [B,R,D/2] when both come from positions and one frequency vector."""
    positions, frequencies = _leaves(cos)
    if len(positions) != 1 or len(frequencies) != 1 or _leaves(sin) != (positions, frequencies):
        return None
    (position,), (frequency,) = positions, frequencies
    inv_freq = edit.params[str(frequency.target)]
    sample = torch.tensor([[0, 1, 5, 77], [3, 130, 1999, 2]])
    have = [_evaluate(n, position, sample, edit.params) for n in (cos, sin)]
    scaling = float(have[0][0, 0, 0])
    want = OPS.rope_table.default(sample, inv_freq, scaling)
    if not all(torch.allclose(h, torch.cat((w, w), -1), rtol=1e-5, atol=1e-5) for h, w in zip(have, want, strict=True)):
        return None
    with edit.after(max(position, frequency, key=list(edit.graph.nodes).index)):
        table = edit.graph.call_function(OPS.rope_table.default, (position, frequency, scaling))
    with edit.mode:
        table.meta["val"] = OPS.rope_table.default(position.meta["val"], frequency.meta["val"], scaling)
    table.meta["pass"] = edit.pass_name
    with edit.after(table):
        second = edit.call(operator.getitem, table, 1)
        first = edit.call(operator.getitem, table, 0)
    return first, second


def _leaves(node: Node) -> tuple[set[Node], set[Node]]:
    """Integer placeholders and float parameters that `node` is computed from."""
    inputs: set[Node] = set()
    params: set[Node] = set()
    seen: set[Node] = set()
    todo = [node]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "placeholder":
            inputs.add(current)
        elif current.op == "get_attr":
            params.add(current)
        elif not calls(current, aten.sym_size.int):
            todo.extend(current.all_input_nodes)
    return inputs, params


def _evaluate(node: Node, position: Node, sample: Tensor, params: dict[str, Tensor]) -> Tensor:
    values: dict[Node, Any] = {position: sample}

    def value(n: Node) -> Any:
        if n not in values:
            if n.op == "get_attr":
                values[n] = params[str(n.target)]
            elif calls(n, aten.sym_size.int):  # every symbolic size of a table is one of the positions' own
                values[n] = sample.shape[int(n.args[1])]
            else:
                args, kwargs = torch.fx.node.map_arg((n.args, n.kwargs), value)
                values[n] = n.target(*args, **kwargs)
        return values[n]

    return value(node)
