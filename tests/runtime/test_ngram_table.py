"""The n-gram table: what it learns, both searches, offline tables, and the checks of papers/04 on the toy engine."""

from __future__ import annotations

from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pytest
from drafting import Bush, generate
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_engine import ToyEngine

from planc.runtime.decode import Decode, Sampling, Tree
from planc.runtime.drafters import Context, NgramTable, PromptLookup, TokenRecycling, Verified
from planc.runtime.drafters.ngram_table import TableDrafter, write_table
from planc.runtime.errors import PlanError
from planc.runtime.loops import Stats
from planc.runtime.trees import Draft

V = 30
SEARCHES = ("best_first", "monte_carlo")


def drafter(**options: Any) -> TableDrafter:
    made = NgramTable.model_validate(options).build(V)
    made.start(0)
    return made


def proposed(made: TableDrafter, tokens: list[int], *, budget: int = 16, depth: int = 8) -> Draft:
    draft = Draft(tokens[-1])
    made.propose(Context(0, tokens, budget, depth), draft)
    return draft


def paths(draft: Draft) -> list[list[int]]:
    def down(row: int) -> list[list[int]]:
        return [[draft.tokens[row], *rest] for child in draft.children[row].values() for rest in down(child)] or [[draft.tokens[row]]]

    return [path[1:] for path in down(0)]


@pytest.mark.parametrize("search", SEARCHES)
def test_it_continues_what_it_has_read(search: str) -> None:
    made = drafter(search=search)
    draft = proposed(made, [1, 2, 3, 4, 5, 6, 9, 1, 2])
    assert paths(draft) == [[3, 4, 5, 6]]
    assert paths(proposed(drafter(search=search), [1, 2, 3, 4, 5])) == [[]]
    assert len(proposed(drafter(search=search), [1])) == 1


@pytest.mark.parametrize("search", SEARCHES)
def test_the_heavier_successor_comes_first_and_the_budget_holds(search: str) -> None:
    made = drafter(search=search)
    tokens = [1, 2, 3, 7, 1, 2, 4, 8, 1, 2, 4, 9, 1, 2]
    assert proposed(made, tokens, budget=1).tokens[1:] == [4]
    for budget in range(1, 9):
        draft = proposed(made, tokens, budget=budget)
        assert len(draft) - 1 <= budget
        assert max(draft.depths) <= 4
    assert {path[0] for path in paths(draft)} == {3, 4}
    assert draft.p[draft.children[0][4]] > draft.p[draft.children[0][3]]
    assert max(proposed(made, tokens, depth=2).depths) == 2


def test_the_last_words_gain_weight_every_round_up_to_the_cap() -> None:
    made = drafter(bump=0.25, cap=0.6, window=4)
    text = [5, 6, 1, 2, 3, 4]
    weights = []
    for _ in range(3):
        proposed(made, text)
        weights.append(dict(made.table.rows[2 * V + 3]))
    assert weights == [{4: 0.25}, {4: 0.5}, {4: 0.6}]
    assert made.table.rows[5 * V + 6] == {1: 0.25}, "what left the window was counted once"


def test_verified_rows_teach_what_the_model_thinks() -> None:
    made = drafter(k=2, bump=0.1)
    made.update(Verified(0, [8, 3], [0, 1], [0, 1], [3, 4]))  # a prompt: no ids, but the token before the root is known now
    #                         root 4: accepted 5, below it 6 rejected; beside it 7 rejected
    step = Verified(0, [4, 5, 6, 7], [0, 1, 2, 1], [0, 1], [5, 9], np.array([[5, 1, 0], [9, 6, 0], [2, 3, 0], [1, 1, 0]]))
    made.update(step)
    rows = made.table.rows
    assert rows[3 * V + 4] == {5: 0.1, 1: 0.05}
    assert rows[4 * V + 5] == {9: 0.1, 6: 0.05}
    assert rows[5 * V + 6] == {2: 0.1, 3: 0.05}
    assert rows[4 * V + 7] == {1: pytest.approx(0.15)}
    assert set(rows) == {3 * V + 4, 4 * V + 5, 5 * V + 6, 4 * V + 7}
    made.update(Verified(0, [9], [0], [0], [1], np.array([[1, 2]])))
    assert rows[5 * V + 9] == {1: 0.1, 2: 0.05}, "its predecessor is the last accepted guess"
    silent = drafter(k=0)
    silent.update(step)
    assert not silent.table.rows


