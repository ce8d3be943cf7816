"""N-gram table: guess along a table of word triples that grows while decoding, searched for the likeliest continuations.

Paper: "ADED: Adaptive Draft-Verification for Efficient LLM Decoding" (papers/04). The table maps two tokens to weighted successors. Every round
raises the weight of the triples in the last words of the text, so that it follows what is being written; where the graph returns top-k, what
the model thought likely after each verified row counts as well. A search gives the draft: the paper's Monte Carlo tree search, or expansion of
the likeliest node first, which the paper's constants come close to and which costs a tenth.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush
from math import inf, log, sqrt
from pathlib import Path
from random import Random
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from planc.runtime.drafters.base import Context, DrafterPart, Verified
from planc.runtime.errors import PlanError
from planc.runtime.trees import Cell, Draft

_C1, _C2 = 32.0, 8.0  # weight of the prior in the search
_FLOOR = 0.01  # guesses less likely than this are not worth a place

Row = dict[int, float]  # successor -> weight


class NgramTable(DrafterPart):
    """Searches a table of token triples that grows with the text (papers/04)."""

    data_file: ClassVar[str | None] = "source"
    search: Literal["best_first", "monte_carlo"] = "best_first"
    source: str | None = Field(None, description="an offline table, as `write_table` makes it; counts from the folder of the plan")
    k: int = Field(4, ge=0, le=64, description="likeliest tokens taken from every verified row; 0 learns from the text alone")
    successors: int = Field(12, ge=1, le=64, description="successors kept for two tokens")
    entries: int = Field(65536, ge=16, description="pairs of tokens kept; the one that was longest of no use is forgotten first")
    bump: float = Field(0.04, gt=0, allow_inf_nan=False, description="weight that a triple in the last words gains every round")
    cap: float = Field(3.0, gt=0, allow_inf_nan=False, description="most weight of a triple")
    window: int = Field(16, ge=3, le=256, description="the last words, in tokens")
    depth: int = Field(4, ge=1, le=32, description="deepest guess")
    iterations: int = Field(150, ge=1, le=10_000, description="monte_carlo: rounds of the search")
    paths: int = Field(24, ge=1, le=1024, description="monte_carlo: most visited paths that become guesses")
    seed: int = Field(0, ge=0, lt=2**64, description="monte_carlo: of its random choices")
    scope: Literal["process", "request"] = Field("process", description="how long the table grows")

    @property
    def needs_top_k(self) -> int:
        return self.k

    def build(self, vocab_size: int) -> TableDrafter:
        return TableDrafter(self, vocab_size, None if self.source is None else _load(self.source, vocab_size))


class Offline:
    """A table in arrays: keys [n] uint64 ascending (first token · V + second), ids [n, s] int32 (-1: none), weights [n, s] float."""

    def __init__(self, keys: NDArray[np.uint64], ids: NDArray[np.int32], weights: NDArray[np.floating]) -> None:
        self.keys, self.ids, self.weights = keys, ids, weights

    def row(self, key: int, most: int) -> Row | None:
        """The successors of a pair, a copy."""
        at = int(np.searchsorted(self.keys, np.uint64(key)))
        if at == len(self.keys) or int(self.keys[at]) != key:
            return None
        pairs = zip(self.ids[at].tolist()[:most], self.weights[at].tolist()[:most], strict=True)
        return {token: weight for token, weight in pairs if token >= 0 and weight > 0}


class Table:
    """Two tokens -> weighted successors. Bounded: the pair that gained nothing for longest is forgotten first."""

    def __init__(self, options: NgramTable, vocab_size: int, offline: Offline | None) -> None:
        self.options, self._vocab, self._offline = options, vocab_size, offline
        self.rows: OrderedDict[int, Row] = OrderedDict()

    def row(self, first: int, second: int) -> Row | None:
        """The successors known of two tokens."""
        key = first * self._vocab + second
        row = self.rows.get(key)
        if row is None and self._offline is not None:
            row = self._offline.row(key, self.options.successors)
            if row is not None:
                self._insert(key, row)
        return row

    def ranked(self, first: int, second: int) -> list[tuple[int, float]]:
        """Successors and weights, heaviest first; of equal ones the older."""
        row = self.row(first, second)
        return sorted(row.items(), key=lambda item: -item[1]) if row else []

    def raise_(self, first: int, second: int, third: int, amount: float) -> None:
        """Add to the weight of a triple, up to the cap."""
        key = first * self._vocab + second
        row = self.row(first, second)
        if row is None:
            row = {}
            self._insert(key, row)
        else:
            self.rows.move_to_end(key)
        row[third] = min(self.options.cap, row.get(third, 0.0) + amount)
        if len(row) > self.options.successors:
            del row[min((token for token in row if token != third), key=row.__getitem__)]

    def _insert(self, key: int, row: Row) -> None:
        self.rows[key] = row
        if len(self.rows) > self.options.entries:
            self.rows.popitem(last=False)


class TableDrafter:
    """Runtime object of `NgramTable`: the table, shared by all texts, and how far each text was read."""

    prompt_rows = 0

    def __init__(self, options: NgramTable, vocab_size: int, offline: Offline | None = None) -> None:
        self.options, self.top_k = options, options.k
        self._vocab, self._offline = vocab_size, offline
        self.table = Table(options, vocab_size, offline)
        self._read: dict[int, int] = {}  # sequence -> tokens of its text that were counted once
        self._before: dict[int, int] = {}  # sequence -> the token before its pending one

    def start(self, sequence: int) -> None:
        if self.options.scope == "request" and sequence == 0:  # a batch is one request, and its first text starts first
            self.table = Table(self.options, self._vocab, self._offline)
        self._read[sequence] = 0
        self._before.pop(sequence, None)

    def propose(self, context: Context, draft: Draft) -> None:
        self._grow(context)
        tokens = context.tokens
        if len(tokens) < 2:
            return
        depth = min(self.options.depth, context.depth)
        if self.options.search == "best_first":
            best_first(self.table, draft, tokens[-2], depth, context.budget)
        else:
            monte_carlo(self.table, draft, tokens[-2], depth, context.budget, self.options, Random(self.options.seed ^ len(tokens)))

    def update(self, verified: Verified) -> None:
        """What the model ranked behind a verified row counts as occurrences of falling weight."""
        tokens, before = verified.tokens, self._before.get(verified.sequence)
        if verified.top_ids is not None and self.top_k:
            latest = {-1: before}  # depth -> its last token: rows stand depth first, so that of a row's parent is the last one above it
            for token, depth, likely in zip(tokens, verified.depths, verified.top_ids[:, : self.top_k].tolist(), strict=True):
                first, latest[depth] = latest[depth - 1], token
                if first is not None:
                    for rank, third in enumerate(likely):
                        self.table.raise_(first, token, third, self.options.bump / (1 + rank))
        self._before[verified.sequence] = tokens[verified.rows[-1]]

    def _grow(self, context: Context) -> None:
        """Count the triples of the last words, and once those of all the text before them."""
        tokens, bump = context.tokens, self.options.bump
        start = max(0, min(self._read[context.sequence] - 2, len(tokens) - self.options.window))
        for at in range(start, len(tokens) - 2):
            self.table.raise_(tokens[at], tokens[at + 1], tokens[at + 2], bump)
        self._read[context.sequence] = len(tokens)


def cell_of(rank: int, share: float, weight: float, bump: float) -> tuple[Cell, float]:
    """What is known about a guess: its rank, its share of the weights in its row, whether it was seen more than once; and a rate to start from."""
    often = weight > 1.5 * bump
    return (NgramTable.key, min(rank, 2), int(4 * share), often), (0.55 if often else 0.35) * share


def best_first(table: Table, draft: Draft, before: int, depth: int, budget: int) -> None:
    """Expand the node with the largest product of shares until `budget` guesses are added."""
    bump, added, count = table.options.bump, 0, 0
    heap: list[tuple[float, int, int, int, int, int, float, float]] = []  # -product, order, parent row, rank, before, token, share, weight

    def offer(product: float, parent: int, first: int, second: int) -> None:
        nonlocal count
        successors = table.ranked(first, second) if draft.depths[parent] < depth else []
        total = sum(weight for _, weight in successors)
        for rank, (token, weight) in enumerate(successors):
            if product * weight < _FLOOR * total:
                return
            heappush(heap, (-product * weight / total, count, parent, rank, second, token, weight / total, weight))
            count += 1

    offer(1.0, 0, before, draft.tokens[0])
    while heap and added < budget:
        product, _, parent, rank, second, token, share, weight = heappop(heap)
        size = len(draft)
        row = draft.add(parent, token, *cell_of(rank, share, weight, bump))
        added += len(draft) - size
        offer(-product, row, second, token)


class _Node:
    """A state of the search: two tokens, how it was reached, and what was found behind it."""

    __slots__ = ("children", "first", "parent", "prior", "second", "value", "visits")

    def __init__(self, first: int, second: int, prior: float, parent: _Node | None) -> None:
        self.first, self.second, self.prior, self.parent = first, second, prior, parent
        self.children: list[_Node] = []
        self.visits, self.value = 0, 0.0

    def path(self) -> list[int]:
        """Tokens below the root."""
        return [*self.parent.path(), self.second] if self.parent is not None else []

    def best(self) -> _Node:
        """The child to follow: mean value plus the prior's bonus for what was visited little; the first that was not visited at all."""
        bonus = sqrt(self.visits) * (_C1 + log((self.visits + _C2 + 1) / _C2))

        def score(child: _Node) -> float:
            return inf if not child.visits else child.value / child.visits + child.prior * bonus / (1 + child.visits)

        return max(self.children, key=score)


