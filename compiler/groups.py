"""Dependency groups: which channels of which parameters have to be removed together (DepGraph, Fang et al. 2023, read off the traced graph).

Every position of every axis of every parameter gets a label; a walk over the graph carries labels along and ties those that must go together: the
outputs of one layer and the inputs of the next, the operands of a sum, the query heads of a key/value head. What is tied is one *unit*; units of
the same parameters are one *group*, such as the hidden channels of an MLP. An operation that needs an axis whole (a norm over it, a softmax), the
outputs, and every operation that is not known here freeze the labels that reach them.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from planc.compiler.program import Program

Labels = NDArray[np.int64]
Axes = list[Labels | None]  # per axis of a value; None where its size is fixed by something else than parameters
Kind = Literal["heads", "channels"]

FROZEN = 0  # the label of everything that stays
_FREEZE: Labels = np.array([FROZEN])
aten = torch.ops.aten


@dataclass(frozen=True)
class Site:
    """One axis of a parameter. `units` [size of the axis]: the unit of its group that each position belongs to, -1 for none of them."""

    param: str
    axis: int
    units: Labels
    reader: Node | None  # the product that sums over this axis, so that a column of zeros silences the unit


@dataclass(frozen=True)
class Group:
    """Units 0 .. size-1 that lie in the same parameters: each can be removed for itself, `costs[u]` parameters with it."""

    kind: Kind
    sites: tuple[Site, ...]
    costs: Labels
    roots: Labels  # [size] what each unit is called in `Groups.roots`

    @property
    def size(self) -> int:
        """How many units there are."""
        return len(self.costs)

    @property
    def read(self) -> tuple[Site, ...]:
        """The sites through which the units act: silenced in all of them, a unit does nothing."""
        return tuple(site for site in self.sites if site.reader is not None)

    @property
    def name(self) -> str:
        """For people: the parameter that reads the units."""
        return self.read[0].param


@dataclass
class Groups:
    """Groups of a program in the order of its graph; `labels` and `roots` say of each axis of each value what lies where."""

    groups: tuple[Group, ...]
    labels: dict[Node, Any]  # Axes, or a list of them for an operation with several outputs
    roots: Labels  # label -> smallest label tied to it
    frozen: dict[tuple[str, int], str]  # parameter, axis -> name of the node that froze it

    def kept(self, labels: Labels | None, dead: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
        """Which positions of an axis stay when the units with `dead[root]` go."""
        return None if labels is None else ~dead[self.roots[labels]]


def find_groups(program: Program) -> Groups:
    """The dependency groups of the main graph."""
    walk = _Walk(program)
    for node in program.main.nodes:
        walk.visit(node)
    return walk.finish()


@dataclass
class _Walk:
    program: Program
    labels: dict[Node, Any] = field(default_factory=dict)
    axes: dict[tuple[str, int], Labels] = field(default_factory=dict)  # (parameter, axis) -> labels
    ties: list[tuple[Labels, Labels]] = field(default_factory=list)
    readers: dict[tuple[str, int], Node] = field(default_factory=dict)
    heads: list[Labels] = field(default_factory=list)
    froze: list[tuple[Labels, Node]] = field(default_factory=list)
    count: int = FROZEN + 1
    at: Any = None  # the node that is visited

    # ---- labels --------------------------------------------------------------------------------------------------------------------

    def tie(self, *all_labels: Labels | None) -> Labels | None:
        """The same units lie at the same positions of all these axes; a fixed axis among them fixes all."""
        known = [labels for labels in all_labels if labels is not None]
        self.ties += [(known[0], labels) for labels in known[1:]]
        if 0 < len(known) < len(all_labels):
            self.freeze(known[0])
        return known[0] if known else None

    def freeze(self, *all_labels: Labels | None) -> None:
        """The node at hand needs these axes as they are."""
        for labels in all_labels:
            if labels is not None:
                self.ties.append((labels, _FREEZE))
                self.froze.append((labels, self.at))

    def of(self, value: Any) -> Axes:
        """Labels of an argument, one entry per axis."""
        return self.labels.get(value, []) if isinstance(value, Node) else []

    def visit(self, node: Node) -> None:
        """Label a node's value and tie what it ties."""
        value: Any = node.meta.get("val")
        self.at = node
        if node.op == "get_attr":
            self.labels[node] = [self._axis(str(node.target), axis, int(size)) for axis, size in enumerate(value.shape)]
        elif node.op == "output":
            for output in node.all_input_nodes:
                self.freeze(*self.of(output))
        elif node.op == "call_function":
            rule = _RULES.get(_name(node.target))
            if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
                rule = _pointwise
            self.labels[node] = (rule or _unknown)(self, node)
        elif isinstance(value, Tensor):
            self.labels[node] = [None] * value.dim()

    def _axis(self, param: str, axis: int, size: int) -> Labels:
        if (param, axis) not in self.axes:
            self.axes[param, axis] = np.arange(self.count, self.count + size)
            self.count += size
        return self.axes[param, axis]

    # ---- the result ----------------------------------------------------------------------------------------------------------------

    def finish(self) -> Groups:
        """Components of tied labels, and the groups that they form."""
        roots = _components(self.count, self.ties)
        members: dict[int, list[tuple[str, int]]] = defaultdict(list)
        for key, labels in self.axes.items():
            for root in np.unique(roots[labels]):
                if root != roots[FROZEN]:
                    members[int(root)].append(key)
        read = {root for key in self.readers for root in np.unique(roots[self.axes[key]])}
        heads = {root for labels in self.heads for root in np.unique(roots[labels])}
        families: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for root, keys in members.items():
            if root in read:  # what nobody sums over cannot be silenced
                families[(root in heads, *keys)].append(root)
        groups = [self._group("heads" if keys[0] else "channels", keys[1:], units, roots) for keys, units in families.items()]
        order = {node: i for i, node in enumerate(self.program.main.nodes)}
        groups.sort(key=lambda g: min(order[s.reader] for s in g.read if s.reader is not None))
        frozen = {key: node.name for labels, node in reversed(self.froze) for key, own in self.axes.items() if own is labels}
        return Groups(tuple(groups), self.labels, roots, frozen)

    def _group(self, kind: Kind, keys: Sequence[tuple[str, int]], units: list[int], roots: Labels) -> Group:
        number = np.full(self.count, -1)
        number[units] = np.arange(len(units))
        sites, costs = [], np.zeros(len(units), dtype=np.int64)
        for param, axis in keys:
            site = Site(param, axis, number[roots[self.axes[param, axis]]], self.readers.get((param, axis)))
            shape = self.program.params[param].shape
            costs += np.bincount(site.units[site.units >= 0], minlength=len(units)) * (math.prod(shape) // shape[axis])
            sites.append(site)
        return Group(kind, tuple(sites), costs, np.array(units))


def _components(count: int, ties: list[tuple[Labels, Labels]]) -> Labels:
    """The smallest label that each label is tied to, by hooking and pointer jumping."""
    parent = np.arange(count)
    if not ties:
        return parent
    pairs = [np.broadcast_arrays(*pair) for pair in ties]
    left, right = (np.concatenate([pair[i].reshape(-1) for pair in pairs]) for i in (0, 1))
    while True:
        before = parent.copy()
        smaller = np.minimum(parent[left], parent[right])
        for side in (left, right):
            np.minimum.at(parent, parent[side], smaller)
        parent = parent[parent]
        if np.array_equal(parent, before):
            return parent


def _name(target: Any) -> str:
    """`linear` of aten.linear.default; an operation that works in place has the rules of the other."""
    if target is operator.getitem:
        return "getitem"
    return str(getattr(target, "_opname", getattr(target, "__name__", target))).rstrip("_")


# ---- one rule per kind of operation: labels of the result; ties are noted on the walk ------------------------------------------------

_RULES: dict[str, Callable[[_Walk, Node], Any]] = {}


def _rule(*names: str) -> Callable[[Callable[[_Walk, Node], Any]], Callable[[_Walk, Node], Any]]:
    def register(rule: Callable[[_Walk, Node], Any]) -> Callable[[_Walk, Node], Any]:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def _fresh(node: Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        return [[None] * v.dim() for v in value]
    return [None] * value.dim() if isinstance(value, Tensor) else []


def _args(node: Node) -> Any:
    """The arguments, whose types each operation fixes."""
    return node.args


def _unknown(walk: _Walk, node: Node) -> Any:
    for source in node.all_input_nodes:
        for labels in walk.of(source):
            for part in labels if isinstance(labels, list) else (labels,):
                walk.freeze(part)
    return _fresh(node)


@_rule("sym_size")
def _size(walk: _Walk, node: Node) -> Any:
    source, axis = _args(node)[:2]
    walk.freeze(walk.of(source)[axis])
    return []


@_rule("glu", "dropout", "contiguous", "clone", "to", "_to_copy", "detach", "alias")
def _pointwise(walk: _Walk, node: Node) -> Any:
    rank = node.meta["val"].dim()
    columns: list[list[Labels | None]] = [[] for _ in range(rank)]
    for source in node.all_input_nodes:
        value, labels = source.meta.get("val"), walk.of(source)
        if isinstance(value, Tensor):
            for axis, part in enumerate(labels, rank - len(labels)):
                if node.meta["val"].shape[axis] == value.shape[axis - rank + len(labels)]:  # size 1 is spread over all
                    columns[axis].append(part)
    return [walk.tie(*parts) for parts in columns]


@_rule("linear")
def _linear(walk: _Walk, node: Node) -> Any:
    x = walk.of(_args(node)[0])
    return [*x[:-1], _product(walk, node, x[-1])]


def _product(walk: _Walk, node: Node, channels: Labels | None) -> Labels | None:
    """Tie what a product sums over to its weight [outputs, inputs, ..]; the labels of its outputs."""
    weight = walk.of(_args(node)[1])
    bias = walk.of(_args(node)[2]) if len(_args(node)) > 2 else []
    walk.tie(weight[1], channels)
    if _args(node)[1].op != "get_attr":
        walk.freeze(*weight)
    elif walk.readers.setdefault((str(_args(node)[1].target), 1), node) is not node:
        walk.freeze(weight[1])  # cannot be silenced for one of two readers alone
    return walk.tie(weight[0], *bias)


@_rule("conv1d", "conv2d", "conv3d", "convolution")
def _convolution(walk: _Walk, node: Node) -> Any:
    x, weight = (walk.of(a) for a in _args(node)[:2])
    shapes = [a.meta["val"].shape for a in _args(node)[:2]]
    groups = int(shapes[0][1]) // int(shapes[1][1])
    if groups == 1:
        out = _product(walk, node, x[1])
    else:
        out = walk.tie(weight[0], *(walk.of(_args(node)[2]) if len(_args(node)) > 2 else []))
        if groups == shapes[0][1] == shapes[1][0]:  # depthwise: every channel for itself
            walk.tie(out, x[1])
        else:
            walk.freeze(out, x[1])  # groups would have to lose the same number each
    return [x[0], out, *[None] * (len(x) - 2)]


@_rule("batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_no_update")
def _batch_norm(walk: _Walk, node: Node) -> Any:
    x = walk.of(_args(node)[0])
    walk.tie(x[1], *(walk.of(a)[0] for a in _args(node)[1:5] if isinstance(a, Node)))
    own = list(x)
    return own if isinstance(node.meta["val"], Tensor) else [own, [None], [None]]


@_rule("rms_norm", "layer_norm", "softmax", "_softmax")
def _whole(walk: _Walk, node: Node) -> Any:
    """Needs the last axis whole (softmax: the axis it names); others pass."""
    x = list(walk.of(_args(node)[0]))
    axis = int(_args(node)[1]) if "softmax" in _name(node.target) else -1
    walk.freeze(x[axis], *(labels for a in _args(node)[1:] if isinstance(a, Node) for labels in walk.of(a)))
    return x


@_rule("embedding")
def _embedding(walk: _Walk, node: Node) -> Any:
    table, ids = walk.of(_args(node)[0]), walk.of(_args(node)[1])
    walk.freeze(table[0])
    return [*ids, table[1]]


@_rule("rope")
def _rope(walk: _Walk, node: Node) -> Any:
    x = walk.of(_args(node)[0])
    walk.freeze(x[3])
    return list(x)


@_rule("attention")
def _attention(walk: _Walk, node: Node) -> Any:
    """A key/value head and the query heads that read it are one unit: the kernels want the same number of queries for each."""
    q, k, v = (walk.of(a) for a in _args(node)[:3])
    if q[2] is None or k[2] is None or v[2] is None or _args(node)[3] is not None:
        walk.freeze(q[2], k[2], v[2])
        return _fresh(node)
    walk.tie(k[2], v[2])
    repeated = np.repeat(k[2], len(q[2]) // len(k[2]))
    walk.heads.append(q[2])
    walk.freeze(q[3], k[3], v[3])
    return [q[0], q[1], walk.tie(q[2], repeated), None]


@_rule("scaled_dot_product_attention")
def _plain_attention(walk: _Walk, node: Node) -> Any:
    """Encoders' own attention over q, k and v [B, heads, T, width]: as `_attention`; a mask may not differ between heads."""
    q, k, v = (walk.of(a) for a in _args(node)[:3])
    mask = _args(node)[3] if len(_args(node)) > 3 else node.kwargs.get("attn_mask")
    by_head = isinstance(mask, Node) and mask.meta["val"].dim() > 2 and mask.meta["val"].shape[-3] != 1
    if len(q) != 4 or q[1] is None or k[1] is None or v[1] is None or by_head:
        return _unknown(walk, node)
    walk.tie(k[1], v[1])
    walk.heads.append(q[1])
    walk.freeze(q[3], k[3], v[3])
    return [q[0], walk.tie(q[1], np.repeat(k[1], len(q[1]) // len(k[1]))), q[2], None]


@_rule("transpose")
def _transpose(walk: _Walk, node: Node) -> Any:
    x = list(walk.of(_args(node)[0]))
    a, b = int(_args(node)[1]), int(_args(node)[2])
    x[a], x[b] = x[b], x[a]
    return x


@_rule("permute")
def _permute(walk: _Walk, node: Node) -> Any:
    x = walk.of(_args(node)[0])
    return [x[axis] for axis in _args(node)[1]]


@_rule("cat")
def _cat(walk: _Walk, node: Node) -> Any:
    parts = [walk.of(a) for a in _args(node)[0]]
    dim = int(_args(node)[1]) % len(parts[0]) if len(_args(node)) > 1 else 0
    out: Axes = []
    for axis, column in enumerate(zip(*parts, strict=True)):
        if axis != dim:
            out.append(walk.tie(*column))
        elif any(labels is None for labels in column):
            walk.freeze(*column)
            out.append(None)
        else:
            out.append(np.concatenate(column))
    return out


@_rule("split", "split_with_sizes", "chunk", "slice")
def _parts(walk: _Walk, node: Node) -> Any:
    x, value = walk.of(_args(node)[0]), node.meta["val"]
    dim = part_axis(node)
    whole = x[dim]
    if whole is None:
        return [list(x) for _ in value] if isinstance(value, list | tuple) else list(x)
    if isinstance(value, Tensor):  # a slice
        start, step = (_args(node)[2] or 0) if len(_args(node)) > 2 else 0, _args(node)[4] if len(_args(node)) > 4 else 1
        if step != 1 or not isinstance(start, int) or start < 0:
            return _unknown(walk, node)
        return [*x[:dim], whole[start : start + int(value.shape[dim])], *x[dim + 1 :]]
    ends = np.cumsum([int(v.shape[dim]) for v in value])
    return [[*x[:dim], part, *x[dim + 1 :]] for part in np.split(whole, ends[:-1])]


def part_axis(node: Node) -> int:
    """The axis that split, chunk or slice works on, from 0."""
    at = 1 if _name(node.target) == "slice" else 2
    rank = _args(node)[0].meta["val"].dim()
    return int(_args(node)[at]) % rank if len(_args(node)) > at else 0


@_rule("getitem")
def _getitem(walk: _Walk, node: Node) -> Any:
    return walk.labels[_args(node)[0]][_args(node)[1]]


@_rule("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "upsample_nearest2d", "pad", "constant_pad_nd")
def _spatial(walk: _Walk, node: Node) -> Any:
    x = walk.of(_args(node)[0])
    walk.freeze(*x[2:])
    return [*x[:2], *[None] * (len(x) - 2)]


@_rule("mean")
def _mean(walk: _Walk, node: Node) -> Any:
    x = walk.of(_args(node)[0])
    dims = {int(d) % len(x) for d in _args(node)[1]} if len(_args(node)) > 1 else set(range(len(x)))
    walk.freeze(*(x[d] for d in dims))
    keep = len(_args(node)) > 2 and bool(_args(node)[2])
    return [None if i in dims else labels for i, labels in enumerate(x) if keep or i not in dims]


@_rule("view", "reshape", "flatten", "unsqueeze", "squeeze", "_unsafe_view")
def _view(walk: _Walk, node: Node) -> Any:
    """Axes are matched from the right. One axis cut into several: the first of them counts units. Several joined: each unit is repeated."""
    x, old, new = list(walk.of(_args(node)[0])), _args(node)[0].meta["val"].shape, node.meta["val"].shape
    out: Axes = [None] * len(new)
    i, j = len(old), len(new)
    while i > 0 and j > 0 and isinstance(old[i - 1], int) and isinstance(new[j - 1], int):
        end_i, end_j = i, j
        i, j = i - 1, j - 1
        while (a := math.prod(old[i:end_i])) != (b := math.prod(new[j:end_j])):
            if a < b and i > 0 and isinstance(old[i - 1], int):
                i -= 1
            elif a > b and j > 0 and isinstance(new[j - 1], int):
                j -= 1
            else:
                walk.freeze(*x[:end_i])
                return out
        # axes of size 1 in front of a match come with the next one
        labelled = [axis for axis in range(i, end_i) if x[axis] is not None]
        if not labelled:
            continue
        axis = labelled[0]
        source = x[axis]
        assert source is not None
        wide = [k for k in range(j, end_j) if new[k] != 1] or [j]
        if len(labelled) > 1 or (end_i - i > 1 and len(wide) > 1):
            walk.freeze(*x[i:end_i])
        elif len(wide) == 1:
            inner, outer = math.prod(old[axis + 1 : end_i]), math.prod(old[i:axis])
            out[wide[0]] = np.tile(np.repeat(source, inner), outer)
        else:
            table = source.reshape(int(new[wide[0]]), -1)
            walk.ties.append((table[:, :1], table))
            out[wide[0]] = table[:, 0]
    walk.freeze(*x[:i])
    return out
