"""The list tasks, their closed forms, and a loop that samples as they say (papers/38)."""

from __future__ import annotations

from itertools import permutations, product
from math import factorial, log, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planc.compiler.suites.exact import valid_share
from planc.compiler.suites.parallelbench import (
    TASKS,
    WAITING_LINE,
    Example,
    insert_random_valid,
    marginals,
    orders,
    remove_random_valid,
    replace_random_correlation,
    replace_random_valid,
    shuffle_correlation,
    shuffle_valid,
)
from planc.compiler.suites.run import draw
from planc.runtime.errors import InputError


def test_closed_forms_of_the_paper() -> None:
    for n, one in ((3, 0.444), (5, 0.410), (10, 0.387)):
        assert replace_random_valid([n]) == pytest.approx((1 - 1 / n) ** (n - 1)) == pytest.approx(one, abs=5e-4)
    for n, one in ((3, 0.185), (5, 0.038), (6, 0.0154)):
        assert shuffle_valid([n], different=True) == pytest.approx((factorial(n) - 1) / n**n) == pytest.approx(one, abs=5e-4)
    assert insert_random_valid(3) == pytest.approx(0.1875) and insert_random_valid(5) == pytest.approx(0.0823, abs=5e-5)
    assert remove_random_valid(3) == pytest.approx(0.889, abs=5e-4) and remove_random_valid(5) == pytest.approx(0.614, abs=5e-4)
    assert [shuffle_valid(orders(6, m)) for m in (2, 4, 1)] == pytest.approx([0.3125, 0.139, 1.0], abs=5e-4)
    assert [replace_random_valid(orders(6, m)) for m in (2, 4, 1)] == pytest.approx([0.7335, 0.627, 1.0], abs=5e-5 + 4e-4)
    assert shuffle_correlation(5) == pytest.approx(5 * log(5) - log(120)) and replace_random_correlation(5) == pytest.approx(
        0.893, abs=5e-4
    )


@pytest.mark.parametrize("n", [2, 3, 4])
def test_closed_forms_by_enumeration(n: int) -> None:
    """One pass: every slot from its own marginal."""
    items = tuple("abcd"[:n])
    shuffle = Example("shuffle", ("_", "_"), items, items[::-1])
    drawn = [sorted(words) == sorted(items) for words in product(items, repeat=n)]
    assert shuffle_valid([n]) == pytest.approx(sum(drawn) / len(drawn))
    assert shuffle_valid([n], different=True) == pytest.approx(
        sum(TASKS["shuffle"].valid(shuffle, w) for w in product(items, repeat=n)) / n**n
    )
    replace = Example("replace_random", ("_", "z"), items, ())
    table = marginals(replace, [None] * n)
    total = 0.0
    for words in product(*table):
        chance = float(np.prod([table[i][w] for i, w in enumerate(words)]))
        total += chance * TASKS["replace_random"].valid(replace, words)
    assert replace_random_valid([n]) == pytest.approx(total)


@pytest.mark.parametrize(
    ("task", "per_pass", "wanted"),
    [
        ("shuffle", 2, shuffle_valid([2, 2, 2])),
        ("shuffle", 3, shuffle_valid([3, 3])),
        ("replace_random", 2, replace_random_valid([2, 2, 2])),
        ("replace_random", 4, replace_random_valid([4, 2])),
    ],
)
def test_the_loop_samples_as_the_formulas_say(task: str, per_pass: int, wanted: float) -> None:
    """Within three standard errors: double commits, stale logits or wrong conditioning would show."""
    runs = 1000
    assert abs(valid_share(task, 6, per_pass, runs) - wanted) < 3 * sqrt(wanted * (1 - wanted) / runs)


def test_the_ends_of_the_scale() -> None:
    """One slot a pass is always right; the likeliest word everywhere is the list itself, which is always wrong."""
    assert valid_share("shuffle", 6, 1, 100) == valid_share("replace_random", 6, 1, 100) == 1.0
    assert valid_share("replace_random", 6, 6, 5, temperature=0.0) == 0.0


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(TASKS)), st.integers(0, 10_000))
def test_property(task: str, seed: int) -> None:
    """What a task calls an answer is valid, and something else is not."""
    example = TASKS[task].example(np.random.default_rng(seed))
    valid = TASKS[task].valid
    low, high = TASKS[task].lengths
    assert low <= len(example.items) <= high
    assert example.prompt.split()[0] == task and len(example.prompt.split()) == 3 + len(example.items)
    assert valid(example, example.answer)
    assert not valid(example, example.answer[:-1]) or task == "remove_random"
    assert not valid(example, [*example.answer, "z"])
    if task == "shuffle":
        others = [p for p in permutations(example.items[:4]) if len(example.items) <= 4]
        assert all(valid(example, p) == (p != example.items) for p in others)
    if task not in ("sum", "trace"):
        assert len(set(example.items)) == len(example.items)


def test_examples_are_drawn_by_task_and_seed() -> None:
    first, again, other = (draw(["copy", "shuffle"], 5, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert [example.task for example in first] == ["copy"] * 5 + ["shuffle"] * 5
    assert set(WAITING_LINE) < set(TASKS) and len(WAITING_LINE) == 10
    with pytest.raises(InputError, match="no task 'fly'"):
        draw(["fly"], 1)
