"""Paper 22, FLAP: the five working conditions of its card, on SmolLM2-135M."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import torch
from torch import Tensor
from torch.fx import Node

import planc
from planc.backends.reference import execute, run
from planc.compiler.compile import raised
from planc.compiler.groups import find_groups
from planc.compiler.models import load_model
from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.passbase import Context
from planc.compiler.plan import Plan
from planc.compiler.program import Program
from planc.passes.prune import Prune
from planc.passes.realise import Realise
from planc_paper_checks.common import MODEL, pass_seconds, quality, wikitext

PLAN = ROOT / "examples/papers/22-flap.yaml"
SEQUENCES, LENGTH = 32, 128  # to calibrate on; as long as in the paper
WINDOWS = 6  # of 512 tokens, to measure on, from later in the text

FLAP = {"score": "fluctuation", "granularity": "units", "allocation": "everywhere", "repair": "mean_bias"}


@paper(22)
def flap() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    loaded = load_model(MODEL)
    program = raised(loaded)
    text, windows = wikitext(loaded, SEQUENCES, LENGTH, WINDOWS)

    def perplexity_of(**options: object) -> float:
        return quality(Prune.model_validate(options).apply(program, Context(text)), windows)

    (part,) = (p for p in Plan.from_yaml(PLAN).passes if isinstance(p, Prune))
    assert part == Prune.model_validate({**FLAP, "sparsity": 0.2}), "the plan is not the method that is checked"
    masked = part.apply(program, Context(text))
    small = Realise().apply(masked, Context())
    yield _same(masked, small, windows[0])
    yield _means(program, masked, text)
    yield _smaller_and_faster(program, small)

    dense = quality(program, windows)
    found = {
        "bias": perplexity_of(**FLAP, sparsity=0.2),
        "no_bias": perplexity_of(**{**FLAP, "repair": "nothing"}, sparsity=0.2),
        "magnitude": perplexity_of(score="magnitude", granularity="units", sparsity=0.2),
        "bias_10_percent": perplexity_of(**FLAP, sparsity=0.1),
    }
    passed = found["bias"] < found["no_bias"] < found["magnitude"] and found["bias_10_percent"] < 1.5 * dense
    yield Item(4, "perplexity: with bias < without < magnitude; at 10 % < 1.5 times dense", passed, {"dense": dense, **found})
    adaptive, uniform = perplexity_of(**FLAP, sparsity=0.3), perplexity_of(**{**FLAP, "allocation": "uniform"}, sparsity=0.3)
    yield Item(5, "one threshold for all is no worse than uniform at 30 %", adaptive <= uniform, {"adaptive": adaptive, "uniform": uniform})


def _same(masked: Program, small: Program, ids: list[int]) -> Item:
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.arange(len(ids))[None]}
    have, want = (run(p, inputs)["logits"] for p in (small, masked))
    difference = float((have - want).abs().max())
    return Item(1, "masked and smaller model agree to 1e-3", difference < 1e-3, {"largest_difference": round(difference, 7)})


def _means(dense: Program, masked: Program, text: Tensor) -> Item:
    """Both products on the inputs that the dense model gives them, token by token."""
    sums: dict[str, list[Tensor]] = {}
    twins = {n.name: n for n in masked.main.nodes}
    changed = [n for n in dense.main.nodes if n.target is torch.ops.aten.linear.default and twins[n.name].args[1:] != n.args[1:]]
    changed = [n for n in changed if str(twins[n.name].args[1].target).endswith("*m")]
    readers = {n.args[0]: n for n in changed}
    for row in text:
        inputs = {"input_ids": row[None], "position_ids": torch.arange(len(row))[None]}
        for node, value in execute(dense, inputs):
            if node not in readers:
                continue
            product = readers[node]
            for i, (program, owner) in enumerate(((dense, product), (masked, twins[product.name]))):
                args = [program.params[str(a.target)] for a in owner.args[1:] if isinstance(a, Node)]
                total = torch.nn.functional.linear(value[0], *args).double().sum(0)
                sums.setdefault(product.name, [torch.zeros_like(total), torch.zeros_like(total)])[i] += total
    worst = max(float((have - want).norm() / want.norm()) for want, have in sums.values())
    return Item(2, "the mean output of every pruned product stays (1e-3)", worst < 1e-3, {"products": len(sums), "worst": round(worst, 7)})


def _smaller_and_faster(dense: Program, small: Program) -> Item:
    block = [sum(int(g.costs.sum()) for g in find_groups(p).groups) for p in (dense, small)]
    figures = {"block_parameters": round(block[1] / block[0], 4), "all_parameters": round(small.bytes() / dense.bytes(), 4)}
    with_plan, plain = planc.compile(MODEL, PLAN, measure=False), planc.compile(MODEL, {}, measure=False)
    for name, rows, past in (("prefill", 256, 0), ("decode", plain.min_rows, 128)):
        times: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(12 if past else 4):
            for is_small in (turn % 2 == 0, turn % 2 == 1):
                times[is_small].append(pass_seconds((with_plan if is_small else plain).engine, rows, past))
        figures[name] = round(median(times[False][1:]) / median(times[True][1:]), 4)
    passed = abs(figures["block_parameters"] - 0.8) < 0.005 and abs(figures["all_parameters"] - 0.84) < 0.01
    passed = passed and figures["decode"] >= 1.12 and figures["prefill"] >= 1.15
    return Item(3, "20 % of the block gone, 0.84 of the model left; decode >= 1.12 x, prefill >= 1.15 x", passed, figures)
