"""Compute full attention for some queries at a time, so that no more than their scores are ever in memory.

Matches   attention(q, k, v) that hides nothing, and scaled_dot_product_attention(q, k, v) without mask
Produces  cat(softmax(q[chunk] k^T * scale) v, ...), one chunk after the other
Keeps     outputs up to rounding: every row of scores is whole
Refuses   nothing: attention that hides keys or adds a bias stays as it is
Paper     patch scaling (3), whose 50 176 tokens would need scores of ten gigabytes a head
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch.fx import Node

from planc.compiler.dialect import OPS
from planc.compiler.passbase import EXACT, Context, Effect, Pass, Stage
from planc.compiler.program import Editor, Program

aten = torch.ops.aten


class ChunkAttention(Pass):
    """Compute full attention for some queries at a time, in memory that grows with the tokens and not with their square."""

    stage: ClassVar[Stage] = Stage.SCHEDULE
    conflicts: ClassVar[tuple[str, ...]] = ("chunk_attention",)
    queries: int = Field(256, ge=1, description="queries whose scores are in memory together")

    @property
    def effect(self) -> Effect:
        """The same sums, in kernels of other sizes."""
        return EXACT

    def apply(self, program: Program, context: Context) -> Program:
        """Unroll every attention over its queries."""
        edit, found, done = program.edit(self.key), 0, 0
        for node in list(edit.graph.nodes):
            if node.target not in (OPS.attention.default, aten.scaled_dot_product_attention.default):
                continue
            found += 1
            if not _is_full(node):
                continue
            with edit.before(node):
                edit.replace(node, self._unrolled(edit, node))
            done += 1
        return edit.done(found, done, (f"{self.queries} queries at a time",)) if done else program

    def _unrolled(self, edit: Editor, node: Node) -> Node:
        inner = node.target is OPS.attention.default  # [B,R,H,D] there, [B,H,R,D] here
        q, k, v = (edit.call(aten.transpose.int, x, 1, 2) if inner else x for x in node.args[:3])
        width = int(q.meta["val"].shape[-1])  # type: ignore[union-attr]
        scale = node.args[4] if inner else node.kwargs.get("scale")
        keys = edit.call(aten.transpose.int, edit.call(aten.mul.Tensor, k, width**-0.5 if scale is None else scale), -2, -1)
        rows, axis = int(q.meta["val"].shape[-2]), q.meta["val"].dim() - 2  # type: ignore[union-attr]
        parts = []
        for start in range(0, rows, self.queries):
            few = edit.call(aten.slice.Tensor, q, axis, start, min(start + self.queries, rows)) if rows > self.queries else q
            scores = edit.call(aten.matmul.default, few, keys)
            parts.append(edit.call(aten.matmul.default, edit.call(aten.softmax.int, scores, -1), v))
        mixed = parts[0] if len(parts) == 1 else edit.call(aten.cat.default, parts, axis)
        return edit.call(aten.transpose.int, mixed, 1, 2) if inner else mixed


def _is_full(node: Node) -> bool:
    q, k = (n.meta["val"].shape for n in node.args[:2])  # type: ignore[union-attr]
    if not isinstance(q[-2 if node.target is not OPS.attention.default else 1], int):
        return False  # a text of any length
    if node.target is OPS.attention.default:
        bias, _, causal, window, softcap = node.args[3:8]
        return bias is None and not causal and not window and not softcap and q[2] == k[2]
    mask, dropout, causal, *rest = (*node.args[3:], *(None, 0.0, False)[len(node.args) - 3 :])
    grouped: Any = node.kwargs.get("enable_gqa", False)
    return mask is None and not dropout and not causal and not rest and not grouped and "attn_mask" not in node.kwargs
