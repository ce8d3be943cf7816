"""Paper 17, Prophet: the five working conditions of its card, on the task `trace`: a running sum, a sign, and the largest digit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from planc.compiler.papers import Item, paper
from planc.compiler.suites.parallelbench import ANSWER_AT, Example
from planc.compiler.suites.run import Result, words
from planc.runtime.filler import Filler
from planc_paper_checks.lists import LEARNED, POINT, filler, held_out, judge, passes, same, started

COUNT = 200
NEVER: dict[str, Any] = {"gap_all_in": {"offset": ANSWER_AT + 1, "length": 1, "thresholds": [float("inf")], "knots": []}}
AT_ONCE: dict[str, Any] = {"gap_all_in": {"offset": ANSWER_AT + 1, "length": 1, "thresholds": [float("-inf")], "knots": []}}


@paper(17)
def prophet() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    exe = filler(17)
    assert exe.plan.stop is not None and exe.plan.stop.key == "gap_all_in", "the plan is not the method that is checked"
    examples = held_out(COUNT, ("trace",))
    plain = judge(exe.with_plan(stop=None), examples)
    never, at_once = judge(exe.with_plan(stop=NEVER), examples), judge(exe.with_plan(stop=AT_ONCE), examples)
    yield Item(1, "with thresholds that are never reached it is the plain run", same(never, plain), {"passes": passes(never)})
    one_shot = judge(exe.with_plan(stop=None, select="all"), examples)
    equal = all(a.canvas == b.canvas for a, b in zip(at_once.answers, one_shot.answers, strict=True))
    yield Item(
        2,
        "with thresholds that always are one pass, and the likeliest token everywhere",
        equal and passes(at_once) == 1.0,
        {"passes": passes(at_once)},
    )
    early = judge(exe, examples)
    figures = {
        "passes": passes(early),
        "passes_plain": passes(plain),
        "answer": _answers(exe, examples, early),
        "answer_plain": _answers(exe, examples, plain),
    }
    figures |= {"trace": _traces(exe, examples, early), "trace_plain": _traces(exe, examples, plain)}
    held = figures["answer"] >= figures["answer_plain"] - POINT and figures["passes"] <= 0.6 * figures["passes_plain"]
    held = held and figures["answer_plain"] >= LEARNED
    yield Item(3, "answers within a point in <= 60 % of the passes", held, figures)
    answer, trace = _half_way(exe, examples)
    yield Item(
        4,
        "half way the answer is final far more often than the trace",
        answer >= trace + 0.2,
        {"answer_final": answer, "trace_final": trace},
    )
    steps = max(1, round(passes(early)))
    fixed = judge(exe.with_plan(stop=None, select={"schedule": {"steps": steps}}), examples)
    control = _answers(exe, examples, fixed)
    yield Item(
        5, "the plain run cut to as many passes is less accurate", control < figures["answer"], {"passes": passes(fixed), "answer": control}
    )


def _answers(exe: Filler, examples: Sequence[Example], result: Result) -> float:
    """Share of right answers, whatever the trace is."""
    return _share(exe, examples, result, slice(ANSWER_AT + 1, ANSWER_AT + 2))


def _traces(exe: Filler, examples: Sequence[Example], result: Result) -> float:
    return _share(exe, examples, result, slice(0, ANSWER_AT))


def _share(exe: Filler, examples: Sequence[Example], result: Result, part: slice) -> float:
    found = [tuple(words(exe, a))[part] == e.answer[part] for e, a in zip(examples, result.answers, strict=True)]
    return round(float(np.mean(found)), 4)


def _half_way(exe: Filler, examples: Sequence[Example]) -> tuple[float, float]:
    """Share of prompts whose answer, and whose whole trace, is proposed as it ends when half of the trace's own slots are decided."""
    plain, answers, traces = exe.with_plan(stop=None), [], []
    for key, example in enumerate(examples):
        filling = started(plain, example, key)
        [row] = filling.rows
        canvas, half, size = row.canvas, None, len(example.items)
        slots = np.arange(size) + canvas.prompt
        for _ in filling:
            if half is None and int((~canvas.masked[slots]).sum()) >= size // 2:
                half = np.where(canvas.masked, canvas.x0, canvas.tokens)
        assert half is not None
        at = canvas.prompt + ANSWER_AT + 1
        answers.append(half[at] == canvas.tokens[at])
        traces.append((half[slots] == canvas.tokens[slots]).all())
    return round(float(np.mean(answers)), 4), round(float(np.mean(traces)), 4)
