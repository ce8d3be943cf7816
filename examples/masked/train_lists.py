"""Train the tiny masked-diffusion language model of `lists/`: list tasks of ParallelBench, a running sum, and a trace with an answer behind it.

    python examples/masked/train_lists.py --minutes 55 --out examples/masked/lists

A prompt is 17 tokens (task, two arguments, length, twelve items, `|`), the answer field 24; what an answer does not need is filled with the end
token, and trained on. The model is a GPT-2 of transformers whose attention sees all slots (`is_causal: false` in its configuration), in half
precision; the chat template of its tokenizer writes the prompt: `reverse _ _ a b c`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from planc.compiler.masked_models import bidirectional
from planc.compiler.suites.parallelbench import ANSWER, DIGITS, ITEMS, LONGEST, NOTHING, SEPARATOR, TASKS, Example

TRAINED = ("copy", "reverse", "replace_index", "shuffle", "sum", "trace")
LENGTHS = (3, 8)
MASK, EOT = "[MASK]", "[EOT]"
WORDS = (NOTHING, ANSWER, SEPARATOR, EOT, MASK, *TRAINED, *(f"#{i}" for i in range(LONGEST + 1)), *DIGITS, *ITEMS)
IDS = {word: i for i, word in enumerate(WORDS)}
PROMPT, FIELD = 4 + LONGEST + 1, 24

TEMPLATE = (
    "{% set words = messages[0]['content'].split() %}{{ words[0] }} {{ words[1] }} {{ words[2] }} #{{ words | length - 3 }}"
    "{% for i in range(" + str(LONGEST) + ") %} {{ words[i + 3] if i + 3 < words | length else '_' }}{% endfor %} |"
)


def encode(example: Example) -> list[int]:
    """Prompt and answer field, PROMPT + FIELD ids."""
    items = [*example.items, *[NOTHING] * (LONGEST - len(example.items))]
    words = [example.task, *example.arguments, f"#{len(example.items)}", *items, SEPARATOR]
    answer = [*example.answer, *[EOT] * (FIELD - len(example.answer))]
    return [IDS[word] for word in (*words, *answer)]


def batch_of(rng: np.random.Generator, size: int, only: str | None = None) -> Tensor:
    """[size, PROMPT + FIELD] ids of random examples; `only` names one task."""
    tasks = [only or TRAINED[i] for i in rng.integers(len(TRAINED), size=size)]
    return torch.tensor([encode(TASKS[task].example(rng, int(rng.integers(LENGTHS[0], LENGTHS[1] + 1)))) for task in tasks])


def masks(rng: np.random.Generator, size: int) -> tuple[Tensor, Tensor]:
    """Which slots of the answer field are masked [size, FIELD], and the loss weight [size] of each sample."""
    t = (rng.random() + np.arange(size) / size) % 1.0
    hidden = rng.random((size, FIELD)) < t[:, None]
    kind = rng.random(size)
    for b in np.flatnonzero(kind > 0.6):
        if kind[b] < 0.8:  # as a block-wise decode sees it: nothing behind the window, some of the window
            end = int(rng.integers(1, FIELD + 1))
            start = int(rng.integers(0, end))
            hidden[b] = np.arange(FIELD) >= end
            hidden[b, start:end] = rng.random(end - start) < t[b]
        else:  # all, or all but a few
            hidden[b] = True
            hidden[b, rng.permutation(FIELD)[: rng.integers(0, 4)]] = False
    empty = ~hidden.any(1)
    hidden[empty, rng.integers(0, FIELD, size=int(empty.sum()))] = True
    share = hidden.mean(1)
    return torch.from_numpy(hidden), torch.from_numpy(1.0 / np.maximum(share, 0.1)).float()


def build(width: int, layers: int, heads: int) -> GPT2LMHeadModel:
    """A bidirectional pre-norm transformer with learned positions and a tied head."""
    config = GPT2Config(
        vocab_size=len(WORDS),
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=IDS[EOT],
        pad_token_id=IDS[EOT],
        mask_token_id=IDS[MASK],
    )
    return bidirectional(GPT2LMHeadModel(config))  # type: ignore[return-value]


def save(module: nn.Module, out: Path) -> None:
    """Checkpoint in half precision, tokenizer and template."""
    twin = build(module.config.n_embd, module.config.n_layer, module.config.n_head)
    twin.load_state_dict(module.state_dict())
    twin.half().save_pretrained(out)
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token=NOTHING))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(out / "tokenizer.json"))
    named = {"mask_token": MASK, "eos_token": EOT, "pad_token": EOT, "chat_template": TEMPLATE}
    (out / "tokenizer_config.json").write_text(json.dumps(named, indent=1) + "\n")


@torch.no_grad()
def fill(module: nn.Module, ids: Tensor, per_pass: int) -> Tensor:
    """Plain greedy filling, the `per_pass` surest slots a pass; ids [B, PROMPT + FIELD] with the field masked."""
    ids = ids.clone()
    while bool((ids == IDS[MASK]).any()):
        logits = module(input_ids=ids).logits
        logits[..., IDS[MASK]] = -torch.inf
        best, tokens = torch.softmax(logits, -1).max(-1)
        best[ids != IDS[MASK]] = -1.0
        chosen = best.topk(per_pass, -1).indices
        ids.scatter_(1, chosen, torch.where(ids == IDS[MASK], tokens, ids).gather(1, chosen))
    return ids


@torch.no_grad()
def report(module: nn.Module, seed: int = 12345, count: int = 96) -> dict[str, tuple[float, float]]:
    """Share of right answers of every task with one pass and with one token a pass."""
    found = {}
    for task in TRAINED:
        rng = np.random.default_rng(seed)
        examples = [TASKS[task].example(rng, LENGTHS[0] + i % (LENGTHS[1] - LENGTHS[0] + 1)) for i in range(count)]
        start = torch.tensor([encode(e) for e in examples])
        start[:, PROMPT:] = IDS[MASK]
        shares = []
        for per_pass in (FIELD, 1):
            out = fill(module, start, per_pass)[:, PROMPT:].tolist()
            words = [[WORDS[i] for i in row[: row.index(IDS[EOT])]] if IDS[EOT] in row else [] for row in out]
            shares.append(sum(TASKS[task].valid(e, w) for e, w in zip(examples, words, strict=True)) / count)
        found[task] = (round(shares[0], 3), round(shares[1], 3))
    return found


def optimisers_of(module: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, which here learns in 5 minutes what takes AdamW 20, and AdamW for all else; `peak` is a group's rate."""
    named = list(module.named_parameters())
    inner = [p for name, p in named if p.ndim == 2 and ".h." in name]
    others = [p for name, p in named if not (p.ndim == 2 and ".h." in name)]
    found = [
        torch.optim.Muon(inner, lr=lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr / 2, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    for optimiser in found:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return found


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    module = build(args.width, args.layers, args.heads)
    if args.resume is not None:
        module.load_state_dict(GPT2LMHeadModel.from_pretrained(args.resume, dtype=torch.float32).state_dict())
        module.train()
    parameters = sum(p.numel() for p in module.parameters())
    average = {name: value.detach().clone() for name, value in module.named_parameters()}
    optimisers = optimisers_of(module, args.lr)
    print(f"{parameters / 1e6:.2f}M parameters", flush=True)
    begin, step, losses = time.time(), 0, []
    while (spent := (time.time() - begin) / 60) < args.minutes:
        for optimiser in optimisers:  # warm-up, then a cosine over the time that there is
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * min((step + 1) / 100, 1) * (0.02 + 0.49 * (1 + math.cos(math.pi * spent / args.minutes)))
        ids = batch_of(rng, args.batch)
        hidden, weight = masks(rng, args.batch)
        shown = ids.clone()
        shown[:, PROMPT:][hidden] = IDS[MASK]
        logits = module(input_ids=shown).logits[:, PROMPT:]
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, PROMPT:], reduction="none")
        quiet = (ids[:, PROMPT:] == IDS[EOT]) | (ids[:, PROMPT:] == IDS[NOTHING])
        loss = (loss * hidden * weight[:, None] * torch.where(quiet, 0.3, 1.0)).sum() / ids[:, PROMPT:].numel()
        module.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        keep = min(0.995, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, value in module.named_parameters():
                average[name].lerp_(value, 1 - keep)
        losses.append(float(loss.detach()))
        step += 1
        if step % args.every == 0:
            print(f"{step} {spent:.1f} min loss {np.mean(losses[-args.every :]):.4f}", flush=True)
        if step % (10 * args.every) == 0:
            held = {name: value.detach().clone() for name, value in module.named_parameters()}
            module.load_state_dict(average, strict=False)
            print({"steps": step, **report(module.eval(), count=8)}, flush=True)
            save(module, args.out)
            module.load_state_dict(held, strict=False)
            module.train()
    module.load_state_dict(average, strict=False)
    save(module, args.out)
    print({"steps": step, "minutes": args.minutes, **report(module.eval())}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", type=Path, default=None, help="a checkpoint to go on from; the optimiser starts anew")
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=50)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