def test_memory_is_bounded() -> None:
    made, rng = drafter(entries=50, successors=3), np.random.default_rng(0)
    text = rng.integers(0, V, 3000).tolist()
    proposed(made, text)
    assert len(made.table.rows) == 50
    assert max(map(len, made.table.rows.values())) <= 3
    assert text[-3] * V + text[-2] in made.table.rows, "the latest are kept"


def test_scope() -> None:
    for scope, kept in (("process", True), ("request", False)):
        made = drafter(scope=scope)
        proposed(made, [1, 2, 3])
        made.start(0)
        assert bool(made.table.rows) == kept
        assert len(proposed(made, [9, 1, 2])) == 1 + kept


@pytest.mark.parametrize("search", SEARCHES)
def test_it_merges_with_the_guesses_of_others(search: str) -> None:
    made, tokens = drafter(search=search), [1, 2, 3, 4, 1, 2]
    draft = Draft(2)
    row = draft.add(0, 3, ("prompt_lookup", 0, 3), 0.5)
    made.propose(Context(0, tokens, 2, 4), draft)
    assert [cell[0] for cell in draft.cells[row]] == ["prompt_lookup", "ngram_table"]
    assert paths(draft) == [[3, 4, 1]], "a guess that was there takes no budget"


def test_monte_carlo_is_a_function_of_its_seed() -> None:
    text = np.random.default_rng(1).integers(0, 5, 200).tolist()
    drafts = [proposed(drafter(search="monte_carlo", seed=seed), text, budget=40) for seed in (3, 3, 4)]
    assert drafts[0].tokens == drafts[1].tokens
    assert drafts[0].parents == drafts[1].parents
    assert len(drafts[0]) > 10


def test_monte_carlo_and_best_first_agree_on_what_matters() -> None:
    """The paper's constants let the prior dominate, so both searches find much the same guesses."""
    text = np.random.default_rng(2).integers(0, 6, 400).tolist()
    kinds = [proposed(drafter(search=search), text, budget=12) for search in SEARCHES]
    firsts = [set(draft.children[0]) for draft in kinds]
    assert firsts[0] & firsts[1]
    assert len(firsts[0] & firsts[1]) >= len(firsts[1]) / 2


# offline tables


@pytest.mark.parametrize("search", SEARCHES)
def test_an_offline_table_is_read_and_grows(search: str, tmp_path: Path) -> None:
    assert write_table(tmp_path / "table.npz", [[1, 2, 3, 4, 5], [1, 2, 3, 6], [7, 8, 9]], V) == 2
    made = drafter(source=str(tmp_path / "table.npz"), search=search, entries=16)
    draft = proposed(made, [0, 1, 2])
    assert draft.children[0].keys() == {3}
    assert {draft.tokens[row] for row in draft.children[draft.children[0][3]].values()} == {4, 6}
    assert made.table.row(7, 8) is None, "seen once"
    made.table.raise_(1, 2, 9, 0.04)
    assert made.table.rows[1 * V + 2] == {3: 1.0, 9: 0.04}


@pytest.mark.parametrize("change", [
    {"keys": np.array([5, 4], dtype=np.uint64)}, {"keys": np.array([1, V * V], dtype=np.uint64)}, {"ids": np.array([[1], [V]])},
    {"weights": np.array([[1.0], [np.nan]])}, {"weights": np.array([[1], [1]])}, {"ids": np.array([1, 2])}, {"ids": np.array([[1.0], [2.0]])},
    {"keys": None}, None,
])  # fmt: skip
def test_a_bad_table_is_refused(change: dict[str, Any] | None, tmp_path: Path) -> None:
    path = tmp_path / "table.npz"
    if change is not None:
        good = {"keys": np.array([1, 5], dtype=np.uint64), "ids": np.array([[1], [2]]), "weights": np.array([[1.0], [1.0]])}
        np.savez(path, **{name: value for name, value in {**good, **change}.items() if value is not None})
    with pytest.raises(PlanError) as refusal:
        NgramTable(source=str(path)).build(V)
    assert refusal.value.code == "plan-bad-value"


def test_a_table_is_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "table.npz", keys=np.array([{}], dtype=object), ids=np.array([[1]]), weights=np.array([[1.0]]))
    with pytest.raises(PlanError, match="table"):
        NgramTable(source=str(tmp_path / "table.npz")).build(V)
    np.save(tmp_path / "table.npy", np.zeros(3))
    with pytest.raises(PlanError, match="table"):
        NgramTable(source=str(tmp_path / "table.npy")).build(V)


