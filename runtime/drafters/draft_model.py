"""Draft with a second, cheaper model: speculative decoding in its first form (papers/A0 sections 1, 6, 8 and 12).

A chain of guesses, one pass of the draft model each. When sampling it draws with the target's noise, so that models that agree on the
distribution agree on the token. Drafting stops where one more guess costs more than the target time that it can be expected to save.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from planc.runtime.builders import BuilderItem, BuilderPart, Source
from planc.runtime.drafters.base import Context, DrafterPart, Host, Loaded, Verified
from planc.runtime.drafters.model_source import ModelSource
from planc.runtime.engine import Floats
from planc.runtime.errors import PlanError
from planc.runtime.registry import item_of
from planc.runtime.sampling import best
from planc.runtime.trees import Draft

if TYPE_CHECKING:
    from planc.runtime.registry import PlanPart as PassItem
else:
    PassItem = item_of("pass")

FOLDER = "draft"  #: where the artifact of a target keeps that of its draft model
FUZZY = "fuzzy"  #: where the latter keeps that of its fuzzy form

_FLOOR = 0.05  # `min_p: auto` where nothing was measured
_REST, _LONGEST_REST = 16, 1024  # rounds without drafts after drafting was seen not to pay
_NEAR = 8  # the price of one more row is read from the target's cost table between its smallest pass and this many rows
_CONFIDENCE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)  # acceptance is learned per step of the draft's own probability
_SURE = (0.95, 0.8, 0.5)  # the draft's probabilities by which `BySureness.leaves` are counted

Floor = Literal["auto"] | Annotated[float, Field(ge=0.0, le=1.0)]


class DraftModel(DrafterPart):
    """Guesses with a second, cheaper model, which the artifact carries along."""

    conflicts: ClassVar[tuple[str, ...]] = ("draft_model",)
    artifact: str | None = Field(None, description="a compiled artifact to draft with")
    plan: str | None = Field(None, description="a plan file that the draft model is compiled by")
    model: str | None = Field(None, description="with `plan`: name or directory of the draft model; left out: the target itself")
    passes: tuple[PassItem, ...] = Field((), description="draft with the target itself after these passes on top of the plan's")
    fuzzy: tuple[PassItem, ...] = Field(
        (), description="passes that make a cheaper form of the draft model, which makes all guesses of a round but the first (papers/14)"
    )
    calibrate: bool = Field(True, description="with `fuzzy`: let the exact form write the cache of accepted guesses again, every round")
    min_p: Floor = Field("auto", description="stop where the guesses so far are right with less probability; auto: by measured cost")
    builder: BuilderItem | None = Field(None, description="the tree of guesses; left out: one chain that stops at `min_p`")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = [name for name in ("artifact", "plan", "passes") if getattr(self, name)]
        if len(ways) != 1 and not (self.fuzzy and not ways):
            found = f"both {' and '.join(ways)}" if ways else "none of them"
            fix = "draft_model: {artifact: DIR}, {plan: FILE, model: NAME} or {passes: [skip_layers: {layers: [3]}]}"
            raise PlanError("plan-bad-value", f"draft_model takes one of artifact, plan and passes; the plan gives {found}", fix=fix)
        if self.fuzzy and self.artifact is not None:
            raise PlanError(
                "plan-bad-value", "draft_model: a compiled artifact has the form that it has", fix="remove `fuzzy`, or use `plan`"
            )
        if self.model is not None and self.plan is None:
            raise PlanError("plan-bad-value", "draft_model: `model` goes with `plan`", fix="add `plan`, or remove `model`")
        return self

    @property
    def draws(self) -> Literal["nothing", "chain", "tree"]:
        """See `DrafterPart`."""
        return "nothing" if self.builder is None else self.builder.draws

    def build_for(self, host: Host) -> ModelDrafter:
        """See `DrafterPart`."""
        assert self.artifact is not None and self.artifact in host.models, (
            "loading an artifact opens the draft models that its drafters name"
        )
        return ModelDrafter(host, host.models[self.artifact], self.min_p, self.builder, calibrate=self.calibrate)


class ModelDrafter:
    """Runtime object of `DraftModel`: a `ModelSource` per row of the batch."""

    prompt_rows = 0
    top_k = 0

    def __init__(
        self, host: Host, model: Loaded, min_p: Floor = "auto", builder: BuilderPart | None = None, *, calibrate: bool = True
    ) -> None:
        self._model, self._builder, self._calibrate = model, builder, calibrate
        self._sources: dict[int, ModelSource] = {}
        self._economy = Economy(host, min_p, model.pass_ms)
        self._eos = frozenset(host.eos_ids)

    @property
    def passes(self) -> int:
        """Passes of the draft model so far."""
        return sum(source.passes for source in self._sources.values())

    def start(self, sequence: int) -> None:
        """The source sees by itself what it holds of the new text; only the guesses of the old one are forgotten."""
        self._economy.forget(sequence)

    def propose(self, context: Context, draft: Draft) -> None:
        """A chain from the root; where other drafters guessed the same, their guesses gain a second reason."""
        source = self._sources.setdefault(context.sequence, ModelSource(self._model, calibrate=self._calibrate))
        source.longest = max(source.longest, context.longest)
        most = min(context.budget, context.depth, source.room(context.tokens))
        if most <= 0 or context.paused:
            return
        guess(source, context, draft, most, self._builder, self._economy, self._eos, DraftModel.key)

    def update(self, verified: Verified) -> None:
        """Nothing: what was committed is read from the text."""


def guess(
    source: Source,
    context: Context,
    draft: Draft,
    most: int,
    builder: BuilderPart | None,
    economy: Economy,
    eos: frozenset[int],
    key: str,
) -> None:
    """Add what the source thinks, at most `most` deep: the builder's tree, or one chain where drafting is worth its passes."""
    if builder is not None:
        row, own_pass = economy.prices(len(context.tokens))
        builder.grow(source, replace(context, depth=most, row_price=row, pass_price=own_pass), draft, key)
    elif economy.worth(context):
        chain(source, context, draft, most, economy, eos, key)


