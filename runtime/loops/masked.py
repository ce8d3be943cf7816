"""The loop of masked models (papers/A2): a pass, proposals, a decision, writes. It owns correctness and the books; policies only decide.

What it guarantees whatever the policies say: only masked, unlocked slots of the window are written; the mask token never is; every pass that leaves
masks makes progress, or the loop stops with an error; no more passes than slots and slots taken back; finished rows leave the batch.
The order is part of the contract: fusion before confidence, early stop before selection, truncation after the writes, re-masking after that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from planc.runtime.engine import Floats, Ints
from planc.runtime.errors import InputError
from planc.runtime.masked.canvas import Canvas, Slots
from planc.runtime.masked.engine import BUCKETS, HIDDEN, MaskedEngine, Query, Reply, SlotCache
from planc.runtime.masked.hooks import (
    Ask,
    CacheHook,
    EndHook,
    FusionHook,
    InputsHook,
    ModelHook,
    ReviseHook,
    SelectHook,
    StopHook,
    WindowHook,
)
from planc.runtime.sampling import noise, process

if TYPE_CHECKING:
    from planc.runtime.decode import Masked, Sampling


@dataclass
class Row:
    """A canvas and the policies of this row."""

    canvas: Canvas
    window: WindowHook
    cache: CacheHook
    select: SelectHook
    fusion: FusionHook | None = None
    stop: StopHook | None = None
    revise: ReviseHook | None = None
    end: EndHook | None = None
    inputs: InputsHook | None = None
    models: ModelHook | None = None
    model: int = 0  # the one that ran the last pass
    most: int = 0  # passes that the row may take

    @classmethod
    def of(cls, canvas: Canvas, plan: Masked) -> Row:
        """A row by the plan's decode section, checked."""
        plan.check(canvas.field)
        canvas.segments = plan.cache.segments(canvas)
        started: dict[str, Any] = {name: None if hook is None else hook.start(canvas) for name, hook in plan.by_name.items()}
        budget = started["revise"].budget(canvas.field) if started["revise"] is not None else 0
        return cls(canvas, **started, most=canvas.field + budget + 1)


