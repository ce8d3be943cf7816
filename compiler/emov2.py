"""EMOv2, a family of small image classifiers: one block of a single residual, whose expansion becomes window attention in the later stages.

The published sizes stand in `CONFIGS`; any other is a `Config`. There are no weights to be had by name: `EMOv2(CONFIGS["5M"])` is untrained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn, ones

Layout = Literal["near", "far"]
KERNEL = 5  # of the depthwise convolutions in blocks
EPS = 1e-6


@dataclass(frozen=True)
class Config:
    """One size of the family: four stages."""

    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int]
    ratios: tuple[float, float, float, float]  # channels inside a block for each of those outside
    heads: tuple[int, int, int, int]  # width of an attention head
    window: int = 7

    def block(self, stage: int, index: int) -> tuple[int, int, int]:
        """Channels in, inside and out of a block. A stage's first block changes the width, and is twice as wide inside."""
        first = index == 0
        before = self.widths[stage - 1] if stage else self.widths[0] // 2
        inputs = before if first else self.widths[stage]
        return inputs, int(inputs * self.ratios[stage] * (2 if first else 1)), self.widths[stage]


CONFIGS = {
    "1M": Config((2, 2, 8, 3), (32, 48, 80, 180), (2, 2.5, 3, 3.5), (16, 16, 20, 20)),
    "2M": Config((3, 3, 9, 3), (32, 48, 120, 200), (2, 2.5, 3, 3.5), (16, 16, 20, 20)),
    "5M": Config((3, 3, 9, 3), (48, 72, 160, 288), (2, 3, 4, 4), (16, 24, 32, 32)),
    "20M": Config((3, 3, 13, 3), (64, 128, 320, 448), (2, 3, 4, 4), (16, 24, 32, 32)),
}


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of every place of a map [B,C,Y,X]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _windows(x: Tensor, heads: int, window: int, layout: Layout) -> Tensor:
    """[B, heads * D, Y, X] -> [B, windows, heads, window^2, D]: neighbours (near), or places that lie a whole window count apart (far)."""
    batch, channels, rows, columns = x.shape
    down, across = rows // window, columns // window
    if layout == "near":
        cut = x.reshape(batch, heads, channels // heads, down, window, across, window).permute(0, 3, 5, 1, 4, 6, 2)
    else:
        cut = x.reshape(batch, heads, channels // heads, window, down, window, across).permute(0, 4, 6, 1, 3, 5, 2)
    return cut.reshape(batch, down * across, heads, window * window, channels // heads)


def _map(x: Tensor, rows: int, columns: int, window: int, layout: Layout) -> Tensor:
    """The inverse of `_windows`."""
    batch, _, heads, _, width = x.shape
    down, across = rows // window, columns // window
    cut = x.reshape(batch, down, across, heads, window, window, width)
    order = (0, 3, 6, 1, 4, 2, 5) if layout == "near" else (0, 3, 6, 4, 1, 5, 2)
    return cut.permute(*order).reshape(batch, heads * width, rows, columns)


def window_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, window: int, layout: Layout) -> Tensor:
    """Attention inside every window of maps q, k [B, heads * D, Y, X] and v [B, heads * E, Y, X], sides multiples of `window` -> as v."""
    q_cut, k_cut, v_cut = (_windows(x, heads, window, layout) for x in (q, k, v))
    return _map(F.scaled_dot_product_attention(q_cut, k_cut, v_cut), v.shape[2], v.shape[3], window, layout)


class WindowExpansion(nn.Module):
    """Expand channels by attention over near and over far windows, which share queries, keys and values.

    Zeros fill the map up to whole windows, at the right and below, and take part like any other place.
    """

    def __init__(self, inputs: int, outputs: int, head: int, window: int) -> None:
        super().__init__()
        self.qk, self.v = nn.Conv2d(inputs, 2 * inputs, 1), nn.Conv2d(inputs, outputs, 1)
        self.heads, self.window = inputs // head, window

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[2:]
        x = F.pad(x, (0, -columns % self.window, 0, -rows % self.window))
        q, k = self.qk(x).chunk(2, 1)
        v = F.gelu(self.v(x))
        near, far = (window_attention(q, k, v, self.heads, self.window, layout) for layout in ("near", "far"))  # type: ignore[arg-type]
        return (near + far)[:, :, :rows, :columns]


class Block(nn.Module):
    """Norm, expand (1x1 convolution, or attention), depthwise convolution, project; added to its input unless it halves the map."""

    def __init__(self, inputs: int, middle: int, outputs: int, late: bool, first: bool, head: int, window: int) -> None:
        super().__init__()
        self.norm: nn.Module = ChannelNorm(inputs, EPS) if late else nn.BatchNorm2d(inputs, EPS)
        if late and not first:
            self.expand: nn.Module = WindowExpansion(inputs, middle, head, window)
        else:
            self.expand = nn.Sequential(nn.Conv2d(inputs, middle, 1), nn.GELU() if late else nn.SiLU())
        stride = 2 if first else 1
        self.depthwise = nn.Conv2d(middle, middle, KERNEL, stride, KERNEL // 2, groups=middle, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(middle, EPS)
        self.project = nn.Conv2d(middle, outputs, 1, bias=False)
        self.scale = nn.Parameter(1e-6 * ones(outputs, 1, 1))
        self.adds = not first

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(self.norm(x))
        local = F.silu(self.depthwise_norm(self.depthwise(y)))
        y = self.project(y + local if self.adds else local) * self.scale
        return x + y if self.adds else y  # type: ignore[no-any-return]


class EMOv2(nn.Module):
    """Images [B,3,Y,X] -> logits [B,classes]; any size."""

    def __init__(self, config: Config, classes: int = 1000) -> None:
        super().__init__()
        width = config.widths[0] // 2
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width, EPS),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, 1, 1, groups=width, bias=False),
            nn.BatchNorm2d(width, EPS),
            nn.SiLU(),
            nn.Conv2d(width, width, 1, bias=False),
        )
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(*config.block(i, j), i > 1, j == 0, config.heads[i], config.window) for j in range(config.depths[i])))
            for i in range(4)
        )
        self.norm, self.head = ChannelNorm(config.widths[3], EPS), nn.Linear(config.widths[3], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.norm(x).mean((2, 3)))  # type: ignore[no-any-return]
