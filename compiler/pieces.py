"""Cut a program between its layers, so that each can be run for other slots than the one before (papers/51)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import Graph, Node

from planc.compiler.blocks import find_blocks
from planc.compiler.program import MAIN, Block, Program

HIDDEN, NEXT = "hidden", "next_hidden"  #: input and output of a piece: the hidden state [B,R,D]


def layer_pieces(stateless: Program, program: Program) -> dict[str, Program]:
    """embed, layer.0 .. and head of `program`, whose layers are those of `stateless`, before it had states.

    What several pieces need of the inputs alone, such as rotary tables, is computed in each. Outputs named NAME.I belong to layer I, as NAME.
    """
    blocks = find_blocks(stateless)
    nodes = {node.name: node for node in program.main.nodes}
    outputs = program.outputs
    pieces = {"embed": _piece(program, {NEXT: nodes[blocks[0].entry]}, None)}
    for number, block in enumerate(blocks):
        own = {name: node for name, node in outputs.items() if f".{number}" in (f".{part}" for part in name.split(".")[1:2])}
        named = {name if name.startswith("present.") else name.partition(".")[0]: node for name, node in own.items()}
        pieces[f"layer.{number}"] = _piece(program, {NEXT: nodes[block.exit], **named}, nodes[block.entry], number)
    rest = {name: node for name, node in outputs.items() if "." not in name}
    pieces["head"] = _piece(program, rest, nodes[blocks[-1].exit])
    assert _chained(blocks), "layers do not follow each other"
    return pieces


def _chained(blocks: Sequence[Block]) -> bool:
    return all(a.exit == b.entry for a, b in zip(blocks, blocks[1:], strict=False))


def _piece(program: Program, outputs: Mapping[str, Node], entry: Node | None, layer: int | None = None) -> Program:
    """What computes `outputs` from the inputs and from `entry`, which becomes the input `hidden`."""
    needed, stack = set[Node](), list(outputs.values())
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed.add(node)
        if node is not entry:
            stack += node.all_input_nodes
    graph, copies = Graph(), dict[Node, Any]()
    for node in program.main.nodes:
        if node.op == "placeholder" and node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    if entry is not None:
        copies[entry] = graph.placeholder(HIDDEN)
        copies[entry].meta = {"val": entry.meta["val"]}
    for node in program.main.nodes:
        if node in needed and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output({name: copies[node] for name, node in outputs.items()})
    params = {str(n.target): program.params[str(n.target)] for n in graph.nodes if n.op == "get_attr"}
    states = () if layer is None else (program.states[layer],)
    return program.replace(graphs={MAIN: graph}, params=params, states=states)
