"""The controller: how many rows, tree or chain, and what it does when its estimates or costs are wrong."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
from drafting import Bush, Oracle, generate
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_engine import ToyEngine

from planc.runtime.controller import Controller, linear_cost
from planc.runtime.decode import Control, Decode, Sampling, Tree
from planc.runtime.loops import Stats
from planc.runtime.trees import Draft, chain


def comb(p: float, depth: int = 8) -> Draft:
    """A chain of guesses with probability p, each with a sibling of probability 0.1."""
    draft, row = Draft(0), 0
    for _ in range(depth):
        draft.add(row, 2, ("x", 1), 0.1)
        row = draft.add(row, 1, ("x", 0), p)
    return draft


def taken(controller: Controller, draft: Draft, **options: object) -> Draft:
    return controller.select([draft], [10], 100, **options)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(("p", "slope", "expected"), [(0.05, 0.5, 0), (0.9, 5.0, 0), (0.5, 0.21, 1), (0.9, 0.05, 8), (0.9, 0.0, 16)])
def test_takes_what_pays(p: float, slope: float, expected: int) -> None:
    assert len(taken(Controller(cost=lambda rows, past: 1 + slope * (rows - 1)), comb(p))) - 1 == expected


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.floats(0.01, 0.99)), max_size=9),
    st.lists(st.floats(0.0, 0.5), min_size=10, max_size=10),
    st.integers(1, 4),
)
def test_no_sub_tree_promises_more_tokens_per_ms(nodes: list[tuple[int, float]], steps: list[float], min_rows: int) -> None:
    draft = Draft(0)
    for token, (parent, p) in enumerate(nodes):
        draft.add(parent % len(draft), token, ("x", token), p)
    costs = [1.0 + sum(steps[:rows]) for rows in range(11)]
    chosen = taken(Controller(cost=lambda rows, past: costs[rows]), draft, min_rows=min_rows)

    def rate(tree: Draft) -> float:
        width = max(min_rows, len(tree))
        return sum(tree.reach()) / (costs[width] * (1.03 if width > min_rows else 1.0))  # a wide pass has to promise 3 % more

    subsets = ([row for row in range(1, len(draft)) if mask >> (row - 1) & 1] for mask in range(1 << (len(draft) - 1)))
    closed = [rows for rows in subsets if all(draft.parents[row] in (0, *rows) for row in rows)]
    assert rate(chosen) == pytest.approx(max(rate(draft.take(rows)) for rows in closed))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(0.01, 0.99), max_size=4), min_size=2, max_size=3), st.lists(st.floats(0.0, 0.5), min_size=14, max_size=14)
)
def test_a_ragged_batch_puts_its_rows_where_they_promise_most(chains: list[list[float]], steps: list[float]) -> None:
    drafts = []
    for path in chains:
        drafts.append(Draft(0))
        for row, p in enumerate(path):
            drafts[-1].add(row, row, ("x", row), p)
    batch, costs = len(chains), [1.0 + sum(steps[:rows]) for rows in range(19)]  # by rows of all sequences
    chosen = Controller(cost=lambda rows, past: costs[rows]).select(drafts, [10] * batch, 100, batch, ragged=True)

    def rate(trees: Sequence[Draft]) -> float:
        rows, rest = divmod(sum(map(len, trees)), batch)
        cost = costs[rows * batch] + (costs[(rows + 1) * batch] - costs[rows * batch] if rest else 0.0) * rest / batch
        return sum(sum(tree.reach()) for tree in trees) / cost

    cuts = product(*(range(len(path) + 1) for path in chains))
    best = max(rate([draft.take(range(1, cut + 1)) for draft, cut in zip(drafts, cut_all, strict=True)]) for cut_all in cuts)
    assert rate(chosen) == pytest.approx(best)


def test_a_ragged_batch_keeps_a_fixed_budget() -> None:
    drafts = [comb(0.9), comb(0.1)]
    chosen = Controller(Tree(budget=3)).select(drafts, [10, 10], 100, 2, ragged=True)
    assert [len(draft) for draft in chosen] == [4, 4]


def test_rows_that_would_be_padding_are_free() -> None:
    controller = Controller(cost=lambda rows, past: float(rows * rows))
    assert len(taken(controller, comb(0.05))) == 1
    assert len(taken(controller, comb(0.05), min_rows=3)) == 3


def test_cost_may_be_a_table_and_depends_on_past_and_batch() -> None:
    class Table:
        def ms(self, rows: int, past: int, batch: int) -> float:
            return 1.0 + rows * (0.0 if past < 1000 else 9.0) * batch

    controller = Controller(cost=Table())
    assert len(controller.select([comb(0.9)], [10], 100)[0]) == 17
    assert len(controller.select([comb(0.9)], [2000], 100)[0]) == 1
    assert [len(draft) for draft in Controller(cost=Table()).select([comb(0.9), Draft(3), comb(0.5, 2)], [10, 10, 10], 100, 3)] == [
        17,
        1,
        5,
    ]


def test_room_limits_the_pass() -> None:
    for room in (1, 2, 5):
        assert len(Controller(cost=lambda rows, past: 1.0).select([comb(0.9)], [10], room)[0]) == room


def test_fixed_budget_is_taken_whatever_it_costs() -> None:
    for budget in (0, 1, 7, 16, 40):
        assert len(taken(Controller(Tree(budget=budget), cost=lambda rows, past: 9.0**rows), comb(0.1))) - 1 == min(budget, 16)


def test_chain_or_tree() -> None:
    flat = Controller(cost=lambda rows, past: 1.0)
    assert not taken(flat, comb(0.6)).is_chain
    assert taken(flat, comb(0.6), trees=False).tokens == [0] + [1] * 8
    assert taken(Controller(Tree(shape="chain"), cost=lambda rows, past: 1.0), comb(0.6)).is_chain
    assert not taken(Controller(Tree(shape="tree"), cost=lambda rows, past: 1.0), comb(0.6), trees=False).is_chain


def test_block_cuts_trees_and_leaves_chains() -> None:
    controller = Controller(cost=lambda rows, past: 1.0)
    for length in range(8, 17):
        tree = controller.select([comb(0.9)], [length], 100, block=16, min_rows=2)[0]
        assert tree.is_chain or length + len(tree) <= (length // 16 + 1) * 16
    assert len(controller.select([comb(0.9)], [15], 100, block=16)[0]) == 9  # the whole chain beats a tree of one row
    assert len(controller.select([comb(0.9)], [16], 100, block=16)[0]) > 9


def test_budget_follows_what_was_taken() -> None:
    controller = Controller(cost=lambda rows, past: 100.0**rows)
    for _ in range(60):
        taken(controller, comb(0.1))
    assert controller.budget == 4


def test_tries_again_now_and_then() -> None:
    controller = Controller(cost=lambda rows, past: 1 + 0.3 * (rows - 1))
    sizes = []
    for _ in range(400):
        size = len(taken(controller, comb(0.02)))
        controller.observe(size, 10, 1, 1.0, 1 + 0.3 * (size - 1))
        sizes.append(size)
    assert 2 <= sum(size > 1 for size in sizes) <= 12


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_backs_off_when_the_table_lies(slope: float) -> None:
    """The table says that rows are free. Where they are, it goes on; where they are not, it stops."""
    controller = Controller(cost=lambda rows, past: 1.0)
    rows = 0
    for _ in range(2000):
        size = len(taken(controller, comb(0.3)))
        tokens = 1.4 if size > 1 else 1.0  # realised on average
        controller.observe(size, 10, 1, tokens, 1 + slope * (size - 1))
        rows += size > 1
    assert rows > 1980 if slope == 0.0 else rows < 250  # a few plain passes are made to measure them


def test_one_disturbed_pass_does_not_stop_speculation() -> None:
    controller, wide = Controller(), 0
    for step in range(200):
        size = len(taken(controller, comb(0.9)))
        wide += size > 1
        controller.observe(size, 10, 1, 4.0, linear_cost(size, 10) * (500 if step % 50 == 7 else 1))
    assert wide > 190


def test_wrong_drafters_are_dropped_and_right_ones_kept() -> None:
    engine, wrong, right = ToyEngine(23), Stats(), Stats()
    decode = Decode(max_new_tokens=120)
    plain, _ = generate(engine, [[1, 2]], decode)
    for drafter, stats in ((Oracle(plain, 23, right=0), wrong), (Oracle(plain, 23), right)):
        # the toy's passes cost wall time like nothing real, so the table's word is made good by a controller that ignores measurements
        controller = Controller(Tree(depth=6), cost=lambda rows, past: 1 + 0.1 * (rows - 1))
        controller.observe = lambda *args, **kwargs: None  # type: ignore[method-assign]
        for run in (Stats(), stats):  # the first run learns
            assert generate(engine, [[1, 2]], decode, [drafter], controller=controller, min_rows=1, stats=run)[0] == plain
    assert wrong.rows / wrong.passes < 1.2
    assert right.tokens_per_pass > 5


def test_learned_rates_match_what_happens() -> None:
    """Calibration: a random drafter over 8 tokens is right about every eighth time, whatever probability it claims."""
    engine, controller = ToyEngine(8, predictable=0.0), Controller(Tree(budget=4))
    generate(engine, [[1, 2]], Decode(max_new_tokens=150), [Bush(8, 0, 3)], controller=controller)
    assert controller.rates.get((("bush", 0), ("twin", 0)), 0.5) == pytest.approx(1 / 8, abs=0.1)


def settle(controller: Controller, alphas: Sequence[float], batch: int = 1, rounds: int = 200) -> None:
    """Rounds of chains whose position i is accepted at a rate of alphas[i], its predecessor being accepted."""
    counts = [0.0] * len(alphas)
    for _ in range(rounds):
        accepted = 0
        while accepted < len(alphas):
            counts[accepted] += alphas[accepted]
            if counts[accepted] < 1.0:
                break
            counts[accepted] -= 1.0
            accepted += 1
        controller.judge(chain([0] * (len(alphas) + 1)), range(accepted + 1))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["position", "constant"]),
    st.floats(0.05, 0.95),
    st.lists(st.floats(0.0, 0.4), min_size=32, max_size=32),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1.0, 1.1]),
)
def test_a_length_settled_ahead_is_the_best_one(estimate: str, alpha: float, steps: list[float], batch: int, margin: float) -> None:
    control = Control.model_validate({"estimate": estimate, "margin": margin, "smoothing": 0.01})
    controller = Controller(Tree(depth=6), lambda rows, past: 1.0 + sum(steps[: rows // 4]), control)
    settle(controller, [alpha] * 6)
    chosen = controller.ahead([10] * batch, 7, batch, tested=False).guesses
    reaches = [controller._expected(6)[: k + 1] for k in range(7)]
    assert reaches[6][1] == pytest.approx(alpha, abs=0.1)
    rates = [sum(reach) / (1.0 + sum(steps[: (k + 1) * batch // 4])) / (margin if k else 1.0) for k, reach in enumerate(reaches)]
    assert rates[chosen] == pytest.approx(max(rates))


def test_depth_grows_again_after_a_hard_text() -> None:
    controller = Controller(Tree(depth=6), lambda rows, past: 1.0 + 0.05 * (rows - 1), Control(estimate="position"))
    settle(controller, [0.0] * 6)
    assert controller.ahead([10], 100).guesses == 0
    settle(controller, [0.95])  # what exploring sees: the first position only
    assert controller.ahead([10], 100).guesses >= 1


def test_a_length_stays_for_the_interval_and_its_batch() -> None:
    controller = Controller(Tree(), lambda rows, past: 1.0 + 0.05 * rows, Control(estimate="position", interval=5))
    first = controller.ahead([10], 100).guesses
    settle(controller, [0.0])
    assert [controller.ahead([10], 100).guesses for _ in range(4)] == [first] * 4
    assert controller.ahead([10], 100).guesses == 0 < first
    assert controller.ahead([10, 10], 100, 2).guesses == 0


def test_the_cost_of_drafting_counts() -> None:
    def chosen(draft_ms: float) -> int:
        controller = Controller(Tree(), lambda rows, past: 10.0 + 0.01 * rows, Control(estimate="constant"))
        for _ in range(60):
            n = controller.ahead([10], 9).guesses
            controller.observe(n + 1, 10, 1, 2.0, 10.0, draft_ms=draft_ms * n)
            settle(controller, [0.7], rounds=3)
        return controller.ahead([10], 9).guesses

    assert chosen(0.0) == 8 > chosen(3.0)


def test_confidence_takes_what_is_likely_whatever_it_costs() -> None:
    control = Control(policy="confidence", threshold=0.5)
    controller = Controller(Tree(shape="chain"), lambda rows, past: 9.0**rows, control)
    assert [len(draft) - 1 for draft in controller.select([comb(0.9), comb(0.6)], [10, 10], 100, 2)] == [6, 1]


def test_exploring_in_a_large_batch_takes_a_guess_each() -> None:
    controller = Controller(Tree(), lambda rows, past: float(rows), Control(estimate="position", patience=8))
    taken = []
    for _ in range(40):
        taken.append(controller.ahead([10] * 16, 100, 16).guesses)
        controller.observe(taken[-1] + 1, 10, 16, 1.0, 16.0 * (taken[-1] + 1))
        settle(controller, [0.01], rounds=2)
    assert set(taken[2:]) == {0, 1}


@pytest.mark.parametrize("estimate", ["position", "constant"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=3)], ids=["greedy", "sampled"])
def test_lengths_settled_ahead_change_no_text(estimate: str, sampling: Sampling) -> None:
    engine, decode = ToyEngine(23), Decode(max_new_tokens=60, sampling=sampling)
    prompts = [[1, 2, 3], [4] * 9]
    plain, _ = generate(engine, prompts, decode)
    control = Control.model_validate({"estimate": estimate, "interval": 3})
    controller = Controller(Tree(), lambda rows, past: 1.0 + 0.02 * rows, control)
    assert generate(engine, prompts, decode, [Bush(23, 0, 3), Oracle(plain, 23)], controller=controller)[0] == plain
