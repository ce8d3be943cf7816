"""What a draft head says after a text and after guesses below it, for one sequence.

`StateSource` is for a head with a decoder layer, and so with a cache (EAGLE; FSPAD, papers/83). `TailSource` is for heads without memory
(Medusa; Hydra, papers/49).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planc.runtime.drafters.base import Loaded
from planc.runtime.engine import CHAIN, Cache, Floats, Outputs, Step
from planc.runtime.trees import Draft

STATE = "tap.state"  #: output of the target that the head reads, [B,R,K]
FEEDBACK = "tap.feedback"  #: output of the head that the next guess is fed, [B,R,K]

_CHUNK = 128  # rows of a pass that feeds text
_SLOTS = 256  # caches are made in multiples of this


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

    def room(self, tokens: Sequence[int]) -> int:
        """How deep guesses behind a text may be."""
        return self.model.capacity - len(tokens)

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


class TailSource:
    """`begin` with a text whose last state was observed, then `expand` rows of the tree of guesses behind it.

    Guess i below the newest verified token is made by level i of the head, a small graph of its own. It reads the target's state of that token
    and, where the head is conditioned on them, the tokens in between; what it has read it hands on to the next level. Rows know nothing of each
    other, so all guesses of a level are one pass, whatever tree they form.
    """

    longest = 0

    def __init__(self, model: Loaded, *, conditioned: bool = True) -> None:
        """`conditioned`: whether guesses depend on those before them; if not, all rows of a level have the same logits."""
        self.engines = (model.engine, *model.levels)
        self.passes = 0  # so far
        self._conditioned = conditioned
        self._caches = [engine.new_cache(1, _CHUNK) for engine in self.engines]
        self._known, self._state = 0, np.zeros(0, dtype=np.float32)  # tokens of the text up to the one whose state this is
        self._read: dict[int, Floats] = {}  # row of the draft -> what the level that made its children has read, [K]
        self._same: dict[int, Floats] = {}  # level -> its logits [1, V], where they are the same for all rows

    def room(self, tokens: Sequence[int]) -> int:
        """How deep guesses behind a text may be."""
        return len(self.engines)

    def observe(self, past: int, states: Floats) -> None:
        """The target's states [n, K] at the positions from `past` on."""
        if len(states):
            self._known, self._state = past + len(states), states[-1].copy()

    def ready(self, tokens: Sequence[int]) -> bool:
        """Whether the state of the last token but the pending one is known."""
        return 1 < len(tokens) == self._known + 1

    def begin(self, tokens: Sequence[int]) -> Floats:
        """Logits [V] after the text."""
        self._read, self._same = {}, {}
        return np.asarray(self._level(0, [0], [tokens[-1]], self._state[None])[0])

    def expand(self, draft: Draft, rows: Sequence[int]) -> Floats:
        """Logits [n, V] after n >= 1 rows of the draft, whose parents were expanded before and which are not as deep as there are levels."""
        found: dict[int, Floats] = {}
        for level in sorted({draft.depths[row] for row in rows}):
            of_level = [row for row in rows if draft.depths[row] == level]
            given = np.stack([self._read[draft.parents[row]] for row in of_level])
            found |= zip(of_level, self._level(level, of_level, [draft.tokens[row] for row in of_level], given), strict=True)
        return np.stack([found[row] for row in rows])

    def _level(self, level: int, rows: Sequence[int], ids: Sequence[int], states: Floats) -> Floats:
        """Logits [n, V] of one level; its rows read the tokens `ids` and the states [n, K]."""
        if not self._conditioned:
            self._read |= dict.fromkeys(rows, states[0])
            if level not in self._same:
                self._same[level] = self._pass(level, [0], ids[:1], states[:1])
            return np.broadcast_to(self._same[level], (len(rows), self._same[level].shape[1]))
        return self._pass(level, rows, ids, states)

    def _pass(self, level: int, rows: Sequence[int], ids: Sequence[int], states: Floats) -> Floats:
        self.passes += 1
        alone = np.full((1, len(ids)), -1, dtype=np.int64)  # no row is behind another: all have one position
        outputs = self.engines[level].forward(
            self._caches[level], Step(np.array([ids], dtype=np.int64), alone, states=states[None]), logits=True
        )
        assert outputs.logits is not None
        if self._conditioned:
            self._read |= zip(rows, outputs.taps[FEEDBACK][0].copy(), strict=True)
        return np.array(outputs.logits[0])
