"""Give the program a key/value cache.

Matches   attention(q, k, v), causal
Produces  cached_attention(q, k, v, past.i.key, past.i.value, lengths, bias?); outputs present.i.key and present.i.value.
          With a policy: lengths.g counts the rows that layers of group g read; stored_attention reads blocks from body.i.*, too; heads that
          stream are an attention of their own, past.is.*; queries that the policy wants are outputs query.i
Keeps     logits of a pass from an empty cache
Refuses   attention that is not causal or has a learned bias
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch.fx import Node

from planc.compiler.dialect import OPS
from planc.compiler.head_classes import streaming_heads
from planc.compiler.passbase import CHANGES, EXACT, Context, Effect, Pass, Stage
from planc.compiler.program import Editor, KVState, Program, describe
from planc.compiler.stored import stored_rows
from planc.runtime.errors import CompileError, PlanError
from planc.runtime.kv import KvPolicy, LayerSpec, Rope
from planc.runtime.rows import bias_name

aten = torch.ops.aten


@dataclass(frozen=True)
class _Part:
    """One attention with a state of its own: a layer's, or that of some of its heads."""

    node: Node
    name: str  # of the state, behind `past.`
    group: int
    heads: tuple[int, ...]  # key/value heads
    whole: bool  # all of the layer's


class KvCache(Pass):
    """Insert the key/value cache; done automatically when a plan does not say it."""

    stage: ClassVar[Stage] = Stage.STATE
    calibrates: ClassVar[bool] = True  # where heads are chosen by how far they look back
    capacity: int | None = Field(
        default=None, ge=2, description="slots per sequence; default: what the model's positions allow, at most 4096"
    )
    trees: Literal["auto", "none", "fused", "split"] = Field(
        default="auto",
        description="whether a pass may hold trees: fused attention with a mask, or attention split into products whose tree rows are bitwise "
        "equal to chain rows; auto: as the decode section needs",
    )
    policy: KvPolicy | None = Field(default=None, description="what becomes of rows that are no longer new; left out: they stay")

    @model_validator(mode="after")
    def _no_split(self) -> Self:
        if self.policy is not None and self.trees == "split":
            message = "bitwise trees stop at multiples of 256 slots, and under a cache policy slots are not positions"
            raise PlanError("plan-conflict", message, fix="use `trees: fused`, or chains")
        return self

    @property
    def effect(self) -> Effect:
        """A plain cache changes no logits; a policy does, once a prompt is complete."""
        return EXACT if self.policy is None else CHANGES

    def apply(self, program: Program, context: Context) -> Program:
        """Insert one state per attention layer, named past.0 .. in order; heads that stream get one of their own."""
        edit = program.edit(self.key)
        nodes = [n for n in edit.graph.nodes if n.target is OPS.attention.default]
        if program.states or not nodes:
            return program
        for node in nodes:
            _check(node)
        layers = self._parts(program, nodes, context)
        parts = [part for layer in layers for part in layer]
        ids = next(n for n in edit.graph.nodes if n.op == "placeholder").meta["val"]
        groups = dict.fromkeys(part.group for part in parts)
        capacities = {group: edit.symbol() for group in groups}
        lengths = {group: edit.input(f"lengths.{group}" if group else "lengths", torch.int64, ids.shape[0]) for group in groups}
        biases = self._biases(edit, parts, ids.shape)
        states: list[KVState] = []
        outputs: dict[str, Node] = {}
        for layer in layers:
            made = []
            for part in layer:
                state = self._state(program, part)
                states.append(state)
                sizes = (ids.shape[0], state.heads, capacities[part.group])
                past = [
                    edit.input(f"{state.name}.{side}", state.dtype, *sizes, width)
                    for side, width in (("key", state.key_width), ("value", state.value_width))
                ]
                mask = biases.get((int(part.node.args[6]), part.group))
                with edit.before(part.node):
                    out, key, value, query = self._attention(edit, part, state, [*past, lengths[part.group]], mask)
                made.append(out)
                outputs |= {f"present.{part.name}.key": key, f"present.{part.name}.value": value}
                if part.group == 1 and self.policy is not None and self.policy.prompt_rows:
                    outputs[f"query.{part.name}"] = query
            edit.replace(layer[0].node, made[0] if len(made) == 1 else _joined(edit, layer, made))
        edit.outputs(**outputs)
        return edit.done(len(nodes), len(nodes), states=tuple(states), policy=self.policy)

    def _parts(self, program: Program, nodes: list[Node], context: Context) -> list[list[_Part]]:
        """The attentions that each layer becomes."""
        policy = self.policy
        wanted = set(range(len(nodes)) if policy is None or policy.layers is None else policy.layers)
        if missing := sorted(wanted - set(range(len(nodes)))):
            message = f"layer {missing[0]} does not exist (the model has {len(nodes)} attention layers)"
            raise CompileError("skip-out-of-range", message, fix=f"name layers 0..{len(nodes) - 1}")
        covered = [i for i, node in enumerate(nodes) if policy is not None and i in wanted and not node.args[6]]
        if policy is not None and not covered:
            message = "no layer has the cache policy: all of them see a window of the text only"
            raise CompileError("pass-refused", message, fix="remove the policy")
        streams = streaming_heads(program, policy.streaming, covered, context) if policy is not None and policy.streaming else {}
        layers = []
        for i, node in enumerate(nodes):
            every = tuple(range(int(node.args[1].meta["val"].shape[2])))
            if i not in covered:
                layers.append([_Part(node, str(i), 0, every, whole=True)])
                continue
            split = [(1, tuple(h for h in every if h not in streams.get(i, ()))), (2, streams.get(i, ()))]
            layers.append([_Part(node, f"{i}s" if group == 2 else str(i), group, heads, heads == every) for group, heads in split if heads])
        return layers

    def _state(self, program: Program, part: _Part) -> KVState:
        q, k, v, _, scale, _, window, softcap = part.node.args
        heads, key, value = len(part.heads), k.meta["val"], v.meta["val"]
        spec = None
        if self.policy is not None:
            sizes = int(key.shape[3]), int(value.shape[3])
            store = self.policy.kept if part.group == 1 else None
            for width in sizes:
                if store is not None and (why := store.check(width)):
                    raise CompileError("pass-refused", f"{store.key}: {why}", node=describe(part.node), fix="use another store")
            spec = LayerSpec(
                name=f"past.{part.name}",
                group=part.group,
                heads=heads,
                which=part.heads,
                key_width=sizes[0],
                value_width=sizes[1],
                query_heads=heads * int(q.meta["val"].shape[2]) // int(key.shape[2]),
                scale=float(scale),
                softcap=float(softcap),
                rope=_rope_of(program, k),
            )
        return KVState(f"past.{part.name}", heads, int(key.shape[3]), int(value.shape[3]), key.dtype, window, self.trees == "split", spec)

    def _attention(self, edit: Editor, part: _Part, state: KVState, past: list[Node], mask: Node | None) -> tuple[Node, Node, Node, Node]:
        """Output, new keys and values, and the queries, of one attention."""
        q, k, v, _, scale, _, window, softcap = part.node.args
        if not part.whole:
            group = int(q.meta["val"].shape[2]) // int(k.meta["val"].shape[2])
            q = _chosen(edit, q, tuple(h * group + j for h in part.heads for j in range(group)), f"{part.name}.query")
            k, v = (_chosen(edit, x, part.heads, f"{part.name}.{side}") for x, side in ((k, "key"), (v, "value")))
        stored: list[Node] = []
        if part.group == 1 and self.policy is not None and self.policy.in_graph:
            assert state.layer is not None and self.policy.kept is not None
            stored = stored_rows(edit, state.layer, self.policy.kept)
        target = OPS.stored_attention.default if stored else OPS.cached_attention.default
        new = edit.call(target, q, k, v, *past, *stored, mask, scale, window, softcap)
        out, key, value = (edit.call(operator.getitem, new, j) for j in range(3))
        return out, key, value, q

    def _biases(self, edit: Editor, parts: list[_Part], ids: torch.Size) -> dict[tuple[int, int], Node]:
        """One mask input per distinct window and group where trees are wanted, else none."""
        if self.trees in ("auto", "none"):
            return {}
        kinds = dict.fromkeys((int(part.node.args[6]), part.group) for part in parts)
        keys = {group: edit.symbol() for group in dict.fromkeys(group for _, group in kinds)}
        return {kind: edit.input(bias_name(*kind), torch.float32, ids[0], 1, ids[1], keys[kind[1]]) for kind in kinds}