@dataclass(frozen=True)
class BySureness:
    """Where a chain ends beside its floor, and what stands beside it, by the draft's own probability of the last guess (papers/43)."""

    confidence: float = 0.0  # a guess with less is the last one
    leaves: tuple[int, int, int, int] | None = None  # guesses for its place, itself included: above each of _SURE, and below


def chain(
    source: Source,
    context: Context,
    draft: Draft,
    most: int,
    economy: Economy,
    eos: frozenset[int],
    key: str,
    rule: BySureness = BySureness(),
) -> None:
    """Add the path that the source itself would take, as far as it is worth its passes."""
    floor = economy.floor(len(context.tokens))
    logits = source.begin(context.tokens)
    row, reach, path = 0, 1.0, list[int]()
    while True:
        token = context.draw(logits, path)
        q = probability(logits, token)
        if rule.leaves is not None:
            count = rule.leaves[next((i for i, sure in enumerate(_SURE) if q > sure), len(_SURE))]
            for rank, other in enumerate(other for other in best(logits, count).tolist() if other != token):
                draft.add(row, other, (key, "leaf", rank, count), probability(logits, other))
        row = draft.add(row, token, (key, bisect_right(_CONFIDENCE, q), int(context.sampled)), q)
        path.append(token)
        reach *= draft.p[row]  # the draft's own probability of the path, corrected by what was seen of its kind
        if len(path) == most or reach < floor or q < rule.confidence or token in eos:
            break
        begin = perf_counter()
        logits = source.expand(draft, [row])[0]
        economy.observe((perf_counter() - begin) * 1e3)
    economy.spent(context, path)


def probability(logits: Floats, token: int) -> float:
    """Softmax of the raw logits [V] at one token."""
    highest = logits.max()
    return float(np.exp(logits[token] - highest) / np.exp(logits - highest).sum())


class Economy:
    """When guesses that cost passes are worth it (papers/A0 section 12).

    A guess that is accepted with probability P saves P passes of the target, and costs a pass of the draft model and one more row in the
    target's pass. One more is not worth making where P is below the ratio of the two (`floor`). Drafting as a whole rests, longer every
    time, while the passes that were really saved were worth less than what the guesses cost (`worth`).
    """

    def __init__(self, host: Host, min_p: Floor, ms: float | None) -> None:
        """`ms`: what a one-row pass of the draft model took when it was measured."""
        self._fixed = None if min_p == "auto" else min_p
        self._cost, self._rows, self.ms = host.cost, host.min_rows, ms
        self._guesses: dict[int, tuple[int, list[int]]] = {}  # sequence -> length of the text, and the guesses behind it
        self._balance: float | None = None  # milliseconds saved per round, running mean
        self._rest, self._next_rest = 0, _REST

    def floor(self, past: int) -> float:
        """The probability below which drafting stops."""
        if self._fixed is not None:
            return self._fixed
        prices = self._prices(past)
        return _FLOOR if prices is None else (prices[1] + prices[2]) / prices[0]

    def prices(self, past: int) -> tuple[float, float]:
        """What one more row in the target's pass, and a pass of the draft model, cost in plain passes; 0 where that does not count."""
        prices = None if self._fixed is not None else self._prices(past)
        return (0.0, 0.0) if prices is None else (prices[2] / prices[0], prices[1] / prices[0])

    def worth(self, context: Context) -> bool:
        """Shall this round be drafted for at all?"""
        prices = None if self._fixed is not None else self._prices(len(context.tokens))
        if prices is None:
            return True
        self._settle(context, *prices)
        if self._balance is not None and self._balance < 0.0:
            self._rest -= 1
            if self._rest >= 0:
                return False
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _LONGEST_REST)
        return prices[1] + prices[2] < prices[0]  # else not even a draft that is always right would pay

    def spent(self, context: Context, guesses: list[int]) -> None:
        """What this round guessed; the next round shows what it was worth."""
        self._guesses[context.sequence] = len(context.tokens), guesses

    def forget(self, sequence: int) -> None:
        """A new text begins."""
        self._guesses.pop(sequence, None)

    def observe(self, ms: float) -> None:
        """A pass of the draft model took `ms` milliseconds; the estimate follows slowly, and a disturbed pass counts as twice the usual."""
        self.ms = ms if self.ms is None else self.ms + 0.1 * (min(ms, 2 * self.ms) - self.ms)

    def _prices(self, past: int) -> tuple[float, float, float] | None:
        """Milliseconds of a plain pass of the target, of a pass of the draft model, and of one more row in the target's pass."""
        if self._cost is None or self.ms is None:
            return None
        plain = self._cost.ms(self._rows, past, 1)
        return plain, self.ms, (self._cost.ms(self._rows + _NEAR, past, 1) - plain) / _NEAR

    def _settle(self, context: Context, plain: float, draft: float, row: float) -> None:
        length, guesses = self._guesses.pop(context.sequence, (0, []))
        if not guesses:
            return
        followed = context.tokens[length : length + len(guesses)]
        right = next((i for i, (a, b) in enumerate(zip(guesses, followed, strict=False)) if a != b), min(len(guesses), len(followed)))
        before = plain if self._balance is None else self._balance
        self._balance = before + 0.2 * (right * plain - len(guesses) * (draft + row) - before)
        if self._balance >= 0.0:
            self._rest, self._next_rest = 0, _REST
