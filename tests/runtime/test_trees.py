"""Draft trees: merging, choosing sub-trees, packing, and the walk that accepts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planc.runtime.acceptance import walk
from planc.runtime.trees import Draft, Proposal, Rates, chain, pack


@st.composite
def drafts(draw: st.DrawFn, most: int = 14) -> Draft:
    draft = Draft(draw(st.integers(0, 5)))
    for _ in range(draw(st.integers(0, most))):
        parent = draw(st.integers(0, len(draft) - 1))
        draft.add(parent, draw(st.integers(0, 5)), ("any", draw(st.integers(0, 2))), draw(st.floats(0.0, 1.0)))
    return draft


def test_duplicates_merge_and_remember_both_sources() -> None:
    draft = Draft(7)
    a = draft.add(0, 3, ("lookup", 2), 0.5)
    assert draft.add(0, 3, ("recycling", 0), 0.4) == a
    assert draft.add(0, 3, ("recycling", 1), 0.4) == a  # a drafter's second vote adds nothing
    b = draft.add(0, 4, ("recycling", 1), 0.1)
    assert (len(draft), b) == (3, 2)
    assert draft.cells[a] == (("lookup", 2), ("recycling", 0))
    assert draft.p[a] == pytest.approx(1 - 0.5 * 0.6)
    assert draft.reach() == pytest.approx([1.0, 0.7, 0.1])


@settings(max_examples=150, deadline=None)
@given(drafts(), st.data())
def test_a_ranking_prefix_is_a_tree_of_the_likeliest_rows(draft: Draft, data: st.DataObject) -> None:
    reach = draft.reach()
    ranking = draft.ranking(reach)
    n = data.draw(st.integers(0, len(ranking)))
    taken = draft.take(ranking[:n])
    assert len(taken) == n + 1
    assert all(parent < row for row, parent in enumerate(taken.parents))
    assert sorted(taken.reach(), reverse=True)[1:] == pytest.approx(sorted(reach[1:], reverse=True)[:n])
    for row in range(1, len(taken)):
        assert taken.children[taken.parents[row]][taken.tokens[row]] == row
        assert taken.depths[row] == taken.depths[taken.parents[row]] + 1


@settings(max_examples=150, deadline=None)
@given(drafts())
def test_best_path_is_the_best_of_all_paths(draft: Draft) -> None:
    reach = draft.reach()

    def promise(row: int) -> float:
        return reach[row] + max((promise(child) for child in draft.children[row].values()), default=0.0)

    path = draft.best_path(reach)
    assert [draft.parents[row] for row in path] == [0, *path][:-1]
    assert 1.0 + sum(reach[row] for row in path) == pytest.approx(promise(0))
    assert draft.take(path).is_chain


def test_take_puts_the_likeliest_branch_into_consecutive_rows() -> None:
    draft = Draft(0)
    for token, p in ((1, 0.2), (2, 0.7), (3, 0.1)):
        draft.add(0, token, ("any",), p)
    deep = draft.add(2, 5, ("any",), 0.9)
    draft.add(deep, 6, ("any",), 0.9)
    taken = draft.take(range(1, len(draft)))
    assert taken.tokens == [0, 2, 5, 6, 1, 3]
    assert taken.parents == [-1, 0, 1, 2, 0, 0]


def drawn() -> Draft:
    """Another drafter's guess 5 at the root, then draws 5, 7, 7, 8 with replacement, and one draw 9 below the first of them."""
    draft = Draft(0)
    draft.add(0, 5, ("other", 0), 0.5)
    draft.proposals[0] = Proposal(np.ones(10, dtype=np.float32), "with_replacement")
    for token in (5, 7, 7, 8):
        draft.draw(0, token, ("drawn", 0), 0.5)
    draft.proposals[1] = Proposal(np.ones(10, dtype=np.float32))
    draft.draw(1, 9, ("drawn", 0), 0.5)
    return draft


