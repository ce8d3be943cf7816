"""Train the tiny next-scale image models of `scales-large/` and `scales-small/` on scikit-learn's handwritten digits.

    python examples/masked/train_scales.py --minutes 8 --out examples/masked

An image is coded as the residuals of its averages over 1, 2 x 2, 4 x 4 and 8 x 8 cells, each value by one of 16 numbers of its scale (k-means).
The models are BERTs of transformers whose attention is causal by scale: the slots of a scale read the picture so far at their size, as one of 64
levels, and say the codes of the residual.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from planc.runtime.masked.scales import levels_of, pooled, spread

SIZES, SIDE, CODES, LEVELS = (1, 2, 4, 8), 8, 16, 64
SLOTS = sum(s * s for s in SIZES)
CLASS = CODES + LEVELS  # ids: codes, levels, ten classes, no class, mask
NONE, MASK = CLASS + 10, CLASS + 11
TRAINED = 1500
MODELS = {"scales-large": (96, 4), "scales-small": (48, 2)}


def images() -> tuple[np.ndarray, np.ndarray]:
    """[N, 8, 8] in -1 .. 1, and classes [N]; training images first."""
    data = load_digits()
    return data.images.astype(np.float32) / 8 - 1, data.target


def fit_codebooks(pictures: np.ndarray) -> np.ndarray:
    """[scales, 16] numbers, rising."""
    rest, books = pictures.copy(), []
    for size in SIZES:
        values = pooled(rest, size)
        found = KMeans(CODES, n_init=2, random_state=0).fit(values.reshape(-1, 1)[:60000])
        books.append(np.sort(found.cluster_centers_[:, 0]).astype(np.float32))
        rest = rest - spread(books[-1][_nearest(values, books[-1])], SIDE)
    return np.stack(books)


def _nearest(values: np.ndarray, book: np.ndarray) -> np.ndarray:
    return np.abs(values[..., None] - book).argmin(-1)


def encode(pictures: np.ndarray, books: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [N, 85], what the slots read [N, 85] (ids of levels), and the pictures that the codes give [N, 8, 8]."""
    made, codes, read = np.zeros_like(pictures), [], []
    for book, size in zip(books, SIZES, strict=True):
        read.append(CODES + levels_of(pooled(made, size), LEVELS).reshape(len(pictures), -1))
        found = _nearest(pooled(pictures - made, size), book)
        codes.append(found.reshape(len(pictures), -1))
        made = made + spread(book[found], SIDE)
    return np.concatenate(codes, 1), np.concatenate(read, 1), made


def build(width: int, layers: int) -> BertForMaskedLM:
    """A transformer with learned positions, which say scale and place."""
    config = BertConfig(
        vocab_size=MASK + 1,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * width,
        max_position_embeddings=1 + SLOTS,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        mask_token_id=MASK,
    )
    return BertForMaskedLM(config)


def visible() -> Tensor:
    """[1, 1, 86, 86] who sees whom: scales up to one's own, and the class."""
    segments = torch.tensor([0, *(1 + i for i, s in enumerate(SIZES) for _ in range(s * s))])
    return (segments[None] <= segments[:, None])[None, None]


def train(name: str, minutes: float, args: argparse.Namespace, books: np.ndarray) -> None:
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    module, (pictures, classes) = build(*MODELS[name]), images()
    average = {key: value.detach().clone() for key, value in module.named_parameters()}
    optimiser = torch.optim.AdamW(module.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    begin, step, losses, seen = time.time(), 0, [], visible()
    while (spent := (time.time() - begin) / 60) < minutes:
        for group in optimiser.param_groups:
            group["lr"] = min((step + 1) / 100, 1) * (2e-5 + (args.lr - 2e-5) * 0.5 * (1 + math.cos(math.pi * spent / minutes)))
        picked = rng.integers(TRAINED, size=args.batch)
        moved = np.stack([np.roll(np.pad(pictures[i], 1, constant_values=-1), rng.integers(-1, 2, 2), (0, 1))[1:-1, 1:-1] for i in picked])
        codes, read, _ = encode(moved.astype(np.float32), books)
        label = np.where(rng.random(args.batch) < 0.1, NONE, CLASS + classes[picked])
        logits = module(
            input_ids=torch.from_numpy(np.column_stack([label, read])), attention_mask=seen.expand(args.batch, -1, -1, -1)
        ).logits
        loss = nn.functional.cross_entropy(logits[:, 1:].transpose(1, 2), torch.from_numpy(codes))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        keep = min(0.995, (step + 1) / (step + 10))
        with torch.no_grad():
            for key, value in module.named_parameters():
                average[key].lerp_(value, 1 - keep)
        losses.append(float(loss.detach()))
        step += 1
        if step % 50 == 0:
            print(f"{name} {step} {spent:.1f} min loss {np.mean(losses[-50:]):.4f}", flush=True)
    module.load_state_dict(average, strict=False)
    module.half().save_pretrained(args.out / name)
    print(f"{name} {step} steps", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="for the large model; the small one has half of it")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pictures, _ = images()
    books = fit_codebooks(pictures[:TRAINED])
    error = float(((encode(pictures[TRAINED:], books)[2] - pictures[TRAINED:]) ** 2).mean())
    print(f"coding error of images that were not seen: {10 * math.log10(4 / error):.1f} dB", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    save_file({"codebooks": books}, args.out / "scales.safetensors")
    for name, share in (("scales-large", 1.0), ("scales-small", 0.5)):
        train(name, share * args.minutes, args, books)


if __name__ == "__main__":
    main()
