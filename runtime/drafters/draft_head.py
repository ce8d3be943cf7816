"""Draft with a head on the target's own hidden states (papers/A1): a decoder layer that guesses the next state, and with it the next token.

The head reads a row per token of the text: the target's state f_t behind token x_t and the embedding of the token x_(t+1) that was chosen there, at
position t. It gives the logits of x_(t+2), and an estimate of f_(t+1) that a guess below that token is fed instead of the true state. So
drafting costs passes of one layer over few rows, and the target is never asked for a state that it has not computed anyway.

EAGLE feeds back the vector that makes the logits; FSPAD (papers/83) has one for each and lets the token gate the state. Which it is stands in the
graph; nothing here depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from planc.runtime.builders import BuilderItem
from planc.runtime.drafters.base import Context, DrafterPart, Host, Loaded, Verified
from planc.runtime.drafters.draft_model import Economy, Floor, guess
from planc.runtime.engine import CHAIN, Cache, Floats, Outputs, Step
from planc.runtime.errors import PlanError
from planc.runtime.trees import Draft

HEAD = "head"  #: where the artifact of a target keeps its draft head
STATE = "tap.state"  #: output of the target that the head reads, [B,R,K]
FEEDBACK = "tap.feedback"  #: output of the head that stands for the next state, [B,R,K]

_CHUNK = 128  # rows of a pass that feeds text
_SLOTS = 256  # caches are made in multiples of this


class DraftHead(DrafterPart):
    """Guesses with a decoder layer on the target's last hidden state, trained by `planc fit` (EAGLE; FSPAD, papers/83)."""

    conflicts = ("draft_head",)
    file: str | None = Field(None, description="trained head (`planc fit` writes it); counts from the folder of the plan")
    artifact: str | None = Field(None, description="set by compile: folder of the artifact that holds the head")
    layer: int = Field(-1, description="decoder layer of the target that the head is made like; -1 is the last")
    fuse: Literal["linear", "gated"] = Field("linear", description="how state and token meet; gated: the token gates the state (papers/83)")
    feedback: Literal["shared", "own"] = Field(
        "shared", description="the vector that is fed back: the one that makes the logits, or one of its own (papers/83)"
    )
    vocabulary: int = Field(
        8192, ge=1, description="tokens that the head chooses from: the most frequent ones of the text it was fitted on"
    )
    min_p: Floor = Field("auto", description="stop where the guesses so far are right with less probability; auto: by measured cost")
    builder: BuilderItem | None = Field(None, description="the tree of guesses; left out: one chain that stops at `min_p`")

    @property
    def draws(self) -> Literal["nothing", "chain", "tree"]:
        """See `DrafterPart`."""
        return "nothing" if self.builder is None else self.builder.draws

    def build_for(self, host: Host) -> HeadDrafter:
        """See `DrafterPart`."""
        if self.artifact is None or self.artifact not in host.models:
            raise PlanError("plan-bad-value", "draft_head has no trained head yet", fix="name a `file`, and make it with `planc fit`")
        if STATE not in host.engine.spec.taps:
            raise PlanError("output-missing", "a draft head reads the target's hidden state, and this graph does not return it")
        return HeadDrafter(host, host.models[self.artifact], self)


class HeadDrafter:
    """Runtime object of `DraftHead`: a `StateSource` per row of the batch."""

    prompt_rows = 0
    top_k = 0

    def __init__(self, host: Host, model: Loaded, options: DraftHead) -> None:
        self._model, self._builder = model, options.builder
        self._sources: dict[int, StateSource] = {}
        self._economy = Economy(host, options.min_p, model.pass_ms)
        self._eos = frozenset(host.eos_ids)

    @property
    def passes(self) -> int:
        """Passes of the head so far."""
        return sum(source.passes for source in self._sources.values())

    def start(self, sequence: int) -> None:
        """The source sees by itself what it knows of the new text."""
        self._economy.forget(sequence)

    def propose(self, context: Context, draft: Draft) -> None:
        """A chain or a tree from the root, where the states of the text are known."""
        source = self._source(context.sequence)
        source.longest = max(source.longest, context.longest)
        most = min(context.budget, context.depth, self._model.capacity - len(context.tokens))
        if most <= 0 or context.paused or not source.ready(context.tokens):
            return
        guess(source, context, draft, most, self._builder, self._economy, self._eos, DraftHead.key)

    def update(self, verified: Verified) -> None:
        """Remember the states behind tokens that are now text."""
        states = verified.taps[STATE]
        before, rows = states[: verified.before], np.array(verified.rows)
        self._source(verified.sequence).observe(verified.past, np.concatenate([before, states[verified.before + rows]]))

    def _source(self, sequence: int) -> StateSource:
        return self._sources.setdefault(sequence, StateSource(self._model))


