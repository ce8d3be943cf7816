"""The pass fold_batch_norm."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import applied, before_and_after
from torch import Tensor, nn
from vision_tiny import images, program_of, randomised, tiny, tiny_program

from planc.backends.reference import probe
from planc.passes.fold_batch_norm import FoldBatchNorm


def norms(program: object) -> int:
    return sum(n.target is torch.ops.aten.batch_norm.default for n in program.main.nodes)  # type: ignore[attr-defined]


def test_golden(golden: Callable[[str, str], None]) -> None:
    module = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    golden(before_and_after(FoldBatchNorm(), program_of(module, 6, 5)), "fold_batch_norm.txt")


def test_equals_eager() -> None:
    x, new = images(3, 20, 18), applied(FoldBatchNorm(), tiny_program())
    assert (norms(tiny_program()), norms(new)) == (2, 0)
    assert torch.allclose(probe(new, x)["logits"], tiny()(x), rtol=1e-5, atol=1e-5)


class Kept(nn.Module):
    """A norm in front of a product, one behind a sum, and one behind a product that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norms = nn.Conv2d(3, 3, 3, padding=1), nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.norms[0](x))
        return self.norms[2](self.norms[1](y) + y).mean((2, 3))


def test_refuses() -> None:
    program = program_of(randomised(Kept()), 6, 5)
    assert FoldBatchNorm().apply(program, None) is program  # type: ignore[arg-type]


class Scaled(nn.Module):
    """A norm in front of two products, scales of channels behind products, and one of a single value, which is none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1, 2), nn.Conv2d(3, 4, 1, 2, bias=False)
        self.head, self.scale = nn.Linear(4, 5), nn.Parameter(torch.ones(4, 1, 1))
        self.head_scale, self.one = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = self.a(y) * self.scale + self.b(y)
        return self.head(y.mean((2, 3))) * self.head_scale * self.one


def test_norms_in_front_and_scales_behind() -> None:
    module, x = randomised(Scaled()), images(2, 6, 5)
    program = program_of(module, 6, 5)
    new = applied(FoldBatchNorm(), program)
    assert norms(new) == 0 and sum(n.target is torch.ops.aten.mul.Tensor for n in new.main.nodes) == 1
    assert torch.allclose(probe(new, x)["logits"], module(x), rtol=1e-5, atol=1e-5)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 3), st.booleans(), st.booleans(), st.integers(0, 99))
def test_property(groups: int, bias: bool, affine: bool, seed: int) -> None:
    conv = nn.Conv2d(3, 3 * groups, 3, 2, 1, bias=bias, groups=3)
    head = nn.Sequential(nn.Linear(3 * groups, 5, bias=bias), nn.BatchNorm1d(5, affine=affine))
    module = randomised(nn.Sequential(conv, nn.BatchNorm2d(3 * groups, affine=affine), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head), seed)
    x, new = images(2, 6, 5, seed), applied(FoldBatchNorm(), program_of(module, 6, 5))
    assert norms(new) == 0
    assert torch.allclose(probe(new, x)["logits"], module(x), rtol=1e-4, atol=1e-4)
