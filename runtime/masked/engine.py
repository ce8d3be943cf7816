"""The engine contract of models that fill a canvas: any set of slots of a row goes through the network, keys and values addressed by slot.

Letters: B rows, S slots of a canvas, Q slots of a query, L layers, K tracked tokens, V vocabulary. One set of weights has several forms (`FORMS`);
which of them a query takes is a matter of cost alone, never of meaning: a query of all slots gives what the whole model gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from planc.runtime.engine import Floats, Ints

Mask = NDArray[np.bool_]

HIDDEN = np.iinfo(np.int32).max  #: segment of slots that nobody sees: beyond a row's length, and the scratch slot for padding

#: full: all slots, no cache. slots: any slots, cached keys and values of the others. embed, layer.N, head: the latter in pieces.
FORMS = ("full", "slots", "embed", "layer", "head")

BUCKETS = (8, 16, 32, 64)  #: queries are padded to these sizes, so that batches are few; beyond, to the longest row of the pass


@dataclass(frozen=True)
class MaskedSpec:
    """What the engine runs."""

    vocab_size: int
    max_length: int
    mask_id: int
    layers: int
    shift: bool = False  # the output of slot i - 1 predicts slot i
    tracked: int = 0  # K, width of the input `tracked`; 0 where the graph has none
    by_layer: bool = False  # whether the layers can be run one by one
    slot_bytes: int = 0  # bytes of keys and values of one slot in all layers
    layer_parameters: int = 0  # weights of a layer that a slot meets, on average


@dataclass(frozen=True)
class Query:
    """Slots of some rows that go through the network in one pass.

    A slot sees the slots whose segment is not above its own, so that equal segments mean attention in both directions, and rising ones attention
    that is causal by block or by scale.
    """

    rows: Ints  # [B] rows of the cache
    tokens: Ints  # [B, Q]
    slots: Ints  # [B, Q] ascending; the scratch slot S for padding
    segments: Ints  # [B, S]; HIDDEN beyond a row's length
    cached: bool = True  # False: Q is S, the cache is neither read nor written
    tracked: Ints | None = None  # [B, Q, K] tokens whose logits are wanted besides the best


@dataclass(frozen=True)
class Reply:
    """What a pass says about the slots of a query, from logits in which the mask token is impossible."""

    best: Ints  # [B, Q] likeliest token, the lowest id on ties
    top: Floats  # [B, Q] its logit
    second: Floats  # [B, Q] the logit of the next one
    total: Floats  # [B, Q] log of the sum of all exponentials
    mean: Floats  # [B, Q] expected logit; mean - total is the negative entropy
    tracked: Floats | None = None  # [B, Q, K]
    logits: Floats | None = None  # [B, Q, V], only where they were asked for

    def row(self, b: int, keep: NDArray[np.integer] | slice) -> Reply:
        """Of one row, some of its slots."""
        return Reply(*(None if v is None else v[b][keep] for v in vars(self).values()))  # type: ignore[arg-type]


def reply_of(logits: Floats, tracked: Ints | None = None) -> Reply:
    """What the graph computes behind the logits [..., V], on the host: for logits that were changed there."""
    best = logits.argmax(-1)
    order = np.partition(logits, logits.shape[-1] - 2, axis=-1)
    top, second = order[..., -1], order[..., -2]
    weights = np.exp(logits - top[..., None])
    sums = weights.sum(-1)
    finite = np.where(np.isfinite(logits), logits, 0.0)
    found = None if tracked is None else np.take_along_axis(logits, tracked, -1)
    return Reply(best, top, second, top + np.log(sums), (weights * finite).sum(-1) / sums, found, logits)


class Runner(Protocol):
    """What a backend has to offer: run one form on arrays. Names that begin with `past.` are state, updated in place."""

    def run(
        self, form: str, feeds: Mapping[str, np.ndarray], state: Mapping[str, np.ndarray], wanted: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Outputs by name."""


@dataclass
class SlotCache:
    """Keys and values of B rows by slot, and, where layers are refreshed one by one, the input of every layer."""

    state: dict[str, np.ndarray]  # past.N.key and past.N.value [B, heads, S + 1, width]
    slots: int  # S
    hidden: list[np.ndarray] = field(default_factory=list)  # per layer [B, S + 1, D]

    def bytes(self) -> int:
        """Bytes of all slots."""
        return sum(t.nbytes for t in (*self.state.values(), *self.hidden))

    def copy_row(self, source: int, target: int) -> None:
        """Row `target` becomes a copy of row `source`."""
        for tensor in (*self.state.values(), *self.hidden):
            tensor[target] = tensor[source]


@dataclass(frozen=True)
class Probe:
    """What a layer says about its attention: [S] the mean over heads of one slot's attention, and the sum of those of the window."""

    row: Floats
    column_sums: Floats


#: (layer, probe) -> whether this layer and those behind it are computed for all slots
LayerCheck = Callable[[int, Probe], bool]


