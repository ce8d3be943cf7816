"""The target as its own draft, on toy engines: the text is the plain one, the cache is the target's, and the search finds what is planted."""

from __future__ import annotations

import numpy as np
import pytest
from drafting import generate
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_engine import ToyCache, ToyEngine

from planc.runtime.decode import Decode, Sampling, Tree
from planc.runtime.drafters import Host, SelfSkip
from planc.runtime.drafters.self_skip import Gates, SkipDrafter, gates_of
from planc.runtime.drafters.skip_search import SkipSearch, chain_speed
from planc.runtime.engine import Outputs, Step
from planc.runtime.errors import PlanError
from planc.runtime.loops import Stats

V = 23
PROMPTS = [[1, 2, 3, 4, 5], [7, 8], list(range(20)) * 3, [3]]
UNITS = tuple((layer, kind) for layer in range(4) for kind in ("attention", "mlp"))


class ToySkip:
    """A toy target whose logits become those of another one when gates are closed; works on one sequence of a batch's cache."""

    units = UNITS

    def __init__(self, target: ToyEngine, wrong: ToyEngine) -> None:
        self.target, self.wrong, self.spec = target, wrong, target.spec
        self.rows: list[int] = []

    def forward(self, cache: ToyCache, sequence: int, step: Step, gates: Gates, *, logits: bool = False) -> Outputs:
        one = ToyCache(1, cache.capacity)
        one.slots, one.lengths = [cache.slots[sequence]], cache.lengths[sequence : sequence + 1]
        outputs = (self.target if gates.all() else self.wrong).forward(one, step, logits=logits)
        cache.last_rows = one.last_rows
        self.rows.append(step.tokens.shape[1])
        return outputs

    def pass_ms(self, gates: Gates) -> float | None:
        return None


def drafter(target: ToyEngine, wrong: ToyEngine, *, closed: tuple[int, ...] = (), eos: tuple[int, ...] = ()) -> SkipDrafter:
    return SkipDrafter(Host(target, eos), ToySkip(target, wrong), gates_of(UNITS, closed, ()), 0.0)  # type: ignore[arg-type]


def test_with_nothing_left_out_everything_is_accepted() -> None:
    for prompt in PROMPTS:
        target, stats = ToyEngine(V), Stats()
        plain, _ = generate(ToyEngine(V), [prompt])
        skip = drafter(target, ToyEngine(V, seed=9))
        assert generate(target, [prompt], None, [skip], Tree(budget=4), stats=stats)[0] == plain
        assert stats.accepted_by == stats.drafted_by and stats.tokens_per_pass > 4
        assert set(skip.skip.rows) == {1}  # type: ignore[attr-defined]  # no second cache, so nothing is ever fed again


@settings(max_examples=40, deadline=None)
@given(
    predictable=st.sampled_from([0.5, 1.0]),
    budget=st.integers(1, 6),
    temperature=st.sampled_from([0.0, 1.0]),
    eos=st.sampled_from([(), (4, 9)]),
)
def test_any_set_gives_the_plain_text(predictable: float, budget: int, temperature: float, eos: tuple[int, ...]) -> None:
    """In a batch too, where rows finish at different times; the runner checks the cache after every piece."""
    target = ToyEngine(V, predictable=0.8)
    decode = Decode(max_new_tokens=24, sampling=Sampling(temperature=temperature, seed=5))
    plain = generate(ToyEngine(V, predictable=0.8), PROMPTS, decode, eos=eos)
    drafts = drafter(target, ToyEngine(V, predictable=predictable), closed=(1, 2), eos=eos)
    assert generate(target, PROMPTS, decode, [drafts], Tree(budget=budget), eos=eos) == plain
    assert drafts.passes > 0


def test_a_nearly_full_cache_ends_drafting_and_nothing_else() -> None:
    target = ToyEngine(V)
    plain, finish = generate(ToyEngine(V), [PROMPTS[0]], capacity=20)
    assert generate(target, [PROMPTS[0]], None, [drafter(target, target)], Tree(budget=8), capacity=20) == (plain, finish)


def test_where_nothing_pays_nothing_is_drafted() -> None:
    stats, idle = Stats(), SelfSkip().build_for(Host(ToyEngine(V)))
    assert generate(ToyEngine(V), [PROMPTS[0]], None, [idle], stats=stats) == generate(ToyEngine(V), [PROMPTS[0]])
    assert not stats.drafted_by


def test_gates_of_lists() -> None:
    assert gates_of(UNITS, (), ()).all()
    assert np.flatnonzero(~gates_of(UNITS, (1, 3), (0,))).tolist() == [1, 2, 6]
    with pytest.raises(PlanError) as caught:
        gates_of(UNITS, (), (4,))
    assert caught.value.code == "skip-out-of-range" and "mlp" in caught.value.message
    assert SelfSkip(attention=(1,)).item() == {"self_skip": {"attention": [1]}}


def test_speed_of_chains() -> None:
    assert chain_speed(0.0, 0.0, lambda rows: 1.0) == 1.0  # drafts cost nothing and never hit
    assert chain_speed(0.0, 0.5, lambda rows: 1.0) == pytest.approx(1 / 1.5)
    assert chain_speed(1.0, 0.0, lambda rows: 1.0) == 13.0  # twelve guesses and the token after them
    assert chain_speed(0.9, 1.0, lambda rows: 1.0) < 1.0  # a draft as dear as the target
    assert chain_speed(0.8, 0.2, lambda rows: 1.0) > 1.3


def test_the_search_finds_what_is_harmless() -> None:
    """Units 2, 3 and 5 may go; 4 and 6 may go together only; the rest costs half of the matches."""
    tried = []

    def match(gates: Gates) -> float:
        tried.append(gates.copy())
        closed = set(np.flatnonzero(~gates).tolist())
        return 0.95 * 0.5 ** len(closed & {0, 1, 7}) * (1.0 if (4 in closed) == (6 in closed) else 0.8)

    def speed(rate: float, gates: Gates) -> float:
        return chain_speed(rate, 0.1 + 0.1 * float(gates.sum()), lambda rows: 0.9)

    free = np.array([unit not in (0, 7) for unit in range(8)])
    search = SkipSearch(free, match, speed, most=0.7)
    found = search.run(120)
    assert np.flatnonzero(~found.gates).tolist() == [2, 3, 4, 5, 6]
    assert found.match == 0.95 and found.speed == speed(0.95, found.gates) > 1.0
    assert search.tried == len(tried) == 120
    assert all(gates[0] and gates[7] and (~gates).sum() <= 5 for gates in tried)
    again = SkipSearch(free, match, speed, most=0.7).run(120)
    assert np.array_equal(again.gates, found.gates)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.floats(0.05, 0.95), st.integers(0, 99))
def test_the_search_never_ends_below_its_start(units: int, steps: int, most: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = SkipSearch(np.ones(units, dtype=bool), lambda gates: float(rng.random()), lambda rate, gates: rate, most, seed).run(steps)
    assert found.speed == 1.0 and found.gates.all()  # everything open matches always
