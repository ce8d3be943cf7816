"""Gradients through a program: the reference backend's operations, kept for torch to differentiate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planc.compiler.dialect import LINEARS, OPS, REFERENCES
from planc.compiler.program import Program


def differentiable(program: Program) -> dict[Node, Callable[..., Tensor]]:
    """What computes each node so that gradients reach the factors: quantised products as products with the matrix that they stand for."""
    functions = {}
    for node in program.main.nodes:
        if node.target in LINEARS[1:]:
            stored = [program.params[str(a.target)] if isinstance(a, Node) else a for a in node.args[1:]]
            stored = (
                stored[:3] if node.target is OPS.linear_int8.default else stored
            )  # a fixed step of activations would cut unit vectors off
            width = int(node.args[0].meta["val"].shape[-1])
            bias = node.target(torch.zeros(1, width), *stored)[0]
            weight = (node.target(torch.eye(width), *stored) - bias).t().contiguous()  # it is affine: the unit vectors say which matrix
            functions[node] = lambda x, *_, weight=weight, bias=bias: torch.nn.functional.linear(x, weight, bias)
        elif node.op == "call_function":
            functions[node] = REFERENCES.get(node.target, node.target)
    return functions


def next_token_loss(
    program: Program,
    functions: Mapping[Node, Callable[..., Any]],
    ids: Tensor,
    params: Mapping[str, Tensor],
    probes: Mapping[Node, Tensor] | None = None,
) -> Tensor:
    """Mean loss in nats of ids [B,L] but the first of each row, with gradients to `params`, which stand in for the program's own by name, and to
    `probes`, which are added to the values of nodes."""
    inputs, probes = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None].expand(len(ids), -1)}, probes or {}
    values: dict[Any, Any] = {}
    for node in program.main.nodes:
        if node.op == "placeholder":
            values[node] = inputs[str(node.target)]
        elif node.op == "get_attr":
            values[node] = params.get(str(node.target), program.params[str(node.target)])
        elif node.op == "call_function":
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = functions[node](*args, **kwargs)
            if node in probes:
                values[node] = values[node] + probes[node]
    logits = values[program.outputs["logits"]]
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def sensitivities(program: Program, nodes: Iterable[Node], text: Tensor) -> dict[Node, Tensor]:
    """Root mean square [N] of the gradient of a text's loss in each channel of each node's output, over the tokens of text [S,L].

    With the mean squares of a product's inputs it gives the diagonal of the Fisher matrix of the weights, where inputs and gradients are
    taken as independent.
    """
    nodes, functions = tuple(nodes), differentiable(program)
    squares = {node: torch.zeros(int(node.meta["val"].shape[-1])) for node in nodes}
    for ids in text:
        probes = {node: torch.zeros(1, len(ids), len(squares[node]), requires_grad=True) for node in nodes}
        with torch.enable_grad():
            (next_token_loss(program, functions, ids[None], {}, probes) * (len(ids) - 1)).backward()
        for node, probe in probes.items():
            assert probe.grad is not None
            squares[node] += probe.grad[0].pow(2).sum(0)
    return {node: (total / text.numel()).sqrt() for node, total in squares.items()}
