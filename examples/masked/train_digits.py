"""Train the tiny masked image model of `digits/`: scikit-learn's handwritten digits, 8 x 8, in eight levels of grey.

    python examples/masked/train_digits.py --minutes 8 --out examples/masked/digits

A BERT of transformers: a slot for the class and 64 for pixels. The vocabulary is eight levels, the mask, ten classes and none.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

LEVELS, SIDE = 8, 8
MASK, CLASS, NONE = LEVELS, LEVELS + 1, LEVELS + 11  # ids: levels, mask, ten classes, no class
TRAINED = 1500  # of 1797 images; the rest is for tests


def images(part: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """Levels [N, 8, 8] and classes [N]."""
    data = load_digits()
    levels = np.round(data.images / 16 * (LEVELS - 1)).astype(np.int64)
    where = slice(0, TRAINED) if part == "train" else slice(TRAINED, None)
    return levels[where], data.target[where]


def batch_of(rng: np.random.Generator, levels: np.ndarray, classes: np.ndarray, size: int) -> Tensor:
    """[size, 65]: class (sometimes none) and pixels, shifted by at most one."""
    rows = []
    for i in rng.integers(len(levels), size=size):
        down, right = rng.integers(-1, 2, size=2)
        padded = np.pad(levels[i], 1)[1 + down : 1 + down + SIDE, 1 + right : 1 + right + SIDE]
        rows.append([NONE if rng.random() < 0.1 else CLASS + int(classes[i]), *padded.reshape(-1)])
    return torch.tensor(rows)


def build(width: int, layers: int) -> BertForMaskedLM:
    """A bidirectional transformer with learned positions."""
    config = BertConfig(
        vocab_size=NONE + 1,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * width,
        max_position_embeddings=1 + SIDE * SIDE,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        mask_token_id=MASK,
    )
    return BertForMaskedLM(config)


def save(module: nn.Module, out: Path) -> None:
    """In half precision."""
    twin = build(module.config.hidden_size, module.config.num_hidden_layers)
    twin.load_state_dict(module.state_dict())
    twin.half().save_pretrained(out)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    module = build(args.width, args.layers)
    average = {name: value.detach().clone() for name, value in module.named_parameters()}
    optimiser = torch.optim.AdamW(module.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    levels, classes = images()
    begin, step, losses = time.time(), 0, []
    while (spent := (time.time() - begin) / 60) < args.minutes:
        for group in optimiser.param_groups:
            group["lr"] = min((step + 1) / 100, 1) * (2e-5 + (args.lr - 2e-5) * 0.5 * (1 + math.cos(math.pi * spent / args.minutes)))
        ids = batch_of(rng, levels, classes, args.batch)
        share = torch.from_numpy(np.cos(np.pi / 2 * ((rng.random() + np.arange(args.batch) / args.batch) % 1.0))).float()
        hidden = torch.rand(args.batch, SIDE * SIDE) < share[:, None]
        shown = ids.clone()
        shown[:, 1:][hidden] = MASK
        logits = module(input_ids=shown).logits[:, 1:]
        loss = nn.functional.cross_entropy(logits[hidden], ids[:, 1:][hidden])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        keep = min(0.995, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, value in module.named_parameters():
                average[name].lerp_(value, 1 - keep)
        losses.append(float(loss.detach()))
        step += 1
        if step % 50 == 0:
            print(f"{step} {spent:.1f} min loss {np.mean(losses[-50:]):.4f}", flush=True)
    module.load_state_dict(average, strict=False)
    save(module, args.out)
    print(f"{step} steps", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
