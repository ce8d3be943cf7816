"""A small task that needs no files: reading drawn digits, and networks that learn it in seconds."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from planc.runtime.vision import ImageSpec

SIDE, BATCH = 16, 64
SPEC = ImageSpec(size=(SIDE, SIDE))


def digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images [count, 3, SIDE, SIDE] of turned, shifted, noisy digits, and what they show."""
    random = np.random.default_rng(seed)
    labels, images = random.integers(0, 10, count), np.empty((count, SIDE, SIDE), np.float32)
    font = ImageFont.load_default(13)
    for i, label in enumerate(labels):
        page = Image.new("L", (SIDE, SIDE))
        ImageDraw.Draw(page).text((4 + random.integers(-2, 3), random.integers(-2, 2)), str(label), fill=255, font=font)
        turned = page.rotate(float(random.uniform(-12, 12)), Image.Resampling.BILINEAR)
        images[i] = np.asarray(turned, np.float32) / 255 * random.uniform(0.7, 1) + random.normal(0, 0.1, (SIDE, SIDE))
    return torch.from_numpy(images)[:, None].repeat(1, 3, 1, 1), torch.from_numpy(labels)


def network(widths: tuple[int, ...]) -> nn.Module:
    """Convolutions of stride two with norms, a pool and a dense layer."""
    layers: list[nn.Module] = []
    for before, width in zip((3, *widths), widths, strict=False):
        layers += [nn.Conv2d(before, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def trained(widths: tuple[int, ...], x: Tensor, y: Tensor, steps: int, seed: int) -> nn.Module:
    """A network after so many steps of Adam on the labels, in eval mode."""
    torch.manual_seed(seed)
    made = network(widths)
    optimiser = torch.optim.Adam(made.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,))
        optimiser.zero_grad()
        nn.functional.cross_entropy(made(x[rows]), y[rows]).backward()
        optimiser.step()
        schedule.step()
    return made.eval()
