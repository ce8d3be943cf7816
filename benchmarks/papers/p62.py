"""Paper 62, ARMOR: the five working conditions of its card, on SmolLM2-135M."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import torch

from planc.backends.reference import execute
from planc.compiler.calibration import batch_of
from planc.compiler.compile import raised
from planc.compiler.dialect import OPS
from planc.compiler.factors import Factors
from planc.compiler.models import load_model
from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.passbase import Context
from planc.compiler.plan import Plan
from planc.compiler.program import Program
from planc.passes.armor import Armor
from planc.passes.prune import Prune
from planc_paper_checks.common import MODEL, divergence, logits_of, wikitext

PLAN = ROOT / "examples/papers/62-armor.yaml"
SEQUENCES, LENGTH = 16, 256  # to calibrate on


@paper(62)
def armor() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    loaded = load_model(MODEL)
    program = raised(loaded)
    text, windows = wikitext(loaded, SEQUENCES, LENGTH, windows=2)
    context = Context(text)
    (part,) = (p for p in Plan.from_yaml(PLAN).passes if isinstance(p, Armor))

    start = part.model_copy(update={"steps": 0}).apply(program, context)
    masked = {name: program.params[name] * (factors.core != 0) for name, factors in _factors(start).items()}
    plain = program.replace(params={**program.params, **masked})
    want, have = (logits_of(p, windows[0][:64]) for p in (plain, start))
    difference = float((have - want).abs().max() / want.abs().max())
    yield Item(1, "without a search: the plain 2:4 layers (1e-4)", difference < 1e-4, {"largest_relative": float(f"{difference:.3g}")})

    wrapped = part.apply(program, context)
    notes = [note.rpartition("error ")[2].split(" -> ") for note in wrapped.history[-1].notes[1:]]
    losses = [(float(first), float(last)) for first, last in notes]
    lower = [1 - last / first for first, last in losses]
    figures = {"layers": len(losses), "least": round(min(lower), 4), "median": round(median(lower), 4)}
    yield Item(2, "the loss of no layer rises", min(lower) >= 0, figures)
    found = _factors(wrapped)
    most = max(int((f.core.reshape(len(f.core), -1, 4) != 0).sum(-1).max()) for f in found.values())
    yield Item(3, "at most two of four", most <= 2, {"most": most})
    yield _folded(wrapped, found, windows[0][:64])

    wanda = Prune(score="wanda", granularity="2:4", modules=part.modules).apply(program, context)
    kl = {"wanda": divergence(program, wanda, windows), "armor": divergence(program, wrapped, windows)}
    yield Item(5, "KL to the dense model at least 15 % below that of Wanda 2:4", kl["armor"] <= 0.85 * kl["wanda"], kl)


def _factors(program: Program) -> dict[str, Factors]:
    """By the name of the weight that they stand for."""
    names = [name.removesuffix(".core") for name in program.params if name.endswith(".core")]
    return {n: Factors(*(program.params[f"{n}.{part}"] for part in ("left", "core", "right")), 0.0, 0.0) for n in names}


def _folded(program: Program, factors: dict[str, Factors], ids: list[int]) -> Item:
    """The three products, one after the other, against one product with the matrix that they make; on the inputs of the model itself."""
    inputs, worst = {}, 0.0
    first = {
        n.args[0]: n for n in program.main.nodes if n.target is OPS.block_diagonal.default and str(n.args[1].target).endswith(".right")
    }
    for node, value in execute(program, batch_of(torch.tensor([ids]))):
        if node in {n.args[0] for n in first.values()}:
            inputs[node] = value
        if node.target is OPS.block_diagonal.default and str(node.args[1].target).endswith(".left"):
            core = node.args[0]
            want = inputs[core.args[0].args[0]] @ factors[str(core.args[1].target).removesuffix(".core")].dense().t()
            worst = max(worst, float((value - want).abs().max() / want.abs().max()))
    return Item(4, "wrappers around the core equal one dense product (1e-4)", 0 < worst < 1e-4, {"largest_relative": float(f"{worst:.3g}")})
