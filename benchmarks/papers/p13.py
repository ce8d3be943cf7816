"""Paper 13, QuantMCU: the five working conditions of its card, on EfficientNet-Lite0 at 224 with a 3x3 grid up to the third stride."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from planc.backends.onnx.lower import lower
from planc.compiler.classify import rewrite
from planc.compiler.image_models import load_classifier
from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.passbase import Context
from planc.compiler.plan import Plan
from planc.compiler.program import Program
from planc.passes.quantize_patches import QuantizePatches, find_parts, part_bit_operations, part_bytes
from planc_paper_checks.common import data

PLAN = ROOT / "examples/papers/13-quantmcu.yaml"
TRADES = (0.3, 0.4, 0.5, 0.6)  # values of lambda
DRAWS = 200  # of random classes


@dataclass(frozen=True)
class Outputs:
    """What a program makes of the images: logits [S,N] float, and the map that the grid cuts, codes [S,C,Y,X]."""

    logits: np.ndarray
    cut: np.ndarray


class Model:
    """The classifier on codes, whole and in parts, with the images."""

    def __init__(self, folder: Path) -> None:
        file = data("imagenet_samples/labels.json")
        assert file is not None, "the images beside the project are needed: set PLANC_DATA"
        labels = json.loads(file.read_text(encoding="utf-8"))
        loaded = load_classifier("efficientnet-lite0")
        assert loaded is not None
        self.folder, self.truth = folder, np.array(list(labels.values()))
        self.pixels = np.stack([loaded.image.pixels(file.parent / name) for name in labels])
        self.calibration = torch.from_numpy(self.pixels[::8])
        plan = Plan.from_yaml(PLAN)
        self.plan = next(p for p in plan.passes if isinstance(p, QuantizePatches))
        self.float, self.whole, self.parts = (
            rewrite(loaded, plan, calibration=self.calibration, disable=off, check=False).program
            for off in (
                ("quantize_static", "patchwise", "quantize_patches", "quantize_weights"),
                ("patchwise", "quantize_patches", "quantize_weights"),
                ("quantize_patches", "quantize_weights"),
            )
        )

    def mixed(self, **options: Any) -> Program:
        """The parts with other options than the plan's."""
        return self.plan.model_copy(update=options).apply(self.parts, Context(self.calibration))

    def run(self, program: Program) -> Outputs:
        edit = program.edit("check")
        joined = [n for n in program.main.nodes if n.meta.get("pass") == "patchwise" and n.meta.get("part") is None]
        if joined:
            edit.outputs(cut=edit[joined[-1]])
        path = lower(edit.done(1, 1), self.folder, ops="standard", positions=1)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(path, options)
        rows = [session.run(None, {"images": self.pixels[i : i + 5]}) for i in range(0, len(self.pixels), 5)]
        both = [np.concatenate(values) for values in zip(*rows, strict=True)]
        return Outputs(both[0], both[1] if joined else np.zeros(0))


@paper(13)
def quantmcu() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    with tempfile.TemporaryDirectory() as folder:
        model = Model(Path(folder))
        wide = model.run(model.parts)
        exact = np.array_equal(wide.logits, model.run(model.whole).logits)
        yield Item(1, "parts of 8 bits equal the int8 model bit for bit", exact, {"images": len(model.pixels)})
        yield _trade(model, wide)
        yield _classes(model, wide)
    yield _search(model)
    yield _ends(model)


def _trade(model: Model, wide: Outputs) -> Item:
    best = model.run(model.float).logits.argmax(1)
    agrees = {"8 bits": float((wide.logits.argmax(1) == best).mean())}
    figures, passed = {"images": len(best), "top1 float": float((best == model.truth).mean())}, False
    for trade in TRADES:
        program = model.mixed(entropy=trade)
        ratio, logits = part_bit_operations(model.parts) / part_bit_operations(program), model.run(program).logits
        agrees[f"lambda {trade}"] = float((logits.argmax(1) == best).mean())
        figures[f"lambda {trade}"] = {"fewer bit operations": round(ratio, 2), "top1": float((logits.argmax(1) == model.truth).mean())}
        passed = passed or (ratio >= 1.8 and agrees["8 bits"] - agrees[f"lambda {trade}"] <= 0.02)
    return Item(2, "1.8 times fewer bit operations of the parts, agreement within 2 points", passed, {**figures, "agreement": agrees})


