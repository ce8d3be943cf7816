"""Decoder layers of a program: found by the module path around each attention, confirmed by the hidden state that goes in and comes out."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator

from torch import Tensor
from torch.fx import Node

from planc.compiler.dialect import LINEARS, OPS
from planc.compiler.program import Block, Program, describe
from planc.runtime.errors import CompileError

ATTENTIONS = (OPS.attention.default, OPS.cached_attention.default)


def module_paths(node: Node) -> Iterator[str]:
    """Paths of the modules around the node, outermost first, without the wrapper's own name."""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        if path:
            yield str(path).removeprefix("model.") if str(path).startswith("model.model.") else str(path)


def layer_path(node: Node) -> str:
    """Module path of the decoder layer that the node belongs to, e.g. model.layers.3, or empty."""
    for path in module_paths(node):
        if match := re.match(r"^(.*?\.\d+)$", path):
            return match[1]
    return ""


def find_blocks(program: Program) -> tuple[Block, ...]:
    """The decoder layers in order of execution: those with an attention, and what is left of their neighbours that have lost theirs.

    Raises CompileError[raise-missing] naming the layer whose entry or exit is not one hidden state.
    """
    attending = dict.fromkeys(layer_path(n) for n in program.main.nodes if n.target in ATTENTIONS)
    if "" in attending:
        raise CompileError("raise-missing", "an attention is not inside a numbered layer", fix="put the layers into an nn.ModuleList")
    lists = {path.rpartition(".")[0] for path in attending}
    members: dict[str, list[Node]] = {}
    for node in program.main.nodes:
        path = layer_path(node)
        left = path.rpartition(".")[0] in lists and isinstance(node.meta.get("val"), Tensor)
        if node.op == "call_function" and (path in attending or left):
            members.setdefault(path, []).append(node)
    return tuple(_block(path, nodes) for path, nodes in members.items())


def head_of(program: Program) -> Node:
    """The dense product that makes the logits; only element-wise work may lie behind it.

    Raises CompileError[raise-missing] where the logits come from something else.
    """
    node = program.outputs["logits"]
    while node.target not in LINEARS:
        if node.op != "call_function" or not node.all_input_nodes:
            raise CompileError("raise-missing", "the logits do not come from a dense product", node=describe(node))
        node = node.all_input_nodes[0]
    return node


def _block(path: str, nodes: list[Node]) -> Block:
    inside = set(nodes)
    exits = [n for n in nodes if any(u not in inside for u in n.users) and isinstance(n.meta.get("val"), Tensor) and not _is_state(n)]
    if len(exits) != 1:
        names = ", ".join(n.name for n in exits) or "none"
        raise CompileError("raise-missing", f"layer {path} should hand on one hidden state, but hands on: {names}", node=path)
    shape = exits[0].meta["val"].shape
    readers = [a for n in nodes for a in n.all_input_nodes if a not in inside and a.op == "call_function"]
    entries = dict.fromkeys(a for a in readers if isinstance(a.meta.get("val"), Tensor) and a.meta["val"].shape == shape)
    if len(entries) != 1:
        names = ", ".join(n.name for n in entries) or "none"
        raise CompileError("raise-missing", f"layer {path} should read one hidden state, but reads: {names}", node=path)
    return Block(int(path.rsplit(".", 1)[1]), path, next(iter(entries)).name, exits[0].name)


def _is_state(node: Node) -> bool:
    return node.target is operator.getitem and node.args[0].target is OPS.cached_attention.default and node.args[1] != 0
