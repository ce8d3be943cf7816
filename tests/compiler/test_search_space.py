"""Points, budgets and mutations of a search, without a model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planc.compiler.search.budget import Budget
from planc.compiler.search.evolution import State, Text, draw, evolve, offspring, start
from planc.compiler.search.space import Infeasible, LevelSpace, Point
from planc.compiler.search.spec import Choose, Drop, Search


@st.composite
def spaces(draw_: st.DrawFn) -> LevelSpace:
    """Spaces with a few kinds of units, whose levels save whole numbers, and a budget between the least and the most."""
    resources = draw_(st.integers(1, 2))
    kinds = draw_(
        st.lists(st.lists(st.lists(st.integers(-9, 0), min_size=resources, max_size=resources), min_size=1, max_size=3), min_size=1)
    )
    costs = []
    for kind in kinds[:3]:
        levels = np.array([[0] * resources, *kind], dtype=np.int64)
        costs += [levels] * draw_(st.integers(1, 6))
    needed = draw_(st.sampled_from([(), tuple(range(len(costs)))]))
    rest = np.full(resources, 200, dtype=np.int64)
    least = rest + sum(levels.min(axis=0) for levels in costs)
    if needed:
        least = least - np.min([levels.min(axis=0) for levels in costs], axis=0)
    share = draw_(st.floats(0, 1))
    return LevelSpace(costs, rest, least + ((rest - least) * share).astype(np.int64), needed)


@settings(max_examples=60, deadline=None)
@given(spaces(), st.integers(0, 2**31))
def test_mutations_keep_the_budget_exactly(space: LevelSpace, seed: int) -> None:
    rng = np.random.default_rng(seed)
    try:
        point = space.random(rng)
    except Infeasible:  # several bounds may be met one by one and not together
        assert len(space.limits) > 1
        return
    assert space.feasible(point)
    for _ in range(12):
        child = space.mutate(point, rng)
        if child is not None:
            assert child != point
            assert space.feasible(child)
            assert (space.cost(child) == space.cost(point)).all()
            point = child


def exchange(units: int = 20, kept: int = 14) -> LevelSpace:
    return LevelSpace([np.array([[0], [-1]])] * units, np.array([units]), np.array([kept]))


HARM = np.random.default_rng(3).permutation(20) / 20
TEXT: Text = [list(range(i, i + 8)) for i in range(40)]


def harm(points: list[Point] | tuple[Point, ...], text: Text) -> list[float]:
    """The sum of the dropped units' harms, with noise that the text makes."""
    noise = np.random.default_rng([piece[0] for piece in text]).normal(0, 0.002, 20)
    return [float(((HARM + noise) * np.array(point)).sum()) for point in points]


SETTINGS = Search(
    space=(Drop(),),
    generations=60,
    offspring=8,
    starts=4,
    selection=({"tokens": 16, "survivors": 3}, {"tokens": 64, "survivors": 1}),  # type: ignore[arg-type]
)


def run(seed: int, settings_: Search = SETTINGS, state: State | None = None) -> tuple[State, list[State]]:
    seen: list[State] = []
    space = exchange()
    return evolve(space, settings_, harm, TEXT, seed, state or start(space, settings_, harm, TEXT, seed), seen.append), seen


def test_evolution_finds_the_least_harmful_set() -> None:
    best = set(np.argsort(HARM)[:6])
    assert set(np.flatnonzero(run(0)[0].parent)) == best


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 60))
def test_the_same_seed_and_a_resumed_run_give_the_same(seed: int, stop: int) -> None:
    whole, states = run(seed)
    assert run(seed)[0] == whole
    assert run(seed, state=states[min(stop, len(states)) - 1])[0] == whole


def test_a_generation_keeps_the_parent_unless_a_child_is_better_on_the_same_text() -> None:
    calls: list[tuple[list[Point], Text]] = []

    def watched(points: list[Point] | tuple[Point, ...], text: Text) -> list[float]:
        calls.append((list(points), text))
        return harm(points, text)

    space = exchange()
    first = start(space, SETTINGS, watched, TEXT, 1)
    calls.clear()
    after = evolve(space, SETTINGS.model_copy(update={"generations": 1}), watched, TEXT, 1, first, lambda state: None)
    (children, few), (finalists, more) = calls
    assert len(children) == len(set(children)) == 8 and first.parent not in children
    assert len(finalists) == 4 and finalists[-1] == first.parent
    assert (sum(map(len, few)), sum(map(len, more))) == (16, 64)
    assert after.history[0] == min(harm(finalists, more))


def test_a_small_space_ends() -> None:
    space = exchange(units=2, kept=1)
    assert offspring(space, (0, 1), 16, np.random.default_rng(0)) == [(1, 0)]
    assert offspring(exchange(units=3, kept=3), (0, 0, 0), 16, np.random.default_rng(0)) == []


def test_one_needed_unit_always_runs() -> None:
    space = LevelSpace([np.array([[0], [-1]])] * 3, np.array([3]), np.array([1]), needed=(0, 1, 2))
    assert {sum(space.random(np.random.default_rng(seed))) for seed in range(9)} == {2}
    with pytest.raises(Infeasible) as caught:
        LevelSpace([np.array([[0], [-1]])] * 3, np.array([3]), np.array([0]), needed=(0, 1, 2))
    assert caught.value.least == (1,)


def test_unequal_units_trade_when_their_costs_add_up() -> None:
    costs = [np.array([[0], [-3]]), *[np.array([[0], [-1]])] * 4]
    space = LevelSpace(costs, np.array([10]), np.array([7]))
    children = offspring(space, (1, 0, 0, 0, 0), 8, np.random.default_rng(0))
    assert children and all(child[0] == 0 and sum(child) == 3 for child in children)


def test_draws_take_whole_pieces_but_the_last() -> None:
    pieces = draw(TEXT, 19, np.random.default_rng(0))
    assert list(map(len, pieces)) == [8, 8, 3]
    assert sum(map(len, draw(TEXT, 10**6, np.random.default_rng(0)))) == 320


@pytest.mark.parametrize(
    ("text", "resource", "limit"),
    [
        ("75% params", "params", 750),
        ("1.5M params", "params", 1_500_000),
        ("60 MB", "bytes", 60_000_000),
        ("2 KiB", "bytes", 2048),
        ("4.0 ms", "time", 4_000_000),
        ("26 attention", "attention", 26),
        ("50%ms", "time", 500),
    ],
)
def test_budgets(text: str, resource: str, limit: int) -> None:
    budget = Budget.parse(text)
    assert budget.resources == (resource,)
    assert budget.limits({resource: 1000}) == (limit,)


@pytest.mark.parametrize("text", ["", "60", "MB", "60 megs", "-3 MB", "5k MB", "3 ms, 4 ms", "60 MB 4 ms"])
def test_budgets_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ValueError, match="budget"):
        Budget.parse(text)


def test_levels_of_one_unit_at_least_two() -> None:
    with pytest.raises(ValueError, match="2"):
        Choose(option="quantize_weights.modules", levels=("int8",))
    with pytest.raises(ValueError, match="narrow"):
        Search(space=(Drop(),), offspring=4, selection=({"tokens": 8, "survivors": 5}, {"tokens": 8, "survivors": 1}))  # type: ignore[arg-type]
