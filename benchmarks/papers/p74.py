"""Paper 74, CoDe: the five working conditions of its card, on two tiny next-scale models of handwritten digits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

import planc
from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.plan import Plan
from planc.runtime.filler import Filled, Filler
from planc.runtime.loops.masked import Filling
from planc.runtime.masked import Canvas, NextScale
from planc_paper_checks.digits import LEVELS, Images, judge

MODEL = str(ROOT / "examples/masked/scales-large")
PLAN = ROOT / "examples/papers/74-code.yaml"
SIZES, CLASS, IMAGES = (1, 2, 4, 8), 80, 600


@paper(74)
def collaborative_decoding() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    plan = Plan.from_yaml(PLAN)
    exe, twin = _compiled(plan), _compiled(plan, second=MODEL)
    assert exe.plan.models is not None and exe.plan.models.key == "switch", "the plan is not the method that is checked"
    few = [[CLASS + i % 10] for i in range(20)]
    want = [a.canvas for a in _made(_at(twin, len(SIZES)), few)]
    held = all([a.canvas for a in _made(_at(twin, at), few)] == want for at in range(len(SIZES)))
    yield Item(1, "with equal weights the same codes, wherever the models switch", held, {"images": len(few)})
    small = _compiled(plan, first=str(ROOT / "examples/masked/scales-small"))
    first, last = _made(_at(exe, len(SIZES)), few), _made(_at(exe, 0), few)
    alone = [a.canvas for a in _made(_at(small, len(SIZES)), few)]
    ends = [a.canvas for a in first] == want and [a.canvas for a in last] == alone
    yield Item(2, "all scales by the first model, and all by the second, are those models alone", ends, {})
    prompts = [[CLASS + i % 10] for i in range(IMAGES)]
    runs = {"large": _at(exe, len(SIZES)), **{f"code_{at}": _at(exe, at) for at in (3, 2, 1)}, "small": _at(exe, 0)}
    made = {name: _made(runner, prompts) for name, runner in runs.items()}
    yield _cost(exe, runs, made)
    classes = np.arange(IMAGES) % 10
    figures = dict[str, Any]()
    for name, answers in made.items():
        images = _pictures(exe, answers)
        figures |= {f"{name}_accuracy": judge().accuracy(images, classes), f"{name}_distance": judge().distance(images)}
    gap = figures["small_distance"] - figures["large_distance"]
    figures["gap_closed"] = round((figures["small_distance"] - figures["code_3_distance"]) / gap, 4) if gap else 0.0
    yield Item(
        4,
        "with three of four scales by the large model 60 % of the distance between the models is gone",
        gap > 0 and figures["gap_closed"] >= 0.6,
        figures,
    )
    yield _memory(exe)


def _compiled(plan: Plan, first: str = MODEL, second: str | None = None) -> Filler:
    masked = plan.decode.masked
    assert masked is not None
    if second is not None:
        plan = plan.model_copy(
            update={"decode": plan.decode.model_copy(update={"masked": masked.model_copy(update={"second_model": second})})}
        )
    exe = planc.compile(first, plan)
    assert isinstance(exe, Filler)
    exe.batch = 32
    return exe


def _at(exe: Filler, at: int) -> Filler:
    other = exe.with_plan(models={"switch": {"at": at}})
    other.batch = exe.batch
    return other


def _made(exe: Filler, prompts: Sequence[Any]) -> list[Filled]:
    made = exe.generate(list(prompts))
    assert isinstance(made, list)
    return made


def _pictures(exe: Filler, answers: Sequence[Filled]) -> Images:
    """[N, 64] in 0 .. 1, rounded to the levels of the judge."""
    inputs, found = exe.plan.inputs, []
    assert isinstance(inputs, NextScale)
    for answer in answers:
        canvas = Canvas(answer.canvas[:1], len(answer.canvas) - 1, exe.engine.spec.mask_id)
        canvas.tokens[:] = answer.canvas
        found.append(np.clip((inputs.picture(canvas) + 1) / 2, 0, 1).reshape(-1))
    return np.round(np.array(found, dtype=np.float64) * (LEVELS - 1)) / (LEVELS - 1)


def _cost(exe: Filler, runs: dict[str, Filler], made: dict[str, list[Filled]]) -> Item:
    """Multiplications as on the card, and time, in turns."""
    work = {name: sum(a.stats.multiplications for a in answers) / len(answers) for name, answers in made.items()}
    large, little = (engine.spec.layer_parameters * engine.spec.layers for engine in (exe.engine, exe.others[0]))
    expected = round((22 * large + 86 * little) / (86 * large), 4)  # slots of the class and of three scales; of the class and all four
    share = round(work["code_3"] / work["large"], 4)
    seconds: dict[str, list[float]] = {"large": [], "code_3": []}
    for _ in range(6):
        for name, times in seconds.items():
            begin = perf_counter()
            _made(runs[name], [[CLASS + i % 10] for i in range(32)])
            times.append(perf_counter() - begin)
    ratio = round(median(seconds["code_3"]) / median(seconds["large"]), 4)
    figures = {"multiplications": share, "expected": expected, "time": ratio, "small_to_large": round(little / large, 4)}
    return Item(
        3,
        "multiplications as counted on paper, time <= 0.6 times the large model's",
        abs(share - expected) < 0.02 and ratio <= 0.6,
        figures,
    )


def _memory(exe: Filler) -> Item:
    """The caches that are alive when the small model has taken over."""
    canvas = exe.canvas([CLASS], sum(s * s for s in SIZES), 0, 0)
    filling = Filling(exe.engine, [canvas], exe.plan, exe.decode.sampling, exe.others)
    alive = [tuple(filling.caches) for _ in filling]
    sizes = [engine.new_cache(1, 86).bytes() for engine in (exe.engine, *exe.others)]
    figures = {"alive_by_scale": str(alive), "peak_bytes": filling.peak_bytes, "large": sizes[0], "small": sizes[1]}
    return Item(
        5,
        "the large model's cache is released before the small one has its own",
        alive[-1] == (1,) and filling.peak_bytes == max(sizes),
        figures,
    )
