"""The engine contract: what a backend offers to the decoding loops. numpy in, numpy out.

Glossary. B sequences in a batch; R rows of a step; V vocabulary; K top-k width; *committed*: part of the text for good; *pending*: the last
committed token, whose keys and values are not in the cache yet (papers/A0 section 1: kv length = committed - 1 between rounds).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

CHAIN = None  #: `Step.parents` of a plain chain
NEVER = 1 << 30  #: `Cache.horizon` where nothing changes


@dataclass(frozen=True)
class Step:
    """Rows of tokens that go through the model in one pass.

    Row r of sequence b sees the sequence's cached tokens, itself and its ancestors. Its K/V are written to slot `length[b] + r`; its position is
    `length[b] + depth(r)`. A chain (`parents is None`) is the tree in which row r's parent is r - 1.
    """

    tokens: Ints  # [B, R] token ids
    parents: Ints | None = CHAIN  # [B, R] parent row, -1 for a child of the cache, parents before children; None for a chain
    logits_from: int = 0  # first row whose outputs are wanted; outputs have R - logits_from rows
    sequences: Ints | None = None  # [B] which sequences of the cache these are, ascending; None: all of them
    counts: Ints | None = None  # [B] rows of each sequence before its padding, which an engine may leave out; None: all R
    least: int = 1  # rows that no kernel may be given fewer than, because fewer would round differently
    firsts: Ints | None = None  # [B] first row with outputs of each sequence, with which its outputs begin; of ragged engines only
    states: Floats | None = None  # [B, R, K] what a draft head reads beside the tokens; None: zeros


@dataclass(frozen=True)
class Outputs:
    """What a pass returned. Arrays are views that stay valid until the next pass with the same cache."""

    argmax: Ints | None = None  # [B, R'] lowest id on ties
    logits: Floats | None = None  # [B, R', V]
    top_ids: Ints | None = None  # [B, R', K] descending by logit
    top_logits: Floats | None = None  # [B, R', K] of these
    taps: dict[str, Floats] = field(default_factory=dict)  # name -> [B, R', ...]


@dataclass(frozen=True)
class EngineSpec:
    """What an engine can do; loops check it before they start."""

    vocab_size: int
    max_length: int  # longest sequence that positions allow
    top_k: int = 0  # width of `top_ids` and `top_logits`, 0 when the graph has none
    trees: bool = True  # `Step.parents` accepted
    taps: tuple[str, ...] = ()
    guesses: int = 0  # tokens behind a prompt that its caches want guessed before they are sealed
    ragged: bool = False  # rows beyond `Step.counts` are left out of the pass, so that sequences may bring different numbers of them


class Cache(Protocol):
    """State of B sequences. `lengths[b]` tokens of sequence b are committed; whatever lies beyond is scratch.

    What has a body here is what a cache without a policy does: nothing (`runtime/kv`).
    """

    lengths: Ints  # [B]
    capacity: int  # slots per sequence
    prompt_rows: int = 0  # last rows of a prompt whose outputs it wants

    def keep(self, sequence: int, rows: Ints) -> None:
        """Commit `rows` (ascending) of the last step of `sequence`: their entries become slots length .. length + len(rows)."""

    def rollback(self, sequence: int, length: int) -> None:
        """Forget everything after the first `length` slots of `sequence`."""

    def seal(self, sequence: int, guessed: int = 0) -> None:
        """The prompt of `sequence` is complete. The first `guessed` rows of the last pass, not committed, are a guess of what follows."""
        return

    def horizon(self, sequence: int) -> int:
        """Commits until what a row of `sequence` sees changes otherwise than by that row, that commit included.

        A pass of at most so many rows gives every row what it would see if tokens came one by one.
        """
        return NEVER

    def bytes(self) -> int:
        """Bytes that the cache holds in memory."""


class Engine(Protocol):
    """A loaded model. Stateless: all state is in the cache."""

    spec: EngineSpec

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` sequences of up to `capacity` slots."""

    def forward(self, cache: Cache, step: Step, *, logits: bool = False, top_k: bool = False) -> Outputs:
        """Run one pass. Writes K/V of the rows beyond the committed length and moves no length. `argmax` is always returned."""
