"""How alike the channels of a value are by the weights that make them, without data (UDFC, Bai et al. 2023): the products of their filters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planc.compiler.program import describe
from planc.runtime.errors import CompileError

_PRODUCTS = ("linear", "conv1d", "conv2d")
#: Operations with one input that treat every channel alike, besides those that work element by element.
_BESIDE = ("dropout", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "upsample2d", "pad", "constant_pad_nd", "flatten", "mean")


def filters(x: Node, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Inner products [C, C] of the filters behind the channels of x, and their biases [C]; float64.

    A depthwise convolution behind a product makes one filter with it: inner products multiply, since the joint filter is the outer product of both.

    Raises CompileError[pass-refused] naming the node where the channels come from something else: a sum, a gate, a norm, the input.
    """
    node: Any = x
    chain: list[tuple[Tensor, Tensor]] = []  # depthwise filters [C, k] and biases on the way, last first
    while isinstance(node, Node):
        name = str(getattr(node.target, "_opname", "")).rstrip("_")
        if name in _PRODUCTS and node.args[1].op == "get_attr":  # type: ignore[union-attr]
            weight, bias = _parameters(node, params)
            if not (name != "linear" and weight.shape[1] == 1 < int(node.args[0].meta["val"].shape[1])):  # type: ignore[union-attr]
                return _joined(weight.flatten(1), bias, chain)
            chain.append((weight.flatten(1), bias))
        elif not (_beside(node, name) and len(_inputs(node)) == 1):
            break
        node = _inputs(node)[0] if name not in _PRODUCTS else node.args[0]
    where = describe(node) if isinstance(node, Node) else None
    message = f"the channels of {x.name} are not made by a convolution alone"
    raise CompileError("pass-refused", message, node=where, fix="leave these readers out by `modules`, or repair with `data: calibration`")


def _beside(node: Node, name: str) -> bool:
    return name in _BESIDE or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _inputs(node: Node) -> list[Node]:
    return [a for a in node.all_input_nodes if isinstance(v := a.meta.get("val"), Tensor) and v.dim() > 1]


def _parameters(node: Node, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    weight: Any = node.args[1]
    bias: Any = node.args[2] if len(node.args) > 2 else None
    value = params[str(weight.target)].double()
    return value, torch.zeros(len(value), dtype=torch.float64) if bias is None else params[str(bias.target)].double()


def _joined(filter_: Tensor, bias: Tensor, chain: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    gram = filter_ @ filter_.t()
    for own, more in reversed(chain):
        gram, bias = gram * (own @ own.t()), bias * own.sum(1) + more
    return gram, bias
