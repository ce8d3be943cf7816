"""Let the attentions of neighbouring layers read one hidden state, so that they no longer wait for each other.

Matches   u1 = h + attn1(h); h1 = u1 + mlp1(u1); u2 = h1 + attn2(h1); h2 = u2 + mlp2(u2); ...       layers 1, 2, .. of a group
Produces  u1 = h + attn1(h); h1 = u1 + mlp1(u1); u2 = h1 + attn2(h); h2 = u2 + mlp2(u2); ...
          with `fused` attn1(h), attn2(h), .. are slices of one attention with the heads of all, behind one norm
Keeps     order and inputs of MLPs and residual sums; layers before `first` and behind `last`; weights
Refuses   groups over different attentions (window, heads, scale) or over keys that another layer made; attention and MLP that are parallel
Paper     EasySpec (14): the fuzzy form of a draft model
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.fx import Node

from planc.compiler.blocks import ATTENTIONS, find_blocks
from planc.compiler.dialect import OPS
from planc.compiler.passbase import CHANGES, EXACT, Context, Effect, Pass, Stage
from planc.compiler.program import Editor, Program, describe
from planc.compiler.units import Unit, find_units
from planc.passes.skip_layers import check_layers
from planc.runtime.errors import CompileError

aten = torch.ops.aten
_NORMS = {OPS.rms_norm.default: (1, 2), aten.layer_norm.default: (2, 4)}  # where the arguments that are parameters begin and end
_VIEWS = (aten.view.default, aten.reshape.default)


@dataclass(frozen=True)
class _Layer:
    """A layer's attention: what reads the hidden state `state` for it, and how it attends (equal in layers that may be grouped)."""

    index: int
    state: Node
    readers: tuple[Node, ...]
    attention: Node
    form: tuple[object, ...] | None  # None: it reads keys of another layer


class LayerParallel(Pass):
    """Let the attentions of a group of layers read the hidden state in front of the group."""

    stage: ClassVar[Stage] = Stage.STRUCTURE
    conflicts: ClassVar[tuple[str, ...]] = ("layer_parallel",)
    demands: ClassVar[tuple[str, ...]] = ("fuse_projections",)
    after: ClassVar[tuple[str, ...]] = ("skip_layers",)
    n: int = Field(4, ge=1, description="layers in a group; 1 changes nothing")
    first: int = Field(1, ge=0, description="layers at the front that stay as they are")
    last: int = Field(1, ge=0, description="layers at the end that stay as they are")
    groups: tuple[tuple[int, ...], ...] = Field(
        (), description="the groups themselves, instead of n, first and last: lists of neighbouring layers"
    )
    fused: bool = Field(False, description="compute a group's attentions as one, of which the cache then has one state")

    @property
    def effect(self) -> Effect:
        """Groups of one layer are the model itself."""
        return CHANGES if self.n > 1 or self.groups else EXACT

    def apply(self, program: Program, context: Context) -> Program:
        """Rewire each group; with `fused` join its attentions."""
        if (self.n == 1 and not self.groups) or any(c.pass_name == self.key for c in program.history):
            return program
        groups = self._chosen(program)
        edit = program.edit(self.key)
        for group in groups:
            if self.fused:
                _join(edit, group)
            else:
                _rewire(edit, group)
        notes = [f"{group[0].index}..{group[-1].index}" for group in groups]
        return edit.done(len(groups), len(groups), notes)

    def _chosen(self, program: Program) -> list[list[_Layer]]:
        """The groups of two and more layers."""
        layers = list(_layers(program))
        if self.groups:
            return [self._named(group, layers) for group in self.groups]
        middle = layers[self.first : max(0, len(layers) - self.last)]
        runs = [list(run) for form, run in groupby(middle, key=lambda layer: layer.form) if form is not None]
        groups = [run[i : i + self.n] for run in runs for i in range(0, len(run), self.n)]
        groups = [group for group in groups if len(group) > 1]
        if not groups:
            message = f"no two neighbours of the {len(middle)} layers between the first {self.first} and the last {self.last} attend alike"
            raise CompileError("pass-refused", message, where=f"pass {self.key}", fix="remove the pass, or give it more layers")
        return groups

    def _named(self, group: tuple[int, ...], layers: Sequence[_Layer]) -> list[_Layer]:
        check_layers(group, {block.index: block for block in layers}, self.key)
        order = [layer.index for layer in layers]
        start = order.index(group[0]) if group else 0
        found = list(layers[start : start + len(group)])
        if len(group) < 2 or tuple(order[start : start + len(group)]) != group:
            message = f"{list(group)} is not a list of two or more neighbouring layers"
        elif sum(len(set(group) & set(other)) for other in self.groups) > len(group):
            message = f"a layer of {list(group)} stands in two groups"
        elif odd := [layer for layer in found if layer.form is None or layer.form != found[0].form]:
            why = "reads keys of another layer" if odd[0].form is None else f"does not attend like layer {group[0]} (window, heads, scale)"
            message = f"layer {odd[0].index} {why}"
        else:
            return found
        raise CompileError("pass-refused", message, where=f"pass {self.key}", fix="change `groups`, or leave the choice to `n`")