# papers/04, "Works when"


def random_table(path: Path) -> str:
    rng = np.random.default_rng(0)
    write_table(path, rng.integers(0, V, (4, 4000)).tolist(), V)
    return str(path)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, seed=11)], ids=["greedy", "sampled"])
def test_the_text_is_the_plain_one(search: str, sampling: Sampling, tmp_path: Path) -> None:
    engine, decode = ToyEngine(V), Decode(max_new_tokens=24, sampling=sampling)
    prompts = [[1, 2, 3, 4], [5], [7, 8, 9, 10, 11]]
    plain = generate(engine, prompts, decode)
    for options in (
        {},
        {"k": 0},
        {"source": random_table(tmp_path / "t.npz")},
        {"entries": 16, "source": random_table(tmp_path / "t.npz")},
    ):
        made = NgramTable.model_validate({"search": search, "iterations": 40, **options}).build(V)
        for tree in (Tree(budget=6), Tree(budget=20), Tree(budget=4, shape="chain")):
            assert generate(engine, prompts, decode, [made], tree) == plain
        others = [PromptLookup().build(V), made, TokenRecycling(k=4).build(V), Bush(V, 1, 3)]
        assert generate(engine, prompts, decode, others, Tree(budget=9)) == plain


def passes(made: TableDrafter, engine: ToyEngine, prompts: list[list[int]]) -> int:
    stats = Stats()
    for prompt in prompts:
        generate(engine, [prompt], Decode(max_new_tokens=40), [made], Tree(budget=12), stats=stats)
    return stats.passes


@pytest.mark.parametrize("options", [{}, {"k": 0}, {"search": "monte_carlo"}])
def test_a_second_run_over_the_same_prompts_needs_fewer_passes(options: dict[str, Any]) -> None:
    engine, made = ToyEngine(V, predictable=0.6), NgramTable.model_validate(options).build(V)
    prompts = [[i, i + 1] for i in range(8)]
    first = passes(made, engine, prompts)
    assert passes(made, engine, prompts) <= 0.85 * first
    assert first <= 8 * 39


def test_what_rows_show_helps() -> None:
    engine, prompts = ToyEngine(V, predictable=0.8), [[i, i + 1] for i in range(6)]
    assert passes(drafter(k=4), engine, prompts) < passes(drafter(k=0), engine, prompts)


def test_a_round_takes_little_time() -> None:
    """Under 0.3 ms at 16 guesses; the bound here leaves room for slow machines."""
    made, rng = NgramTable(k=8).build(5000), np.random.default_rng(0)
    made.start(0)
    text = (rng.zipf(1.5, 4000) % 50).tolist()
    proposed(made, text[:1000])
    best = np.inf
    for at in range(1001, 1101):
        begin = process_time()
        draft = Draft(text[at])
        made.propose(Context(0, text[: at + 1], 16, 12), draft)
        spent = process_time() - begin
        taken, likely = draft.take(range(1, len(draft))), rng.integers(0, 50, (len(draft), 8))
        begin = process_time()
        made.update(Verified(0, taken.tokens, taken.depths, [0], [1], likely))
        if len(draft) == 17:
            best = min(best, spent + process_time() - begin)
    assert best < 1.5e-3


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_property_any_options_any_text(data: st.DataObject) -> None:
    draw = data.draw
    options = {
        "search": draw(st.sampled_from(SEARCHES)), "k": draw(st.integers(0, 4)), "successors": draw(st.integers(1, 4)),
        "entries": draw(st.integers(16, 40)), "window": draw(st.integers(3, 20)), "depth": draw(st.integers(1, 6)), "iterations": 20,
    }  # fmt: skip
    made = drafter(**options)
    text = draw(st.lists(st.integers(0, 4), min_size=1, max_size=60))
    for length in range(1, len(text) + 1):
        budget, depth = draw(st.integers(1, 12)), draw(st.integers(1, 8))
        draft = proposed(made, text[:length], budget=budget, depth=depth)
        assert len(draft) <= budget + 1
        assert max(draft.depths) <= min(depth, made.options.depth)
        assert all(0 < p <= 1 for p in draft.p)
        assert len(made.table.rows) <= made.options.entries
        taken = draft.take(range(1, len(draft)))
        top = np.array(draw(st.lists(st.permutations(range(5)), min_size=len(draft), max_size=len(draft))))
        made.update(Verified(0, taken.tokens, taken.depths, [0], [0], top))
