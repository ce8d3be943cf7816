"""The sublayers of a program that can be left out: what each decoder layer adds to its hidden state (papers/43)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.fx import Node

from planc.compiler.blocks import ATTENTIONS, find_blocks
from planc.compiler.program import Program

_ADD = torch.ops.aten.add.Tensor
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)


@dataclass(frozen=True)
class Unit:
    """What a sublayer adds to the hidden state: `term`, of the shape of `state`. Without the sublayer nothing is added."""

    layer: int
    kind: Literal["attention", "mlp"]
    state: Node
    term: Node


def find_units(program: Program) -> tuple[Unit, ...]:
    """Attention and MLP of every decoder layer, in order. A layer whose hidden state is more than a sum has none."""
    nodes = {n.name: n for n in program.main.nodes}
    units: list[Unit] = []
    for block in find_blocks(program):
        entry = nodes[block.entry]
        terms = _terms(nodes[block.exit], entry)
        stops = {entry, *(state for state, _ in terms)}
        for state, term in terms:
            both = _sources(term)
            attending = [part for part in both if _attends(part, stops)]
            if len(both) == 2 and len(attending) == 1:  # parallel attention: both read the same state and are summed
                mlp = both[1] if attending[0] is both[0] else both[0]
                units += [Unit(block.index, "attention", state, attending[0]), Unit(block.index, "mlp", state, mlp)]
            else:
                units.append(Unit(block.index, "attention" if _attends(term, stops) else "mlp", state, term))
    return tuple(units)


def _terms(exit_: Node, entry: Node) -> list[tuple[Node, Node]]:
    """(state, term) of every sum on the way from the layer's entry to its exit; empty when that is not a way of sums only."""
    node, found = exit_, list[tuple[Node, Node]]()
    while node is not entry:
        before = _sources(node)
        states = [a for a in before if _on_stream(a, entry)]
        if len(states) != 1:
            return []
        if len(before) == 2:
            found.append((states[0], before[1] if before[0] is states[0] else before[0]))
        node = states[0]
    return found[::-1]


def _sources(node: Node) -> list[Node]:
    """The two summands of a sum, what a view shows; nothing of any other node."""
    if node.target is _ADD and len(node.args) == 2 and all(isinstance(a, Node) and a.op == "call_function" for a in node.args):
        return list(node.all_input_nodes)
    return [node.all_input_nodes[0]] if node.target in _VIEWS else []


def _on_stream(node: Node, entry: Node) -> bool:
    """Is it the layer's entry, or the entry plus something?"""
    return node is entry or any(_on_stream(a, entry) for a in _sources(node))


def _attends(term: Node, stops: Iterable[Node]) -> bool:
    """Does an attention lie between these nodes and the term?"""
    seen, stack = set(stops), [term]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in ATTENTIONS:
            return True
        stack += node.all_input_nodes
    return False
