"""The program of a point, without compiling again: every level of a searched option is compiled once, and a candidate is spliced from them."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from planc.compiler.blocks import find_blocks
from planc.compiler.compile import Planned, context_of, demanded
from planc.compiler.passbase import Context, Pass, Stage
from planc.compiler.pipeline import ordered, run_passes
from planc.compiler.plan import Plan
from planc.compiler.program import MAIN, Program, eliminate_dead
from planc.compiler.search.space import Point
from planc.compiler.search.spec import Choose, Drop
from planc.compiler.units import find_units
from planc.passes.skip_layers import SkipLayers, check_layers
from planc.runtime.errors import CompileError

_COUNTED = ("params", "nonzeros", "bytes")


@dataclass(frozen=True)
class Unit:
    """Something that takes a level: a sublayer or layer that runs or not, or a module of a searched option."""

    name: str  # module path, or the number of the layer
    kind: str  # attention, mlp, layer, or the shape of the weight: units of a kind cost the same time
    levels: tuple[Any, ...]  # best quality first


class Candidates:
    """The programs of all points of a plan's search.

    Passes before the searched one are applied once. What calibrates is not calibrated again for each candidate, and passes behind the
    searched one are left out: a candidate is close to, not bit by bit, what compiling its plan gives.

    Args:
        start: the model, traced and raised, with nothing applied.
        plan: with a section `search`.
    """

    def __init__(self, start: Planned, plan: Plan, note: Callable[[str], None] = lambda text: None) -> None:
        assert plan.search is not None
        self.plan, self.original = plan, start.program
        self.drop = next((space for space in plan.search.space if isinstance(space, Drop)), None)
        self.choose = next((space for space in plan.search.space if isinstance(space, Choose)), None)
        self._known_nonzeros: dict[int, tuple[Tensor, int]] = {}  # by identity; holds the tensor, so that the identity stays its own
        self._context = context_of(plan, start.model, start.text_ids)
        before, self._part = _split([p for p in demanded(plan) if p.stage <= Stage.NUMERICS], self.choose)
        self.base, _ = run_passes(start.program, before, self._context, note=note)
        self._levels = _Levels(self.base, self._context)
        self._dropped = _droppable(self.base, self.drop)
        weights = self._weights()
        self.units = (*(unit for unit, _ in self._dropped), *(unit for unit, _ in weights))
        self._weights_of = [weight for _, weight in weights]
        if not self.units:
            raise CompileError(
                "pass-no-match", "there is nothing to search: no unit matches", where="search", fix="see `modules` and `keep`"
            )

    @property
    def top(self) -> Point:
        """Everything at its best level."""
        return (0,) * len(self.units)

    @property
    def attentions(self) -> list[int]:
        """Units without which no attention would be left: empty when some attention cannot be dropped."""
        units = [i for i, unit in enumerate(self.units) if unit.kind in ("attention", "layer")]
        return units if len(units) == len(find_blocks(self.base)) else []

    def program(self, point: Point) -> Program:
        """The program of a point: parameters are shared, the graph is its own."""
        program = self.base
        if self.choose is not None:
            levels = point[len(self._dropped) :]
            chosen = {weight: self._at(self.choose.levels[level]) for weight, level in zip(self._weights_of, levels, strict=True)}
            program = _splice(program, chosen, self._at(None))
        if skip := self._skip(point):
            program = skip.apply(program, self._context)
        return program

    def resolved(self, point: Point) -> Plan:
        """The plan of a point: nothing left to search, everything written out."""
        assert self.plan.search is not None
        data = self.plan.to_dict()
        data.pop("search")
        passes = list(data.get("passes", ()))
        skip = self._skip(point)
        if self.choose is not None:
            left = skip.apply(self.base, self._context).params if skip else self.base.params
            chosen = zip(self.units[len(self._dropped) :], self._weights_of, point[len(self._dropped) :], strict=True)
            found = {unit.name: self.choose.levels[level] for unit, weight, level in chosen if weight in left}
            at = next(i for i, part in enumerate(self.plan.passes) if part.key == self.choose.pass_key)
            options = dict(self.plan.passes[at].item()[self.choose.pass_key])
            passes[at] = {self.choose.pass_key: {**options, self.choose.field: {**found, **options.get(self.choose.field, {})}}}
        if skip:
            passes.append(skip.item())
        return Plan(**{**data, "passes": passes})

    def counts(self, program: Program) -> dict[str, int]:
        """Parameters, nonzero parameters and bytes that a program's graph reads. A quantised weight counts as the weights that it stores."""
        return _counts(program, {name: value.numel() for name, value in self.base.params.items()}, self._nonzeros)

    def _nonzeros(self, value: Tensor) -> int:
        """Nonzero elements; the programs of a search share their tensors, so each is counted once."""
        if id(value) not in self._known_nonzeros:
            self._known_nonzeros[id(value)] = (value, int(torch.count_nonzero(value)))
        return self._known_nonzeros[id(value)][1]

    def _skip(self, point: Point) -> SkipLayers | None:
        lists: dict[str, list[int]] = {"layers": [], "attention": [], "mlp": []}
        for (unit, index), level in zip(self._dropped, point, strict=False):
            if level:
                lists["layers" if unit.kind == "layer" else unit.kind].append(index)
        return SkipLayers(**{key: tuple(found) for key, found in lists.items()}) if any(lists.values()) else None

    def _at(self, level: Any) -> _Level:
        """The base program with one level everywhere; None is the pass as the plan has it."""
        assert self.choose is not None and self._part is not None
        part = self._part if level is None else self.choose.uniform(self._part, level)
        assert isinstance(part, Pass)
        return self._levels.at(level, part)

    def _weights(self) -> list[tuple[Unit, str]]:
        """Units of the searched option, each with the parameter of the base program that it stands for."""
        if self.choose is None:
            return []
        changed = {weight for level in self.choose.levels for weight in self._at(level).weights.values()}
        found = []
        read = dict.fromkeys(str(node.target) for node in self.base.main.nodes if node.op == "get_attr" and node.target in changed)
        for name in read:
            path = name.split("|")[0].partition(".weight")[0]  # products that were joined are one unit, called by the first
            matches = fnmatch.fnmatch(path, self.choose.modules) or fnmatch.fnmatch(path, f"*.{self.choose.modules}")
            if matches:
                found.append((Unit(path, "x".join(map(str, self.base.params[name].shape)), self.choose.levels), name))
        return found


