"""Say which slots see which others as an input.

Matches   attention(q, k, v), not causal
Produces  the same with segment_bias(segments, segments) added; input segments [B,S] int64
Keeps     outputs, where all segments are equal     Refuses   causal attention
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.fx import Node

from planc.compiler.dialect import OPS
from planc.compiler.passbase import EXACT, Context, Effect, Pass, Stage
from planc.compiler.program import Editor, Program, describe
from planc.runtime.errors import CompileError


class Segments(Pass):
    """Attention by segments: in both directions, causal by block, or causal by scale; made for `decode: {masked: ...}` by itself."""

    stage: ClassVar[Stage] = Stage.STATE

    @property
    def effect(self) -> Effect:
        """One segment is what was there."""
        return EXACT

    def apply(self, program: Program, context: Context) -> Program:
        """One bias for all attentions."""
        if "segments" in program.inputs:
            return program
        edit = program.edit(self.key)
        nodes = attentions(edit)
        batch, slots = nodes[0].args[0].meta["val"].shape[:2]
        segments = edit.input("segments", torch.int64, batch, slots)
        with edit.before(nodes[0]):
            bias = edit.call(OPS.segment_bias.default, segments, segments)
        for node in nodes:
            with_bias(edit, node, bias)
        return edit.done(len(nodes), len(nodes))


def attentions(edit: Editor) -> list[Node]:
    """The attentions of a model that fills slots; refuses what cannot fill any."""
    nodes = [n for n in edit.graph.nodes if n.target is OPS.attention.default]
    if not nodes:
        raise CompileError("pass-no-match", "there is no attention")
    for node in nodes:
        if node.args[5] or node.args[6]:
            kind = "causal: it cannot look at what stands to the right" if node.args[5] else "limited to a sliding window"
            fix = "use a diffusion language model, or add the pass `bidirectional` to one that was trained on to fill masks"
            raise CompileError("pass-refused", f"this model's attention is {kind}", node=describe(node), fix=fix)
    return nodes


def with_bias(edit: Editor, node: Node, bias: Node) -> None:
    """Add `bias` to what the attention has."""
    with edit.before(node):
        own = node.args[3]
        node.update_arg(3, bias if own is None else edit.call(torch.ops.aten.add.Tensor, own, bias))
