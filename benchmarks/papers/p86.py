"""Paper 86, SliceGPT: the five working conditions of its card, on SmolLM2-135M."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import torch
from torch import Tensor

import planc
from planc.backends.reference import execute
from planc.compiler.compile import raised
from planc.compiler.models import load_model
from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.passbase import Context
from planc.compiler.plan import Plan
from planc.compiler.program import Program
from planc.compiler.residual import find_states, tied
from planc.passes.fold_norms import FoldNorms
from planc.passes.skip_layers import SkipLayers
from planc.passes.slice import Slice
from planc_paper_checks.common import MODEL, logits_of, pass_seconds, quality, wikitext

PLAN = ROOT / "examples/papers/86-slicegpt.yaml"
SEQUENCES, LENGTH = 16, 256  # to calibrate on
LAYERS = (0, 1, 2, 3)  # of the model that is checked in float64


@paper(86)
def slicegpt() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    loaded = load_model(MODEL)
    program = raised(loaded)
    text, windows = wikitext(loaded, SEQUENCES, LENGTH)
    (part,) = (p for p in Plan.from_yaml(PLAN).passes if isinstance(p, Slice))
    folded = FoldNorms().apply(program, Context())
    yield from _rotations(program, folded, text, windows[0][:64])
    sliced = part.apply(folded, Context(text))
    yield _same(folded, sliced, part, text, windows[0][:128])
    channels = part.model_copy(update={"directions": "channels"}).apply(folded, Context(text))
    parameters = round(sliced.bytes() / program.bytes(), 4)
    found = {"dense": quality(program, windows), "sliced": quality(sliced, windows), "channels": quality(channels, windows)}
    passed = abs(parameters - 0.89) < 0.01 and found["sliced"] < found["channels"]
    what = "one basis, 10 %: 0.89 of the parameters, perplexity below that of cutting as many channels by energy"
    yield Item(4, what, passed, {"parameters": parameters, **found})
    yield _faster(program, sliced)


def _rotations(program: Program, folded: Program, text: Tensor, ids: list[int]) -> Iterator[Item]:
    """Both forms at full width, the whole model in float32 and four of its layers in float64."""
    figures, worst = {}, 0.0
    for bases in ("one", "layer"):
        rotated = Slice(sparsity=0.0, bases=bases).apply(folded, Context(text[:4]))  # type: ignore[arg-type]
        figures[bases] = float((logits_of(rotated, ids) - logits_of(program, ids)).abs().max())
        for change in (value.double() for name, value in rotated.params.items() if ".from." in name):
            worst = max(worst, float((change @ change.t() - torch.eye(len(change), dtype=torch.float64)).abs().max()))
    changes = sum(".from." in name for name in rotated.params)
    few = SkipLayers(keep=LAYERS).apply(program, Context())
    few = few.replace(params={name: value.double() if value.is_floating_point() else value for name, value in few.params.items()})
    wide = Slice(sparsity=0.0, bases="layer").apply(_recomputed(FoldNorms().apply(_recomputed(few), Context())), Context(text[:4]))
    figures["float64"] = float((logits_of(wide, ids) - logits_of(few, ids)).abs().max())
    figures["largest_logit"] = float(logits_of(program, ids).abs().max())
    passed = max(figures["one"], figures["layer"]) < 1e-4 * figures["largest_logit"] and figures["float64"] < 1e-9
    what = "only rotated: same logits, 1e-4 of the largest in float32 and 1e-9 in float64"
    yield Item(1, what, passed, {k: float(f"{v:.3g}") for k, v in figures.items()})
    yield Item(2, "the products between bases are orthogonal (1e-5)", changes > 0 and worst < 1e-5, {"products": changes, "worst": worst})


def _recomputed(program: Program) -> Program:
    """The program with recorded types that follow from its parameters."""
    edit = program.edit("double")
    with edit.mode:
        for node in edit.graph.nodes:
            if node.op == "get_attr":
                value = edit.params[str(node.target)]
                node.meta["val"] = torch.empty(value.shape, dtype=value.dtype)
    for node in edit.graph.nodes:
        if node.op == "call_function":
            edit.compute(node)
    return edit.done(1, 1).replace(history=program.history)


def _same(folded: Program, sliced: Program, part: Slice, text: Tensor, ids: list[int]) -> Item:
    """Against the whole model with every value of the hidden state projected, and the table as the head reads it."""
    states = find_states(folded)
    bases = part.bases_of(folded, states, Context(text))
    onto = {state.node: (basis @ basis.t()).float() for state, basis in zip(states, bases, strict=True)}
    tables = {name: folded.params[name] @ (bases[i] @ bases[i].t()).float() for name, i in tied(states).items()}
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.arange(len(ids))[None]}
    steps = execute(folded.replace(params={**folded.params, **tables}), inputs)
    node, value = next(steps)
    while node.op != "output":
        node, value = steps.send(value @ onto[node] if node in onto else None)
    difference = float((value["logits"][0] - logits_of(sliced, ids)).abs().max())
    return Item(3, "narrow equals projected at full width (1e-3)", difference < 1e-3, {"largest_difference": float(f"{difference:.3g}")})


def _products(program: Program) -> int:
    """Multiplications per row of all dense products but the head, which runs on the last row alone."""
    found = [n for n in program.main.nodes if n.target is torch.ops.aten.linear.default]
    return sum(program.params[str(n.args[1].target)].numel() for n in found[:-1])


def _faster(program: Program, sliced: Program) -> Item:
    predicted = 1 - _products(sliced) / _products(program)
    with_plan, plain = planc.compile(MODEL, PLAN, measure=False), planc.compile(MODEL, {}, measure=False)
    times: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(8):
        for small in (turn % 2 == 0, turn % 2 == 1):
            times[small].append(pass_seconds((with_plan if small else plain).engine, 256))
    saved = 1 - median(times[True][1:]) / median(times[False][1:])
    figures = {"products_saved": round(predicted, 4), "time_saved": round(saved, 4)}
    return Item(5, "prefill time falls by at least half of what the products do", saved >= predicted / 2, figures)
