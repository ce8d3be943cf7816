"""What a draft model says after a text and after guesses below it, for one sequence.

The cache holds `held`: draft-model ids of the text, and of a path of guesses behind it. Nothing is ever told to it: every call looks how much
of what it needs is already held, rolls back to there and feeds the rest (papers/A0 section 8). So catching up after any number of accepted
guesses, after rounds without drafts and with the next request's text are one rule.

A model may have a second, fuzzy form on the same cache (papers/14, "EasySpec"): `expand` runs that one, and `begin` the exact one. What the fuzzy
form wrote is rolled back at the next `begin` even where its guess was accepted, because its keys and values are approximate: the pass over
the accepted tokens writes them again, exactly, and gives the first guess of the round as well.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from planc.runtime.drafters.base import Loaded
from planc.runtime.engine import Cache, Engine, Floats, Outputs, Step
from planc.runtime.trees import Draft

_CHUNK = 128  # rows of a pass that feeds text
_SLOTS = 256  # caches are made in multiples of this


class ModelSource:
    """`begin` with a text, then `expand` rows of the tree of guesses behind it."""

    def __init__(
        self, model: Loaded, longest: int = 0, *, cache: Cache | None = None, held: Sequence[int] = (), calibrate: bool = True
    ) -> None:
        """`longest`: most tokens that the text may come to, so that the cache is made once; 0 when that is not known.

        A `cache` that is given already has the ids `held`. Without `calibrate` what the fuzzy form wrote stays, and only a text that does
        not continue the last one is read by the exact form.
        """
        self.model, self.fuzzy, self.longest, self.calibrate = model, model.fuzzy, longest, calibrate
        self.held = list(held)  # draft-model ids in the cache
        self.exact = len(self.held)  # how many of them the exact form wrote
        self.passes = 0  # so far
        self._text: list[int] = []  # draft-model ids of the text of the last `begin`
        self._cache = cache

    def room(self, tokens: Sequence[int]) -> int:
        """Guesses that fit behind a text; less than 0 when the text itself does not."""
        limit = min(self.model.capacity, self.model.engine.spec.max_length)
        return limit - (len(tokens) if self.model.vocabulary is None else len(self.model.vocabulary.feed(tokens)))

    def begin(self, tokens: Sequence[int]) -> Floats:
        """Logits [V] after the text."""
        self._text = self._ids(tokens)
        self._make_room(len(self._text))
        if self.fuzzy and (self.calibrate or not self.exact or self._text[: self.exact] != self.held[: self.exact]):
            self._forget(self.exact)
            return np.asarray(self._translated(self._follow(self._text))[0])
        return np.asarray(self._translated(self._follow(self._text, self.fuzzy))[0])

    def expand(self, draft: Draft, rows: Sequence[int]) -> Floats:
        """Logits [n, V] after n >= 1 rows of a draft, each on its own path behind the text of the last `begin`.

        One pass where it is one row or the engine takes trees, else a pass for each row. What all paths share joins the cache.
        """
        paths = [self._path(draft, row) for row in rows]
        self._make_room(len(self._text) + sum(map(len, paths)))
        if len(paths) > 1 and self.model.engine.spec.trees:
            return self._translated(self._branch(paths))
        return np.concatenate([self._translated(self._follow(self._text + path, self.fuzzy)) for path in paths])

    def _ids(self, tokens: Sequence[int]) -> list[int]:
        return list(tokens) if self.model.vocabulary is None else self.model.vocabulary.feed(tokens)

    def _path(self, draft: Draft, row: int) -> list[int]:
        path: list[int] = []
        while row > 0:
            path.append(draft.tokens[row])
            row = draft.parents[row]
        return self._ids(path[::-1])

    def _translated(self, logits: Floats) -> Floats:
        """A copy over the target's ids: engines reuse their buffers."""
        return logits.copy() if self.model.vocabulary is None else self.model.vocabulary.logits(logits)

    def _make_room(self, slots: int) -> None:
        if self._cache is not None and self._cache.capacity >= slots:
            return
        wanted = max(slots + _SLOTS // 4, self.longest + _SLOTS // 4)
        limit = min(self.model.capacity, self.model.engine.spec.max_length)
        self._cache = None  # free the old one before the new one is made
        self._cache, self.held, self.exact = self.model.engine.new_cache(1, min(limit, -(-wanted // _SLOTS) * _SLOTS)), [], 0

    def _rest(self, ids: Sequence[int]) -> Sequence[int]:
        """Roll back to what is held of `ids`, and the ids that follow: never none, because a row is needed for its logits."""
        assert self._cache is not None
        most = min(len(self.held), len(ids) - 1)
        same = most if self.held[:most] == ids[:most] else bisect_left(range(most), True, key=lambda i: self.held[: i + 1] != ids[: i + 1])
        self._forget(same)
        return ids[same:]

    def _forget(self, length: int) -> None:
        """Roll back to the first `length` ids."""
        assert self._cache is not None
        self._cache.rollback(0, length)
        del self.held[length:]
        self.exact = min(self.exact, length)

    def _follow(self, ids: Sequence[int], fuzzy: Engine | None = None) -> Floats:
        """Logits [1, V'] after a path, which the cache then holds; from the fuzzy form if that is given."""
        rest = self._rest(ids)
        for start in range(0, len(rest), _CHUNK):
            part = rest[start : start + _CHUNK]
            outputs = self._pass(fuzzy, part, None, len(part) - 1, logits=start + _CHUNK >= len(rest))
            self._keep(part, exact=fuzzy is None)
        assert outputs.logits is not None
        return np.asarray(outputs.logits[0])

    def _branch(self, paths: Sequence[Sequence[int]]) -> Floats:
        """Logits [n, V'] after each path, in one pass over the tree that they form behind what they share."""
        shortest = min(map(len, paths))
        shared = next((i for i in range(shortest - 1) if len({path[i] for path in paths}) > 1), shortest - 1)
        stem = self._text + list(paths[0][:shared])
        if rest := list(self._rest([*stem, -1])[:-1]):
            self._pass(self.fuzzy, rest, None, len(rest) - 1)
            self._keep(rest, exact=self.fuzzy is None)
        nodes: dict[tuple[int, int], int] = {}  # (parent, id) -> row
        ends = []
        for path in paths:
            row = -1
            for i in path[shared:]:
                row = nodes.setdefault((row, i), len(nodes))
            ends.append(row)
        first = min(ends)
        outputs = self._pass(self.fuzzy, [i for _, i in nodes], [parent for parent, _ in nodes], first, logits=True)
        assert outputs.logits is not None
        return np.asarray(outputs.logits[0][np.array(ends) - first])

    def _pass(
        self, fuzzy: Engine | None, ids: Sequence[int], parents: Sequence[int] | None, logits_from: int, *, logits: bool = False
    ) -> Outputs:
        assert self._cache is not None
        self.passes += 1
        tree = None if parents is None else np.array([parents], dtype=np.int64)
        step = Step(np.array([ids], dtype=np.int64), tree, logits_from)
        return (fuzzy or self.model.engine).forward(self._cache, step, logits=logits)

    def _keep(self, ids: Sequence[int], *, exact: bool) -> None:
        assert self._cache is not None
        self._cache.keep(0, np.arange(len(ids)))
        if exact and self.exact == len(self.held):
            self.exact += len(ids)
        self.held += ids