class Filling:
    """One run of the loop over a batch. Iterating gives, after every round, the canvases that it has advanced."""

    def __init__(
        self, engine: MaskedEngine, canvases: Sequence[Canvas], plan: Masked, sampling: Sampling, others: Sequence[MaskedEngine] = ()
    ) -> None:
        self.engines, self.plan, self.sampling = (engine, *others), plan, sampling
        self.rows = [Row.of(canvas, plan) for canvas in canvases]
        self.slots = max(len(canvas.tokens) for canvas in canvases)
        self.caches: dict[int, SlotCache] = {}  # by model
        self.passes = 0  # of the engines; rows share them
        self.peak_bytes = 0  # of caches

    def __iter__(self) -> Iterator[list[Canvas]]:
        for row in self.rows:
            self._finish_if_full(row)
        while live := [row for row in self.rows if not row.canvas.done]:
            asks = []
            for row in live:
                canvas = row.canvas
                canvas.start, canvas.stop, canvas.window = row.window.place(canvas)
                if len(canvas.reserved):
                    canvas.window = canvas.window & np.isin(np.arange(len(canvas.tokens)), canvas.reserved)
                self._choose_model(row)
                asks.append(_with_region(row, row.cache.query(canvas)))
            self._release(live)
            self._run(live, asks)
            for row in live:
                self._advance(row)
            yield [row.canvas for row in live]

    def _choose_model(self, row: Row) -> None:
        """H12; keys and values of one model mean nothing to another."""
        if row.models is None:
            return
        window = self.plan.window.number(row.canvas)
        if (model := row.models.pick(row.canvas, window)) != row.model:
            row.model, row.cache = model, self.plan.cache.start(row.canvas)

    def _release(self, live: Sequence[Row]) -> None:
        """Forget the caches of models that no row needs any more."""
        for model in set(self.caches) - {row.model for row in live}:
            del self.caches[model]

    def _advance(self, row: Row) -> None:
        """Everything between a pass and the next, for one row."""
        canvas = row.canvas
        if canvas.step > row.most:
            raise _stuck(f"{canvas.step} passes for a field of {canvas.field} slots")
        self._propose(row)
        if row.stop is not None and row.stop.all_in(canvas):
            self._all_in(row)
        else:
            slots = canvas.open
            if not len(slots):
                raise _stuck("the window has no masked slot")
            sure = canvas.confidence[slots]
            chosen = np.asarray(row.select.select(canvas, slots, sure), dtype=bool)
            reason = "chosen"
            if not chosen.any():
                chosen, reason = np.arange(len(slots)) == int(np.argmax(sure)), "progress"
            if (tokens := row.select.insist(canvas, slots[chosen])) is not None:
                canvas.x0[slots[chosen]] = tokens
            canvas.write(slots[chosen], reason)
            canvas.reserved = row.select.reserve(canvas)
        if row.end is not None:
            if (length := row.end.cut(canvas)) is not None:
                canvas.cut(length)
            if (token := row.end.fill(canvas)) is not None:
                canvas.fill_rest(token)
        if row.revise is not None and len(again := row.revise.remask(canvas)):
            canvas.remask(again)
        self._finish_if_full(row)

    def _propose(self, row: Row) -> None:
        """H4 and H5: fuse, choose a token for every slot of the query, and say how sure it is. Gaps are of raw logits."""
        canvas, slots = row.canvas, row.canvas.queried
        raw = canvas.reply
        assert raw is not None
        canvas.gap[slots] = raw.top - raw.second
        reply = raw if row.fusion is None else row.fusion.fuse(canvas, slots, raw)
        if self.sampling.temperature > 0.0:
            canvas.x0[slots], logit = self._sample(canvas, slots, reply)
        else:
            canvas.x0[slots], logit = reply.best, reply.top
        canvas.confidence[slots] = self._confidence(canvas, slots, reply, logit)
        canvas.asked[slots] = canvas.step

    def _sample(self, canvas: Canvas, slots: Slots, reply: Reply) -> tuple[Ints, Floats]:
        """A token per slot and its logit: drawn for the open slots, the likeliest elsewhere, which is what an early stop writes.

        The noise belongs to seed, row, slot and step, so that it does not depend on what else shares the pass; in float64, as float32 gives others.
        """
        assert reply.logits is not None
        tokens, plain = reply.best.copy(), self.sampling.top_k == 0 and self.sampling.top_p == 1.0 and self.sampling.min_p == 0.0
        for i in np.flatnonzero(canvas.masked[slots] & canvas.window[slots]):
            line = reply.logits[i].astype(np.float64)
            scores = line / self.sampling.temperature if plain else process(line, self.sampling)
            tokens[i] = np.argmax(scores + noise(self.sampling.seed, canvas.key, (canvas.step << 32) | int(slots[i]), len(scores)))
        return tokens, np.take_along_axis(reply.logits, tokens[:, None], 1)[:, 0]

    def _confidence(self, canvas: Canvas, slots: Slots, reply: Reply, logit: Floats) -> Floats:
        if self.plan.score == "random":
            return canvas.rng.random(len(canvas.tokens))[slots].astype(np.float32)
        if self.plan.score == "neg_entropy":
            return reply.mean - reply.total
        sure: Floats = np.exp(logit - reply.total)
        return sure - np.exp(reply.second - reply.total) if self.plan.score == "margin" else sure

    def _all_in(self, row: Row) -> None:
        """Write the proposals of everything that is masked; what the last pass left out gets a pass of its own first."""
        canvas = row.canvas
        left = np.flatnonzero(canvas.masked)
        if (canvas.asked[left] != canvas.step).any():
            cached = row.model in self.caches
            self._run([row], [Ask(left if cached else np.arange(canvas.length), "all_in", cached=cached)])
            self._propose(row)
        canvas.write(left, "all_in")

    def _finish_if_full(self, row: Row) -> None:
        canvas = row.canvas
        if not canvas.masked.any():
            canvas.done = True
            canvas.finish = "eos" if canvas.ids and canvas.ids[-1] in canvas.ends else "length"

    # ---- passes ------------------------------------------------------------------------------------------------------------------

    def _run(self, rows: Sequence[Row], asks: Sequence[Ask]) -> None:
        """Rows whose queries have the same form and bucket share a pass; every canvas gets its reply, and its costs are counted."""
        groups: dict[tuple[int, str, int], list[tuple[Row, Ask, Slots]]] = {}
        for row, ask in zip(rows, asks, strict=True):
            slots = np.union1d(ask.slots, self._sources(row, ask.slots))
            if ask.layers is not None:
                self._by_layer(row, ask, slots)
                continue
            size = row.canvas.length if not ask.cached else next((b for b in BUCKETS if b >= len(slots)), self.slots)
            groups.setdefault((row.model, "slots" if ask.cached else "full", size), []).append((row, ask, slots))
        for (model, form, _), group in groups.items():
            width = max(len(slots) for _, _, slots in group)
            width = next((b for b in BUCKETS if b >= width), width) if form == "slots" else width
            query = self._query(group, width)
            reply = self.engines[model].forward(self._cache(model, form), query, logits=self.sampling.temperature > 0.0)
            self.passes += 1
            for b, (row, ask, slots) in enumerate(group):
                self._take(row.canvas, reply.row(b, np.searchsorted(slots, self._sources(row, ask.slots))), ask.slots)
                self._count(row, ask.mode, len(slots) * self.engines[model].spec.layers, ask.cached)

    def _query(self, group: Sequence[tuple[Row, Ask, Slots]], width: int) -> Query:
        spec, cached = self.engines[group[0][0].model].spec, group[0][1].cached
        end = self.slots if cached else width
        tokens, places = np.zeros((len(group), width), np.int64), np.full((len(group), width), end, np.int64)
        segments = np.stack([_padded(row.canvas.visible, end) for row, _, _ in group])
        tracked = np.zeros((len(group), width, spec.tracked), np.int64)
        for b, (row, _, slots) in enumerate(group):
            read = row.canvas.tokens if row.inputs is None else row.inputs.tokens(row.canvas)
            tokens[b, : len(slots)], places[b, : len(slots)] = read[slots], slots
            if row.fusion is not None and spec.tracked:
                about = np.minimum(slots + spec.shift, len(row.canvas.tokens) - 1)
                tracked[b, : len(slots)] = row.fusion.track(row.canvas, about)
        if not cached:
            places = np.broadcast_to(np.arange(width), places.shape).copy()
        numbers = np.array([next(i for i, other in enumerate(self.rows) if other is row) for row, _, _ in group])
        return Query(numbers, tokens, places, segments, cached, tracked if spec.tracked else None)

    def _by_layer(self, row: Row, ask: Ask, slots: Slots) -> None:
        canvas, layers, engine = row.canvas, ask.layers, self.engines[row.model]
        assert layers is not None
        query, everything = (self._query([(row, ask, part)], len(part)) for part in (slots, np.arange(canvas.length)))
        watched = np.resize(layers.watched, engine.spec.layers)
        cache = self._cache(row.model, "slots")
        reply, refreshed, found = engine.forward_by_layer(cache, query, everything, watched, layers.window, layers.check)
        self.passes += 1
        about = np.arange(canvas.length) if refreshed else ask.slots
        self._take(canvas, reply.row(0, np.searchsorted(found, self._sources(row, about))), about)
        reused = engine.spec.layers - refreshed + (refreshed > 0)  # the layer that was found stale ran twice
        canvas.cost.refreshed_layers += refreshed
        self._count(row, "refresh" if refreshed else ask.mode, reused * len(slots) + refreshed * canvas.length, True)

    def _sources(self, row: Row, slots: Slots) -> Slots:
        """Whose outputs speak about these slots."""
        return np.maximum(slots - 1, 0) if self.engines[row.model].spec.shift else slots

    def _take(self, canvas: Canvas, reply: Reply, slots: Slots) -> None:
        canvas.reply, canvas.queried = reply, slots
        canvas.changed.difference_update(map(int, slots))
        canvas.step += 1

    def _count(self, row: Row, mode: str, token_layers: int, cached: bool) -> None:
        cost, spec = row.canvas.cost, self.engines[row.model].spec
        cost.passes += 1
        cost.modes[mode] += 1
        cost.token_layers += token_layers
        cost.attention_pairs += token_layers * row.canvas.length
        cost.multiplications += token_layers * spec.layer_parameters
        cost.kv_bytes += token_layers * spec.slot_bytes // max(1, spec.layers) if cached else 0

    def _cache(self, model: int, form: str) -> SlotCache:
        """Made when it is first needed; nothing of it is left for another run."""
        if form != "slots":
            return SlotCache({}, self.slots)
        if model not in self.caches:
            self.caches[model] = self.engines[model].new_cache(len(self.rows), self.slots)
            self.peak_bytes = max(self.peak_bytes, sum(cache.bytes() for cache in self.caches.values()))
        return self.caches[model]


def _with_region(row: Row, ask: Ask) -> Ask:
    """A query that also holds what the early stop looks at."""
    region = row.stop.region(row.canvas) if row.stop is not None else np.zeros(0, dtype=np.int64)
    return replace(ask, slots=np.union1d(ask.slots, region)) if len(region) else ask


def _padded(segments: Ints, size: int) -> Ints:
    return np.concatenate([segments[:size], np.full(max(0, size - len(segments)), HIDDEN)])


def _stuck(message: str) -> InputError:
    return InputError(
        "decode-stuck", f"the policies of the decode section make no progress: {message}", fix="use another selection or window"
    )
