"""Paper 5, LocalLeap: the five working conditions of its card, on the tiny model of list tasks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planc.compiler.papers import Item, paper
from planc.runtime.filler import Filler
from planc.runtime.masked import LocalRelaxed
from planc_paper_checks.lists import DETERMINISTIC, LEARNED, POINT, filler, held_out, judge, passes, same, started

COUNT = 40


@paper(5)
def local_leap() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    exe = filler(5)
    assert exe.plan.select == LocalRelaxed(), "the plan is not the method that is checked"
    examples = held_out(COUNT, DETERMINISTIC)
    threshold, local = judge(exe.with_plan(select="threshold"), examples), judge(exe, examples)
    for number, what, options in ((1, "tau_relaxed = tau", {"tau_relaxed": 0.9}), (2, "radius 0", {"radius": 0})):
        neutral = judge(exe.with_plan(select={"local_relaxed": options}), examples)
        yield Item(number, f"{what} is the threshold alone, pass by pass", same(neutral, threshold), {"passes": passes(neutral)})
    figures = {"passes_threshold": passes(threshold), "passes_local": passes(local), "slots": exe.decode.max_new_tokens}
    figures |= {"accuracy_threshold": threshold.share(), "accuracy_local": local.share()}
    fewer = passes(local) <= 0.9 * passes(threshold) and passes(local) <= 0.5 * exe.decode.max_new_tokens
    fewer = fewer and threshold.share() >= LEARNED
    yield Item(
        3,
        "passes <= 0.9 times and <= half of the slots, accuracy within a point",
        fewer and local.share() >= threshold.share() - POINT,
        figures,
    )
    near = agreement(exe)
    falling = near[1] > near[8] and np.polyfit(list(near), list(near.values()), 1)[0] < 0
    yield Item(
        4,
        "proposals agree with what is written in the end, the less the further from an anchor",
        bool(falling),
        {str(d): v for d, v in near.items()},
    )
    shuffle = held_out(4 * COUNT, ("shuffle",))
    plain, relaxed = (judge(e, shuffle) for e in (exe.with_plan(select="threshold"), exe))
    figures = {
        "accuracy_threshold": plain.share(),
        "accuracy_local": relaxed.share(),
        "passes_threshold": passes(plain),
        "passes_local": passes(relaxed),
    }
    yield Item(5, "on shuffle, where every slot depends on every other, the loss is told", len(relaxed.answers) == 4 * COUNT, figures)


def agreement(exe: Filler) -> dict[int, float]:
    """Distance to the nearest anchor -> share of proposals of open slots that are what is written there in the end, under the threshold alone."""
    plan = exe.with_plan(select="threshold", window="whole")
    found: dict[int, list[bool]] = {d: [] for d in range(1, 9)}
    for key, example in enumerate(held_out(40)):
        filling = started(plan, example, key)
        canvas = filling.rows[0].canvas
        seen: list[tuple[int, int, int]] = []  # distance, slot, proposal
        before = canvas.masked.copy()
        for _ in filling:
            open_slots = np.flatnonzero(before)
            anchors = open_slots[canvas.confidence[open_slots] >= 0.9]
            others = np.setdiff1d(open_slots, anchors) if len(anchors) else anchors
            seen += [(int(np.abs(anchors - slot).min()), int(slot), int(canvas.x0[slot])) for slot in others]
            before = canvas.masked.copy()
        for distance, slot, token in seen:
            if distance in found:
                found[distance].append(token == int(canvas.tokens[slot]))
    return {d: round(float(np.mean(hits)), 4) if hits else 0.0 for d, hits in found.items()}
