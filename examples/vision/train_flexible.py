"""Train small vision transformers on handwritten digits: one for each patch size, and one for all of them.

    python examples/vision/train_flexible.py --steps 2400 --out examples/vision

The images are scikit-learn's digits of 8 x 8 pixels, put anywhere on a canvas of 16 x 16, turned a little and noisy. The models of one size see as
many images each; the one for all sizes sees as many at each size, and twice as many at the smallest, and resamples its patch embedding and positions
for every batch.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor

from planc.compiler.vit import Config, ViT

SIDE, SIZES, BASE, BATCH, TRAIN = 16, (8, 4, 2), 4, 32, 1297
COPIES = 4  # of every test image, each at another place


def config(patch: int) -> Config:
    """The shape of all models; they differ in their patches."""
    return Config(image=SIDE, patch=patch, width=48, depth=3, heads=4, classes=10, channels=1, ratio=3.0, class_token="none")


def moved(images: Tensor, random: torch.Generator) -> Tensor:
    """Images [N,1,8,8] as [N,1,SIDE,SIDE], each about half as wide as the canvas, turned a little and put anywhere on it, with noise."""
    count = len(images)
    turn, scale, place = (torch.rand(count, n, generator=random) * 2 - 1 for n in (1, 1, 2))
    angle, size = 0.15 * turn[:, 0], 0.5 * (1 + 0.1 * scale[:, 0])
    rows = torch.stack((torch.stack((angle.cos(), -angle.sin()), 1), torch.stack((angle.sin(), angle.cos()), 1)), 1) / size[:, None, None]
    grid = F.affine_grid(torch.cat((rows, 0.9 * place[:, :, None]), 2), [count, 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False) + 0.05 * torch.randn(count, 1, SIDE, SIDE, generator=random)


def digits(train: bool) -> tuple[Tensor, Tensor]:
    """Images [N,1,8,8] in 0 .. 1 and classes, of one half of the data; which is which never changes."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    rows = order[:TRAIN] if train else order[TRAIN:]
    return torch.tensor(found.images, dtype=torch.float32)[rows, None] / 16, torch.tensor(found.target)[rows]


def test_set() -> tuple[Tensor, Tensor]:
    """What all models are measured on: COPIES of every image that none was trained on."""
    images, classes = digits(train=False)
    return moved(images.repeat(COPIES, 1, 1, 1), torch.Generator().manual_seed(1)), classes.repeat(COPIES)


def accuracy(model: ViT, patch: int) -> float:
    """Share of the test set that a model reads right at a patch size."""
    images, classes = test_set()
    with torch.no_grad():
        return float((model(images, patch).argmax(1) == classes).float().mean())


def train(patches: tuple[int, ...], base: int, steps: int) -> ViT:
    """A model that has seen `steps` batches at each of these patch sizes."""
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(2)
    images, classes = digits(train=True)
    model = ViT(config(base))
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps * len(patches), pct_start=0.1)
    for step in range(steps * len(patches)):
        rows = torch.randint(len(images), (BATCH,), generator=random)
        optimiser.zero_grad()
        F.cross_entropy(model(moved(images[rows], random), patches[step % len(patches)]), classes[rows]).backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def main() -> None:
    """Train, measure, and write the weights and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=["patch8", "patch4", "patch2", "flexible"], help="train this one alone")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "figures.json"
    figures = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name, patches, base in (*((f"patch{p}", (p,), p) for p in SIZES), ("flexible", (*SIZES, SIZES[-1]), BASE)):
        if options.only not in (None, name):
            continue
        begin = time.perf_counter()
        model = train(patches, base, options.steps)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, options.out / f"{name}.safetensors")
        shares = {f"patch {p}": round(accuracy(model, p), 4) for p in sorted(set(patches), reverse=True)}
        figures[name] = shares | {"steps": options.steps, "seconds": round(time.perf_counter() - begin)}
        print(name, figures[name], flush=True)
        file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
