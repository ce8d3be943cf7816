"""Give the program keys and values that are addressed by slot.

Matches   attention(q, k, v), not causal
Produces  attention(q, slot_write(past.i.key, k, slots), slot_write(past.i.value, v, slots), segment_bias(segments, own_segments)); outputs
          present.i.key and present.i.value; with `probe` also row.i and column_sums.i of attention_probe
Keeps     outputs of a pass of all slots        Refuses   causal attention, a learned bias
"""

from __future__ import annotations

import operator
from typing import ClassVar

import torch
from pydantic import Field
from torch.fx import Node

from planc.compiler.dialect import OPS
from planc.compiler.passbase import EXACT, Context, Effect, Pass, Stage
from planc.compiler.program import Editor, KVState, Program, describe
from planc.passes.segments import attentions
from planc.runtime.errors import CompileError


class SlotCache(Pass):
    """Run any slots of a canvas with the keys and values of the others cached; made for `decode: {masked: ...}` by itself."""

    stage: ClassVar[Stage] = Stage.STATE
    probe: bool = Field(False, description="also tell what a watched slot and the window attend to")

    @property
    def effect(self) -> Effect:
        """The cache changes no outputs."""
        return EXACT

    def apply(self, program: Program, context: Context) -> Program:
        """One state per attention layer, named past.0 .. in order."""
        if program.states:
            return program
        edit = program.edit(self.key)
        nodes = attentions(edit)
        batch, rows = nodes[0].args[0].meta["val"].shape[:2]
        slots, capacity = edit.input("slots", torch.int64, batch, rows), edit.symbol()
        segments, own = edit.input("segments", torch.int64, batch, capacity), edit.input("own_segments", torch.int64, batch, rows)
        watched = edit.input("watched", torch.int64, batch) if self.probe else None
        window = edit.input("window", torch.float32, batch, rows) if self.probe else None
        with edit.before(nodes[0]):
            bias = edit.call(OPS.segment_bias.default, segments, own)
        states, outputs = [], dict[str, Node]()
        for i, node in enumerate(nodes):
            if node.args[3] is not None:
                message = "a bias that was learned by the distance of slots cannot be looked up by slot yet"
                raise CompileError("pass-refused", message, node=describe(node), fix="use `cache: uncached`")
            states.append(self._cache(edit, node, i, slots, bias, capacity, outputs))
            if watched is not None and window is not None:
                q, k, _, _, scale, _, _, softcap = node.args
                with edit.before(node):
                    both = edit.call(OPS.attention_probe.default, q, k, bias, watched, window, scale, softcap)
                    outputs |= {name: edit.call(operator.getitem, both, j) for j, name in enumerate((f"row.{i}", f"column_sums.{i}"))}
        edit.outputs(**outputs)
        return edit.done(len(nodes), len(nodes), states=tuple(states))

    def _cache(
        self, edit: Editor, node: Node, index: int, slots: Node, bias: Node, capacity: torch.SymInt, outputs: dict[str, Node]
    ) -> KVState:
        key, value = (node.args[j].meta["val"] for j in (1, 2))
        for j, (part, t) in enumerate((("key", key), ("value", value)), 1):
            past = edit.input(f"past.{index}.{part}", t.dtype, t.shape[0], t.shape[2], capacity, t.shape[3])
            with edit.before(node):
                present = edit.call(OPS.slot_write.default, past, node.args[j], slots)
                node.update_arg(j, edit.call(torch.ops.aten.transpose.int, present, 1, 2))
            outputs[f"present.{index}.{part}"] = present
        node.update_arg(3, bias)
        edit.compute(node)
        return KVState(f"past.{index}", int(key.shape[2]), int(key.shape[3]), int(value.shape[3]), key.dtype)
