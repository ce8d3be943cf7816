"""Paper 78, UDFC: working conditions of its card, on small networks that learn to read drawn digits."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from planc.backends.reference import probe
from planc.compiler.classify import traced
from planc.compiler.image_models import LoadedClassifier
from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.passbase import Context
from planc.compiler.plan import Plan
from planc.compiler.program import Program
from planc.passes.fold_batch_norm import FoldBatchNorm
from planc.passes.prune import Prune
from planc.passes.pruning import Nothing
from planc.passes.realise import Realise
from planc_paper_checks.drawn_digits import BATCH, SPEC, digits, trained

PLAN = ROOT / "examples/papers/78-udfc.yaml"
WIDTHS, TRAIN, TEST, EPOCHS, SEEDS, IMAGES = (16, 32, 32), 4000, 1000, 6, 3, 64


@paper(78)
def udfc() -> Iterator[Item]:
    """The conditions of the card, in its order."""
    (part,) = (p for p in Plan.from_yaml(PLAN).passes if isinstance(p, Prune))
    (x, y), (x_test, _) = digits(TRAIN, 1), digits(TEST, 2)
    networks = [trained(WIDTHS, x, y, EPOCHS * TRAIN // BATCH, seed) for seed in range(SEEDS)]
    yield _copies(networks[0], part, x_test)
    programs = [_program(network) for network in networks]
    yield _no_stand_ins(programs[0], part)

    def agreement(repair: Any) -> float:
        """Images of the same class as the whole network's, over the networks."""
        options = {**part.model_dump(exclude_defaults=True), "repair": repair}
        pruned = [Prune.model_validate(options).apply(p, Context(x[:IMAGES])) for p in programs]
        return round(mean(_same_class(a, b, x_test) for a, b in zip(pruned, programs, strict=True)), 4)

    names = {"nothing": "nothing", "no_data": part.repair, "signed": {"least_squares": {"data": "none"}}, "mean_bias": "mean_bias"}
    found = {name: agreement(repair) for name, repair in names.items()}
    what = "20 % of the hidden channels gone, without data: at least 10 points more images of the same class than without repair"
    yield Item(3, what, found["no_data"] >= found["nothing"] + 0.1, found)
    both = {"no_data": found["no_data"], "images": agreement("least_squares")}
    yield Item(5, f"the same regression on {IMAGES} images is better", both["images"] > both["no_data"], both)


def _program(module: nn.Module) -> Program:
    return FoldBatchNorm().apply(traced(LoadedClassifier(module, "digits", SPEC)), Context())


def _same_class(one: Program, other: Program, x: Tensor) -> float:
    return float((probe(one, x)["logits"].argmax(-1) == probe(other, x)["logits"].argmax(-1)).float().mean())


def _copies(module: nn.Module, part: Prune, x: Tensor) -> Item:
    """The trained network with three more channels in its first layer, which are small copies of others: they go, and nothing changes."""
    program = _program(module)
    names = [n for n, v in program.params.items() if v.dim() == 4]
    first, shift, second = names[0], names[0].replace(".folded", ".shift"), names[1]
    params = dict(program.params)
    for name in (first, shift):
        params[name] = torch.cat((params[name], 0.05 * params[name][:3]))
    params[second] = torch.cat((params[second], 0.05 * torch.randn_like(params[second][:, :3])), 1)
    wider = _resized(program.replace(params=params))
    options = {"modules": (second.partition(".weight")[0],), "sparsity": 3 / (WIDTHS[0] + 3)}
    figures: dict[str, Any] = {}
    for name, repair in (("largest_relative", part.repair.model_copy(update={"ridge": 0.0})), ("without_repair", Nothing())):
        small = Realise().apply(part.model_copy(update={**options, "repair": repair}).apply(wider, Context()), Context())
        want, have = (probe(p, x)["logits"] for p in (wider, small))
        figures[name] = float(f"{float((have - want).abs().max() / want.abs().max()):.3g}")
    figures["channels"] = int(small.params[next(n for n in small.params if n.startswith(first))].shape[0])
    passed = figures["largest_relative"] < 1e-5 < figures["without_repair"] and figures["channels"] == WIDTHS[0]
    return Item(1, "copies of channels are pruned without loss (1e-5)", passed, figures)


def _resized(program: Program) -> Program:
    """The program with recorded shapes that follow from its parameters."""
    edit = program.edit("wider")
    with edit.mode:
        for node in edit.graph.nodes:
            if node.op == "get_attr":
                node.meta["val"] = torch.empty(edit.params[str(node.target)].shape)
    for node in edit.graph.nodes:
        if node.op == "call_function":
            edit.compute(node)
    return edit.done(1, 1)


def _no_stand_ins(program: Program, part: Prune) -> Item:
    """A ridge without bound makes all factors zero."""
    repairs = ("nothing", {"least_squares": {"data": "none", "ridge": 1e15}})
    options = part.model_dump(exclude_defaults=True)
    one, two = (Prune.model_validate({**options, "repair": r}).apply(program, Context()) for r in repairs)
    worst = max(float((value - one.params[name]).abs().max()) for name, value in two.params.items())
    return Item(2, "with all factors zero it is plain pruning", worst < 1e-6, {"largest_difference": worst})
