"""Draft with the target itself, some of its sublayers left out (papers/43, "SWIFT: On-the-Fly Self-Speculative Decoding").

The layers that stay read the target's own keys and values of the committed text. What they write for guesses lies behind the committed
length, where verification overwrites it: there is no second cache, and nothing to catch up with. Which sublayers are left out is named by the
plan, searched while text is served as in the paper (`ServingSearch`), or searched when the plan is compiled, by speed (`SkipSearch`).
"""

from __future__ import annotations

from typing import ClassVar, Protocol, Self, runtime_checkable

import numpy as np
from pydantic import Field, model_validator

from planc.runtime.drafters.base import Context, DrafterPart, Host, Loaded, Verified
from planc.runtime.drafters.draft_model import BySureness, Economy, Floor, chain
from planc.runtime.drafters.model_source import ModelSource
from planc.runtime.drafters.serving_search import Gates, Serving, ServingSearch
from planc.runtime.drafters.skip_search import chain_speed
from planc.runtime.engine import Cache, EngineSpec, Ints, Outputs, Step
from planc.runtime.errors import PlanError
from planc.runtime.trees import Draft

Units = tuple[tuple[int, str], ...]  # layer and kind, attention or mlp, of every gate


class SkipEngine(Protocol):
    """A target whose sublayers can be left out, on the target's own caches."""

    spec: EngineSpec
    units: Units

    def forward(self, cache: Cache, sequence: int, step: Step, gates: Gates, *, logits: bool = False) -> Outputs:
        """A pass [1, R] of one sequence."""

    def replay(self, cache: Cache, sequence: int, tokens: Ints, gates: Gates) -> Ints:
        """What would have been guessed after each of the last cached `tokens` [W]: argmax [W]. The cache is left as it was."""

    def pass_ms(self, gates: Gates) -> float | None:
        """What a pass of one row takes, as measured; None when it was not."""


@runtime_checkable
class Skippable(Protocol):
    """An engine that has the graph for it."""

    def skipping(self) -> SkipEngine:
        """The same target, with gates."""


class SelfSkip(DrafterPart):
    """Guesses with the target itself, some of its sublayers left out (papers/43)."""

    conflicts: ClassVar[tuple[str, ...]] = ("self_skip",)
    attention: tuple[int, ...] = Field((), description="layers whose attention is left out; without both lists they are searched")
    mlp: tuple[int, ...] = Field((), description="layers whose MLP is left out")
    search: Serving | None = Field(
        None, description="search while text is served; the lists, or every other layer, are the set to begin with"
    )
    steps: int = Field(160, ge=1, description="sets that compile tries where there are neither lists nor `search`")
    most: float = Field(0.6, gt=0.0, lt=1.0, description="largest share of the sublayers that compile leaves out")
    min_p: Floor = Field("auto", description="stop where the guesses so far are right with less probability; auto: by measured cost")
    confidence: float = Field(0.0, ge=0.0, le=1.0, description="stop behind a guess that the draft itself gives less probability")
    leaves: tuple[int, int, int, int] | None = Field(
        None,
        description="when greedy: guesses for one place where the draft's probability is above 0.95, 0.8, 0.5, and below; one of them goes on",
    )

    @model_validator(mode="after")
    def _one_search(self) -> Self:
        fields = type(self).model_fields
        if self.search is not None and (changed := [name for name in ("steps", "most") if getattr(self, name) != fields[name].default]):
            message = f"self_skip: {changed[0]} belongs to the search of compile, `search` to that of the runtime"
            raise PlanError("plan-conflict", message, fix=f"remove {changed[0]} or `search`")
        return self

    def build_for(self, host: Host) -> SkipDrafter | Idle:
        """See `DrafterPart`."""
        if not self.attention and not self.mlp:
            return Idle()
        assert isinstance(host.engine, Skippable), "compile refuses this drafter for other engines"
        skip = host.engine.skipping()
        return SkipDrafter(host, skip, gates_of(skip.units, self.attention, self.mlp), self)


def free_units(units: Units) -> Gates:
    """Gates that may be closed: the first and the last layer always run, where the model has more than two."""
    ends = {units[0][0], units[-1][0]} if len({layer for layer, _ in units}) > 2 else set[int]()
    return np.array([layer not in ends for layer, _ in units], dtype=np.bool_)


def alternating(units: Units, ratio: float) -> Gates:
    """What a search begins with: as many gates closed as `ratio` of the free ones, in every other layer first."""
    free = np.flatnonzero(free_units(units))
    order = sorted(free, key=lambda unit: units[unit][0] % 2 == 0)  # stable: odd layers, then even ones
    gates = np.ones(len(units), dtype=np.bool_)
    gates[order[: int(ratio * len(free))]] = False
    return gates


def gates_of(units: Units, attention: tuple[int, ...], mlp: tuple[int, ...]) -> Gates:
    """Open gates but for these layers' attention and MLP.

    Raises PlanError[skip-out-of-range] for a sublayer that the model does not have.
    """
    closed = {*((layer, "attention") for layer in attention), *((layer, "mlp") for layer in mlp)}
    if missing := sorted(closed - set(units)):
        layer, kind = missing[0]
        known = sorted({layer for layer, _ in units})
        fix = f"use layers {known[0]}..{known[-1]}"
        raise PlanError("skip-out-of-range", f"self_skip: the model has no {kind} of its own in layer {layer}", fix=fix)
    return np.array([unit not in closed for unit in units], dtype=np.bool_)


