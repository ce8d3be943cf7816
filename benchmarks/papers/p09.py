"""Paper 9, Learn2PD: the five working conditions of its card. The filter of the plan was fitted by `planc fit` on other examples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from planc.compiler.papers import Item, paper
from planc.runtime.filler import ONE_A_PASS, Filler
from planc.runtime.masked import LearnedFilter, Oracle
from planc_paper_checks.lists import DETERMINISTIC, LEARNED, POINT, filler, held_out, judge, passes, same, started

COUNT = 40
TAUS = (0.999, 0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9, 0.85, 0.8, 0.7)


@paper(9)
def learn2pd() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    exe = filler(9)
    part = exe.plan.select
    assert isinstance(part, LearnedFilter) and part.theta == 0.96, "the plan is not the method that is checked"
    examples = held_out(COUNT, DETERMINISTIC)
    plain, whole = judge(exe.with_plan(**ONE_A_PASS), examples), exe.with_plan(end=None)
    never = judge(whole.with_plan(select=part.model_copy(update={"theta": 1.0})), examples)
    yield Item(
        1,
        "a filter that never fires is one slot a pass",
        same(never, plain) and passes(never) == exe.decode.max_new_tokens,
        {"passes": passes(never)},
    )
    yield _oracle(exe)
    fitted = judge(whole, examples)
    figures: dict[str, Any] = {
        "passes": passes(fitted),
        "passes_plain": passes(plain),
        "accuracy": fitted.share(),
        "accuracy_plain": plain.share(),
    }
    figures["precision"] = _precision(whole)
    held = (
        passes(fitted) <= 0.5 * passes(plain)
        and fitted.share() >= plain.share() - POINT
        and figures["precision"] >= 0.97
        and plain.share() >= LEARNED
    )
    yield Item(3, "<= half of the passes, accuracy within a point, precision >= 0.97", held, figures)
    tuned = {tau: judge(whole.with_plan(select={"threshold": {"tau": tau}}), examples) for tau in TAUS}
    as_good = {tau: passes(result) for tau, result in tuned.items() if result.share() >= fitted.share()}
    best = min(as_good, key=lambda tau: as_good[tau]) if as_good else None
    figures = {"passes_filter": passes(fitted), "threshold": best, "passes_threshold": None if best is None else as_good[best]}
    yield Item(
        4, "needs no more passes than the best threshold of equal accuracy", best is None or passes(fitted) <= as_good[best], figures
    )
    yield _ends(exe)


def _oracle(exe: Filler) -> Item:
    """The head-room: commit what is right, and nothing else."""
    equal, used, prompts = True, 0, 0
    blocks = exe.decode.max_new_tokens // 8
    plain = exe.with_plan(**ONE_A_PASS)
    for key, example in enumerate(held_out(20, DETERMINISTIC)):
        reference = started(plain, example, key)
        for _ in reference:
            pass
        wanted = tuple(int(t) for t in reference.rows[0].canvas.tokens[reference.rows[0].canvas.prompt :])
        filling = started(exe, example, key, plain.plan.model_copy(update={"select": Oracle(reference=wanted)}))
        for _ in filling:
            pass
        canvas = filling.rows[0].canvas
        equal = equal and tuple(canvas.tokens[canvas.prompt :]) == wanted
        used, prompts = used + canvas.cost.passes, prompts + 1
    per_block = round(used / prompts / blocks, 3)
    return Item(
        2, "an oracle gives the reference exactly, in <= 2 passes a block of 8", equal and per_block <= 2.0, {"passes_per_block": per_block}
    )


def _precision(exe: Filler) -> float:
    """Of what the filter accepted, how much was what one slot a pass writes there."""
    plain, right, accepted = exe.with_plan(**ONE_A_PASS), 0, 0
    part = exe.plan.select
    for key, example in enumerate(held_out(20, DETERMINISTIC)):
        reference = started(plain, example, key)
        for _ in reference:
            pass
        wanted = reference.rows[0].canvas.tokens
        filling = started(exe, example, key)
        for _ in filling:
            canvas = filling.rows[0].canvas
            commit = canvas.trace[-1]
            slots = np.array(commit.slots)
            # the surest is committed in any case; what the filter itself says of the slots that were open is asked again
            before = canvas.tokens.copy()
            fired = slots[part.select(canvas, slots, np.full(len(slots), -1.0, np.float32))] if len(slots) > 1 else slots[:0]
            right += int((before[fired] == wanted[fired]).sum())
            accepted += len(fired)
    return round(right / max(1, accepted), 4)


def _ends(exe: Filler) -> Item:
    """Answers of 3 to 8 tokens in a field of 24."""
    examples = held_out(COUNT, ("copy", "reverse", "replace_index"))
    cut, kept = judge(exe, examples), judge(exe.with_plan(end=None), examples)
    same_text = float(np.mean([a.ids == b.ids for a, b in zip(cut.answers, kept.answers, strict=True)]))
    share = round(cut.cost.token_layers / kept.cost.token_layers, 4)
    figures = {"positions": share, "same_text": round(same_text, 4), "passes": passes(cut), "passes_kept": passes(kept)}
    return Item(5, "truncation: <= 0.6 times the positions, the same text in >= 98 %", share <= 0.6 and same_text >= 0.98, figures)
