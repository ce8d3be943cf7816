"""Give the program a key/value cache.

Matches   attention(q, k, v), causal
Produces  cached_attention(q, k, v, past.i.key, past.i.value, lengths, bias?); outputs present.i.key and present.i.value
Keeps     logits of a pass from an empty cache
Refuses   attention that is not causal or has a learned bias
"""

from __future__ import annotations

import operator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch.fx import Node

from planc.compiler.dialect import OPS
from planc.compiler.passbase import EXACT, Context, Effect, Pass, Stage
from planc.compiler.program import Editor, KVState, Program, describe
from planc.runtime.errors import CompileError


class KvCache(Pass):
    """Insert the key/value cache; done automatically when a plan does not say it."""

    stage: ClassVar[Stage] = Stage.STATE
    capacity: int | None = Field(
        default=None, ge=2, description="slots per sequence; default: what the model's positions allow, at most 4096"
    )
    trees: Literal["auto", "none", "fused", "split"] = Field(
        default="auto",
        description="whether a pass may hold trees: fused attention with a mask, or attention split into products whose tree rows are bitwise "
        "equal to chain rows; auto: as the decode section needs",
    )

    @property
    def effect(self) -> Effect:
        """The cache changes no logits."""
        return EXACT

    def apply(self, program: Program, context: Context) -> Program:
        """Insert one state per attention layer, named past.0 .. in order."""
        edit = program.edit(self.key)
        nodes = [n for n in edit.graph.nodes if n.target is OPS.attention.default]
        if program.states or not nodes:
            return program
        ids = next(n for n in edit.graph.nodes if n.op == "placeholder").meta["val"]
        capacity = edit.symbol()
        lengths = edit.input("lengths", torch.int64, ids.shape[0])
        biases = self._biases(edit, nodes, ids.shape)
        states: list[KVState] = []
        outputs: dict[str, Node] = {}
        for i, node in enumerate(nodes):
            q, k, v, bias, scale, causal, window, softcap = node.args
            if not causal or bias is not None:
                raise CompileError(
                    "pass-refused",
                    "a cache needs causal attention without a learned bias",
                    node=describe(node),
                    fix="this model's attention cannot be cached yet; use it without decode",
                )
            key, value = k.meta["val"], v.meta["val"]
            past = [
                edit.input(f"past.{i}.{part}", t.dtype, ids.shape[0], t.shape[2], capacity, t.shape[3])
                for part, t in (("key", key), ("value", value))
            ]
            with edit.before(node):
                mask = biases.get(window)
                new = edit.call(OPS.cached_attention.default, q, k, v, *past, lengths, mask, scale, window, softcap)
                out, present_k, present_v = (edit.call(operator.getitem, new, j) for j in range(3))
            edit.replace(node, out)
            outputs |= {f"present.{i}.key": present_k, f"present.{i}.value": present_v}
            states.append(
                KVState(f"past.{i}", int(key.shape[2]), int(key.shape[3]), int(value.shape[3]), key.dtype, window, self.trees == "split")
            )
        edit.outputs(**outputs)
        return edit.done(len(nodes), len(nodes), states=tuple(states))

    def _biases(self, edit: Editor, nodes: list[Node], ids: torch.Size) -> dict[int, Node]:
        """One mask input per distinct window where trees are wanted, else none."""
        if self.trees in ("auto", "none"):
            return {}
        keys = edit.symbol()
        windows = dict.fromkeys(int(n.args[6]) for n in nodes)
        return {w: edit.input(f"bias.{w}" if w else "bias", torch.float32, ids[0], 1, ids[1], keys) for w in windows}
