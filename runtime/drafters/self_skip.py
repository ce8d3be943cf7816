"""Draft with the target itself, some of its sublayers left out (papers/43, "SWIFT: On-the-Fly Self-Speculative Decoding").

The layers that stay read the target's own keys and values of the committed text. What they write for guesses lies behind the committed
length, where verification overwrites it: there is no second cache, and nothing to catch up with. Unlike the paper, which searches the set of
sublayers while it serves, the set is searched when the plan is compiled (`SkipSearch`), by speed and not by match rate at a fixed size; a plan
may also name it. Side candidates, which the paper verifies around the chain, are left to other drafters.
"""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from planc.runtime.drafters.base import Context, DrafterPart, Host, Loaded, Verified
from planc.runtime.drafters.draft_model import Economy, Floor, chain
from planc.runtime.drafters.model_source import ModelSource
from planc.runtime.engine import Cache, EngineSpec, Ints, Outputs, Step
from planc.runtime.errors import PlanError
from planc.runtime.trees import Draft

Gates = NDArray[np.bool_]  # [units] whether each sublayer runs
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
    attention: tuple[int, ...] = Field((), description="layers whose attention is left out; without both lists compile searches")
    mlp: tuple[int, ...] = Field((), description="layers whose MLP is left out")
    steps: int = Field(160, ge=1, description="sets that the search tries")
    most: float = Field(0.6, gt=0.0, lt=1.0, description="largest share of the sublayers that the search leaves out")
    min_p: Floor = Field("auto", description="stop where the guesses so far are right with less probability; auto: by measured cost")

    def build_for(self, host: Host) -> SkipDrafter | Idle:
        """See `DrafterPart`."""
        if not self.attention and not self.mlp:
            return Idle()
        assert isinstance(host.engine, Skippable), "compile refuses this drafter for other engines"
        skip = host.engine.skipping()
        return SkipDrafter(host, skip, gates_of(skip.units, self.attention, self.mlp), self.min_p)


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

    def __init__(self, host: Host, skip: SkipEngine, gates: Gates, min_p: Floor = "auto") -> None:
        self.skip, self.gates = skip, gates
        self.passes = 0  # so far, with sublayers left out
        self._economy = Economy(host, min_p, skip.pass_ms(gates))
        self._eos = frozenset(host.eos_ids)

    def start(self, sequence: int) -> None:
        """The cache is the target's."""
        self._economy.forget(sequence)

    def propose(self, context: Context, draft: Draft) -> None:
        """A chain from the root. Its rows are scratch: afterwards the cache has the length that it had."""
        cache, length = context.cache, len(context.tokens) - 1
        assert cache is not None and cache.lengths[context.sequence] == length, "the pending token is not cached"
        limit = min(cache.capacity, self.skip.spec.max_length)
        most = min(context.budget, context.depth, limit - length - 1)
        if most < 1 or context.paused or not self._economy.worth(context):
            return
        view = _View(cache, context.sequence)
        source = ModelSource(Loaded(_OneSequence(self.skip, self.gates), limit), cache=view, held=context.tokens[:-1])
        try:
            chain(source, context, draft, most, self._economy, self._eos, "self_skip")
        finally:
            self.passes += source.passes
            cache.rollback(context.sequence, length)

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


class _View:
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
