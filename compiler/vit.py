"""A vision transformer from a configuration, with parameters named as in timm, and the class token in front, behind, or averaged away.

Its forward takes a patch size: training at several of them with one set of weights gives a model that `patch_size` moves between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planc.compiler.patch_embedding import resample_patches, resample_positions


@dataclass(frozen=True)
class Config:
    """Shape of a transformer."""

    image: int
    patch: int  # of the weights
    width: int
    depth: int
    heads: int
    classes: int
    channels: int = 3
    ratio: float = 4.0  # hidden channels of an MLP for each of the width
    class_token: Literal["first", "last", "none"] = "first"  # none: logits of the mean token

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along rows and columns."""
        return self.image // self.patch, self.image // self.patch


class Attention(nn.Module):
    """Full attention with joined projections."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv, self.proj = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        joined = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(joined[0], joined[1], joined[2])
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Two dense layers."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = int(config.width * config.ratio)
        self.fc1, self.fc2 = nn.Linear(config.width, hidden), nn.Linear(hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Norm, attention, norm, MLP, with residuals."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(config.width, 1e-6), Attention(config)
        self.norm2, self.mlp = nn.LayerNorm(config.width, 1e-6), Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class PatchEmbed(nn.Module):
    """Images to tokens, row by row."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.channels, config.width, config.patch, config.patch)

    def forward(self, x: Tensor, patch: int) -> Tensor:
        weight = resample_patches(self.proj.weight, (patch, patch))
        return F.conv2d(x, weight, self.proj.bias, patch).flatten(2).transpose(1, 2)


def waves(config: Config) -> Tensor:
    """Positions [places, width] to begin with: sines and cosines of row and column, as in Beyer et al. 2022 (better plain ViT baselines)."""
    quarter = -(-config.width // 4)
    frequencies = 100.0 ** (-torch.arange(quarter) / quarter)
    rows, columns = (torch.arange(size)[:, None] * frequencies for size in config.grid)
    down, across = (torch.cat((angle.sin(), angle.cos()), 1) for angle in (rows, columns))
    both = torch.cat((down[:, None].expand(-1, len(across), -1), across[None].expand(len(down), -1, -1)), 2)
    return 0.5 * both.flatten(0, 1)[:, : config.width]


class ViT(nn.Module):
    """Images [B,C,Y,X] -> logits [B,classes]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.extra = 0 if config.class_token == "none" else 1
        others = torch.zeros(self.extra, config.width)
        table = (others, waves(config)) if config.class_token == "first" else (waves(config), others)
        self.pos_embed = nn.Parameter(torch.cat(table)[None])
        self.cls_token = nn.Parameter(torch.zeros(1, self.extra, config.width))
        self.blocks = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.norm, self.head = nn.LayerNorm(config.width, 1e-6), nn.Linear(config.width, config.classes)

    def forward(self, x: Tensor, patch: int | None = None) -> Tensor:
        """With `patch`, as if the weights had been resampled to that size before."""
        config, patch = self.config, patch or self.config.patch
        grid = (config.image // patch, config.image // patch)
        tokens, token = self.patch_embed(x, patch), self.cls_token.expand(x.shape[0], -1, -1)
        if config.class_token != "none":
            tokens = torch.cat((token, tokens) if config.class_token == "first" else (tokens, token), 1)
        tokens = tokens + resample_positions(self.pos_embed, config.grid, grid, int(config.class_token == "first"))
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        if config.class_token == "none":
            return self.head(tokens.mean(1))  # type: ignore[no-any-return]
        return self.head(tokens[:, 0] if config.class_token == "first" else tokens[:, -1])  # type: ignore[no-any-return]
