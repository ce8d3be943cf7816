"""Fold batch normalisation into the convolution or the dense layer in front of it.

Matches   batch_norm(conv2d(x, w, b), gain, shift, mean, variance)    Produces  conv2d(x, w * s, (b - mean) * s + shift),
Keeps     outputs up to rounding                                                s = gain / sqrt(variance + eps) per output channel
Refuses   nothing: a norm behind anything else, or behind a product that others read, or one of batch statistics, stays
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
    """Fold batch normalisation into the products in front of it."""

    stage: ClassVar[Stage] = Stage.STRUCTURE
    conflicts: ClassVar[tuple[str, ...]] = ("fold_batch_norm",)

    @property
    def effect(self) -> Effect:
        """Rounding of the folded weights only."""
        return EXACT

    def apply(self, program: Program, context: Context) -> Program:
        """Scale weights and biases, and let the readers of each norm read its product."""
        edit, norms, folded = program.edit(self.key), 0, 0
        for node in list(edit.graph.nodes):
            if (norm := _norm(edit, node)) is None:
                continue
            norms += 1
            product: Any = node.args[0]
            if not _foldable(product):
                continue
            scale, shift = norm
            old = edit.params[str(product.args[1].target)]
            bias = edit.params[str(product.args[2].target)] if len(product.args) > 2 and product.args[2] is not None else None
            weight = old.double() * scale.reshape(-1, *[1] * (old.dim() - 1))
            offset = shift if bias is None else bias.double() * scale + shift
            with edit.before(node):
                name = str(product.args[1].target)
                new = edit.call(
                    product.target,
                    product.args[0],
                    edit.param(f"{name}.folded", weight.to(old.dtype)),
                    edit.param(f"{name}.shift", offset.to(old.dtype)),
                    *product.args[3:],
                )
            edit.replace(node, new)
            folded += 1
        return edit.done(norms, folded) if folded else program


def _foldable(product: Any) -> bool:
    """Is it a product of parameters that nobody but the norm reads?"""
    if not isinstance(product, Node) or product.target not in _PRODUCTS or len(product.users) != 1:
        return False
    parameters = [a for a in product.args[1:3] if a is not None]
    return all(isinstance(a, Node) and a.op == "get_attr" for a in parameters)


def _norm(edit: Editor, node: Node) -> tuple[Tensor, Tensor] | None:
    """Scale and shift per channel, float64, of a norm that uses stored statistics; None for any other node."""
    if node.target is not aten.batch_norm.default:
        return None
    *tensors, training, _, eps = node.args[1:8]
    if training:
        return None
    gain, bias, mean, variance = (None if t is None else edit.params[str(t.target)].double() for t in tensors)  # type: ignore[union-attr]
    assert mean is not None and variance is not None
    scale = torch.rsqrt(variance + eps) * (1.0 if gain is None else gain)  # type: ignore[operator]
    return scale, (0.0 if bias is None else bias) - mean * scale
