"""Repairs of convolutional networks: channels that stand in for others, by their filters alone or by images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import applied, close
from torch import Tensor, nn
from vision_tiny import images, program_of, randomised

from planc.backends.reference import execute, probe
from planc.compiler.passbase import Context
from planc.compiler.program import Program
from planc.passes.fold_batch_norm import FoldBatchNorm
from planc.passes.prune import Prune
from planc.passes.pruning.filters import filters
from planc.passes.pruning.repairs import _nonnegative
from planc.passes.realise import Realise
from planc.runtime.errors import CompileError

X = images(3, 8, 8)
FREE: dict[str, Any] = {"granularity": "channels", "modules": ("2", "4"), "sparsity": 0.25}


def network(depthwise: bool = False, norm: bool = False, seed: int = 0) -> nn.Sequential:
    """3 -> 8 channels -> 5, the first of them behind a depthwise convolution if wanted; a linear head."""
    first: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)] if norm else [nn.Conv2d(3, 8, 3, padding=1)]
    middle: list[nn.Module] = [nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1, groups=8)] if depthwise else []
    layers = [*first, *middle, nn.ReLU(), nn.Conv2d(8, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)]
    return randomised(nn.Sequential(*layers), seed)  # type: ignore[return-value]


def copied(module: nn.Sequential, factor: float) -> nn.Sequential:
    """Channels 6 and 7 become small copies of 0 and 1."""
    with torch.no_grad():
        first = module[0]
        first.weight[6:] = factor * first.weight[:2]
        first.bias[6:] = factor * first.bias[:2]
        for layer in module[1:]:
            if isinstance(layer, nn.Conv2d) and layer.groups == 8:
                layer.weight[6:], layer.bias[6:] = layer.weight[:2], layer.bias[:2] * factor
    return module


@pytest.mark.parametrize("nonneg", [False, True])
@pytest.mark.parametrize("depthwise", [False, True])
def test_a_copy_is_replaced_without_loss(depthwise: bool, nonneg: bool) -> None:
    module = copied(network(depthwise), 0.1)
    reader = "4" if depthwise else "2"
    program = program_of(module, 8, 8)
    repair = {"least_squares": {"data": "none", "ridge": 0.0, "nonneg": nonneg}}
    small = Realise().apply(applied(Prune(**{**FREE, "modules": (reader,)}, repair=repair), program, Context()), Context())
    close(probe(small, X)["logits"], module(X).detach(), 1e-5)
    assert {v.shape[0] for n, v in small.params.items() if n.startswith("0.weight")} == {6}
    bare = Prune(**{**FREE, "modules": (reader,)}).apply(program, Context())
    assert float((probe(bare, X)["logits"] - module(X).detach()).abs().max()) > 1e-3


def test_without_stand_ins_it_is_plain_pruning() -> None:
    """A ridge without bound makes every factor zero."""
    program = program_of(network(), 8, 8)
    repair = {"least_squares": {"data": "none", "ridge": 1e12}}
    one, two = (Prune(**{**FREE, "modules": ("2",)}, repair=r).apply(program, Context()) for r in ("nothing", repair))
    assert all(torch.allclose(one.params[n], v, atol=1e-9) for n, v in two.params.items())


def test_factors_by_their_definition() -> None:
    """Paper 78: s = (G^T G + a1 b_K b_K^T + a2 mean|g|^2)^-1 (G^T w_j + a1 b_j b_K), on weights with the norm folded in."""
    module = network(norm=True)
    program = FoldBatchNorm().apply(program_of(module, 8, 8), Context())
    a1, a2 = 0.3, 0.05
    pruned = Prune(**{**FREE, "modules": ("3",)}, repair={"least_squares": {"data": "none", "bias_weight": a1, "ridge": a2}}).apply(
        program, Context()
    )
    weight, bias = (program.params[f"0.weight.{part}"].double() for part in ("folded", "shift"))
    new, old = (p.params[next(n for n in p.params if n.startswith("3.weight"))].double() for p in (pruned, program))
    gone = (new == 0).movedim(1, 0).flatten(1).all(1)
    assert int(gone.sum()) == 2
    rows = weight.flatten(1)
    g, b = rows[~gone], bias[~gone]
    alike = g @ g.t() + a1 * torch.outer(b, b) + a2 * g.pow(2).sum(1).mean() * torch.eye(len(g), dtype=g.dtype)
    for j in torch.nonzero(gone)[:, 0]:
        old[:, ~gone] += torch.einsum("nhw,k->nkhw", old[:, j], torch.linalg.solve(alike, g @ rows[j] + a1 * bias[j] * b))
    close(new[:, ~gone], old[:, ~gone], 1e-6)


def test_images_beat_no_images() -> None:
    """On the inputs that the repair has seen, the reader's output is nearest with the regression on them."""
    module, x = network(seed=3), images(12, 8, 8, seed=5)
    program = program_of(module, 8, 8)

    def outputs(p: Program) -> Tensor:
        found = [v for n, v in execute(p, {"images": x}) if getattr(n.target, "_opname", "") == "conv2d"]
        return found[-1]  # type: ignore[no-any-return]

    def error(repair: Any) -> float:
        pruned = Prune(**{**FREE, "modules": ("2",), "sparsity": 0.4}, repair=repair).apply(program, Context(x))
        return float((outputs(pruned) - outputs(program)).pow(2).mean())

    errors = [error(r) for r in ("least_squares", "mean_bias", "nothing")]
    assert errors[0] < errors[1] < errors[2]
    assert errors[0] < error({"least_squares": {"data": "none"}})


class Gated(nn.Module):
    """A convolution that reads a product of two values, and one that reads a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(i, o, 1) for i, o in ((3, 4), (3, 4), (4, 4), (4, 2)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.a(x) * torch.sigmoid(self.b(x)))
        return self.d(y + self.a(x)).mean((2, 3))


@pytest.mark.parametrize("module", ["c", "d"])
def test_refuses_channels_of_several_sources(module: str) -> None:
    program = program_of(randomised(Gated()), 6, 6)
    product = next(n for n in program.main.nodes if n.args and str(getattr(n.args[1:2] and n.args[1], "target", "")) == f"{module}.weight")
    with pytest.raises(CompileError) as caught:
        filters(product.args[0], program.params)
    assert caught.value.code == "pass-refused" and "calibration" in (caught.value.fix or "")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 999))
def test_property_nonnegative_is_the_best_of_its_kind(kept: int, gone: int, seed: int) -> None:
    """Karush-Kuhn-Tucker: no factor is negative, the gradient nowhere points down, and it is zero where a factor is not."""
    random = np.random.default_rng(seed)
    rows = torch.from_numpy(random.normal(size=(kept, kept + 2)))
    among, between = rows @ rows.t() + 0.1 * torch.eye(kept, dtype=rows.dtype), torch.from_numpy(random.normal(size=(kept, gone)))
    by = _nonnegative(among, between)
    gradient = among @ by - between
    assert float(by.min()) >= 0 and float(gradient.min()) > -1e-6 * float(between.abs().max() + 1)
    assert float((by * gradient).abs().max()) < 1e-5 * float(between.abs().max() + 1) * float(by.max() + 1)
