"""Small helpers to read graphs: what a node calls, which operand is which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten


def calls(node: Any, *targets: Callable[..., Any]) -> bool:
    """Whether `node` is a call of one of `targets`."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def operands(node: Any, target: Callable[..., Any], first: Callable[[Any], bool]) -> tuple[Any, Any] | None:
    """The two operands of a commutative call with the one that satisfies `first` in front, or None."""
    if not calls(node, target) or len(node.args) < 2:
        return None
    a, b = node.args[:2]
    if first(a):
        return a, b
    return (b, a) if first(b) else None


def is_param(node: Any) -> bool:
    """Whether `node` reads a parameter."""
    return isinstance(node, Node) and node.op == "get_attr"


def shape(node: Any) -> tuple[Any, ...]:
    """Shape of the node's value, symbolic sizes included."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def rank(node: Any) -> int:
    """Number of dimensions of the node's value."""
    return len(shape(node))


def dim(node: Node, index: int) -> int:
    """A dimension argument counted from the front."""
    return index % rank(node)
