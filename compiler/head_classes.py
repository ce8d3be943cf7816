"""Which key/value heads can do with the first and the last tokens alone (papers/34, section on head classes; ours: measured, not trained).

A head is judged by the attention that its queries give to keys which a streaming head would not see, on text whose second half repeats the
first: heads that find the earlier occurrence, which is what long contexts need, look back half the text.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from planc.backends.reference import execute
from planc.compiler.calibration import calibration_text
from planc.compiler.dialect import OPS
from planc.compiler.passbase import Context
from planc.compiler.program import Program
from planc.runtime.errors import CompileError
from planc.runtime.kv import Streaming

_HALF, _SINK, _LOCAL = 192, 8, 64  # tokens: of the text that is repeated; that count as first; that count as last
_TEXTS = 2


def streaming_heads(program: Program, streaming: Streaming, layers: list[int], context: Context) -> dict[int, tuple[int, ...]]:
    """The key/value heads of each of these layers that stream.

    Raises CompileError[skip-out-of-range] for a head that the model does not have.
    """
    nodes = [n for n in program.main.nodes if n.target is OPS.attention.default]
    counts = [int(node.args[1].meta["val"].shape[2]) for node in nodes]
    if streaming.heads is not None:
        for layer, heads in enumerate(streaming.heads):
            if layer >= len(counts) or any(not 0 <= head < counts[layer] for head in heads):
                message = f"layer {layer} has no heads {list(heads)} (the model has {len(counts)} layers)"
                raise CompileError("skip-out-of-range", message, where="pass kv_cache", fix="name heads from 0 for each layer")
        return {layer: tuple(sorted(set(streaming.heads[layer]))) for layer in layers if layer < len(streaming.heads)}
    assert streaming.share is not None
    if streaming.share == 1.0:
        return {layer: tuple(range(counts[layer])) for layer in layers}
    far = far_attention(program, calibration_text(context, "kv_cache"))
    order = sorted((float(far[layer][head]), layer, head) for layer in layers for head in range(counts[layer]))
    chosen = order[: round(streaming.share * len(order))]
    return {layer: tuple(sorted(head for _, at, head in chosen if at == layer)) for layer in layers}


def far_attention(program: Program, text: Tensor) -> list[Tensor]:
    """Per layer [G]: the largest share of attention, of any query head of a key/value head, that goes where streaming would not see."""
    nodes = [n for n in program.main.nodes if n.target is OPS.attention.default]
    half = min(_HALF, text.shape[1])
    totals = [torch.zeros(int(node.args[1].meta["val"].shape[2])) for node in nodes]
    for row in text[:_TEXTS]:
        ids = row[:half].repeat(2)[None]
        for index, q, k in _operands(program, nodes, ids):
            totals[index] += _far(q, k, float(nodes[index].args[4]), half) / len(text[:_TEXTS])  # type: ignore[arg-type]
    return totals


def _operands(program: Program, nodes: list[Node], ids: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """Queries and keys [R,H,D] of every attention on ids [1,R]."""
    wanted = {source: None for node in nodes for source in node.args[:2]}
    values: dict[object, Tensor] = {}
    inputs = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None]}
    for node, value in execute(program, inputs):
        if node in wanted:
            values[node] = value[0]
    return [(i, values[node.args[0]], values[node.args[1]]) for i, node in enumerate(nodes)]


def _far(q: Tensor, k: Tensor, scale: float, half: int) -> Tensor:
    """[G] of one text, over the queries of its second half."""
    rows, group = torch.arange(half, len(q)), q.shape[1] // k.shape[1]
    keys = torch.arange(len(k))
    scores = torch.einsum("rhd,thd->hrt", q[half:], k.repeat_interleave(group, 1)) * scale
    weights = scores.masked_fill(keys > rows[:, None], -torch.inf).softmax(-1)  # [H, R/2, R]
    hidden = (keys >= _SINK) & (keys <= rows[:, None] - min(_LOCAL, half // 2))
    return (weights * hidden).sum(-1).mean(1).reshape(k.shape[1], group).amax(1)
