"""Statistics of values inside a program, streamed over calibration text by the reference backend."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planc.compiler.program import Program


def mean_squares(program: Program, nodes: Iterable[Node], ids: Tensor, progress: Any = None) -> dict[Node, Tensor]:
    """Mean of x**2 per channel [K] of each node [.., K], over token ids [S, L]; float64 sums, so the order of text does not matter."""
    wanted = set(nodes)
    totals: dict[Node, Tensor] = {}
    for row in progress(ids, "calibrating") if progress else ids:
        for node, value in _watch(program, wanted, row[None]):
            square = value.double().reshape(-1, value.shape[-1]).pow(2).mean(0)
            totals[node] = totals[node] + square if node in totals else square
    return {node: total / len(ids) for node, total in totals.items()}


def row_peaks(program: Program, nodes: Iterable[Node], ids: Tensor, progress: Any = None) -> dict[Node, Tensor]:
    """Largest |x| of every row of each node [.., K], over token ids [S, L]: [S*L] float32 in the order of the text."""
    wanted = set(nodes)
    parts: dict[Node, list[Tensor]] = {node: [] for node in wanted}
    for row in progress(ids, "calibrating") if progress else ids:
        for node, value in _watch(program, wanted, row[None]):
            parts[node].append(value.float().abs().amax(-1).reshape(-1))
    return {node: torch.cat(peaks) for node, peaks in parts.items()}


def _watch(program: Program, wanted: set[Node], ids: Tensor) -> Iterable[tuple[Node, Tensor]]:
    """Run the traced form (no cache) and yield the wanted values as they appear; stops after the last of them."""
    values: dict[Any, Any] = {}
    pending = {node: len(node.users) for node in program.main.nodes}
    left = len(wanted)
    inputs = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None]}
    with torch.no_grad():
        for node in program.main.nodes:
            if node.op == "placeholder":
                values[node] = inputs[str(node.target)]
            elif node.op == "get_attr":
                values[node] = program.params[str(node.target)]
            elif node.op == "call_function":
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
                for source in node.all_input_nodes:
                    pending[source] -= 1
                    if not pending[source]:
                        del values[source]
                if node in wanted:
                    yield node, values[node]
                    left -= 1
                    if not left:
                        return
