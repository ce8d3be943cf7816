"""What the checks of papers on masked slots share: the tiny model of list tasks, held-out examples, and runs that can be looked into."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import planc
from planc.compiler.papers import ROOT
from planc.compiler.plan import Plan
from planc.compiler.suites.parallelbench import Example
from planc.compiler.suites.run import Result, draw, judge
from planc.runtime.decode import Masked
from planc.runtime.filler import Filled, Filler
from planc.runtime.loops.masked import Filling

MODEL = str(ROOT / "examples/masked/lists")
TASKS = ("copy", "reverse", "replace_index", "shuffle", "sum", "trace")
DETERMINISTIC = ("copy", "reverse", "replace_index", "sum", "trace")
SEED = 7  # of held-out examples; training draws from other streams, and there are far more examples than it can have seen
POINT = 0.01
LEARNED = 0.9  # share of right answers, one slot a pass, below which a model has not learned enough for a condition about accuracy to mean anything


@cache
def filler(paper: int) -> Filler:
    """The compiled plan of a paper."""
    [path] = (ROOT / "examples/papers").glob(f"{paper:02}-*.yaml")
    exe = planc.compile(MODEL, Plan.from_yaml(path))
    assert isinstance(exe, Filler)
    return exe


def held_out(count: int, tasks: Sequence[str] = TASKS) -> list[Example]:
    """`count` examples of every task, of the lengths that the model was trained on."""
    return [example for length in range(3, 9) for example in draw(tasks, -(-count // 6), SEED + length, dict.fromkeys(tasks, length))]


def same(a: Result, b: Result) -> bool:
    """Whether two runs wrote the same tokens in the same passes."""
    return all(_course(x) == _course(y) for x, y in zip(a.answers, b.answers, strict=True))


def _course(answer: Filled) -> list[Any]:
    return [(commit.step, commit.slots, commit.tokens) for commit in answer.trace]


def passes(result: Result) -> float:
    """Per prompt."""
    return round(result.cost.passes / len(result.answers), 3)


def started(exe: Filler, example: Example, key: int = 0, plan: Masked | None = None) -> Filling:
    """A run of one example that can be watched pass by pass."""
    prompt = exe.text.apply_chat([{"role": "user", "content": example.prompt}])
    canvas = exe.canvas(prompt, exe.decode.max_new_tokens, exe.decode.sampling.seed, key)
    return Filling(exe.engine, [canvas], exe.plan if plan is None else plan, exe.decode.sampling)


__all__ = ["DETERMINISTIC", "LEARNED", "MODEL", "POINT", "TASKS", "filler", "held_out", "judge", "passes", "same", "started"]
