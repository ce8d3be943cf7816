"""Paper 58, gradual pruning: the five working conditions of its card, on small networks that learn to read drawn digits."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import planc
from planc.backends.onnx.images import OnnxImageEngine
from planc.backends.reference import probe
from planc.compiler.classify import traced
from planc.compiler.image_models import LoadedClassifier
from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.passbase import Context
from planc.compiler.plan import Plan
from planc.compiler.program import Program
from planc.passes.fold_batch_norm import FoldBatchNorm
from planc.passes.prune import Prune
from planc.runtime.artifact import read_artifact
from planc_paper_checks.drawn_digits import BATCH, SPEC, digits, trained

PLAN = ROOT / "examples/papers/58-gradual-pruning.yaml"
TRAIN, TEST, SEEDS, EPOCHS = 4000, 1000, 3, 6
WIDTHS = (16, 32, 32)


@paper(58)
def gradual() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    torch.manual_seed(0)
    (part,) = (p for p in Plan.from_yaml(PLAN).passes if isinstance(p, Prune))
    (x, y), (x_test, y_test) = digits(TRAIN, 1), digits(TEST, 2)
    assert part.tune is not None and part.sparsity is not None
    more = part.tune.every * len(part.schedule.shares(1.0)[:-1]) + part.tune.last
    runs: list[dict[str, Any]] = []
    for seed in range(SEEDS):
        dense = trained(WIDTHS, x, y, EPOCHS * TRAIN // BATCH, seed)
        program = FoldBatchNorm().apply(traced(LoadedClassifier(dense, "digits", SPEC)), Context())
        sparse, runs_of = part.apply(program, Context(x)), {"dense": _accuracy(program, x_test, y_test)}
        small = trained(_widths(_weights(program) * (1 - part.sparsity)), x, y, EPOCHS * TRAIN // BATCH + more, seed)
        runs_of |= {"sparse": _accuracy(sparse, x_test, y_test), "small": _accuracy_of(small, x_test, y_test)}
        ninety = part.model_copy(update={"sparsity": 0.9})
        at_once = Prune.model_validate(
            {"sparsity": 0.9, "tune": {**part.tune.model_dump(), "last": more}}  # the same score, and as many steps
        )
        runs_of["gradual_90"] = _accuracy(ninety.apply(program, Context(x)), x_test, y_test)
        runs_of["at_once_90"] = _accuracy(at_once.apply(program, Context(x)), x_test, y_test)
        runs.append({"module": dense, "program": program, "pruned": sparse, **runs_of})
        if not seed:
            yield _schedule(program, part)
            yield _exported(dense, sparse, part, x)
    accuracy = {k: round(mean(run[k] for run in runs), 4) for k in ("dense", "sparse", "small", "gradual_90", "at_once_90")}
    first = {k: accuracy[k] for k in ("dense", "sparse", "small")}
    passed = first["sparse"] >= first["dense"] - 0.02 and first["sparse"] >= first["small"] + 0.01
    what = "80 %: accuracy within 2 points of dense, and 1 point above a dense network of as many weights (3 seeds)"
    yield Item(3, what, passed, {**first, "weights": _weights(runs[0]["program"])})
    second = {k: accuracy[k] for k in ("gradual_90", "at_once_90")}
    yield Item(4, "90 %: gradual beats at once with as many steps", second["gradual_90"] > second["at_once_90"], second)
    yield _files(runs[0]["module"], x)


def _widths(weights: float) -> tuple[int, ...]:
    """The widest network of the same shape with at most so many weights in its convolutions."""
    scaled = [tuple(max(1, round(w * s / 100)) for w in WIDTHS) for s in range(100, 5, -1)]
    return next(w for w in scaled if sum(9 * a * b for a, b in zip((3, *w), w, strict=False)) <= weights)


def _accuracy(program: Program, x: Tensor, y: Tensor) -> float:
    return float((probe(program, x)["logits"].argmax(-1) == y).float().mean())


def _accuracy_of(module: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((module(x).argmax(-1) == y).float().mean())


def _prunable(program: Program) -> dict[str, Tensor]:
    """Weights that `prune` may take: of all products but the last."""
    return {n: v for n, v in program.params.items() if v.dim() == 4}


def _weights(program: Program) -> int:
    return sum(v.numel() for v in _prunable(program).values())


def _schedule(program: Program, part: Prune) -> Item:
    """Every step of the schedule, as one step of its own."""
    shares = part.schedule.shares(part.sparsity or 0.0)
    worst = 0.0
    for share in shares:
        pruned = Prune(sparsity=share).apply(program, Context())
        for value in _prunable(pruned).values():
            worst = max(worst, abs(float((value == 0).sum()) - share * value.numel()))
    level = (shares[-1] - shares[-2]) / (shares[1] - shares[0])
    figures = {"first": shares[0], "last": shares[-1], "last_step_over_first": round(level, 4), "weights_off": round(worst, 3)}
    passed = shares[0] == 0.0 and shares[-1] == part.sparsity and level < 0.01 and worst <= 1.0
    return Item(1, "from the first to the last share, level at the end, each met within one weight", passed, figures)


def _initializers(module: nn.Module, plan: Plan | dict[str, Any], x: Tensor, out: Path) -> dict[str, Any]:
    planc.compile(module, plan, image=SPEC, calibration=x, out=out)
    return {t.name: numpy_helper.to_array(t, str(out)) for t in onnx.load(out / "model.onnx", load_external_data=True).graph.initializer}


def _exported(module: nn.Module, sparse: Program, part: Prune, x: Tensor) -> Item:
    """Zeros of the file against the count that the last step left; training goes on after that step."""
    with tempfile.TemporaryDirectory() as folder:
        tensors = [t for t in _initializers(module, Plan.from_yaml(PLAN), x, Path(folder, "a")).values() if t.ndim == 4]
    zeros = sum(int((t == 0).sum()) for t in tensors)
    wanted = sum(round((part.sparsity or 0.0) * t.size) for t in tensors)
    in_program = sum(int((v == 0).sum()) for v in _prunable(sparse).values())
    figures = {"zeros": zeros, "wanted": wanted, "in_the_program": in_program}
    return Item(2, "masked weights are zero in the file, and no more come back after the end", zeros == in_program >= wanted, figures)


def _files(module: nn.Module, x: Tensor) -> Item:
    """Compressed weights, and time per pass, of the pruned network against the dense one."""
    with tempfile.TemporaryDirectory() as folder:
        sizes, engines = {}, {}
        for name, plan in (("dense", {}), ("sparse", Plan.from_yaml(PLAN))):
            out = Path(folder, name)
            tensors = [t for t in _initializers(module, plan, x, out).values() if t.ndim == 4]  # type: ignore[arg-type]
            raw = b"".join(t.tobytes() for t in tensors)
            sizes[name] = len(zlib.compress(raw, 9)) / len(raw)
            engines[name] = OnnxImageEngine(out, read_artifact(out))
        images, ratios = x[:64].numpy(), []
        for turn in range(60):
            spent = {}
            for name in ("dense", "sparse") if turn % 2 else ("sparse", "dense"):
                begin = perf_counter()
                for _ in range(10):
                    engines[name].forward(images)
                spent[name] = perf_counter() - begin
            ratios.append(spent["sparse"] / spent["dense"])
    figures = {"compressed": round(sizes["sparse"], 4), "dense_compressed": round(sizes["dense"], 4), "time": round(median(ratios), 4)}
    passed = sizes["sparse"] <= 0.2 * 1.25 and 0.97 <= figures["time"] <= 1.03
    return Item(5, "80 %: compressed to at most 0.25 of the weights' bytes; no faster and no slower", passed, figures)