def _layers(program: Program) -> Iterator[_Layer]:
    """The attention of every decoder layer, in order."""
    nodes = {node.name: node for node in program.main.nodes}
    units: dict[int, list[Unit]] = {}
    for unit in find_units(program):
        units.setdefault(unit.layer, []).append(unit)
    for block in find_blocks(program):
        own = units.get(block.index, [])
        if [unit.kind for unit in own] != ["attention", "mlp"]:
            raise _refused(f"layer {block.index} is not an attention and then an MLP that are added to a hidden state", nodes[block.exit])
        if own[0].state is own[1].state:
            raise _refused(f"attention and MLP of layer {block.index} are parallel as they are", nodes[block.exit])
        inside = _behind(own[0].term, own[0].state)
        attention = next(node for node in inside if node.target in ATTENTIONS)
        readers = tuple(node for node in own[0].state.users if node in inside)
        yield _Layer(block.index, own[0].state, readers, attention, _form(attention, own[0].state))


def _form(attention: Node, state: Node) -> tuple[object, ...] | None:
    """Sizes and options of an attention; None where keys or values do not come from the layer's own hidden state."""
    sources: Any = attention.args[:3]
    if not all(any(state in node.all_input_nodes for node in _behind(source, state)) for source in sources):
        return None
    return (*(tuple(source.meta["val"].shape[2:]) for source in sources), *attention.args[3:])


def _refused(message: str, node: Node) -> CompileError:
    return CompileError("pass-refused", message, node=describe(node), where="pass layer_parallel", fix="remove the pass")


def _behind(node: Node, stop: Node) -> dict[Node, None]:
    """What `node` needs, itself included, as far as `stop`, which is not."""
    found, stack = dict[Node, None](), [node]
    while stack:
        if (current := stack.pop()) is not stop and current not in found:
            found[current] = None
            stack += current.all_input_nodes
    return found


def _rewire(edit: Editor, group: Sequence[_Layer]) -> None:
    entry = edit[group[0].state]
    for layer in group[1:]:
        for reader in layer.readers:
            edit[reader].replace_input_with(edit[layer.state], entry)


# ---- one attention for a group ----


@dataclass(frozen=True)
class _Projection:
    """A query, key or value [B,R,H,D]: view(rows of linear(norm(h))), rotated where `rotation` has cos and sin."""

    norm: Any
    linear: Any
    rows: slice
    view: Node
    rotation: tuple[Any, ...]

    @property
    def alike(self) -> tuple[Any, ...]:
        """What has to be equal in all layers."""
        return self.rotation, self.norm.target, self.norm.args[_NORMS[self.norm.target][1] :], len(self.linear.args)

    @property
    def name(self) -> str:
        """The weight and the rows of it, as the name of a parameter."""
        weight = str(self.linear.args[1].target)
        return weight if self.rows == slice(None) else f"{weight}[{self.rows.start}:{self.rows.stop}]"


def _join(edit: Editor, group: Sequence[_Layer]) -> None:
    """One norm without a weight, for each role one product with the layers' weights on top of each other, one attention, and its slices."""
    roles = [[_projection(layer, role) for layer in group] for role in range(3)]
    if any(part.alike != parts[0].alike for parts in roles for part in parts):
        raise _refused(f"the attentions of layers {group[0].index}..{group[-1].index} differ in positions or norms", group[0].attention)
    attention = edit[group[0].attention]
    readers = [_reader(layer) for layer in group]
    with edit.before(attention):
        normed = _neutral(edit, [part.norm for part in roles[0]])
        joined = edit.call(attention.target, *(_stacked(edit, normed, parts) for parts in roles), *attention.args[3:])
        rows = edit[readers[0]].args[1][:2]
        flat = edit.call(aten.reshape.default, joined, [*rows, -1])
        width = int(readers[0].meta["val"].shape[2])
        split = edit.call(aten.split_with_sizes.default, flat, [width] * len(group), -1)
        slices = [edit.call(operator.getitem, split, i) for i in range(len(group))]
    for reader, own in zip(readers, slices, strict=True):
        edit.replace(edit[reader], own)