class MaskedEngine:
    """Runs queries by the forms of a model. Stateless but for what a backend keeps: all state is in the cache."""

    def __init__(self, runner: Runner, spec: MaskedSpec, states: Mapping[str, tuple[tuple[int, int], np.dtype]]) -> None:
        self.runner, self.spec, self.states = runner, spec, dict(states)

    def new_cache(self, rows: int, slots: int) -> SlotCache:
        """An empty cache; slot S of a row is scratch, where padding is written."""
        state = {name: np.zeros((rows, heads, slots + 1, width), kind) for name, ((heads, width), kind) in self.states.items()}
        return SlotCache(state, slots)

    def forward(self, cache: SlotCache, query: Query, *, logits: bool = False) -> Reply:
        """Run one pass; with `cached` the keys and values of its slots are written."""
        if not query.cached:
            feeds = {"input_ids": query.tokens, "position_ids": query.slots, "segments": query.segments}
            return self._reply(self.runner.run("full", self._with_tracked(feeds, query), {}, self._wanted(logits)))
        with _RowState(cache, query.rows) as state:
            return self._reply(self.runner.run("slots", self._with_tracked(self._slot_feeds(query), query), state, self._wanted(logits)))

    def forward_by_layer(
        self, cache: SlotCache, query: Query, everything: Query, watched: Ints, window: Mask, check: LayerCheck
    ) -> tuple[Reply, int, Ints]:
        """A pass of one row in which a layer that `check` finds stale, and all layers behind it, run for all slots, from their cached inputs.

        `watched` [L] slots of the query and `window` [S] say what the probes look at. Returns the reply, how many layers ran for all slots, and the
        slots that the reply is about.
        """
        assert len(query.rows) == 1
        current, refreshed, b = query, 0, int(query.rows[0])
        with _RowState(cache, query.rows) as state:
            hidden = self.runner.run("embed", self._slot_feeds(query), {}, ["next_hidden"])["next_hidden"]
            for layer in range(self.spec.layers):
                if len(cache.hidden) == layer:
                    cache.hidden.append(np.zeros((len(next(iter(cache.state.values()))), cache.slots + 1, hidden.shape[-1]), np.float32))
                cache.hidden[layer][b, current.slots[0]] = hidden[0]
                following, probe = self._layer(layer, current, hidden, state, int(watched[layer]), window)
                if check(layer, probe) and current is query:
                    current, hidden = everything, cache.hidden[layer][b][None, everything.slots[0]]
                    following, _ = self._layer(layer, current, hidden, state, int(watched[layer]), window)
                refreshed += current is everything
                hidden = following
            head = self._with_tracked({**self._slot_feeds(current), "hidden": hidden}, current)
            return self._reply(self.runner.run("head", head, {}, self._wanted(False))), refreshed, current.slots[0]

    def _layer(
        self, layer: int, query: Query, hidden: Floats, state: Mapping[str, np.ndarray], watched: int, window: Mask
    ) -> tuple[Floats, Probe]:
        slots, end = query.slots[0], query.segments.shape[1]
        at = np.minimum(np.searchsorted(slots, [watched]), len(slots) - 1)
        feeds = {**self._slot_feeds(query), "hidden": hidden, "watched": at, "window": window[slots].astype(np.float32)[None]}
        own = {name: tensor for name, tensor in state.items() if name.startswith(f"past.{layer}.")}
        out = self.runner.run(f"layer.{layer}", feeds, own, ["next_hidden", "row", "column_sums"])
        return out["next_hidden"], Probe(out["row"][0, :end], out["column_sums"][0, :end])

    def _slot_feeds(self, query: Query) -> dict[str, np.ndarray]:
        slots = query.segments.shape[1]
        keys = np.concatenate([query.segments, np.full((len(query.segments), 1), HIDDEN)], 1)
        own = np.take_along_axis(keys, query.slots, 1)  # padding sees everything and is read by nobody
        positions = np.minimum(query.slots, max(0, slots - 1))
        return {"input_ids": query.tokens, "position_ids": positions, "segments": keys, "own_segments": own, "slots": query.slots}

    def _with_tracked(self, feeds: dict[str, np.ndarray], query: Query) -> dict[str, np.ndarray]:
        if self.spec.tracked:
            shape = (*query.slots.shape, self.spec.tracked)
            feeds["tracked"] = np.zeros(shape, np.int64) if query.tracked is None else query.tracked
        return feeds

    def _wanted(self, logits: bool) -> list[str]:
        names = ["best", "top", "second", "total", "mean"]
        return names + (["tracked_logits"] if self.spec.tracked else []) + (["logits"] if logits else [])

    def _reply(self, out: dict[str, np.ndarray]) -> Reply:
        return Reply(out["best"], out["top"], out["second"], out["total"], out["mean"], out.get("tracked_logits"), out.get("logits"))


class _RowState:
    """The state of some rows of a cache: the memory itself where they lie together, else copies that are written back."""

    def __init__(self, cache: SlotCache, rows: Ints) -> None:
        self.cache, self.rows = cache, rows
        self.together = bool(np.all(np.diff(rows) == 1))
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        self.state = {name: tensor[part] if self.together else tensor[rows] for name, tensor in cache.state.items()}

    def __enter__(self) -> dict[str, np.ndarray]:
        return self.state

    def __exit__(self, *error: object) -> None:
        if not self.together:
            for name, tensor in self.state.items():
                self.cache.state[name][self.rows] = tensor
