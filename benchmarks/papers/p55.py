"""Paper 55, LQ-LoRA: the five working conditions of its card, on SmolLM2-135M."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from planc.backends.onnx.artifact import signature
from planc.backends.onnx.engine import OnnxEngine
from planc.backends.onnx.lower import lower
from planc.backends.reference import probe
from planc.compiler.calibration import Moments, calibration_text, collect
from planc.compiler.codebooks import bits_of
from planc.compiler.compile import context_of, demanded, raised, text_ids, text_of
from planc.compiler.low_rank import decompose
from planc.compiler.models import load_model
from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.passbase import Context
from planc.compiler.pipeline import run_passes
from planc.compiler.plan import Plan
from planc.compiler.program import Program
from planc.compiler.quality import perplexity, program_nll, read_windows
from planc.compiler.training import sensitivities
from planc.compiler.weight_forms import store
from planc.passes.fuse_projections import FuseProjections
from planc.passes.quantize_weights import QuantizeWeights
from planc.passes.train_low_rank import TrainLowRank
from planc.runtime.artifact import Manifest
from planc.runtime.engine import Step

PLAN = ROOT / "examples/papers/55-lq-lora.yaml"
TEXT = Path(os.environ.get("PLANC_DATA", ROOT.parent / "shared/data"), "wikitext2/valid.txt")
TOKENS, POSITIONS, RANK = 2048, 1100, 16
SEQUENCES, LENGTH = 32, 256  # to train the factors on, a step each


@paper(55)
def lq_lora() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    loaded = load_model("smollm2-135m")
    plan = Plan.from_yaml(PLAN)
    (part,) = (p for p in plan.passes if isinstance(p, QuantizeWeights))
    own = context_of(plan, loaded, text_ids(loaded))
    plain = FuseProjections().apply(raised(loaded), own)
    products = {n: v for n, v in plain.params.items() if v.dim() == 2 and ".layers." in n}
    planned = part.apply(plain, own)
    yield _decomposition(products)
    yield _size(planned, products)
    yield _allocation(plain, planned, products, own)
    yield _perplexity(text_of(loaded).encode, plain, planned, part, own)
    yield _export(run_passes(planned, demanded(Plan(passes=())), own)[0])


def _decomposition(products: dict[str, torch.Tensor]) -> Item:
    """Every eighth matrix: a split takes a second or two."""
    falling, better, shares, some = 0, 0, list[float](), list(products.values())[::8]
    for weight in some:
        split = decompose(weight, RANK, lambda value: store(value, "nf3", 64))
        alone = float((weight - store(weight, "nf3", 64).weight).norm())
        kept = split.errors[: int(np.argmin(split.errors)) + 1]
        falling += all(b < a for a, b in zip(kept, kept[1:], strict=False))
        better += min(split.errors) < alone
        shares.append(min(split.errors) / alone)
    figures = {"matrices": len(some), "falling": falling, "better": better, "mean_share_of_error": round(float(np.mean(shares)), 4)}
    return Item(1, "the error falls until the end and is below that of the format alone", falling == better == len(some), figures)


def _parts(program: Program, name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in program.params.items() if key.startswith(f"{name}.")}


def _bits(parts: dict[str, torch.Tensor], names: tuple[str, ...]) -> int:
    return 8 * sum(parts[name].numel() * parts[name].element_size() for name in names if name in parts)


def _chosen(parts: dict[str, torch.Tensor], weight: torch.Tensor, options: list[tuple[int, int]]) -> tuple[int, int]:
    """Bits and block of a stored matrix, by the sizes of its parts."""
    bits = 8 * parts["codes"].shape[1] // weight.shape[1]
    stored = _bits(parts, ("codes", "tables", "scales", "coarse", "offset"))
    return next(o for o in options if o[0] == bits and bits_of(*weight.shape, *o) == stored)


_FORM = ("codes", "tables", "scales", "coarse", "offset")
_OPTIONS = [(bits, block) for bits in (2, 3, 4) for block in (16, 32, 64)]


def _size(planned: Program, products: dict[str, torch.Tensor]) -> Item:
    """Stored bits against a formula of its own: b + 8/B0 + 32/(256 B0) bits per weight, and 16 r (N + K) for the factors."""
    stored = formula = 0.0
    for name, weight in products.items():
        parts, (outputs, inputs) = _parts(planned, name), weight.shape
        bits, block = _chosen(parts, weight, _OPTIONS)
        stored += _bits(parts, (*_FORM, "left", "right"))
        formula += (bits + 8 / block + 32 / (256 * block)) * outputs * inputs + 16 * RANK * (outputs + inputs)
    weights = sum(weight.numel() for weight in products.values())
    figures = {"stored_bits": round(stored / weights, 4), "formula_bits": round(formula / weights, 4)}
    return Item(2, "stored bytes follow the formula within 1 %", abs(stored / formula - 1) <= 0.01, figures)


def _allocation(plain: Program, planned: Program, products: dict[str, torch.Tensor], own: Context) -> Item:
    """Errors of the formats alone, weighed by inputs and gradients as the integer programme counts them, against NF3 in blocks of 64 for all."""
    nodes = {str(n.args[1].target): n for n in plain.main.nodes if n.target is torch.ops.aten.linear.default}  # type: ignore[union-attr]
    text = calibration_text(own, "paper 55")
    seen = collect(plain, {nodes[name].args[0]: {Moments} for name in products}, text)  # type: ignore[misc]
    rows = sensitivities(plain, (nodes[name] for name in products), text)
    mixed = uniform = spent = uniform_bits = 0.0
    widths = dict.fromkeys((2, 3, 4), 0)
    for name, weight in products.items():
        bits, block = _chosen(_parts(planned, name), weight, _OPTIONS)
        widths[bits] += 1
        importance = seen[nodes[name].args[0], Moments].mean_square * rows[nodes[name]].pow(2)[:, None]  # type: ignore[index]
        mixed += float(((weight - store(weight, f"nf{bits}", block).weight).pow(2) * importance).sum())  # type: ignore[arg-type]
        uniform += float(((weight - store(weight, "nf3", 64).weight).pow(2) * importance).sum())
        spent += bits_of(*weight.shape, bits, block)
        uniform_bits += bits_of(*weight.shape, 3, 64)
    weights = sum(weight.numel() for weight in products.values())
    figures = {
        "bits": round(spent / weights, 4), "error": round(mixed, 2), "nf3_bits": round(uniform_bits / weights, 4),
        "nf3_error": round(uniform, 2), "widths": widths,
    }  # fmt: skip
    holds = mixed <= uniform and spent <= 3.0 * weights and sum(count > 0 for count in widths.values()) >= 2
    return Item(3, "the mix at 3 bits has no more error than NF3, in two widths or more, within its budget", holds, figures)


def _perplexity(encode: Callable[[str], Sequence[int]], plain: Program, planned: Program, part: QuantizeWeights, own: Context) -> Item:
    """On the first tokens of the text; the factors are trained on what lies behind them."""
    parts = read_windows(TEXT, encode, tokens=TOKENS + SEQUENCES * LENGTH, window=LENGTH)
    held_out = [[token for piece in parts[i : i + 4] for token in piece] for i in range(0, TOKENS // LENGTH, 4)]
    text = torch.tensor(parts[TOKENS // LENGTH :])
    trained = TrainLowRank(steps=SEQUENCES).apply(planned, Context(text))
    nf3 = part.model_copy(update={"budget": None, "low_rank": 0, "weigh": False})
    nf4 = part.model_copy(update={"budget": None, "format": "nf4", "rounding": "gptq", "scales": "search"})
    programs = {"float": plain, "lq3": planned, "lq3_trained": trained, "nf3": nf3.apply(plain, own), "nf4_r16": nf4.apply(plain, own)}
    count, found = sum(len(window) - 1 for window in held_out), dict[str, float]()
    for name, program in programs.items():
        found[name] = round(perplexity(program_nll(program, held_out), count), 3)
        print(f"  {name}: {found[name]}", flush=True)
    holds = found["lq3_trained"] < found["lq3"] < found["nf3"] and found["nf4_r16"] <= 1.05 * found["float"]
    figures: dict[str, Any] = {**found, "training": trained.history[-1].notes[0]}
    return Item(
        4, "perplexity: LQ at 3 bits < NF3, trained factors lower still, NF4 with rank 16, rounded by GPTQ, within 5 %", holds, figures
    )


def _export(planned: Program) -> Item:
    ids = torch.arange(5, 29)[None]
    wanted = probe(planned, ids)["logits"].numpy()
    with tempfile.TemporaryDirectory() as home:
        lower(planned, Path(home), ops="standard", positions=POSITIONS)
        engine = OnnxEngine(Path(home), Manifest(planc="0", signature=signature(planned, POSITIONS), extra={"batches": True}))
        logits = engine.forward(engine.new_cache(1, 64), Step(ids.numpy()), logits=True).logits
        assert logits is not None
        difference = float(np.abs(logits - wanted).max() / np.abs(wanted).max())
    return Item(5, "the exported graph equals the reference within 1e-4", difference <= 1e-4, {"largest_relative": difference})