def _projection(layer: _Layer, role: int) -> _Projection:
    """How the layer makes its queries (role 0), keys or values.

    Raises CompileError[pass-refused] where something else lies between the norm and the attention, such as a norm per head.
    """
    node: Any = layer.attention.args[role]
    rotation: tuple[Any, ...] = ()
    if node.target is OPS.rope.default:
        node, rotation = node.args[0], tuple(node.args[1:])
    view = node
    linear, rows = _slice(view.args[0]) if view.target in _VIEWS else (view, slice(None))
    fits = linear.target is aten.linear.default and linear.args[0].target in _NORMS and layer.readers == (linear.args[0],)
    parameters = (*linear.args[1:], *linear.args[0].args[slice(*_NORMS[linear.args[0].target])]) if fits else ()
    if not fits or not all(isinstance(node, Node) and node.op == "get_attr" for node in parameters):
        raise CompileError(
            "pass-refused",
            f"attention {layer.index} cannot be joined with others: {'qkv'[role]} is not a product of the layer's norm alone",
            node=describe(view if view.target not in _VIEWS else linear),
            where="pass layer_parallel",
            fix="remove `fused`",
        )
    return _Projection(linear.args[0], linear, rows, view, rotation)


def _slice(node: Any) -> tuple[Any, slice]:
    """The value that `node` is a piece of along the last axis, and which; the whole of any other node."""
    source = node.args[0] if node.args else None
    if node.target is aten.slice.Tensor and node.args[1] in (2, -1):
        return source, slice(node.args[2], min(node.args[3], int(source.meta["val"].shape[-1])))
    if node.target is operator.getitem and source.target in (aten.split_with_sizes.default, aten.split.Tensor):
        sizes = [int(piece.shape[-1]) for piece in source.meta["val"]]
        start = sum(sizes[: node.args[1]])
        return source.args[0], slice(start, start + sizes[node.args[1]])
    return node, slice(None)


def _reader(layer: _Layer) -> Node:
    """What takes the heads [B,R,H,D] side by side, [B,R,H*D]."""
    reader = next(iter(layer.attention.users))
    if len(layer.attention.users) > 1 or reader.target not in _VIEWS or reader.meta["val"].dim() != 3:
        raise _refused(f"attention {layer.index} cannot be joined with others: its heads are not read side by side", layer.attention)
    return reader


def _neutral(edit: Editor, norms: Sequence[Node]) -> Node:
    """The norm of the group's hidden state that leaves weight and bias to the products behind it."""
    old, neutral = edit[norms[0]], list(edit[norms[0]].args)
    for place, value in zip(range(*_NORMS[old.target]), (1.0, 0.0), strict=False):
        name = "|".join(str(norm.args[place].target) for norm in norms) + ".neutral"
        neutral[place] = edit.param(name, torch.full_like(_value(edit, old.args[place]), value))
    return edit.call(old.target, *neutral)


def _stacked(edit: Editor, normed: Node, parts: Sequence[_Projection]) -> Node:
    """Queries, keys or values of all layers, [B,R,N*H,D], from the norm without weights: these go into the product."""
    weights, biases = list[Tensor](), list[Tensor]()
    for part in parts:
        weight, *bias = (_value(edit, argument)[part.rows] for argument in part.linear.args[1:])
        scale, *shift = (_value(edit, argument) for argument in part.norm.args[slice(*_NORMS[part.norm.target])])
        weights.append(weight * scale)
        if bias or shift:
            biases.append((weight @ shift[0] if shift else 0.0) + (bias[0] if bias else torch.zeros(len(weight))))
    name, view = "|".join(part.name for part in parts), parts[0].view
    stacked = [edit.param(name, torch.cat(weights))]
    if biases:
        stacked.append(edit.param(f"{name}.bias", torch.cat(biases)))
    product = edit.call(aten.linear.default, normed, *stacked)
    width = int(view.meta["val"].shape[3])
    heads = edit.call(aten.view.default, product, [*edit[view].args[1][:2], -1, width])
    return edit.call(OPS.rope.default, heads, *(edit[table] for table in parts[0].rotation)) if parts[0].rotation else heads


def _value(edit: Editor, argument: Any) -> Tensor:
    return edit.params[str(argument.target)]