def monte_carlo(table: Table, draft: Draft, before: int, depth: int, budget: int, options: NgramTable, random: Random) -> None:
    """The paper's search; states on a path are capped at `depth`, the root's included."""
    root = _Node(before, draft.tokens[0], 0.0, None)
    nodes = [root]
    for _ in range(options.iterations):
        node, length = root, 1
        while node.children and length < depth:  # select
            node, length = node.best(), length + 1
        if length < depth and (row := table.row(node.first, node.second)):  # expand: all at once, go on with the last
            node.children = [_Node(node.second, token, weight, node) for token, weight in row.items()]
            nodes += node.children
            node, length = node.children[-1], length + 1
        value = 1.0 + _rollout(table, node, depth - length, random)
        step: _Node | None = node
        while step is not None:  # the value of the path: the weights of its transitions
            value += step.prior
            step = step.parent
        step = node
        while step is not None:
            step.visits, step.value, step = step.visits + 1, step.value + value, step.parent
    nodes.sort(key=lambda node: -node.visits)  # stable: of equal ones the older
    _add(table, draft, before, (node.path() + _likeliest(table, node) for node in nodes[: options.paths]), budget, depth)


def _rollout(table: Table, node: _Node, steps: int, random: Random) -> float:
    """Weights along a random continuation, drawn in proportion to them."""
    first, second, total = node.first, node.second, 0.0
    for _ in range(steps):
        row = table.row(first, second)
        if not row:
            break
        (third,) = random.choices(list(row), list(row.values()))
        first, second, total = second, third, total + row[third]
    return total


