"""Paper 18, EvoPress: the five working conditions of its card, on SmolLM2-135M."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.fx import Node

import planc
from planc.backends.reference import run
from planc.compiler.blocks import ATTENTIONS
from planc.compiler.compile import Planned, text_of
from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.plan import Plan
from planc.compiler.program import Program
from planc.compiler.quality import read_windows
from planc.compiler.search.budget import Budget
from planc.compiler.search.candidates import Candidates
from planc.compiler.search.evolution import Score, State, Text, evolve, start
from planc.compiler.search.fitness import Evaluator, started
from planc.compiler.search.run import spaces_of
from planc.compiler.search.space import LevelSpace, Point
from planc.compiler.search.workers import Local, scorer
from planc.compiler.units import find_units
from planc.runtime.engine import Step
from planc.runtime.errors import InputError
from planc.runtime.profile import fill_cache

MODEL = "smollm2-135m"
PLAN = ROOT / "examples/papers/18-evopress.yaml"
DATA = Path(os.environ.get("PLANC_DATA") or ROOT.parent / "shared/data")


@paper(18)
def evopress() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    plan, model = Plan.from_yaml(PLAN), started(MODEL)
    assert plan.search is not None and plan.search.budget is not None
    candidates = Candidates(model, plan)
    evaluator = Evaluator(candidates)
    score = scorer(Local(evaluator))
    budget = Budget.parse(plan.search.budget)
    [space], _ = spaces_of(candidates, [budget], lambda line: None)
    text = _text(model, plan.search.length)
    searched, held_out = text[:64], text[-10:]
    seen: set[Point] = set()
    parents: list[State] = [start(space, plan.search, score, searched, seed=0)]

    def watched(points: Sequence[Point], pieces: Text) -> list[float]:
        seen.update(points)
        return score(points, pieces)

    best = evolve(space, plan.search, watched, searched, 0, parents[0], parents.append).parent
    yield _invariant(space, seen)
    others = _rankings(candidates, space, searched[:4])
    random = [space.random(np.random.default_rng([1, draw])) for draw in range(8)]
    found = dict(zip(("evolved", *others, *range(8)), score([best, *others.values(), *random], held_out), strict=True))
    yield _elitism(parents, score, held_out[:5], found["evolved"], found["uniform"])
    yield _better(found)
    yield _sparsity(model, searched, held_out)
    yield _smaller(candidates, best)


def _text(model: Planned, length: int) -> Text:
    file = DATA / "wikitext2/valid.txt"
    if not file.is_file():
        raise InputError(
            "input-invalid", f"there is no {file}", where="PLANC_DATA", fix="name the folder that holds wikitext2 in PLANC_DATA"
        )
    return read_windows(file, text_of(model.model).encode, tokens=80 * length, window=length)


def _invariant(space: LevelSpace, seen: set[Point]) -> Item:
    costs = {tuple(map(int, space.cost(point))) for point in seen}
    return Item(1, "every candidate drops 4 attentions and 4 MLPs", costs == {(26, 26)}, {"candidates": len(seen), "costs": sorted(costs)})


def _rankings(candidates: Candidates, space: LevelSpace, text: Text) -> dict[str, Point]:
    """Sets that rank sublayers one by one: the cosine of the state before and behind, whole blocks by the same (ShortGPT), and places."""
    similar: dict[tuple[int, str], list[float]] = {}
    program = candidates.original
    units = find_units(program)
    sums = {unit: next(iter(unit.term.users)) for unit in units}
    entries = {unit.layer: unit.state for unit in reversed(units)}
    exits = {unit.layer: sums[unit] for unit in units}
    edit = program.edit("states")
    edit.outputs(**{node.name: edit[node] for node in (*sums.values(), *(unit.state for unit in units))})
    states = edit.done(1, 1)
    for piece in text:
        values = run(states, {"input_ids": torch.tensor([list(piece)]), "position_ids": torch.arange(len(piece))[None]})

        def cosine(before: Node, after: Node, values: dict[str, torch.Tensor] = values) -> float:
            return float(F.cosine_similarity(values[before.name][0], values[after.name][0], dim=-1).mean())

        for unit in units:
            similar.setdefault((unit.layer, unit.kind), []).append(cosine(unit.state, sums[unit]))
        for layer, entry in entries.items():
            similar.setdefault((layer, "block"), []).append(cosine(entry, exits[layer]))
    order = {key: float(np.mean(values)) for key, values in similar.items()}

    def most(kind: str) -> list[int]:
        return sorted(entries, key=lambda layer: -order[layer, kind])[:4]

    last, count = max(entries), len(entries)
    return {
        "cosine": _point(candidates, most("attention"), most("mlp")),
        "block_influence": _point(candidates, most("block"), most("block")),
        "last_but_one": _point(candidates, *[[last - i for i in range(1, 5)]] * 2),
        "uniform": _point(candidates, *[[round((i + 0.5) * count / 4) for i in range(4)]] * 2),
    }


def _point(candidates: Candidates, attention: Sequence[int], mlp: Sequence[int]) -> Point:
    gone = {("attention", str(i)) for i in attention} | {("mlp", str(i)) for i in mlp}
    return tuple(int((unit.kind, unit.name) in gone) for unit in candidates.units)


def _elitism(parents: Sequence[State], score: Score, held_out: Text, evolved: float, uniform: float) -> Item:
    """The parent on one fixed held-out draw, at five moments: it may rise by noise, 5 % of where it stood."""
    moments = [parents[round(i * (len(parents) - 1) / 4)].parent for i in range(5)]
    points = list(dict.fromkeys(moments))
    values = dict(zip(points, score(points, held_out), strict=True))
    steps = [values[moment] for moment in moments]
    falling = all(b <= 1.05 * a for a, b in zip(steps, steps[1:], strict=False))
    figures = {"parents": [round(value, 4) for value in steps], "evolved": round(evolved, 4), "uniform": round(uniform, 4)}
    return Item(2, "the parent's KL on held-out text does not rise; final <= uniform", falling and evolved <= uniform, figures)


def _better(found: dict[object, float]) -> Item:
    named = {str(name): round(value, 4) for name, value in found.items() if not isinstance(name, int)}
    named["random_best_of_8"] = round(min(value for name, value in found.items() if isinstance(name, int)), 4)
    rivals = {name: value for name, value in named.items() if name not in ("evolved", "uniform")}
    share = named["evolved"] / min(rivals.values())
    named["share_of_best_other"] = round(share, 4)
    return Item(3, "KL on held-out text >= 20 % below random, cosine, block influence and last-but-one layers", share <= 0.8, named)


SPARSE = """
planc: 1
passes: [prune: {score: magnitude, allocation: rows, sparsity: {}}]
search:
  space: [choose: {option: prune.sparsity, levels: [0.5, 0.6, 0.7]}]
  generations: 8
  offspring: 8
  selection: [{tokens: 256, survivors: 2}, {tokens: 1024, survivors: 1}]
  precision: bfloat16
