"""A product whose weights are pruned, with what calibration saw of its input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torch.fx import Node

from planc.compiler.calibration import Gram32, Statistic, Statistics
from planc.compiler.program import describe
from planc.runtime.errors import CompileError

S = TypeVar("S", bound=Statistic)


@dataclass(frozen=True)
class Layer:
    """`weight` [N, K, ..] sums over K channels of the input `x`; `node` computes it. `params`: of the program, by name."""

    node: Node
    weight: Tensor
    seen: Statistics
    params: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def x(self) -> Node:
        """The input [.., K] (or [B, K, ..] of a convolution)."""
        x = self.node.args[0]
        assert isinstance(x, Node)
        return x

    def statistic(self, kind: type[S]) -> S:
        """What calibration saw of the input."""
        return self.seen[self.x, kind]

    def along_inputs(self, channels: Tensor) -> Tensor:
        """A value per input channel [K], shaped so that it multiplies the weight."""
        return channels.to(self.weight.dtype).reshape(1, -1, *[1] * (self.weight.dim() - 2))

    def hessian(self, damp: float) -> Tensor:
        """`channel_products` of a dense layer, whose weights multiply one channel each."""
        if self.weight.dim() != 2:
            message, fix = (
                "this needs the products of all pairs of inputs, which a convolution does not have",
                "use another score or repair",
            )
            raise CompileError("pass-refused", message, node=describe(self.node), fix=fix)
        return self.channel_products(damp)

    def channel_products(self, damp: float) -> Tensor:
        """E[x x^T] over rows or pixels plus `damp` times its mean diagonal, [K, K] float64; a channel that is always zero gets a one."""
        gram = self.statistic(Gram32)
        h = gram.matrix.double() / gram.count
        diagonal = h.diagonal()
        diagonal[diagonal == 0] = 1.0
        diagonal += damp * diagonal.mean()
        return h

    def inverse_factor(self, damp: float) -> Tensor:
        """Upper Cholesky factor U of the inverse of the Hessian, H^-1 = U^T U, [K, K] float64."""
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.hessian(damp)))
        return torch.linalg.cholesky(inverse, upper=True)