def _check(node: Node) -> None:
    _, _, _, bias, _, causal, _, _ = node.args
    if not causal or bias is not None:
        raise CompileError(
            "pass-refused",
            "a cache needs causal attention without a learned bias",
            node=describe(node),
            fix="this model's attention cannot be cached yet; use it without decode",
        )


def _rope_of(program: Program, key: Node) -> Rope | None:
    """How the keys were turned."""
    if key.target is not OPS.rope.default:
        return None
    _, frequency, scaling = key.args[1].args[0].args
    return Rope(inv_freq=tuple(program.params[str(frequency.target)].float().tolist()), scaling=float(scaling))


def _chosen(edit: Editor, x: Node, heads: tuple[int, ...], name: str) -> Node:
    """Some heads of x [B,R,H,D]; before they are turned, so that a backend can still leave that to its attention."""
    if x.target is OPS.rope.default:
        return edit.call(OPS.rope.default, _chosen(edit, x.args[0], heads, name), *x.args[1:])
    return edit.call(aten.index_select.default, x, 2, edit.param(f"kv_heads.{name}", torch.tensor(heads)))


def _joined(edit: Editor, layer: list[_Part], outs: list[Node]) -> Node:
    """The attentions of a layer's parts as one, heads in the model's order."""
    node = layer[0].node
    group = int(node.args[0].meta["val"].shape[2]) // int(node.args[1].meta["val"].shape[2])
    order = [h * group + j for part in layer for h in part.heads for j in range(group)]
    with edit.before(node):
        whole = edit.call(aten.cat.default, outs, 2)
        if order == sorted(order):
            return whole
        back = edit.param(f"kv_heads.{layer[0].name}.back", torch.tensor(order).argsort())
        return edit.call(aten.index_select.default, whole, 2, back)