def _split(passes: list[Pass], choose: Choose | None) -> tuple[list[Pass], Pass | None]:
    """The passes before the searched one, and the searched one."""
    passes = ordered(passes)
    if choose is None:
        return passes, None
    at = next(i for i, part in enumerate(passes) if part.key == choose.pass_key)
    return passes[:at], passes[at]


def _droppable(program: Program, drop: Drop | None) -> list[tuple[Unit, int]]:
    if drop is None:
        return []
    blocks = {block.index: block for block in find_blocks(program)}
    check_layers(drop.keep, blocks, "search: drop")
    if drop.unit == "layer":
        found = [(index, "layer") for index in blocks]
    else:
        found = [(unit.layer, unit.kind) for unit in find_units(program) if drop.unit in ("sublayer", unit.kind)]
    return [(Unit(str(index), kind, ("run", "drop")), index) for index, kind in found if index not in drop.keep]


# ---- levels ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Level:
    """The base program after the searched pass with one level, and what takes the place of what.

    `instead` maps nodes of the base program to nodes of `program`, `weights` the same nodes to the parameter that they belong to.
    """

    program: Program
    instead: Mapping[str, Node]
    weights: Mapping[str, str]


class _Levels:
    """Levels, made when they are first needed and kept in memory (papers/18, item 9)."""

    def __init__(self, base: Program, context: Context) -> None:
        self._base, self._context = base, context
        self._known: dict[Any, _Level] = {}

    def at(self, level: Any, part: Pass) -> _Level:
        if level not in self._known:
            program = part.apply(self._base, self._context)
            instead = _aligned(self._base, program)
            nodes = {node.name: node for node in self._base.main.nodes}
            self._known[level] = _Level(program, instead, {name: _weight_of(nodes[name], self._base, part) for name in instead})
        return self._known[level]


