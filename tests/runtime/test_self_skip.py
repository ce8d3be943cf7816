"""The target as its own draft, on toy engines: the text is the plain one, the cache is the target's, and the search finds what is planted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from drafting import generate
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_engine import ToyCache, ToyEngine

from planc.runtime.decode import Decode, Sampling, Tree
from planc.runtime.drafters import Context, Host, SelfSkip
from planc.runtime.drafters.self_skip import SkipDrafter, alternating, free_units, gates_of
from planc.runtime.drafters.serving_search import Gates, Serving, ServingSearch
from planc.runtime.drafters.skip_search import SkipSearch, chain_speed
from planc.runtime.engine import Ints, Outputs, Step
from planc.runtime.errors import PlanError
from planc.runtime.loops import Stats
from planc.runtime.trees import Draft

V = 23
PROMPTS = [[1, 2, 3, 4, 5], [7, 8], list(range(20)) * 3, [3]]
UNITS = tuple((layer, kind) for layer in range(4) for kind in ("attention", "mlp"))


class ToySkip:
    """A toy target whose logits become those of another one when gates are closed; works on one sequence of a batch's cache."""

    units = UNITS

    def __init__(self, target: ToyEngine, wrong: ToyEngine) -> None:
        self.target, self.wrong, self.spec = target, wrong, target.spec
        self.rows: list[int] = []
        self.replayed: list[Gates] = []

    def forward(self, cache: ToyCache, sequence: int, step: Step, gates: Gates, *, logits: bool = False) -> Outputs:
        one = ToyCache(1, cache.capacity)
        one.slots, one.lengths = [cache.slots[sequence]], cache.lengths[sequence : sequence + 1]
        outputs = (self.target if gates.all() else self.wrong).forward(one, step, logits=logits)
        cache.last_rows = one.last_rows
        self.rows.append(step.tokens.shape[1])
        return outputs

    def replay(self, cache: ToyCache, sequence: int, tokens: Ints, gates: Gates) -> Ints:
        """What the text says, as far as the set allows."""
        start = int(cache.lengths[sequence]) - len(tokens)
        assert [token for _, token in cache.slots[sequence][start : start + len(tokens)]] == tokens.tolist()
        self.replayed.append(gates)
        following = [*tokens[1:].tolist(), -1]  # the last one is pending: never right
        right = self.match(gates) * len(tokens)
        return np.array([token if i < right else -2 for i, token in enumerate(following)])

    @staticmethod
    def match(gates: Gates) -> float:
        """Closing unit 2 or 3 does harm."""
        return 0.9 - 0.2 * float((~gates[2:4]).sum())

    def pass_ms(self, gates: Gates) -> float | None:
        return None


def drafter(target: ToyEngine, wrong: ToyEngine, *, closed: tuple[int, ...] = (), eos: tuple[int, ...] = (), **options: Any) -> SkipDrafter:
    return SkipDrafter(Host(target, eos), ToySkip(target, wrong), gates_of(UNITS, closed, ()), SelfSkip(min_p=0.0, **options))


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


# ---- the search while text is served ----


def serving(seed: int = 0, target: ToyEngine | None = None, **options: Any) -> tuple[SkipDrafter, list[list[int]]]:
    """A drafter that searched through four texts, beginning with the harmful units closed, and the texts."""
    target = target or ToyEngine(V)
    search = Serving(window=8, stop=2.0, seed=seed, **options)
    part = SelfSkip(min_p=0.0, search=search)
    drafts = SkipDrafter(Host(target), ToySkip(target, ToyEngine(V, seed=9)), gates_of(UNITS, (1,), (1,)), part)  # type: ignore[arg-type]
    return drafts, generate(target, PROMPTS, Decode(max_new_tokens=60), [drafts], Tree(budget=3))[0]


def test_the_search_changes_the_set_and_no_token() -> None:
    drafts, texts = serving()
    assert texts == generate(ToyEngine(V), PROMPTS, Decode(max_new_tokens=60))[0]
    assert drafts.search is not None and drafts.search.tried > 20
    assert np.array_equal(drafts.gates, drafts.search.best)
    assert np.flatnonzero(~drafts.gates).tolist() == [4, 5]  # as many as at the start, and the harmless ones
    assert all((~gates).sum() == 2 and gates[[0, 1, 6, 7]].all() for gates in drafts.skip.replayed)  # type: ignore[attr-defined]


def test_the_search_follows_its_seed() -> None:
    tried = [[gates.tolist() for gates in serving(seed)[0].skip.replayed] for seed in (0, 0, 1)]  # type: ignore[attr-defined]
    assert tried[0] == tried[1] != tried[2]


def test_without_a_search_the_set_stays() -> None:
    target = ToyEngine(V)
    drafts = drafter(target, ToyEngine(V, seed=9), closed=(1,))
    generate(target, PROMPTS, Decode(max_new_tokens=40), [drafts], Tree(budget=3))
    assert drafts.search is None and np.array_equal(drafts.gates, gates_of(UNITS, (1,), ()))
    assert not drafts.skip.replayed  # type: ignore[attr-defined]


