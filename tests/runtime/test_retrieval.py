"""Drafting over a short context: what is retrieved, that texts stay plain, and that the short cache holds the short text."""

from __future__ import annotations

import pytest
from drafting import generate
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_engine import ToyEngine

from planc.runtime.contract import CostTable
from planc.runtime.decode import Decode, Sampling, Speculative, Transfer, Tree
from planc.runtime.drafters import Context, Host, Retrieval
from planc.runtime.drafters.retrieval import RetrievalDrafter, retrieve
from planc.runtime.loops import Stats
from planc.runtime.trees import Draft

V = 23
LONG = [[(7 * i + i // 5) % V for i in range(90)], [3] * 70, [1, 2]]
SMALL = {"context": 40, "chunk": 6, "query": 8, "head": 4, "min_p": 0.0}


def drafter(engine: ToyEngine, cost: CostTable | None = None, **options: object) -> RetrievalDrafter:
    return Retrieval.model_validate({**SMALL, **options}).build_for(Host(engine, cost=cost))


def test_the_chunk_that_shares_rare_tokens_is_found() -> None:
    common = [1, 2, 3, 4]
    chunks = [[*common, 10 + i] for i in range(8)]
    assert retrieve(chunks, [1, 2, 15], 1) == [5]
    assert retrieve(chunks, [17, 12, 1], 2) == [2, 7]  # in the order of the text


def test_copies_count_once_and_without_a_match_both_ends_are_taken() -> None:
    assert retrieve([[5, 6], [5, 6], [5, 7], [8, 9]], [5, 6], 2) == [0, 2]
    assert retrieve([[1], [2], [3], [4], [5]], [9], 3) == [0, 1, 4]
    assert retrieve([[1]], [9], 3) == [0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=12), st.lists(st.integers(0, 12)), st.integers(1, 6)
)
def test_what_is_retrieved_is_in_order_and_never_too_much(chunks: list[list[int]], query: list[int], most: int) -> None:
    found = retrieve(chunks, query, most)
    assert 1 <= len(found) <= most
    assert found == sorted(set(found)) and found[-1] < len(chunks)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 120), st.integers(16, 60), st.integers(4, 12), st.integers(1, 20), st.integers(0, 10))
def test_the_short_text_keeps_both_ends_and_its_bound(length: int, context: int, chunk: int, query: int, head: int) -> None:
    made = drafter(ToyEngine(V), context=context, chunk=chunk, query=query, head=head)
    prompt = list(range(length))
    made.propose(Context(0, [*prompt, 999], 0, 0), Draft(999))
    short = made._sources[0].short([*prompt, 999])
    assert short == sorted(short) and short[-query - 1 :] == [*prompt, 999][-query - 1 :] and short[: min(head, length)] == prompt[:head]
    assert len(short) - 1 <= max(context, head + query + chunk)
    if length <= context:
        assert short == [*prompt, 999]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=5)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("options", [{}, {"builder": "chain"}], ids=["own chain", "builder"])
def test_texts_stay_plain_and_the_short_cache_holds_the_short_text(sampling: Sampling, options: dict[str, object]) -> None:
    engine, stats, decode = ToyEngine(V, predictable=0.9), Stats(), Decode(max_new_tokens=24, sampling=sampling)
    plain, _ = generate(ToyEngine(V, predictable=0.9), LONG, decode)
    made = drafter(engine, **options)
    for _ in range(2):  # the second time with caches that hold the first texts
        assert generate(engine, LONG, decode, [made], Tree(budget=4), stats=stats)[0] == plain
    assert 0 < stats.accepted_by["retrieval"] < stats.drafted_by["retrieval"]
    for b in (0, 1):
        source = made._sources[b]._source
        assert source._cache is not None and len(source.held) < 40 + 32
        source._cache.check(0, source.held)  # type: ignore[attr-defined]
        short = made._sources[b].short(plain[b])
        same = min(len(source.held), len(short)) - 4
        assert source.held[:same] == short[:same]
    assert made._sources[2].skipped == []  # too short to leave anything out: no passes were spent on it
    assert made._sources[2]._source._cache is None


def test_nothing_is_drafted_where_the_short_pass_is_no_cheaper() -> None:
    def drafted(per_key: float) -> int:
        cost = CostTable(
            rows=(1, 2, 9),
            past=(1, 100),
            measured=((tuple(10.0 + r / 100 for r in (1, 2, 9)), tuple(10.0 + 100 * per_key + r / 100 for r in (1, 2, 9))),),
        )
        engine, stats = ToyEngine(V), Stats()
        generate(engine, LONG[:1], Decode(max_new_tokens=20), [drafter(engine, cost, min_p="auto")], Tree(budget=4), stats=stats)
        return stats.drafted_by["retrieval"]

    assert drafted(0.0) == 0 < drafted(5.0)


def transfer(strength: float, sampling: Sampling, **options: object) -> list[list[int]]:
    engine = ToyEngine(V, predictable=0.8)
    part = Retrieval.model_validate({**SMALL, "builder": "chain"})
    speculative = Speculative(drafter=(part,), transfer=Transfer(strength=strength, floor=0.1))
    decode = Decode(max_new_tokens=20, sampling=sampling, speculative=speculative)
    return generate(engine, LONG[:1], decode, [part.build_for(Host(engine))], Tree(budget=4), **options)[0]  # type: ignore[arg-type]


def test_transfer_of_strength_0_is_greedy_verification() -> None:
    plain, _ = generate(ToyEngine(V, predictable=0.8), LONG[:1], Decode(max_new_tokens=20))
    weak, strong = Stats(), Stats()
    assert transfer(0.0, Sampling(), stats=weak) == plain
    assert transfer(20.0, Sampling(), stats=strong) != plain
    assert strong.accepted_by["retrieval"] > weak.accepted_by["retrieval"]
