"""Remove what is silent: channels and heads whose every reader has a column of zeros for them.

Matches   a unit of a dependency group (see compiler/groups) that is zero in all weights which sum over it
Produces  smaller dense parameters; heads, splits and views of the sizes that are left, so layers may differ
Keeps     the function, up to the order of sums; one unit of a group stays in any case
Paper     DepGraph (Fang et al. 2023) for what goes together; pruning passes only write zeros, this is the one step that changes shapes
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from planc.compiler.groups import Group, Groups, find_groups, part_axis
from planc.compiler.passbase import EXACT, Context, Effect, Pass, Stage
from planc.compiler.program import Editor, Program

aten = torch.ops.aten


class Realise(Pass):
    """Turn pruned channels and heads into smaller matrices; demanded by `prune`."""

    stage: ClassVar[Stage] = Stage.STRUCTURE
    after: ClassVar[tuple[str, ...]] = ("prune",)

    @property
    def effect(self) -> Effect:
        """What is removed was multiplied by zero."""
        return EXACT

    def apply(self, program: Program, context: Context) -> Program:
        """Find silent units, cut them out of all parameters, and let the shapes follow."""
        found = find_groups(program)
        silent = [_silent(program, group) for group in found.groups]
        count = sum(int(s.sum()) for s in silent)
        if not count:
            return program
        edit = program.edit(self.key)
        stay: dict[str, dict[int, NDArray[np.bool_]]] = defaultdict(dict)  # parameter -> axis -> positions that stay
        dead = np.zeros(len(found.roots), dtype=bool)
        for group, gone in zip(found.groups, silent, strict=True):
            dead[group.roots[gone]] = True
            for site in group.sites:
                whole = stay[site.param].setdefault(site.axis, np.ones(len(site.units), dtype=bool))
                whole &= ~np.append(gone, False)[site.units]
        changed = self._cut(edit, stay)
        for old in program.main.nodes:
            if old.op == "call_function" and any(source in changed for source in edit[old].all_input_nodes):
                _resize(edit, found, edit[old], old, dead)
                if _size(edit[old]) != _size(old):
                    changed.add(edit[old])
        sizes = [f"{group.name}: {group.size} -> {group.size - int(gone.sum())}" for group, gone in zip(found.groups, silent, strict=True)]
        return edit.done(sum(group.size for group in found.groups), count, sizes)

    def _cut(self, edit: Editor, stay: dict[str, dict[int, NDArray[np.bool_]]]) -> set[Node]:
        changed = set()
        for node in list(edit.graph.nodes):
            if node.op != "get_attr" or all(bool(s.all()) for s in stay.get(str(node.target), {}).values()):
                continue
            value = edit.params[str(node.target)]
            for axis, whole in stay[str(node.target)].items():
                value = value.index_select(axis, torch.from_numpy(np.flatnonzero(whole)))
            name = f"{node.target}*r"
            with edit.before(node):
                new = edit.param(name, edit.params.get(name, value))
            edit.replace(node, new)
            changed.add(new)
        return changed


def _size(node: Node) -> Any:
    """Shape of a value, or of each of several."""
    value = node.meta.get("val")
    return [v.shape for v in value] if isinstance(value, list | tuple) else getattr(value, "shape", None)


def _silent(program: Program, group: Group) -> NDArray[np.bool_]:
    """Which units of a group no reader listens to, [size]; the first stays where all are silent."""
    heard = np.zeros(group.size, dtype=bool)
    for site in group.read:
        weight = program.params[site.param]
        loud = (weight != 0).movedim(site.axis, 0).flatten(1).any(1).numpy()
        heard[site.units[loud & (site.units >= 0)]] = True
    if not heard.any():
        heard[0] = True
    return ~heard


def _resize(edit: Editor, found: Groups, node: Node, old: Node, dead: NDArray[np.bool_]) -> None:
    """Give one node the sizes that are left, and compute its value anew."""
    sizes = _left(found, old, dead)
    name = getattr(node.target, "_opname", "")
    if sizes is not None and name in ("view", "reshape", "_unsafe_view"):
        shape = list(node.args[1])  # type: ignore[arg-type]
        for axis, size in enumerate(sizes):
            if size is not None and shape[axis] != -1:
                shape[axis] = size
        node.update_arg(1, shape)
    elif name in ("split", "chunk", "split_with_sizes") and sizes is not None:
        axis = part_axis(old)
        node.target, node.args = aten.split_with_sizes.default, (node.args[0], sizes, axis)
    elif name == "slice" and (kept := found.kept(found.labels[old.args[0]][part_axis(old)], dead)) is not None:
        start, end = int(old.args[2] or 0), min(int(old.args[3]), len(kept)) if old.args[3] is not None else len(kept)  # type: ignore[call-overload]
        node.args = (node.args[0], node.args[1], int(kept[:start].sum()), int(kept[:end].sum()))
    elif name.startswith("conv") and _channels_per_weight(old) > 1:  # the number of groups is the last argument
        node.update_arg(len(node.args) - 1, _channels_per_weight(node))
    edit.compute(node)


def _channels_per_weight(node: Node) -> int:
    """Groups of a convolution, from the shapes of its input and its weight."""
    channels, inputs = (int(a.meta["val"].shape[1]) for a in node.args[:2])  # type: ignore[union-attr]
    return channels // inputs


def _left(found: Groups, old: Node, dead: NDArray[np.bool_]) -> list[int | None] | None:
    """Sizes of the axes that lose something: of a view, one for each axis (None: as before); of a split, one for each part."""
    labels, value = found.labels[old], old.meta.get("val")
    if isinstance(value, list | tuple):
        if not labels or not isinstance(labels[0], list) or labels[0][axis := part_axis(old)] is None:
            return None
        sizes = [int(found.kept(part[axis], dead).sum()) for part in labels]  # type: ignore[union-attr]
        return sizes if sizes != [int(v.shape[axis]) for v in value] else None
    if not isinstance(value, Tensor):
        return None
    return [None if (kept := found.kept(part, dead)) is None else int(kept.sum()) for part in labels]
