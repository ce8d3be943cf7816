"""Paper 57, ReCAP: the five working conditions of its card, on generated digits and on shuffles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import planc
from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.suites.run import draw
from planc.runtime.filler import Filled, Filler
from planc.runtime.masked.engine import Query
from planc_paper_checks.digits import CLASS, MODEL, judge, pictures
from planc_paper_checks.lists import filler as list_filler
from planc_paper_checks.lists import judge as judge_lists

PLAN: Path = ROOT / "examples/papers/57-recap.yaml"
IMAGES = 600
SIZE = 64


@paper(57)
def recap() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    exe = planc.compile(MODEL, PLAN)
    assert isinstance(exe, Filler)
    assert exe.plan.cache.key == "local" and exe.plan.select.locals == 1, "the plan is not the method that is checked"
    exe.batch = 64
    few = [[CLASS + i % 10] for i in range(20)]
    plain = _made(_scheme(exe, cache="uncached"), few)
    off = _made(_scheme(exe), few)
    yield Item(
        1,
        "without local steps it is the base sampler, draw by draw",
        [a.canvas for a in plain] == [a.canvas for a in off],
        {"images": len(few)},
    )
    yield _plumbing(exe)
    classes = np.arange(IMAGES) % 10
    prompts = [[CLASS + int(c)] for c in classes]
    schemes = {"full_16": _scheme(exe, cache="uncached"), "recap_12_4": exe, "full_12": _scheme(exe, steps=12, cache="uncached")}
    schemes["full_1"] = _scheme(exe, steps=1, cache="uncached")
    runs = {name: _made(scheme, prompts) for name, scheme in schemes.items()}
    layers = {name: sum(a.stats.token_layers for a in run) for name, run in runs.items()}
    modes = dict(runs["recap_12_4"][0].stats.modes)
    share = round(layers["recap_12_4"] / layers["full_16"], 4)
    local = exe.plan.select.counts(SIZE)[8:]
    group = [1 + a + b for a, b in zip(local[::2], local[1::2], strict=True)]
    wanted = round((12 * (SIZE + 1) + sum(group)) / (16 * (SIZE + 1)), 4)
    yield Item(
        3, "slots through layers as counted on paper", abs(share - wanted) < 0.01, {"share": share, "expected": wanted, "passes": modes}
    )
    figures: dict[str, Any] = {}
    for name, run in runs.items():
        images = pictures([a.canvas for a in run])
        figures |= {f"{name}_accuracy": judge().accuracy(images, classes), f"{name}_distance": judge().distance(images)}
    held = (
        figures["full_16_distance"] <= figures["recap_12_4_distance"] * 1.1 and figures["recap_12_4_distance"] < figures["full_12_distance"]
    )
    yield Item(4, "by Frechet distance 16 full steps, then 12 and 4 local ones, then 12 full ones", held, figures)
    yield _shuffles()


def _scheme(exe: Filler, *, steps: int = 16, **changes: Any) -> Filler:
    """The base sampler."""
    other = exe.with_plan(select={"gumbel_top_k": {"steps": steps, "noise": 4.0}}, **changes)
    other.batch = exe.batch
    return other


def _made(exe: Filler, prompts: Sequence[Any]) -> list[Filled]:
    made = exe.generate(list(prompts))
    assert isinstance(made, list)
    return made


def _plumbing(exe: Filler) -> Item:
    """A local step behind a full one, before anything is written, says the same."""
    engine, rng = exe.engine, np.random.default_rng(0)
    tokens = np.array([[CLASS + 3, *np.where(rng.random(SIZE) < 0.5, engine.spec.mask_id, rng.integers(0, 8, SIZE))]])
    slots, segments = np.arange(SIZE + 1)[None], np.zeros((1, SIZE + 1), np.int64)
    cache = engine.new_cache(1, SIZE + 1)
    whole = engine.forward(cache, Query(np.array([0]), tokens, slots, segments))
    group = np.array([[0, *np.flatnonzero(tokens[0] == engine.spec.mask_id)[::3]]])
    local = engine.forward(cache, Query(np.array([0]), np.take_along_axis(tokens, group, 1), group, segments))
    difference = max(
        float(np.abs(getattr(local, name) - getattr(whole, name)[:, group[0]]).max()) for name in ("top", "second", "total", "mean")
    )
    return Item(
        2,
        "a local step before any write says what the full one did (1e-4)",
        difference < 1e-4,
        {"largest_difference": float(f"{difference:.2g}")},
    )


def _shuffles() -> Item:
    """Two slices of a shuffle: one full and one local step, against both at once."""
    exe = list_filler(38)
    examples = draw(("shuffle",), 300, 7, {"shuffle": 4})
    groups: dict[str, Any] = {"steps": 12, "shape": "power", "noise": 0.0}
    both = judge_lists(exe.with_plan(select={"gumbel_top_k": {**groups, "steps": 6}}), examples, temperature=1.0)
    apart = judge_lists(exe.with_plan(select={"gumbel_top_k": {**groups, "locals": 1}}, cache="local"), examples, temperature=1.0)
    figures = {
        "one_and_one": apart.share(),
        "at_once": both.share(),
        "passes": [apart.answers[0].stats.passes, both.answers[0].stats.passes],
    }
    figures["token_layers"] = [apart.cost.token_layers, both.cost.token_layers]
    return Item(5, "on shuffles a full and a local step are better than both slices at once", apart.share() > both.share(), figures)