def _likeliest(table: Table, node: _Node) -> list[int]:
    return [token for token, _ in table.ranked(node.first, node.second)[:1]]


def _add(table: Table, draft: Draft, before: int, paths: Iterable[list[int]], budget: int, depth: int) -> None:
    """Unite the paths with the draft, most visited first, until `budget` guesses are added: prefixes that are shared count once."""
    bump, added = table.options.bump, 0
    for path in paths:
        row, first, second = 0, before, draft.tokens[0]
        for token in path[:depth]:
            known = draft.children[row].get(token)
            if known is None and added == budget:
                return
            weights = table.row(first, second) or {}
            weight = weights.get(token, 0.0)
            if not weight:  # forgotten meanwhile
                break
            rank = sum(other > weight for other in weights.values())
            row = draft.add(row, token, *cell_of(rank, weight / sum(weights.values()), weight, bump))
            added += known is None
            first, second = second, token


# ---- offline tables ----


def write_table(path: str | Path, texts: Iterable[Sequence[int]], vocab_size: int, *, successors: int = 12, least: int = 2) -> int:
    """Count the triples of `texts` (token ids) and write the table that `source` reads, an .npz file; returns its number of pairs.

    Weights are shares of the counts of a pair; pairs seen fewer than `least` times are left out.
    """
    counts: dict[int, dict[int, int]] = {}
    for text in texts:
        for first, second, third in zip(text, text[1:], text[2:], strict=False):
            row = counts.setdefault(first * vocab_size + second, {})
            row[third] = row.get(third, 0) + 1
    kept = sorted((key, row) for key, row in counts.items() if sum(row.values()) >= least)
    ids = np.full((len(kept), successors), -1, dtype=np.int32)
    weights = np.zeros((len(kept), successors), dtype=np.float16)
    for at, (_, row) in enumerate(kept):
        total = sum(row.values())
        for place, (token, count) in enumerate(sorted(row.items(), key=lambda item: -item[1])[:successors]):
            ids[at, place], weights[at, place] = token, count / total
    with Path(path).open("wb") as file:
        np.savez(file, keys=np.array([key for key, _ in kept], dtype=np.uint64), ids=ids, weights=weights)
    return len(kept)


def _load(path: str, vocab_size: int) -> Offline:
    fix = "name a file that `planc.runtime.drafters.ngram_table.write_table` made for this model"
    try:
        with np.load(Path(path), allow_pickle=False) as file:
            keys, ids, weights = (file[name] for name in ("keys", "ids", "weights"))
    except (OSError, ValueError, EOFError, LookupError, TypeError) as error:
        raise PlanError("plan-bad-value", f"ngram_table: cannot read the table {path}: {error}", fix=fix) from error
    if wrong := next(_faults(keys, ids, weights, vocab_size), None):
        raise PlanError("plan-bad-value", f"ngram_table: {path} is no table for a vocabulary of {vocab_size}: {wrong}", fix=fix)
    return Offline(keys.astype(np.uint64), ids.astype(np.int32), weights)


def _faults(keys: NDArray[np.uint64], ids: NDArray[np.int32], weights: NDArray[np.floating], vocab_size: int) -> Iterator[str]:
    if keys.ndim != 1 or ids.ndim != 2 or ids.shape != weights.shape or len(keys) != len(ids):
        yield f"keys {list(keys.shape)}, ids {list(ids.shape)} and weights {list(weights.shape)} do not belong together"
    elif keys.dtype.kind not in "iu" or ids.dtype.kind not in "iu" or weights.dtype.kind != "f":
        yield "keys and ids must be integers, weights floats"
    elif (keys[1:] <= keys[:-1]).any():
        yield "keys do not ascend"
    elif keys.size and int(keys[-1]) >= vocab_size**2:
        yield "a key lies outside the vocabulary"
    elif ids.size and (ids.min() < -1 or ids.max() >= vocab_size):
        yield "an id lies outside the vocabulary"
    elif not np.isfinite(weights).all():
        yield "a weight is not finite"