def test_a_pause_stops_drafts_and_search() -> None:
    target = ToyEngine(V)
    drafts = drafter(target, ToyEngine(V, seed=9), closed=(1,), search=Serving(window=4))
    cache, context = target.new_cache(1, 64), Context(0, list(range(20)), 4, 4, paused=True)
    context.cache = cache
    target.forward(cache, Step(np.arange(19)[None]))
    cache.keep(0, np.arange(19))
    draft = Draft(19)
    drafts.start(0)
    drafts.propose(context, draft)
    assert len(draft) == 1 and not drafts.skip.rows and not drafts.skip.replayed  # type: ignore[attr-defined]


def test_short_answers_are_not_searched_on() -> None:
    """The window holds what the target chose, never the prompt."""
    target = ToyEngine(V)
    for new, searched in ((9, False), (24, True)):
        drafts = drafter(target, ToyEngine(V, seed=9), closed=(1,), search=Serving(window=8))
        generate(target, [PROMPTS[2]], Decode(max_new_tokens=new), [drafts], Tree(budget=1))
        assert bool(drafts.skip.replayed) is searched  # type: ignore[attr-defined]


def test_an_easy_text_does_not_freeze_the_search() -> None:
    free = np.array([False, True, True, True, True, False])
    search = ServingSearch(Serving(bayes=0), free, np.array([True, False, False, True, True, True]))
    assert np.array_equal(search.next(), search.best) and not search.learn(search.best, 0.9)
    assert not search.learn(search.next(), 0.8)
    search.renew()
    assert np.array_equal(search.next(), search.best)
    search.learn(search.best, 0.3)
    better = search.next()
    assert search.learn(better, 0.5) and np.array_equal(search.best, better)


def test_the_search_ends() -> None:
    free = np.ones(6, dtype=bool)
    for options, scores, ended in (
        ({"stop": 0.9}, [0.5, 0.95], True),
        ({"patience": 2}, [0.5, 0.4, 0.4, 0.4], True),
        ({"patience": 2}, [0.5, 0.4, 0.4, 0.6, 0.4], False),
        ({"most": 2, "patience": 9}, [0.5, 0.4, 0.4], True),
    ):
        search = ServingSearch(Serving(**options), free, alternating(UNITS, 0.5)[:6])  # type: ignore[arg-type]
        for score in scores:
            assert not search.done
            search.learn(search.next(), score)
        assert search.done is ended


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 12), st.floats(0.1, 0.9), st.sampled_from([0, 1, 3]), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 99))
def test_every_set_keeps_its_size(layers: int, ratio: float, bayes: int, swaps: float, seed: int) -> None:
    units = tuple((layer, kind) for layer in range(layers) for kind in ("attention", "mlp"))
    start, free = alternating(units, ratio), free_units(units)
    search = ServingSearch(Serving(bayes=bayes, swaps=swaps, seed=seed, stop=2.0), free, start)
    rng, best = np.random.default_rng(seed), -1.0
    for _ in range(12):
        gates = search.next()
        assert (~gates).sum() == (~start).sum() == int(ratio * free.sum())
        assert gates[~free].all()
        score = float(rng.random())
        search.learn(gates, score)
        best = max(best, score)
        assert search.score == best


def test_a_bayesian_step_prefers_what_did_well() -> None:
    """Closing unit 0 is good, all else indifferent: most of its proposals close it."""
    free = np.ones(12, dtype=bool)
    search = ServingSearch(Serving(bayes=1, stop=2.0), free, np.arange(12) < 9)
    proposed = []
    for _ in range(60):
        gates = search.next()
        proposed.append(bool(~gates[0]))
        search.learn(gates, 1.0 if not gates[0] else 0.0)
    assert sum(proposed[30:]) > 15  # a random set closes it in a quarter of the cases


def test_a_draft_stops_where_it_is_not_sure() -> None:
    target = ToyEngine(V)
    for confidence, longest in ((1.0, 1), (0.0, 4)):
        skip = drafter(target, target, confidence=confidence)
        stats = Stats()
        generate(target, [PROMPTS[0]], None, [skip], Tree(budget=4), stats=stats)
        assert max(stats.accepted) == longest


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_leaves_beside_the_chain(temperature: float) -> None:
    target, stats = ToyEngine(V, predictable=0.8), Stats()
    decode = Decode(max_new_tokens=24, sampling=Sampling(temperature=temperature, seed=5))
    skip = drafter(target, ToyEngine(V, predictable=0.8, seed=3), closed=(1,), leaves=(3, 5, 8, 10))
    texts = generate(target, PROMPTS, decode, [skip], Tree(budget=12, depth=3, shape="tree"), stats=stats)
    assert texts == generate(ToyEngine(V, predictable=0.8), PROMPTS, decode)
    rounds = sum(stats.accepted.values())
    assert (stats.drafted_by["self_skip"] > 5 * rounds) is (temperature == 0.0)


def test_options_of_the_other_search_are_refused() -> None:
    with pytest.raises((PlanError, ValueError), match="belongs to the search of compile"):
        SelfSkip(search=Serving(), steps=7)