def test_draws_remember_their_order_and_meet_what_is_there() -> None:
    draft = drawn()
    assert draft.tokens == [0, 5, 7, 8, 9]
    assert (draft.proposals[0].drawn, draft.proposals[0].marks) == ([5, 7, 7, 8], [2, 2, 3, 3])
    assert draft.cells[1] == (("other", 0), ("drawn", 0))
    assert [draft.path(row) for row in range(5)] == [[], [5], [7], [8], [5, 9]]


@pytest.mark.parametrize(("count", "draws"), [(0, []), (1, []), (2, [5, 7]), (3, [5, 7, 7, 8]), (4, [5, 7, 7, 8]), (9, [5, 7, 7, 8])])
def test_first_counts_a_draw_that_met_a_row_like_any_other(count: int, draws: list[int]) -> None:
    """With room for one guess the draw 5 is cut as a draw of any other token would be, though its row is there."""
    cut = drawn().first(count)
    assert cut.tokens == [0, 5, 7, 8, 9][: count + 1]
    assert (cut.proposals[0].drawn if 0 in cut.proposals else []) == draws
    assert (1 in cut.proposals) == (count >= 4)


def test_first_path_leaves_draws_beside_an_older_guess_out() -> None:
    path = drawn().first_path(3)
    assert path.tokens == [0, 5, 9]
    assert {row: proposal.drawn for row, proposal in path.proposals.items()} == {1: [9]}


def test_a_tree_cut_by_estimates_has_no_proposals() -> None:
    assert not drawn().take([1, 2]).proposals


def test_pack_pads_behind_the_last_row() -> None:
    tree = Draft(0)
    tree.add(0, 1, ("any",), 0.5)
    tree.add(0, 2, ("any",), 0.5)
    step = pack([tree, chain([9]), chain([4, 5, 6, 7])], min_rows=2)
    assert step.tokens.tolist() == [[0, 1, 2, 2], [9, 9, 9, 9], [4, 5, 6, 7]]
    assert step.parents is not None
    assert step.parents.tolist() == [[-1, 0, 0, 2], [-1, 0, 1, 2], [-1, 0, 1, 2]]
    assert pack([chain([1, 2]), chain([3])], min_rows=5).parents is None
    assert pack([chain([1, 2])], min_rows=5).tokens.tolist() == [[1, 2, 2, 2, 2]]


@settings(max_examples=150, deadline=None)
@given(drafts(), st.lists(st.integers(0, 5), min_size=20, max_size=20))
def test_walk_commits_what_plain_decoding_would(draft: Draft, plain: list[int]) -> None:
    asked: list[int] = []

    def choose(row: int, path: list[int]) -> int:
        assert path == plain[: len(path)]
        asked.append(row)
        return plain[draft.depths[row]]

    result = walk(draft, choose)
    assert result.tokens == plain[: len(result.tokens)]
    assert result.rows == sorted(asked) == asked
    assert [draft.tokens[row] for row in result.rows[1:]] == result.tokens[:-1]
    last = result.rows[-1]
    assert result.tokens[-1] not in draft.children[last]  # the longest possible run


def test_rates_start_at_the_prior_and_end_at_the_truth() -> None:
    rates = Rates()
    cell = (("lookup", 1),)
    assert rates.get(cell, 0.2) == 0.2
    for hit in itertools.islice(itertools.cycle([True, True, True, False]), 400):
        rates.observe(cell, hit)
    assert rates.get(cell, 0.2) == pytest.approx(0.75, abs=0.04)
    for _ in range(400):
        rates.observe(cell, hit=False)
    assert rates.get(cell, 0.2) < 0.05


def test_rates_learn_from_guesses_that_were_not_verified() -> None:
    rates = Rates(strength=1.0)
    draft = Draft(0, rates)
    right = draft.add(0, 1, ("a", 0), 0.5)
    draft.add(0, 2, ("a", 1), 0.5)
    below = draft.add(right, 3, ("b", 0), 0.5)
    draft.add(below, 4, ("c", 0), 0.5)
    rates.learn(draft, [1, 9])
    assert rates.get((("a", 0),), 0.5) > 0.5 > rates.get((("a", 1),), 0.5)
    assert rates.get((("b", 0),), 0.5) < 0.5
    assert rates.get((("c", 0),), 0.5) == 0.5  # its parent was wrong: nothing is known about it
