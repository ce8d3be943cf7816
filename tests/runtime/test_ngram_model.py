"""The n-gram model: what it guesses from a table, and files that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drafting import generate
from toy_engine import ToyEngine

from planc.runtime.decode import Decode, Sampling, Tree
from planc.runtime.drafters import Context, NgramModel
from planc.runtime.drafters.ngram_model import MULTIPLIER, BackOff, NgramDrafter, load_table, write_table
from planc.runtime.errors import PlanError
from planc.runtime.trees import Draft

V = 30


def key(*tokens: int) -> int:
    return sum((token + 1) * pow(MULTIPLIER, j, 2**64) for j, token in enumerate(reversed(tokens))) % 2**64


def table(rows: dict[tuple[int, ...], dict[int, float]], order: int = 3, width: int = 2) -> BackOff:
    found = sorted((key(*context), list(after.items())) for context, after in rows.items())
    ids, shares = np.full((len(found), width), -1, np.int32), np.zeros((len(found), width), np.uint8)
    for at, (_, after) in enumerate(found):
        for place, (token, share) in enumerate(after):
            ids[at, place], shares[at, place] = token, round(255 * share)
    return BackOff(order, np.array([k for k, _ in found], np.uint64), ids, shares, {})


KNOWN = table({(1,): {2: 0.6, 3: 0.3}, (2,): {4: 0.9}, (1, 2): {5: 0.8, 4: 0.1}, (7, 1, 2): {6: 0.7}, (5,): {1: 0.03}})


def proposed(tokens: list[int], draft: Draft | None = None, **options: Any) -> Draft:
    draft = draft or Draft(tokens[-1])
    NgramDrafter(KNOWN).propose(Context(0, tokens, **{"budget": 16, "depth": 8, **options}), draft)
    return draft


def test_the_longest_context_counts() -> None:
    assert proposed([2], budget=1).tokens[1:] == [4]
    assert proposed([1, 2], budget=1).tokens[1:] == [5]
    assert proposed([9, 1, 2], budget=1).tokens[1:] == [5]
    assert proposed([7, 1, 2], budget=1).tokens[1:] == [6]
    assert len(proposed([9])) == 1


def test_guesses_follow_guesses_likeliest_first() -> None:
    draft = proposed([8, 1])
    assert [draft.path(row) for row in range(1, len(draft))] == [[2], [2, 5], [3], [2, 4]]
    assert draft.reach()[1:] == pytest.approx([0.6, 0.48, 0.3, 0.06], abs=0.01)
    assert 1 not in [draft.tokens[row] for row in range(1, len(draft))], "0.6 x 0.8 x 0.03 is not worth a place"


def test_budget_depth_and_chains_are_kept() -> None:
    assert [len(proposed([8, 1], budget=n)) - 1 for n in range(6)] == [0, 1, 2, 3, 4, 4]
    assert max(proposed([8, 1], depth=1).depths) == 1
    assert proposed([8, 1], siblings=False).is_chain


def test_a_guess_that_another_drafter_made_counts_twice() -> None:
    draft = Draft(1)
    other = draft.add(0, 2, ("other",), 0.5)
    last = draft.add(other, 9, ("other",), 0.5)
    proposed([8, 1], draft)
    assert [cell[0] for cell in draft.cells[other]] == ["other", "ngram_model"] and draft.p[other] > 0.6
    assert draft.path(last) == [2, 9] and 5 in draft.children[other]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=4)])
def test_text_stays_the_same(sampling: Sampling) -> None:
    random = np.random.default_rng(0)
    rows = {(int(t),): {int(random.integers(V)): 0.5, int(random.integers(V)): 0.4} for t in range(V)}
    prompts = [[3, 1, 4, 1, 5], [2, 7]]
    decode = Decode(max_new_tokens=30, sampling=sampling)
    plain, _ = generate(ToyEngine(V), prompts, decode)
    drafted, _ = generate(ToyEngine(V), prompts, decode, [NgramDrafter(table(rows))], Tree(budget=4))
    assert drafted == plain


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "table.npz"
    path.write_bytes(write_table(3, KNOWN.keys, KNOWN.ids, KNOWN.shares, {"tokens": 7}))
    made = NgramModel(file=str(path)).build(V).table
    assert made.about == {"tokens": 7, "order": 3}
    assert all(np.array_equal(getattr(made, name), getattr(KNOWN, name)) for name in ("keys", "ids", "shares"))


def test_bad_tables_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.npz"
    with pytest.raises(PlanError, match="no table yet"):
        NgramModel().build(V)
    with pytest.raises(PlanError, match="cannot read"):
        load_table(path, V)
    path.write_bytes(b"no table")
    with pytest.raises(PlanError, match="cannot read"):
        load_table(path, V)
    np.savez(path, keys=KNOWN.keys)
    with pytest.raises(PlanError, match="cannot read"):
        load_table(path, V)
    good: dict[str, Any] = {"order": 3, "keys": KNOWN.keys, "ids": KNOWN.ids, "shares": KNOWN.shares}
    for fault, wrong in (
        ("order", {"order": 0}),
        ("belong together", {"ids": KNOWN.ids[1:]}),
        ("ascend", {"keys": KNOWN.keys[::-1].copy()}),
        ("must be", {"shares": KNOWN.shares.astype(np.float32)}),
        ("outside the vocabulary", {"ids": KNOWN.ids + V}),
    ):
        path.write_bytes(write_table(**{**good, **wrong}, about={}))
        with pytest.raises(PlanError, match=fault):
            load_table(path, V)
