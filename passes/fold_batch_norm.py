"""Fold batch normalisation, and constant scales of channels, into the convolution or the dense layer beside them.

Matches   batch_norm(conv2d(x, w, b), gain, shift, mean, variance)    Produces  conv2d(x, w * s, (b - mean) * s + shift),
          conv2d(x, w, b) * s, s one constant per output channel                s = gain / sqrt(variance + eps) per output channel
          conv2d(batch_norm(x, ...), w, b) without padding                      conv2d(x, w * s per input channel, b + w (shift - mean * s))
Keeps     outputs up to rounding
Refuses   nothing: a norm or a scale beside anything else, or behind a product that others read, or one of batch statistics, stays
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from planc.compiler.dialect import OPS
from planc.compiler.passbase import EXACT, Context, Effect, Pass, Stage
from planc.compiler.program import Editor, Program

aten = torch.ops.aten
_PRODUCTS = (OPS.conv2d.default, aten.linear.default)


class FoldBatchNorm(Pass):
    """Fold batch normalisation and scales of channels into the products beside them."""

    stage: ClassVar[Stage] = Stage.STRUCTURE
    conflicts: ClassVar[tuple[str, ...]] = ("fold_batch_norm",)

    @property
    def effect(self) -> Effect:
        """Rounding of the folded weights only."""
        return EXACT

    def apply(self, program: Program, context: Context) -> Program:
        """Scale weights and biases, and let the readers of each norm read its product."""
        edit, found, folded = program.edit(self.key), 0, 0
        for node in list(edit.graph.nodes):
            affine = _norm(edit, node) or _scale(edit, node)
            if affine is None:
                continue
            found += 1
            if _foldable(product := node.args[0]):
                _fold_back(edit, node, product, *affine)
            elif readers := _readers(node):
                for reader in readers:
                    _fold_forward(edit, node, reader, *affine)
            else:
                continue
            folded += 1
        return edit.done(found, folded) if folded else program


def _parameters(edit: Editor, product: Node) -> tuple[str, Tensor, Tensor | None]:
    """Name of the weight, weight, and bias, float64."""
    weight: Any = product.args[1]
    bias: Any = product.args[2] if len(product.args) > 2 else None
    return str(weight.target), edit.params[str(weight.target)].double(), None if bias is None else edit.params[str(bias.target)].double()


def _folded(edit: Editor, product: Node, x: Any, name: str, weight: Tensor, bias: Tensor) -> Node:
    dtype = product.meta["val"].dtype
    parameters = edit.param(f"{name}.folded", weight.to(dtype)), edit.param(f"{name}.shift", bias.to(dtype))
    return edit.call(product.target, x, *parameters, *product.args[3:])  # type: ignore[arg-type]


def _fold_back(edit: Editor, node: Node, product: Any, scale: Tensor, shift: Tensor) -> None:
    """What stands behind a product, into it."""
    name, weight, bias = _parameters(edit, product)
    with edit.before(node):
        scaled = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
        new = _folded(edit, product, product.args[0], name, scaled, shift if bias is None else bias * scale + shift)
    edit.replace(node, new)


def _fold_forward(edit: Editor, node: Node, reader: Node, scale: Tensor, shift: Tensor) -> None:
    """What stands in front of a product of one group, into it."""
    name, weight, bias = _parameters(edit, reader)
    with edit.before(reader):
        inner = (weight * shift.reshape(1, -1, *[1] * (weight.dim() - 2))).flatten(1).sum(1)
        scaled = weight * scale.reshape(1, -1, *[1] * (weight.dim() - 2))
        new = _folded(edit, reader, node.args[0], name, scaled, inner if bias is None else bias + inner)
    edit.replace(reader, new)


def _is_ours(product: Any) -> bool:
    """Is it a product with parameters?"""
    if not isinstance(product, Node) or product.target not in _PRODUCTS:
        return False
    parameters = [a for a in product.args[1:3] if a is not None]
    return all(isinstance(a, Node) and a.op == "get_attr" for a in parameters)


def _foldable(product: Any) -> bool:
    """Is it a product of parameters that nobody but the norm reads?"""
    return _is_ours(product) and len(product.users) == 1


def _readers(node: Node) -> list[Node]:
    """The products that read a norm, where nobody else does and none sees zeros beside its values or takes channels in groups."""
    readers = list(node.users)

    def fits(reader: Node) -> bool:
        if not _is_ours(reader) or reader.args[0] is not node:
            return False
        return reader.target is aten.linear.default or (reader.args[4] == [0, 0, 0, 0] and reader.args[6] == 1)

    return readers if readers and all(map(fits, readers)) else []


def _norm(edit: Editor, node: Node) -> tuple[Tensor, Tensor] | None:
    """Scale and shift per channel, float64, of a norm that uses stored statistics; None for any other node."""
    if node.target is not aten.batch_norm.default:
        return None
    like = {2: aten.linear.default, 4: OPS.conv2d.default}.get(node.meta["val"].dim())  # the product whose channels lie where the norm's do
    if any(n.target in _PRODUCTS and n.target is not like for n in (node.args[0], *node.users)):  # type: ignore[union-attr]
        return None
    *tensors, training, _, eps = node.args[1:8]
    if training:
        return None
    gain, bias, mean, variance = (None if t is None else edit.params[str(t.target)].double() for t in tensors)  # type: ignore[union-attr]
    assert mean is not None and variance is not None
    scale = torch.rsqrt(variance + eps) * (1.0 if gain is None else gain)  # type: ignore[operator]
    return scale, (0.0 if bias is None else bias) - mean * scale


def _scale(edit: Editor, node: Node) -> tuple[Tensor, Tensor] | None:
    """The same for a product that is multiplied with a constant per channel; None for any other node."""
    if node.target is not aten.mul.Tensor or not _foldable(product := node.args[0]):
        return None
    factor: Any = node.args[1]
    if not isinstance(factor, Node) or factor.op != "get_attr":
        return None
    shape, channels = tuple(factor.meta["val"].shape), int(product.args[1].meta["val"].shape[0])  # type: ignore[union-attr]
    behind = (1, 1) if product.target is OPS.conv2d.default else ()  # type: ignore[union-attr]
    if shape[-1 - len(behind) :] != (channels, *behind) or any(size != 1 for size in shape[: -1 - len(behind)]):
        return None
    scale = edit.params[str(factor.target)].double().reshape(-1)
    return scale, torch.zeros_like(scale)
