"""Prompt lookup: guess that what followed the last words before will follow them again.

An index of n-grams replaces the rescan of the text: each committed token adds `max_ngram` entries and a lookup is a few dictionary
accesses, whatever the length of the text. The drafter's confidence comes from how far the match reaches back beyond the n-gram.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from planc.runtime.drafters.base import Context, DrafterPart, Verified
from planc.runtime.trees import Cell, Draft

_REACH_BACK = 16  # longest common suffix that is told apart
_FLOOR = 0.01  # guesses less likely than this are not worth a place

#: match length -> (length class, acceptance rate before anything is learned)
_CLASSES: tuple[tuple[int, float], ...] = tuple(
    (low, prior)
    for low, high, prior in (
        (1, 1, 0.15), (2, 2, 0.40), (3, 3, 0.50), (4, 4, 0.60), (5, 6, 0.70), (7, 9, 0.80), (10, 15, 0.85), (16, _REACH_BACK, 0.92)
    )
    for _ in range(low, high + 1)
)  # fmt: skip


class PromptLookup(DrafterPart):
    """Copies what followed the longest recent match of the last tokens (prompt lookup, n-gram speculation)."""

    max_ngram: Annotated[int, Field(ge=1, le=_REACH_BACK)] = 3
    min_ngram: Annotated[int, Field(ge=1, le=_REACH_BACK)] = 1
    candidates: Annotated[int, Field(ge=1, le=2)] = 2

    @model_validator(mode="after")
    def _ordered(self) -> PromptLookup:
        if self.min_ngram > self.max_ngram:
            raise ValueError(f"min_ngram {self.min_ngram} is larger than max_ngram {self.max_ngram}")
        return self

    def build(self, vocab_size: int) -> LookupDrafter:
        return LookupDrafter(self.max_ngram, self.min_ngram, self.candidates)


class _Index:
    """Where each n-gram of one text was last continued. An n-gram enters when the token after it is known, so it never finds itself."""

    __slots__ = ("places", "read")

    def __init__(self, max_ngram: int) -> None:
        self.read = 0  # tokens indexed so far
        # [n][n-gram] -> last and next-to-last continuation
        self.places: list[dict[Any, tuple[int, int]]] = [{} for _ in range(max_ngram + 1)]

    def extend(self, tokens: list[int], min_ngram: int) -> None:
        for end in range(max(1, self.read), len(tokens)):
            for n in range(min_ngram, min(len(self.places) - 1, end) + 1):
                places, gram = self.places[n], _gram(tokens, end, n)
                places[gram] = (end, places[gram][0] if gram in places else -1)
        self.read = len(tokens)


def _gram(tokens: list[int], end: int, n: int) -> Any:
    return tokens[end - 1] if n == 1 else tuple(tokens[end - n : end])


class LookupDrafter:
    """Runtime object of `PromptLookup`. State per text: the index, `max_ngram` entries a token."""

    prompt_rows = 0
    top_k = 0

    def __init__(self, max_ngram: int = 3, min_ngram: int = 1, candidates: int = 2) -> None:
        self.max_ngram, self.min_ngram, self.candidates = max_ngram, min_ngram, candidates
        self._indices: dict[int, _Index] = {}

    def start(self, sequence: int) -> None:
        self._indices[sequence] = _Index(self.max_ngram)

    def propose(self, context: Context, draft: Draft) -> None:
        index = self._indices[context.sequence]
        index.extend(context.tokens, self.min_ngram)
        for rank, place in enumerate(self._places(index, context.tokens)):
            self._copy(context, draft, place, rank)

    def update(self, verified: Verified) -> None:
        """Nothing to learn: the text itself is the state, and it is read in `propose`."""

    def _places(self, index: _Index, tokens: list[int]) -> list[int]:
        """Where to copy from: the latest continuations of the longest n-gram, then of shorter ones; at most `candidates`."""
        found: list[int] = []
        for n in range(min(self.max_ngram, len(tokens)), self.min_ngram - 1, -1):
            for place in index.places[n].get(_gram(tokens, len(tokens), n), ()):
                if place >= 0 and place not in found:
                    found.append(place)
                    if len(found) == self.candidates:
                        return found
        return found

    def _copy(self, context: Context, draft: Draft, place: int, rank: int) -> None:
        tokens = context.tokens
        period = len(tokens) - place  # beyond the end of the text the copy goes on with its own guesses
        match = 1
        while match < _REACH_BACK and match < place and tokens[place - 1 - match] == tokens[-1 - match]:
            match += 1
        row, reach, guesses = 0, 1.0, list[int]()
        for step in range(min(context.depth, context.budget)):
            token = tokens[place + step] if step < period else guesses[step - period]
            length, prior = _CLASSES[min(match + step, _REACH_BACK) - 1]
            cell: Cell = (PromptLookup.key, rank, length)
            row = draft.add(row, token, cell, prior)
            guesses.append(token)
            reach *= draft.p[row]
            if reach < _FLOOR:
                return
