"""The exactness probe: does a row's result depend on the other rows of its pass?

Verified drafts are lossless only if it does not (papers/A0 section 10). The probe compares logits bit for bit, on real text, between plain
decoding (one token after another, at a minimum of rows) and chains of many lengths, and between every path of random trees with
siblings and the same path fed as a chain.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from planc.runtime.contract import Exactness, Level, weakest
from planc.runtime.engine import Cache, Engine, Floats, Ints, Step
from planc.runtime.errors import InputError
from planc.runtime.profile import fill_cache

CHAINS = (2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48)
PAST = (20, 237, 129, 500)  #: a chain of 48 rows behind 237 or 500 crosses a multiple of 256 keys, where kernels change blocks
MINIMUM_ROWS = (1, 2, 4, 8)  #: candidates for the smallest pass; the first that agrees bitwise is taken
TREES_PER_PAST = 6
TREE_ROWS = (5, 8, 12, 16, 24)

_QUICK, _FULL = 8, 24  # tokens of plain decoding: to reject a candidate minimum, and to judge the one taken
_HUGE = float(np.finfo(np.float32).max)  # stands for differences of infinities, which JSON cannot hold


@dataclass
class _Tally:
    """Comparisons so far of one kind."""

    rows: int = 0
    unequal: int = 0
    flips: int = 0
    largest: float = 0.0

    def compare(self, found: Floats, expected: Floats) -> None:
        """Rows [R, V] against what they should be."""
        assert found.shape == expected.shape
        bits = [
            (np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8)) for a, b in zip(found, expected, strict=True)
        ]
        same = np.array([np.array_equal(a, b) for a, b in bits])
        self.rows += len(same)
        if not same.all():
            a, b = found[~same], expected[~same]
            self.unequal += len(a)
            self.flips += int((a.argmax(-1) != b.argmax(-1)).sum())
            with np.errstate(invalid="ignore"):  # inf - inf
                difference = np.abs(a.astype(np.float64) - b)
            self.largest = max(self.largest, float(np.nan_to_num(difference, nan=_HUGE, posinf=_HUGE).max()))

    def line(self) -> str:
        return f"{self.unequal} of {self.rows} rows differ, by up to {self.largest:.3g}, {self.flips} argmax flips"

    def level(self) -> Level:
        return "bitwise" if not self.unequal else "tokens" if not self.flips else "lossy"


@dataclass
class _Place:
    """One place of the text: a cache that holds the past, and the tokens that come next."""

    engine: Engine
    text: Ints  # [past] real tokens in the cache
    following: Ints  # [n] real tokens after them
    cache: Cache
    gaps: list[float] = field(default_factory=list)  # smallest top-2 logit gap of each noted run

    @property
    def past(self) -> int:
        return len(self.text)

    def rows(self, tokens: Ints, parents: Ints | None = None, minimum: int = 1) -> Floats:
        """Logits [R, V] of a pass that is not committed, padded to the minimum as the loops pad (`trees.pack`)."""
        count = len(tokens)
        if count < minimum:
            tokens = np.concatenate([tokens, np.full(minimum - count, tokens[-1])])
            if parents is not None:
                parents = np.concatenate([parents, np.arange(count - 1, minimum - 1)])
        outputs = self.engine.forward(self.cache, Step(tokens[None], None if parents is None else parents[None]), logits=True)
        assert outputs.logits is not None
        return outputs.logits[0, :count].copy()

    def plain(self, count: int, minimum: int) -> Floats:
        """Logits [count, V] of plain decoding: each token in its own pass of `minimum` rows, then committed."""
        found = []
        for token in self.following[:count]:
            found.append(self.rows(np.array([token]), minimum=minimum)[0])
            self.cache.keep(0, np.zeros(1, np.int64))
        self.cache.rollback(0, self.past)
        return np.stack(found)

    def note_gaps(self, logits: Floats) -> None:
        """Remember how close the second-best token came in every row."""
        top = np.partition(logits, -2, axis=-1)[:, -2:].astype(np.float64)
        self.gaps.append(float((top[:, 1] - top[:, 0]).min()))


def probe(
    engine: Engine,
    ids: Sequence[int],
    *,
    capacity: int | None = None,
    tree_block: int | None = None,
    uses_trees: bool = True,
    past: Sequence[int] = PAST,
    chains: Sequence[int] = CHAINS,
    seconds: float = 6.5,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Exactness:
    """Probe an engine on real text.

    Args:
        engine: what to probe.
        ids: token ids of real text; about 560 let every default past length take part.
        capacity: cache slots, as the artifact will use them.
        tree_block: a tree that would cross a multiple of this many keys is made smaller, as the loop will do.
        uses_trees: whether the plan's loop uses trees; decides whether they count for the overall level.
        past, chains: cached tokens and chain lengths to try; those that the text or the cache cannot hold are left out.
        seconds: no new comparison starts after this time, but every place of the text is visited once.
        progress: called as `progress(done, total)`.
    """
    clock = _Clock(seconds, progress)
    places = _places(engine, np.asarray(ids, np.int64), capacity, past, max(chains))
    chain, minimum, notes = _chains(places, sorted(set(chains)), clock)
    tree = _Tally()
    if engine.spec.trees:
        _trees(places, tree, minimum, tree_block, np.random.default_rng(seed), clock)
        if tree.unequal:
            notes.append(f"trees: {tree.line()}")
    batch = _batch(engine, places, minimum)
    if batch.unequal:
        notes.append(f"batches: {batch.line()}")
    clock.finish()
    tree_level = tree.level() if tree.rows else None
    counted = [chain, tree] if uses_trees else [chain]
    return Exactness(
        level=weakest(chain.level(), tree_level) if uses_trees and tree_level else chain.level(),
        chains=chain.level(),
        trees=tree_level,
        batch=batch.level() if batch.rows else None,
        min_rows=minimum,
        tree_block=tree_block,
        probes=sum(t.rows for t in counted),
        flips=sum(t.flips for t in counted),
        smallest_gap=min(gap for place in places for gap in place.gaps),
        largest_difference=max(t.largest for t in counted),
        note="; ".join(notes),
    )


class _Clock:
    """Time left, and the progress bar that shows it."""

    def __init__(self, seconds: float, progress: Callable[[int, int], None] | None) -> None:
        self._start, self._seconds, self._progress = time.perf_counter(), seconds, progress

    def over(self, share: float = 1.0) -> bool:
        """Has this share of the time gone by?"""
        spent = time.perf_counter() - self._start
        if self._progress is not None:
            self._progress(min(99, int(100 * spent / max(self._seconds, 1e-9))), 100)
        return spent > share * self._seconds

    def finish(self) -> None:
        if self._progress is not None:
            self._progress(100, 100)


def _places(engine: Engine, ids: Ints, capacity: int | None, past: Sequence[int], longest: int) -> list[_Place]:
    """Caches filled with the text up to each past length that leaves room for at least a short chain."""
    limit = min(capacity or engine.spec.max_length, engine.spec.max_length)
    usable = min(len(ids), limit)
    if usable < _QUICK + 1:
        raise InputError("input-invalid", f"the exactness probe needs at least {_QUICK + 1} tokens of text, got {usable}")
    lengths = [p for p in dict.fromkeys(past) if 0 < p <= usable - _QUICK] or [usable - _QUICK]
    places = []
    for length in lengths:
        cache = engine.new_cache(1, capacity or min(limit, length + longest + max(MINIMUM_ROWS)))
        fill_cache(engine, cache, ids[None, :length])
        room = min(limit, cache.capacity) - length
        places.append(_Place(engine, ids[:length], ids[length : length + min(longest, room - max(MINIMUM_ROWS) + 1)], cache))
    return [place for place in places if len(place.following) > 1] or places[:1]


def _chains(places: list[_Place], chains: list[int], clock: _Clock) -> tuple[_Tally, int, list[str]]:
    """Find the smallest minimum of rows at which chains equal plain decoding bit for bit; the tally is the one of that minimum."""
    notes: list[str] = []
    fallback: tuple[_Tally, int] | None = None
    for minimum in MINIMUM_ROWS:
        tally = _compare_chains(places, chains, minimum, _QUICK, clock)
        if not tally.unequal or minimum == 2:  # 2 is what the loop uses when nothing is bitwise
            tally = _compare_chains(places, chains, minimum, _FULL, clock)
        if not tally.unequal:
            return tally, minimum, notes
        if minimum <= 2:
            notes.append(f"passes of {minimum} row{'s' * (minimum > 1)} against longer ones: {tally.line()}")
        if minimum == 2:
            fallback = tally, minimum
    assert fallback is not None
    return *fallback, notes


def _compare_chains(places: list[_Place], chains: list[int], minimum: int, count: int, clock: _Clock) -> _Tally:
    """Rows of chains of at least `minimum` rows against `count` tokens of plain decoding (beyond: against the longest chain)."""
    tally = _Tally()
    for number, place in enumerate(places):
        if number and clock.over(0.6):
            break
        fitting = [n for n in chains if minimum <= n <= len(place.following)] or [len(place.following)]
        if count == _QUICK:
            fitting = [n for n in fitting if n <= 2 * _QUICK] or fitting[:1]
        expected = place.plain(min(count, fitting[-1]), minimum)
        for length in reversed(fitting):
            found = place.rows(place.following[:length], minimum=minimum)
            tally.compare(found[: len(expected)], expected[:length])
            if length > len(expected):
                expected = np.concatenate([expected, found[len(expected) :]])
        place.note_gaps(expected)
        if tally.unequal and count == _QUICK:
            break
    return tally


def _trees(places: list[_Place], tally: _Tally, minimum: int, block: int | None, rng: np.random.Generator, clock: _Clock) -> None:
    """Every root-to-leaf path of random trees with siblings against the same path fed as a chain."""
    for turn in range(TREES_PER_PAST):
        for place in places:
            if tally.rows and clock.over():
                return
            room = len(place.following)
            if block is not None:
                room = min(room, block - place.past % block)
            size = min(TREE_ROWS[turn % len(TREE_ROWS)], room)
            if size < 3:
                continue
            parents = _random_parents(size, rng)
            tokens = _tree_tokens(parents, place.following, rng)
            found = place.rows(tokens, parents, minimum)
            for leaf in sorted(set(range(size)) - set(parents.tolist())):
                path = _path(parents, leaf)
                expected = place.rows(tokens[path], minimum=minimum)
                tally.compare(found[path], expected)


def _batch(engine: Engine, places: list[_Place], minimum: int) -> _Tally:
    """Two texts of different length in one pass against each alone."""
    tally, pair = _Tally(), (places[0], places[-1])
    rows = min(len(place.following) for place in pair)
    try:
        cache = engine.new_cache(2, max(place.cache.capacity for place in pair))
    except InputError:  # an engine of one sequence; batches then run one after another
        return tally
    lengths = [place.past for place in pair]
    texts = np.stack([np.resize(place.text, max(lengths)) for place in pair])  # the shorter one goes on with anything: it is rolled back
    fill_cache(engine, cache, texts)
    for sequence, length in enumerate(lengths):
        cache.rollback(sequence, length)
    for count in sorted({max(minimum, 2), rows} & set(range(minimum, rows + 1))):
        tokens = np.stack([place.following[:count] for place in pair])
        outputs = engine.forward(cache, Step(tokens), logits=True)
        assert outputs.logits is not None
        together = outputs.logits.copy()
        for sequence, place in enumerate(pair):
            tally.compare(together[sequence], place.rows(tokens[sequence]))
    return tally


def _random_parents(size: int, rng: np.random.Generator) -> Ints:
    """Parents [size] of a random tree: the root, two children of it at least, the rest anywhere above."""
    parents = np.array([-1, 0, 0] + [int(rng.integers(0, r)) for r in range(3, size)], np.int64)
    return parents


def _tree_tokens(parents: Ints, following: Ints, rng: np.random.Generator) -> Ints:
    """The first node of every depth carries the text's own token, its cousins other tokens of the text."""
    depths = np.zeros(len(parents), np.int64)
    tokens = np.empty(len(parents), np.int64)
    for row, parent in enumerate(parents):
        depths[row] = 0 if parent < 0 else depths[parent] + 1
        first = not (depths[:row] == depths[row]).any()
        tokens[row] = following[depths[row]] if first else rng.choice(following)
    return tokens


def _path(parents: Ints, leaf: int) -> list[int]:
    """Rows from the root to `leaf`."""
    path = [leaf]
    while parents[path[-1]] >= 0:
        path.append(int(parents[path[-1]]))
    return path[::-1]