"""


def _sparsity(model: Planned, searched: Text, held_out: Text) -> Item:
    """Evolution of the sparsity per product, from 60 % everywhere and at as many nonzero weights."""
    plan = Plan.from_yaml(SPARSE)
    assert plan.search is not None
    candidates = Candidates(model, plan)
    evaluator = Evaluator(candidates)
    uniform = (1,) * len(candidates.units)
    nonzeros = candidates.counts(candidates.program(uniform))["nonzeros"]
    [space], _ = spaces_of(candidates, [Budget.parse(f"{nonzeros} nonzeros")], lambda line: None)
    best = evolve(space, plan.search, scorer(Local(evaluator)), searched, 0, State(uniform), lambda state: None).parent
    perplexity = {name: _perplexity(candidates.program(point), held_out) for name, point in (("uniform", uniform), ("evolved", best))}
    kept = candidates.counts(candidates.program(best))["nonzeros"]
    figures = {name: round(value, 2) for name, value in perplexity.items()} | {"nonzeros": nonzeros, "nonzeros_evolved": kept}
    holds = perplexity["evolved"] < perplexity["uniform"] and kept == nonzeros
    return Item(4, "60 % unstructured: evolved perplexity < uniform, same database and nonzeros", holds, figures)


def _perplexity(program: Program, text: Text) -> float:
    total = 0.0
    for piece in text:
        ids = torch.tensor([list(piece)])
        logits = run(program, {"input_ids": ids, "position_ids": torch.arange(len(piece))[None]})["logits"][0, :-1]
        total += float(F.cross_entropy(logits.float(), ids[0, 1:], reduction="sum"))
    return math.exp(total / sum(len(piece) - 1 for piece in text))


def _smaller(candidates: Candidates, best: Point) -> Item:
    """Nodes of the graph, and milliseconds of a one-row pass in ONNX Runtime, measured in turns."""
    programs = {"whole": candidates.original, "evolved": candidates.program(best)}
    attentions = {name: sum(node.target in ATTENTIONS for node in program.main.nodes) for name, program in programs.items()}
    bytes_ = {name: program.bytes() for name, program in programs.items()}
    plans = {"whole": Plan(), "evolved": candidates.resolved(best)}
    times: dict[str, list[float]] = {name: [] for name in plans}
    with tempfile.TemporaryDirectory() as folder:
        engines = {name: planc.compile(MODEL, plan, out=Path(folder) / name, measure=False).engine for name, plan in plans.items()}
        caches = {name: engine.new_cache(1, 256) for name, engine in engines.items()}
        for name, engine in engines.items():
            fill_cache(engine, caches[name], np.zeros((1, 128), dtype=np.int64))
        for turn in range(81):
            for name, engine in engines.items():
                begin = time.perf_counter()
                engine.forward(caches[name], Step(np.array([[1]])))
                if turn:
                    times[name].append((time.perf_counter() - begin) * 1e3)
    ms = {name: float(np.quantile(values, 0.1)) for name, values in times.items()}  # what else the machine does only adds
    figures = {
        "nodes": {name: len(program.main.nodes) for name, program in programs.items()},
        "attentions": attentions,
        "bytes_ratio": round(bytes_["evolved"] / bytes_["whole"], 4),
        "ms": {name: round(value, 2) for name, value in ms.items()},
        "ms_ratio": round(ms["evolved"] / ms["whole"], 4),
    }
    falls = (1 - ms["evolved"] / ms["whole"]) / (1 - bytes_["evolved"] / bytes_["whole"])
    figures["time_saved_per_bytes_saved"] = round(falls, 3)
    holds = attentions["evolved"] == attentions["whole"] - 4 and falls >= 0.9
    return Item(5, "dropped sublayers leave the graph; decode time falls in proportion to the bytes (0.9)", holds, figures)
