"""Paper 53, CreditDecoding: the five working conditions of its card, on the tiny model of list tasks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from planc.compiler.papers import Item, paper
from planc.runtime.filler import Filler
from planc.runtime.masked import Canvas, Credit
from planc.runtime.masked.credit import CreditOf
from planc.runtime.masked.engine import Reply, reply_of
from planc_paper_checks.lists import DETERMINISTIC, LEARNED, POINT, filler, held_out, judge, passes, same, started

COUNT = 40
TAUS = (0.88, 0.86, 0.84, 0.82, 0.8, 0.75, 0.7, 0.65, 0.6)


@paper(53)
def credit_decoding() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    exe = filler(53)
    assert exe.plan.fusion == Credit() and exe.plan.select.key == "threshold", "the plan is not the method that is checked"
    examples = held_out(COUNT, DETERMINISTIC)
    threshold, credit = judge(exe.with_plan(fusion=None), examples), judge(exe, examples)
    off = judge(exe.with_plan(fusion={"credit": {"alpha": 0.0}}), examples)
    yield Item(1, "without weight it is the threshold alone, pass by pass", same(off, threshold), {"passes": passes(off)})
    yield _sparse()
    yield _formula()
    figures: dict[str, Any] = {"passes_threshold": passes(threshold), "passes_credit": passes(credit)}
    figures |= {"accuracy_threshold": threshold.share(), "accuracy_credit": credit.share()}
    lower = {tau: judge(exe.with_plan(fusion=None, select={"threshold": {"tau": tau}}), examples) for tau in TAUS}
    equal = min(lower, key=lambda tau: (abs(passes(lower[tau]) - passes(credit)), -tau))  # the threshold that takes as many passes
    figures |= {"equal_tau": equal, "equal_passes": passes(lower[equal]), "equal_accuracy": lower[equal].share()}
    faster = passes(credit) <= 0.9 * passes(threshold) and credit.share() >= threshold.share() - POINT and threshold.share() >= LEARNED
    yield Item(
        4,
        "passes <= 0.9 times, accuracy within a point, and no worse than a lower threshold",
        faster and credit.share() >= lower[equal].share(),
        figures,
    )
    yield _attribution()


class _Twin(CreditOf):
    """Sparse credit beside dense credit [S, V], on the same passes."""

    worst, compared, lost = 0.0, 0, 0

    def fuse(self, canvas: Canvas, slots: Any, reply: Reply) -> Reply:
        block = self._block
        fused = super().fuse(canvas, slots, reply)
        assert reply.logits is not None
        if self._block != block:
            self.dense = np.zeros((len(canvas.tokens), reply.logits.shape[-1]))
        inside = np.flatnonzero(canvas.masked[slots] & canvas.window[slots])
        self.dense[slots[inside]] *= self.part.beta
        self.dense[slots[inside], reply.best[inside]] += np.exp(reply.top - reply.total)[inside] ** self.part.gamma
        wanted = reply_of((reply.logits + self.part.alpha * np.log1p(self.dense[slots])).astype(np.float32))
        held = (self.dense[slots] > 0).sum(-1) <= self.tracked
        sure = [np.exp(r.top - r.total)[inside][held[inside]] for r in (fused, wanted)]
        self.worst = max(self.worst, float(np.abs(sure[0] - sure[1]).max(initial=0.0)))
        self.compared, self.lost = self.compared + int(held[inside].sum()), self.lost + int((~held[inside]).sum())
        return fused


class _TwinCredit(Credit):
    kind = "twin"

    def start(self, canvas: Canvas) -> CreditOf:
        return _Twin(self, len(canvas.tokens))


def _sparse() -> Item:
    """Dense credit needs the logits, so both run where tokens are drawn."""
    exe = filler(53)
    exe.engine, engine = _WithLogits(exe.engine), exe.engine  # type: ignore[assignment]
    rows = rows_of_twins(exe)
    exe.engine = engine
    worst, compared, lost = max(r.worst for r in rows), sum(r.compared for r in rows), sum(r.lost for r in rows)
    figures = {
        "largest_difference": float(f"{worst:.3g}"),
        "slots": compared,
        "share_beyond_four_tokens": round(lost / (compared + lost), 5),
    }
    return Item(2, "credit of four tokens a slot is that of all tokens (1e-5)", worst < 1e-5, figures)


class _WithLogits:
    """The engine with logits in every reply."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.spec, self.new_cache = engine, engine.spec, engine.new_cache

    def forward(self, cache: Any, query: Any, *, logits: bool = False) -> Reply:
        reply: Reply = self.engine.forward(cache, query, logits=True)
        return reply


def rows_of_twins(exe: Filler) -> list[_Twin]:
    """Credits of finished rows."""
    assert isinstance(exe.plan.fusion, Credit)
    found = []
    for key, example in enumerate(held_out(8)):
        filling = started(exe, example, key, exe.plan.model_copy(update={"fusion": _TwinCredit(**exe.plan.fusion.model_dump())}))
        for _ in filling:
            pass
        found.append(filling.rows[0].fusion)
    return found  # type: ignore[return-value]


def _formula() -> Item:
    """Constant logits whose likeliest token has probability 0.85, threshold 0.9."""
    canvas = Canvas([1], 1, 11)
    part = Credit().start(canvas)
    logits = np.full((1, 12), np.log(0.15 / 11), np.float32)
    logits[0, 5] = np.log(0.85)
    sure = []
    for _ in range(3):
        slots = np.array([1])
        fused = part.fuse(canvas, slots, reply_of(logits, part.track(canvas, slots)))
        sure.append(round(float(np.exp(fused.top - fused.total)[0]), 4))
    first = next(i for i, value in enumerate(sure, 1) if value >= 0.9)
    return Item(3, "a steady token of probability 0.85 passes 0.9 in the second pass", first == 2, {"confidence": sure})


def _attribution() -> Item:
    """Commits that passed through credit alone, and proposals that credit changed."""
    exe, through, changed, commits = filler(53), 0, 0, 0
    for key, example in enumerate(held_out(20)):
        filling = started(exe, example, key)
        [row] = filling.rows
        for _ in filling:
            commit, reply = row.canvas.trace[-1], row.canvas.reply
            assert reply is not None
            at = np.searchsorted(row.canvas.queried, commit.slots)
            plain = np.exp(reply.top - reply.total)[at]
            through += int(((np.array(commit.confidence) >= 0.9) & (plain < 0.9)).sum())
            commits += len(commit.slots)
        assert row.fusion is not None
        changed += row.fusion.changed  # type: ignore[attr-defined]
    figures = {"commits": commits, "through_credit_alone": through, "proposals_changed": changed}
    return Item(5, "what credit did is counted", commits > 0, figures)
