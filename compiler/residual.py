"""The residual stream of a decoder: who writes the hidden state, the norms through which it is read, and the sums that pass it on.

A rotation of the hidden state (SliceGPT, Ashkboos et al. 2024) and everything else that changes its basis has to touch exactly these nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planc.compiler.dialect import OPS
from planc.compiler.program import Program, describe
from planc.runtime.errors import CompileError

aten = torch.ops.aten
NORMS = (OPS.rms_norm.default, aten.layer_norm.default)
VIEWS = (aten.view.default, aten.reshape.default)
_SCALES = (aten.mul.Tensor, aten.div.Tensor)


@dataclass(frozen=True)
class Norm:
    """A norm over the hidden state, the products that read it, and the views in between."""

    node: Node
    products: tuple[Node, ...]
    views: tuple[Node, ...]


@dataclass
class State:
    """A value of the hidden state [.., D] that norms read: a sum of what its `writers` (embeddings and products) add to earlier states.

    `skips`: nodes of the sum that read an earlier state directly, with that state's number.
    """

    node: Node
    norms: list[Norm] = field(default_factory=list)
    writers: list[Node] = field(default_factory=list)
    skips: list[tuple[Node, int]] = field(default_factory=list)
    views: list[Node] = field(default_factory=list)

    @property
    def width(self) -> int:
        """D."""
        return int(self.node.meta["val"].shape[-1])

    @property
    def embeddings(self) -> list[str]:
        """Tables that are looked up."""
        return [str(w.args[0].target) for w in self.writers if w.target is aten.embedding.default]  # type: ignore[union-attr]


def find_states(program: Program) -> list[State]:
    """The values of the hidden state in the order of the graph.

    Raises CompileError[residual-form] naming the node that stands in the way: a norm behind a sublayer (Gemma) or behind the sum (BERT), whose
    scale no product takes up, or anything else that reads or writes the hidden state itself.
    """
    members = _stream(program)
    states: dict[Node, State] = {}
    for node in program.main.nodes:
        if node.target in NORMS and node.args[0] in members:
            views, products = list[Node](), list[Node]()
            for reader, own in _readers(node):
                (views if own else products).append(reader)
            states.setdefault(node.args[0], State(node.args[0])).norms.append(Norm(node, tuple(products), tuple(views)))
    order = {node: i for i, node in enumerate(program.main.nodes)}
    found = sorted(states.values(), key=lambda s: order[s.node])
    number = {state.node: i for i, state in enumerate(found)}
    owner: dict[Node, Node] = {}
    for state in found:
        _terms(state, state.node, number, owner)
    if lost := [n for n in members if n not in owner]:
        raise _refused(lost[0], "writes to the hidden state, but no norm reads what it wrote")
    return found


def _stream(program: Program) -> set[Node]:
    """Nodes whose value lies in the space of the hidden state: all that sums, views and constant factors tie to an embedding."""
    work = [n for n in program.main.nodes if n.target is aten.embedding.default]
    members: set[Node] = set()
    if not work:
        raise CompileError("residual-form", "the model looks up no embedding", fix="only decoders have a residual stream")
    while work:
        node = work.pop(0)
        if node in members:
            continue
        members.add(node)
        if passed := _passed(node):
            work += passed
        elif not _writes(node):
            why = "scales what a sublayer adds to the hidden state" if node.target in NORMS else "makes the hidden state"
            raise _refused(node, why)
        for user in node.users:
            if user.target in NORMS and user.args[0] is node:
                continue
            if node not in _passed(user):
                raise _refused(user, "reads the hidden state without a norm")
            work.append(user)
    return members


def _passed(node: Node) -> list[Node]:
    """The arguments whose space a node shares: the summands of a sum, what a view shows or a number scales. Empty for any other node."""
    tensors = [a for a in node.args if isinstance(a, Node) and isinstance(v := a.meta.get("val"), Tensor) and v.dim() > 0]
    if node.target is aten.add.Tensor and len(tensors) == len(node.args) == 2:
        return tensors
    if node.target in _SCALES and len(tensors) == 1 and tensors[0] is node.args[0]:
        return tensors
    if node.target in VIEWS and tensors[0].meta["val"].shape[-1] == node.meta["val"].shape[-1]:
        return tensors
    return []


def _writes(node: Node) -> bool:
    """An embedding or a dense product with a weight of its own."""
    table = 0 if node.target is aten.embedding.default else 1
    return node.target in (aten.embedding.default, aten.linear.default) and node.args[table].op == "get_attr"  # type: ignore[union-attr]


def _readers(norm: Node) -> Iterator[tuple[Node, bool]]:
    """What reads a norm, through views: (node, whether it is a view)."""
    work = list(norm.users)
    while work:
        node: Any = work.pop(0)
        if node.target in VIEWS and node.args[0].meta["val"].shape[-1] == node.meta["val"].shape[-1]:
            yield node, True
            work += node.users
        elif node.target is aten.linear.default and node.args[1].op == "get_attr":
            yield node, False
        else:
            raise _refused(norm, f"is read by {node.name}, which is no dense product,")


def _terms(state: State, node: Node, number: dict[Node, int], owner: dict[Node, Node]) -> None:
    """Walk from a state back over its sum to writers and earlier states."""
    if owner.setdefault(node, state.node) is not state.node:
        raise _refused(node, "is part of two values of the hidden state, before and after a sublayer,")
    if node.target in VIEWS:
        state.views.append(node)
    if _writes(node):
        state.writers.append(node)
    for source in _passed(node):
        if source in number:
            state.skips.append((node, number[source]))
        else:
            _terms(state, source, number, owner)


def _refused(node: Node, why: str) -> CompileError:
    return CompileError(
        "residual-form",
        f"{node.name} {why} so that the hidden state cannot be rotated",
        node=describe(node),
        fix="prune heads and channels with `prune` instead",
    )


def tied(states: list[State]) -> dict[str, int]:
    """Embedding tables that a product behind a norm reads, too: name -> state into which they are looked up."""
    tables = {name: i for i, state in enumerate(states) for name in state.embeddings}
    read = {str(p.args[1].target) for s in states for n in s.norms for p in n.products}  # type: ignore[union-attr]
    return {name: i for name, i in tables.items() if name in read}