class SkipDrafter:
    """Runtime object of `SelfSkip`."""

    prompt_rows = 0
    top_k = 0

    def __init__(self, host: Host, skip: SkipEngine, gates: Gates, part: SelfSkip) -> None:
        self.skip, self.gates, self.part = skip, gates, part
        self.search = None if part.search is None else ServingSearch(part.search, free_units(skip.units), gates)
        self._cost, self._rows = host.cost, host.min_rows
        self._economy = Economy(host, part.min_p, skip.pass_ms(gates))
        self.passes = 0  # so far, with sublayers left out
        self._eos = frozenset(host.eos_ids)
        self._prompts: dict[int, int] = {}  # sequence -> tokens of its prompt, known from its first round on
        self._rounds = 0

    def start(self, sequence: int) -> None:
        """The cache is the target's."""
        self._economy.forget(sequence)
        self._prompts.pop(sequence, None)

    def propose(self, context: Context, draft: Draft) -> None:
        """A chain from the root. Its rows are scratch: afterwards the cache has the length that it had."""
        cache, length = context.cache, len(context.tokens) - 1
        assert cache is not None and cache.lengths[context.sequence] == length, "the pending token is not cached"
        if self.search is not None and not context.paused:
            self._look(self.search, cache, context)
        limit = min(cache.capacity, self.skip.spec.max_length)
        most = min(context.budget, context.depth, limit - length - 1)
        if most < 1 or context.paused or not self._economy.worth(context):
            return
        view = _View(cache, context.sequence)
        source = ModelSource(Loaded(_OneSequence(self.skip, self.gates), limit), cache=view, held=context.tokens[:-1])
        rule = BySureness(self.part.confidence, self.part.leaves if context.siblings and not context.sampled else None)
        try:
            chain(source, context, draft, most, self._economy, self._eos, "self_skip", rule)
        finally:
            self.passes += source.passes
            cache.rollback(context.sequence, length)

    def _look(self, search: ServingSearch, cache: Cache, context: Context) -> None:
        """One step of the search, on the newest tokens that the target chose itself."""
        tokens, window = context.tokens, search.options.window
        if context.sequence not in self._prompts:
            self._prompts[context.sequence] = len(tokens) - 1
            search.renew()
        self._rounds += 1
        if search.done or self._rounds % search.options.interval or len(tokens) - self._prompts[context.sequence] <= window + 1:
            return
        gates = search.next()
        self.passes += 1
        guesses = self.skip.replay(cache, context.sequence, np.array(tokens[-window - 1 : -1], dtype=np.int64), gates)
        match = float((guesses == tokens[-window:]).mean())
        if search.learn(gates, match if search.options.objective == "match" else self._speed(match, gates, len(tokens))):
            self.gates, self._economy.ms = gates, self.skip.pass_ms(gates)

    def _speed(self, match: float, gates: Gates, past: int) -> float:
        """Decoding speed against plain; by sublayers that run where nothing was measured."""
        cost, draft = self._cost, self.skip.pass_ms(gates)
        if cost is None or draft is None:
            return chain_speed(match, float(gates.mean()), lambda rows: 1.0 + 0.05 * (rows - 1))
        return chain_speed(match, draft, lambda rows: cost.ms(max(rows, self._rows), past, 1))

    def update(self, verified: Verified) -> None:
        """Nothing is learned but the rates of the tree."""


class Idle:
    """What stands in when the search found no set that pays: it guesses nothing, and the second graph is never opened."""

    prompt_rows = 0
    top_k = 0

    def start(self, sequence: int) -> None:
        """Nothing."""

    def propose(self, context: Context, draft: Draft) -> None:
        """Nothing."""

    def update(self, verified: Verified) -> None:
        """Nothing."""


class _View(Cache):
    """One sequence of the target's cache, as a cache of its own."""

    def __init__(self, cache: Cache, sequence: int) -> None:
        self.cache, self.sequence = cache, sequence
        self.lengths, self.capacity = cache.lengths[sequence : sequence + 1], cache.capacity

    def keep(self, sequence: int, rows: Ints) -> None:
        self.cache.keep(self.sequence, rows)

    def rollback(self, sequence: int, length: int) -> None:
        self.cache.rollback(self.sequence, length)

    def bytes(self) -> int:
        return 0  # the target's


class _OneSequence:
    """Passes over a view, with one set of sublayers."""

    def __init__(self, skip: SkipEngine, gates: Gates) -> None:
        self.skip, self.gates, self.spec = skip, gates, skip.spec

    def new_cache(self, batch: int, capacity: int) -> Cache:
        raise AssertionError("the cache is the target's, whose capacity bounds the draft")

    def forward(self, cache: Cache, step: Step, *, logits: bool = False, top_k: bool = False) -> Outputs:
        assert isinstance(cache, _View)
        return self.skip.forward(cache.cache, cache.sequence, step, self.gates, logits=logits)