def _aligned(base: Program, other: Program) -> dict[str, Node]:
    """What in `other` takes the place of which node of `base`, for the nodes that a pass replaced.

    Both graphs are walked from their outputs. Copied nodes keep their names; where the other graph has a new node or another tensor, that
    stands for the old node, and the walk goes on from the copied nodes that it reads.
    """
    names = {node.name: node for node in base.main.nodes}
    instead: dict[str, Node] = {}
    seen: set[tuple[Node, Node]] = set()
    stack = [(base.outputs[name], other.outputs[name]) for name in base.outputs]
    while stack:
        old, new = stack.pop()
        if (old, new) in seen:
            continue
        seen.add((old, new))
        same_tensor = old.op != "get_attr" or base.params[str(old.target)] is other.params.get(str(new.target))
        if new.name == old.name and new.target == old.target and same_tensor:
            stack += zip(old.all_input_nodes, new.all_input_nodes, strict=True)
            continue
        instead[old.name] = new
        reads = [new]
        while reads:
            for source in reads.pop().all_input_nodes:
                if source.name in names and source.target == names[source.name].target:
                    stack.append((names[source.name], source))
                else:
                    reads.append(source)
    return instead


def _weight_of(node: Node, base: Program, part: Pass) -> str:
    """The parameter that a replaced node stands for: its own, or the matrix that it reads."""
    read = [node] if node.op == "get_attr" else [a for a in node.all_input_nodes if a.op == "get_attr"]
    names = [str(a.target) for a in read if base.params[str(a.target)].dim() > 1]
    if not names:
        raise CompileError(
            "pass-refused",
            f"{part.key} also changes {node.name}, which belongs to no weight, so its modules cannot be chosen one by one",
            where="search: choose",
        )
    return names[0]


def _splice(base: Program, chosen: Mapping[str, _Level], rest: _Level) -> Program:
    """The base program with each weight at its level; weights that are not in `chosen` as in `rest`."""
    graph, copies = Graph(), dict[Node, Node]()
    made: dict[tuple[int, str], Node] = {}
    params: dict[str, Tensor] = dict(base.params)
    by_name = {node.name: node for node in base.main.nodes}
    known = {id(level): level for level in (rest, *chosen.values())}
    owner = {name: weight for level in known.values() for name, weight in level.weights.items()}

    def copy(node: Node, level: _Level) -> Node:
        """A node of the level's program in the new graph, with all that it needs."""
        if node.name in by_name and node.target == by_name[node.name].target and node.op != "get_attr":
            return copies[by_name[node.name]]
        if (id(level), node.name) not in made:
            inputs = {source: copy(source, level) for source in node.all_input_nodes}
            new = graph.node_copy(node, inputs.__getitem__)
            if node.op == "get_attr":
                value, name = level.program.params[str(node.target)], str(node.target)
                while params.setdefault(name, value) is not value:  # the same name at another level
                    name += "'"
                new.target = name
            made[id(level), node.name] = new
        return made[id(level), node.name]

    for node in base.main.nodes:
        level = chosen.get(owner[node.name], rest) if node.name in owner else rest
        if node.op == "output":
            graph.output({name: copies[value] for name, value in base.outputs.items()})
        elif node.name in level.instead:
            copies[node] = copy(level.instead[node.name], level)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    eliminate_dead(graph)
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    return base.replace(graphs={**base.graphs, MAIN: graph}, params={name: value for name, value in params.items() if name in used})


def _counts(program: Program, sizes: Mapping[str, int], nonzeros: Callable[[Tensor], int]) -> dict[str, int]:
    total = dict.fromkeys(_COUNTED, 0)
    for name in {str(node.target) for node in program.main.nodes if node.op == "get_attr"}:
        value = program.params[name]
        total["bytes"] += value.numel() * value.element_size()
        source = name.rpartition(".")[0]
        if value.is_floating_point():
            scale = source in sizes  # of a quantised weight
            total["params"] += 0 if scale else value.numel()
            total["nonzeros"] += 0 if scale else nonzeros(value)
        elif source in sizes:
            total["params"] += sizes[source]
            total["nonzeros"] += sizes[source]
    return total