class StateSource:
    """`begin` with a text whose states were observed, then `expand` rows of the tree of guesses behind it.

    The cache of the head holds a row per token but the first of the text, written from true states, and behind them the path of guesses that
    was last followed, which the next `begin` writes again.
    """

    def __init__(self, model: Loaded, longest: int = 0) -> None:
        """`longest`: most tokens that the text may come to, so that buffers are made once; 0 when that is not known."""
        self.model, self.longest = model, longest
        self.passes = 0  # so far
        self._states: Floats | None = None  # [slots, K] of the target, by position
        self._known = 0  # positions from 0 on whose states are known
        self._cache: Cache | None = None
        self._held: list[int] = []  # ids of the rows that the cache has from true states
        self._stem: list[int] = []  # rows of the draft whose guesses the cache holds behind them
        self._feedback: dict[int, Floats] = {}  # row of the draft -> [K]

    def observe(self, past: int, states: Floats) -> None:
        """The target's states [n, K] at the positions from `past` on; what was known of later ones belongs to another text."""
        end = past + len(states)
        if self._states is None or len(self._states) < end:
            grown = np.empty((max(self.longest, -(-end // _SLOTS) * _SLOTS), states.shape[1]), dtype=np.float32)
            if self._states is not None:
                grown[: self._known] = self._states[: self._known]
            self._states = grown
        del self._held[past:]
        self._states[past:end] = states
        self._known = end if past <= self._known else 0  # a gap: the text began before anybody listened

    def ready(self, tokens: Sequence[int]) -> bool:
        """Whether the states of all of the text but its last token, which is pending, are known."""
        return 1 < len(tokens) <= self._known + 1

    def begin(self, tokens: Sequence[int]) -> Floats:
        """Logits [V] after the text."""
        assert self._states is not None
        ids = list(tokens[1:])  # row t: the state behind token t and the token after it
        self._make_room(len(ids))
        same = min(len(self._held), len(ids) - 1)
        same = next((i for i in range(same) if self._held[i] != ids[i]), same)
        self._rewind(same)
        for start in range(same, len(ids), _CHUNK):
            end = min(start + _CHUNK, len(ids))
            outputs = self._pass(ids[start:end], self._states[start:end], logits=end == len(ids))
            self._keep(end - start)
            self._held += ids[start:end]
        self._feedback = {0: outputs.taps[FEEDBACK][0, -1].copy()}
        assert outputs.logits is not None
        return np.array(outputs.logits[0, -1])

    def expand(self, draft: Draft, rows: Sequence[int]) -> Floats:
        """Logits [n, V] after n >= 1 rows of the draft, whose parents were expanded before."""
        paths = [self._path(draft, row) for row in rows]
        self._make_room(len(self._held) + sum(map(len, paths)))
        if len(paths) > 1 and self.model.engine.spec.trees:
            return self._branch(draft, paths)
        return np.concatenate([self._follow(draft, path) for path in paths])

    def _path(self, draft: Draft, row: int) -> list[int]:
        path: list[int] = []
        while row > 0:
            path.append(row)
            row = draft.parents[row]
        return path[::-1]

    def _follow(self, draft: Draft, path: list[int]) -> Floats:
        """Logits [1, V] after a path, which the cache then holds."""
        shared = next(
            (i for i, (a, b) in enumerate(zip(self._stem, path[:-1], strict=False)) if a != b), min(len(self._stem), len(path) - 1)
        )
        self._rewind(len(self._held), shared)
        rest = path[shared:]
        outputs = self._pass([draft.tokens[row] for row in rest], self._given(draft, rest), logits=True)
        self._keep(len(rest))
        self._stem += rest
        self._feedback[rest[-1]] = outputs.taps[FEEDBACK][0, -1].copy()
        assert outputs.logits is not None
        return np.array(outputs.logits[0, -1:])

    def _branch(self, draft: Draft, paths: list[list[int]]) -> Floats:
        """Logits [n, V] after each path, in one pass over the tree that they form; nothing of it stays in the cache."""
        self._rewind(len(self._held))
        inner = dict.fromkeys(row for path in paths for row in path[:-1])
        ends = [path[-1] for path in paths]
        rows = [*sorted(inner.keys() - set(ends)), *sorted(ends)]  # parents first: they are older
        place = {row: i for i, row in enumerate(rows)}
        parents = np.array([[place.get(draft.parents[row], -1) for row in rows]], dtype=np.int64)
        first = len(rows) - len(ends)
        outputs = self._pass([draft.tokens[row] for row in rows], self._given(draft, rows), parents, first, logits=True)
        for row in ends:
            self._feedback[row] = outputs.taps[FEEDBACK][0, place[row]].copy()
        assert outputs.logits is not None
        return np.asarray(outputs.logits[0][[place[row] - first for row in ends]])

    def _given(self, draft: Draft, rows: Sequence[int]) -> Floats:
        """The states [n, K] that guesses are fed: what the head thought of their parents."""
        return np.stack([self._feedback[draft.parents[row]] for row in rows])

    def _pass(
        self, ids: Sequence[int], states: Floats, parents: np.ndarray | None = CHAIN, first: int | None = None, *, logits: bool
    ) -> Outputs:
        assert self._cache is not None
        self.passes += 1
        step = Step(np.array([ids], dtype=np.int64), parents, len(ids) - 1 if first is None else first, states=states[None])
        return self.model.engine.forward(self._cache, step, logits=logits)

    def _keep(self, rows: int) -> None:
        assert self._cache is not None
        self._cache.keep(0, np.arange(rows))

    def _rewind(self, held: int, stem: int = 0) -> None:
        """Go back to the first `held` rows of the text and `stem` of the guesses behind them."""
        assert self._cache is not None
        del self._held[held:], self._stem[stem:]
        self._cache.rollback(0, held + stem)

    def _make_room(self, slots: int) -> None:
        if self._cache is not None and self._cache.capacity >= slots:
            return
        wanted = max(slots, self.longest) + _SLOTS // 4
        self._cache = None  # free the old one before the new one is made
        self._cache = self.model.engine.new_cache(1, min(self.model.capacity, -(-wanted // _SLOTS) * _SLOTS))
        self._held, self._stem = [], []