def _classes(model: Model, wide: Outputs) -> Item:
    """Errors of every part of every image where no part keeps 8 bits, then what remains where some do: by outliers, or drawn at random."""
    narrow = model.run(model.mixed(images=1.0)).cut
    square = (narrow.astype(np.float64) - wide.cut) ** 2
    rows = [slice(start, stop) for start, stop in _cuts(square.shape[2])]
    parts = [(r, c) for r in rows for c in [slice(a, b) for a, b in _cuts(square.shape[3])]]
    errors = np.stack([square[:, :, r, c].sum((1, 2, 3)) for r, c in parts], 1)  # [images, parts]
    far = np.abs(wide.cut - wide.cut.mean()) > model.plan.deviations * wide.cut.std()
    outliers = np.stack([far[:, :, r, c].mean((1, 2, 3)) for r, c in parts], 1) > model.plan.fraction
    fixed = np.broadcast_to(outliers.mean(0) > model.plan.images, outliers.shape)
    random = np.random.default_rng(0)
    figures: dict[str, Any] = {"outliers by part": outliers.mean(0).round(2).tolist()}
    ratios = {}
    for name, chosen in (("classes by place", fixed), ("classes by image", outliers)):
        left = float((errors * ~chosen).sum())
        drawn = [float((errors * ~_shuffled(chosen, name, random)).sum()) for _ in range(DRAWS)]
        ratios[name] = round(float(np.mean(drawn)) / left, 3) if left else float("inf")
        figures[name] = {"kept": round(float(chosen.sum(1).mean()), 2), "random over outliers": ratios[name]}
    return Item(3, "parts that keep 8 bits at random leave 1.3 times the error", ratios["classes by place"] >= 1.3, figures)


def _shuffled(chosen: np.ndarray, name: str, random: np.random.Generator) -> np.ndarray:
    """As many parts, drawn at random: for all images alike, or for each."""
    if name == "classes by place":
        return chosen[:, random.permutation(chosen.shape[1])]
    return random.permuted(chosen, axis=1)


def _cuts(size: int) -> list[tuple[int, int]]:
    return [(size * i // 3, size * (i + 1) // 3) for i in range(3)]


def _search(model: Model) -> Item:
    """Budgets from what 8 bits need down to what the fewest do; bytes counted again in the graph."""
    widest, narrowest = part_bytes(model.parts), part_bytes(model.mixed(entropy=0.0, images=1.0))
    figures: dict[str, Any] = {"bytes at 8 bits": widest, "bytes at the fewest": narrowest}
    passed = narrowest < widest
    for share in (0.9, 0.75, 0.6):
        budget = int(narrowest + share * (widest - narrowest))
        begin = perf_counter()
        found = part_bytes(model.mixed(images=1.0, budget=budget))
        figures[f"budget {budget}"] = {"bytes": found, "seconds": round(perf_counter() - begin, 1)}
        passed = passed and found <= budget and perf_counter() - begin < 60
    return Item(4, "the search takes under 60 s and keeps the budget", passed, figures)


def _ends(model: Model) -> Item:
    widths = {trade: _widths(model.mixed(entropy=trade, images=1.0)) for trade in (0.0, 1.0)}
    passed = widths[1.0] == {255} and widths[0.0] == {3}
    return Item(5, "lambda 1 keeps 8 bits, lambda 0 takes the fewest", passed, {str(k): sorted(v) for k, v in widths.items()})


def _widths(program: Program) -> set[int]:
    """The largest codes of all maps but those that parts share."""
    return {int(m.makers[0].args[-1]) for part in find_parts(program) for m in part.maps if not m.shared}
