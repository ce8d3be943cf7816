"""The modules of a program in order: what its layers consist of, for pictures of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Node

from planc.compiler.program import Program, module_path, module_paths


@dataclass(frozen=True)
class Part:
    """A module of a layer, such as its attention."""

    name: str
    calls: int
    bytes: int  # of the parameters that it is the first to read
    flops: int


@dataclass(frozen=True)
class Group:
    """A numbered layer, or a module outside of all of them."""

    name: str  # module path; empty for what belongs to no module
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        """Of all parts."""
        return sum(part.bytes for part in self.parts)

    @property
    def flops(self) -> int:
        """Of all parts."""
        return sum(part.flops for part in self.parts)


def groups_of(program: Program, flops: Callable[[Node], int]) -> tuple[Group, ...]:
    """The layers and other modules of the main graph, in the order in which they begin; `flops` counts a node."""
    nodes = {node: _weights(node) for node in program.main.nodes if node.op == "call_function"}
    wrapper = _wrapper(nodes)
    found: dict[str, dict[str, list[int]]] = {}
    counted = set[str]()
    for node, weights in nodes.items():
        group, part = _place(node, weights, wrapper)
        counts = found.setdefault(group, {}).setdefault(part, [0, 0, 0])
        read = set(weights) - counted
        counted |= read
        counts[0] += 1
        counts[1] += sum(program.params[name].numel() * program.params[name].element_size() for name in read)
        counts[2] += flops(node)
    return tuple(Group(group, tuple(Part(name, *counts) for name, counts in parts.items())) for group, parts in found.items())


def _weights(node: Node) -> list[str]:
    """Names of the parameters that a node reads."""
    return [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]


def _owners(weights: Iterable[str]) -> list[str]:
    return [path for name in weights for path in module_paths(name) if path != name]


def _wrapper(nodes: Mapping[Node, Sequence[str]]) -> str:
    """What traced module paths begin with and parameter names do not, because the model was traced inside of another module."""
    pairs = ((module_path(node), owner) for node, weights in nodes.items() for owner in _owners(weights))
    found = Counter(path.removesuffix(owner) for path, owner in pairs if path.endswith(owner))
    return found.most_common(1)[0][0] if found else ""


def _place(node: Node, weights: Sequence[str], wrapper: str) -> tuple[str, str]:
    """Group and part of a node: by the parameter that it reads, whichever node a pass made it from, else by the module that it was traced in.

    Work of a layer outside of its modules, such as residual sums, is its part "".
    """
    path = next(iter(_owners(weights)), module_path(node).removeprefix(wrapper))
    if numbered := re.match(r"(.*?\.\d+)(?:\.([^.]*))?", path):
        return numbered[1], numbered[2] or ""
    return path, path.rpartition(".")[2]
