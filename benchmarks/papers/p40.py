"""Paper 40, DSnoT: the five working conditions of its card, on SmolLM2-135M."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import Node

from planc.backends.reference import run
from planc.compiler.calibration import Moments, collect
from planc.compiler.compile import raised, text_of
from planc.compiler.models import load_model
from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.passbase import Context
from planc.compiler.plan import Plan
from planc.compiler.program import Program
from planc.compiler.quality import perplexity, program_nll, read_windows
from planc.passes.prune import Prune
from planc.passes.pruning import Nothing

MODEL = "smollm2-135m"
PLAN = ROOT / "examples/papers/40-dsnot.yaml"
TEXT = Path(os.environ.get("PLANC_DATA", ROOT.parent / "shared/data"), "wikitext2/valid.txt")
SEQUENCES, LENGTH, SEEDS = 8, 256, 3  # calibration text of a seed
WINDOWS, WINDOW = 4, 512  # to measure on, from later in the text


@paper(40)
def dsnot() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    loaded = load_model(MODEL)
    program, encode = raised(loaded), text_of(loaded).encode
    parts = read_windows(TEXT, encode, tokens=SEEDS * SEQUENCES * LENGTH + 2 * WINDOWS * WINDOW, window=LENGTH)
    texts = [torch.tensor(parts[seed * SEQUENCES : (seed + 1) * SEQUENCES]) for seed in range(SEEDS)]
    later = [token for part in parts[-WINDOWS * WINDOW // LENGTH :] for token in part]
    windows = [later[start : start + WINDOW] for start in range(0, len(later), WINDOW)]
    (part,) = (p for p in Plan.from_yaml(PLAN).passes if isinstance(p, Prune))

    def both(text: Tensor, sparsity: float | None = part.sparsity) -> list[Program]:
        """Without and with exchanges."""
        options = ({"sparsity": sparsity, "repair": repair} for repair in (Nothing(), part.repair))
        return [part.model_copy(update=o).apply(program, Context(text)) for o in options]

    masked, swapped = both(texts[0])
    yield from _masks(program, masked, swapped, texts[0])
    kl = [_divergence(program, masked, windows[0]), _divergence(program, swapped, windows[0])]
    for text in texts[1:]:
        kl = [total + _divergence(program, p, windows[0]) for total, p in zip(kl, both(text), strict=True)]
    before, after = (round(perplexity(program_nll(p, windows), len(later) - len(windows)), 2) for p in both(texts[0], 0.7))
    figures = {
        "kl_before": round(kl[0] / SEEDS, 4),
        "kl_after": round(kl[1] / SEEDS, 4),
        "at_70_percent": before,
        "at_70_percent_swapped": after,
    }
    yield Item(
        4, "60 %: KL to dense falls (3 seeds); 70 %: perplexity at least 10 % lower", kl[1] < kl[0] and after <= 0.9 * before, figures
    )
    yield _means(program, masked, swapped, texts[0])


def _weights(program: Program) -> dict[str, tuple[Node, Tensor]]:
    """Node name -> node and weight of every product."""
    found = [n for n in program.main.nodes if n.target is torch.ops.aten.linear.default]
    return {n.name: (n, program.params[str(n.args[1].target)]) for n in found}


def _masks(dense: Program, masked: Program, swapped: Program, text: Tensor) -> Iterator[Item]:
    old, was, now = (_weights(p) for p in (dense, masked, swapped))
    seen = collect(dense, {n.args[0]: {Moments} for n, _ in old.values()}, text)  # type: ignore[misc]
    rows, values, moved, worse = True, True, 0, 0
    lost = [0.0, 0.0]
    for name, (node, weight) in old.items():
        a, b = was[name][1], now[name][1]
        rows &= torch.equal((a != 0).sum(1), (b != 0).sum(1))
        values &= torch.equal(b[b != 0], weight[b != 0])
        moved += int(((a == 0) & (b != 0)).sum())
        mean = seen[node.args[0], Moments].mean  # type: ignore[index]
        errors = [((weight - w).double() @ mean).abs() for w in (a, b)]
        worse += int((errors[1] > errors[0] + 1e-6).sum())
        lost = [total + float(e.sum()) for total, e in zip(lost, errors, strict=True)]
    yield Item(1, "as many weights in every row as before", rows and moved > 0, {"products": len(old), "exchanges": moved})
    figures = {"rows_worse": worse, "error_before": round(lost[0], 3), "error_after": round(lost[1], 3)}
    yield Item(2, "no row's error grows, and their sum falls", worse == 0 and lost[1] < lost[0], figures)
    yield Item(3, "kept weights are the dense ones bit for bit", values, {"weights": sum(w.numel() for _, w in old.values())})


def _logits(program: Program, ids: list[int]) -> Tensor:
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.arange(len(ids))[None]}
    return run(program, inputs)["logits"][0].log_softmax(-1)


def _divergence(dense: Program, other: Program, ids: list[int]) -> float:
    """Mean KL of the next token's distribution, in nats."""
    want, have = _logits(dense, ids), _logits(other, ids)
    return float((want.exp() * (want - have)).sum(-1).mean())


def _means(dense: Program, masked: Program, swapped: Program, text: Tensor) -> Item:
    """|mean over tokens of (dense - sparse) output|, for inputs of the dense model."""
    old, was, now = (_weights(p) for p in (dense, masked, swapped))
    seen = collect(dense, {n.args[0]: {Moments} for n, _ in old.values()}, text)  # type: ignore[misc]
    ratios = []
    for name, (node, weight) in old.items():
        mean = seen[node.args[0], Moments].mean  # type: ignore[index]
        before, after = (float(((weight - w[name][1]).double() @ mean).abs().mean()) for w in (was, now))
        if before:
            ratios.append(before / max(after, 1e-12))
    typical = sorted(ratios)[len(ratios) // 2]
    return Item(
        5, "the mean output error shrinks by more than 2", typical > 2, {"median": round(typical, 3), "least": round(min(ratios), 3)}
    )
