"""Acceptance by sample-then-match (papers/A0 sections 2, 5 and 6), written once for chains and trees, greedy and sampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from planc.runtime.trees import Draft

#: (row, tokens accepted below the root up to and with that row) -> the token that plain decoding would commit after that row
Choose = Callable[[int, list[int]], int]


@dataclass(frozen=True, slots=True)
class Walk:
    """What a verified draft yields. `rows[i]` is the row whose output chose `tokens[i]`, so both have 1 + accepted entries."""

    rows: list[int]  # the root and the accepted guesses, ascending
    tokens: list[int]  # the accepted guesses, then the correction or bonus token


def walk(draft: Draft, choose: Choose) -> Walk:
    """Follow the target's own choices down the tree until they leave it.

    At every row the target chooses once (argmax, or the sample that plain decoding would draw there with the same noise); a guess is
    accepted when it equals that choice. So the committed text is the plain text for any tree, however it was made: exact for greedy, and
    for coupled sampling token by token. Rows that the text does not visit are never evaluated.
    """
    rows, tokens = [0], list[int]()
    while True:
        y = choose(rows[-1], tokens)
        child = draft.children[rows[-1]].get(y)
        tokens.append(y)
        if child is None:
            return Walk(rows, tokens)
        rows.append(child)
