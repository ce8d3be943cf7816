"""Tiny seeded image models: a CNN with every operation that patches know, a vision transformer, and random CNN graphs for properties."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from planc.compiler.classify import traced
from planc.compiler.image_models import LoadedClassifier
from planc.compiler.program import Program
from planc.runtime.vision import ImageSpec


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and statistic random, so that leaving one out shows."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_buffers():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=random) + (0.5 if "var" in name else 0.0))
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3 + (0.1 if parameter.dim() == 1 else 0.0))
    return module.eval()


class Tiny(nn.Module):
    """Convolutions of several strides and paddings, writes in place, a residual, pools, upsampling and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, 2, padding=0, bias=False), nn.BatchNorm2d(6)
        self.depth, self.bn2 = nn.Conv2d(6, 6, 5, padding="same", groups=6), nn.BatchNorm2d(6)
        self.wide, self.head = nn.Conv2d(6, 8, 3, dilation=2, padding=2), nn.Linear(14, 7)
        self.act = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.stem(F.pad(x, (0, 1, 0, 1)))))
        x = F.hardswish(self.bn2(self.depth(x))) + x
        y = F.interpolate(F.max_pool2d(self.wide(x), 3, 2, 1), scale_factor=2.0, mode="nearest")
        x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return self.head(F.adaptive_avg_pool2d(torch.cat([x, F.silu(y)[:, :, : x.shape[2], : x.shape[3]]], 1), 1).flatten(1))


@cache
def tiny() -> nn.Module:
    return randomised(Tiny())


@cache
def tiny_program() -> Program:
    """The tiny CNN's program in the dialect, images 3x20x18."""
    return program_of(tiny(), 20, 18)


def program_of(module: nn.Module, rows: int, columns: int) -> Program:
    return traced(LoadedClassifier(module, type(module).__name__, ImageSpec(size=(rows, columns))))


@cache
def vit() -> nn.Module:
    """A vision transformer of transformers."""
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8, num_labels=5
    )
    return randomised(transformers.ViTForImageClassification(config))


def images(count: int, rows: int, columns: int, seed: int = 0, dtype: Any = torch.float32) -> Tensor:
    return torch.randn(count, 3, rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
