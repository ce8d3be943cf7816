"""Continuous batching: whoever comes and goes, every text is the one that it has alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from drafting import Bush, Helped, Oracle, generate
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_engine import ToyEngine

from planc.runtime.controller import Controller
from planc.runtime.decode import Batching, Decode, Sampling, Tree
from planc.runtime.drafters import Drafter, PromptLookup, TokenRecycling
from planc.runtime.engine import Outputs, Step
from planc.runtime.loops.autoregressive import one_token
from planc.runtime.loops.run import Run, Stop
from planc.runtime.loops.speculative import one_round
from planc.runtime.scheduler import Event, Job, Scheduler, regroup

V = 23
PROMPTS = [[1, 2, 3, 4], [5], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [2, 2], [3] * 30]
SAMPLED = Sampling(temperature=0.7, top_p=0.95, repetition_penalty=1.2, seed=11)


def drafters() -> list[Drafter]:
    return [PromptLookup().build(V), TokenRecycling(k=4).build(V), Bush(V, 3, 4)]


def scheduler(
    engine: ToyEngine,
    slots: int,
    made: Sequence[Drafter] | None = None,
    *,
    batching: Batching | None = None,
    chunk: int = 4,
    **options: Any,
) -> Scheduler:
    run = Run(engine, engine.new_cache(slots, 160), [], Decode(), made or (), **options)
    controller = Controller(Tree(budget="auto" if engine.spec.ragged else 5))
    work = (lambda live: one_token(run, live)) if made is None else (lambda live: one_round(run, live, controller, True, None))
    return Scheduler(run, work, batching or Batching(), chunk)


def job(
    scheduler: Scheduler, prompt: Sequence[int], new: int = 24, sampling: Sampling | None = None, key: int = 0, stop: Stop | None = None
) -> Job:
    decode = Decode(max_new_tokens=new, sampling=sampling or Sampling())
    return Job(scheduler.run.text(prompt, decode, key, stop))


def alone(
    engine: ToyEngine, prompt: Sequence[int], new: int = 24, sampling: Sampling | None = None, key: int = 0, **options: Any
) -> list[int]:
    decode = Decode(max_new_tokens=new, sampling=sampling or Sampling())
    return generate(engine, [prompt], decode, ids=[key], **options)[0][0]


def drain(scheduler: Scheduler, turns: int = 2000) -> list[Event]:
    """Run until nothing is left, with every cache checked against its text."""
    events = []
    for _ in range(turns):
        events += scheduler.turn()
        check(scheduler)
        if scheduler.idle:
            break
    assert scheduler.idle
    assert not scheduler.run.cache.lengths.any()
    return events


def check(scheduler: Scheduler) -> None:
    """The invariants of papers/41: lengths, positions and slots of running sequences; nothing left of those that are gone."""
    run = scheduler.run
    for b, held in enumerate(scheduler.places):
        if held is None:
            assert run.cache.lengths[b] == 0
        else:
            run.cache.check(b, held.text.tokens)  # type: ignore[attr-defined]
            if len(held.text.tokens) > held.text.prompt:
                assert run.cache.lengths[b] == len(held.text.tokens) - 1


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("slots", [1, 2, 3, 8])
@pytest.mark.parametrize("speculative", [False, True])
def test_every_text_is_the_one_it_has_alone(sampling: Sampling, slots: int, speculative: bool) -> None:
    engine = ToyEngine(V, least=2)
    wanted = [alone(engine, prompt, 10 + 7 * i, sampling, key=i) for i, prompt in enumerate(PROMPTS)]
    served = scheduler(engine, slots, drafters() if speculative else None)
    jobs = [job(served, prompt, 10 + 7 * i, sampling, key=i) for i, prompt in enumerate(PROMPTS)]
    for one in jobs:
        served.submit(one)
    drain(served)
    assert [one.text.tokens for one in jobs] == wanted
    assert {one.text.finish for one in jobs} == {"length"}


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("speculative", [False, True])
def test_prompts_ride_along_with_decoding_passes(sampling: Sampling, speculative: bool) -> None:
    engine = ToyEngine(V, ragged=True, least=2)
    wanted = [alone(engine, prompt, 20 + i, sampling, key=i) for i, prompt in enumerate(PROMPTS)]
    served = scheduler(engine, 3, drafters() if speculative else None)
    jobs = [job(served, prompt, 20 + i, sampling, key=i) for i, prompt in enumerate(PROMPTS)]
    for one in jobs:
        served.submit(one)
    drain(served)
    assert [one.text.tokens for one in jobs] == wanted
    assert served.run.stats.purposes["prefill"] == 1  # only the first prompt found nobody to ride with
    assert [one.stats.tokens for one in jobs] == [20 + i for i in range(len(jobs))]
    if not speculative:
        assert [one.stats.passes for one in jobs] == [19 + i for i in range(len(jobs))]  # the prompt's own token took no decoding pass


def test_an_error_in_a_pass_that_a_prompt_rode_along_with_ends_both() -> None:
    class Failing(ToyEngine):
        def forward(self, cache: Any, step: Step, *, logits: bool = False, top_k: bool = False) -> Outputs:
            if step.firsts is not None:
                raise RuntimeError("out of memory")
            return super().forward(cache, step, logits=logits, top_k=top_k)

    served = scheduler(Failing(V, ragged=True), 2)
    jobs = [job(served, prompt) for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[3])]
    for one in jobs:
        served.submit(one)
    events = drain(served)
    assert [event.job for event in events if event.error] == jobs[:2]
    assert [event.finish for event in events if event.job is jobs[2]][-1] == "length"


def test_every_order_of_arrival_gives_the_same_texts() -> None:
    engine = ToyEngine(V)
    wanted = [alone(engine, prompt, 12, SAMPLED, key=i) for i, prompt in enumerate(PROMPTS[:4])]
    for order in permutations(range(4)):
        served = scheduler(engine, 3, drafters())
        jobs = {i: job(served, PROMPTS[i], 12, SAMPLED, key=i) for i in order}
        for number in order:
            served.submit(jobs[number])
            served.turn()
        drain(served)
        assert [jobs[i].text.tokens for i in range(4)] == wanted


def test_a_ragged_engine_gets_rows_where_they_promise_most() -> None:
    engine = ToyEngine(V, ragged=True, least=2)
    wanted = [alone(engine, prompt, 40, key=i) for i, prompt in enumerate(PROMPTS[:3])]
    sure = Oracle([*wanted[:1], [], []], V)
    served = scheduler(engine, 3, [sure])
    jobs = [job(served, prompt, 40, key=i) for i, prompt in enumerate(PROMPTS[:3])]
    for one in jobs:
        served.submit(one)
    drain(served)
    assert [one.text.tokens for one in jobs] == wanted
    assert jobs[0].stats.passes < 12 < jobs[1].stats.passes == 39


def test_settings_belong_to_the_request() -> None:
    engine = ToyEngine(V)
    kinds = [Sampling(), SAMPLED, Sampling(temperature=1.3, seed=4), Sampling(repetition_penalty=1.5)]
    served = scheduler(engine, 4, drafters())
    jobs = [job(served, [1, 2, 3], 20, kind) for kind in kinds]
    jobs.append(job(served, [1, 2, 3], 20, stop=lambda text: len(text.tokens) == 7))
    for one in jobs:
        served.submit(one)
    drain(served)
    assert [one.text.tokens for one in jobs[:4]] == [alone(engine, [1, 2, 3], 20, kind) for kind in kinds]
    assert (jobs[4].text.finish, jobs[4].text.tokens) == ("stop", jobs[0].text.tokens[:7])


def test_an_end_frees_the_place_at_once() -> None:
    engine = ToyEngine(V)
    plain = alone(engine, PROMPTS[0])
    end = plain[10]
    wanted = [alone(engine, prompt, eos={end}) for prompt in PROMPTS]
    served = scheduler(engine, 2, [Helped([plain] * 2, V, 1)], eos={end})
    jobs = [job(served, prompt) for prompt in PROMPTS]
    for one in jobs:
        served.submit(one)
    engine.taken.clear()
    drain(served)
    assert [one.text.tokens for one in jobs] == wanted
    assert jobs[0].text.finish == "eos"
    assert max(map(len, engine.taken)) == 2


def test_finished_rows_take_part_in_no_pass() -> None:
    engine = ToyEngine(V)
    served = scheduler(engine, 4)
    for new in (3, 30):
        served.submit(job(served, [1, 2], new))
    drain(served)
    assert engine.taken[-1] == [1]
    assert sum(len(taken) == 2 for taken in engine.taken) <= 3


@pytest.mark.parametrize("when", [0, 1, 3, 6])
def test_a_cancelled_job_leaves_and_disturbs_nobody(when: int) -> None:
    engine = ToyEngine(V)
    served = scheduler(engine, 2, drafters())
    jobs = [job(served, prompt, 20, key=i) for i, prompt in enumerate(PROMPTS)]
    for one in jobs:
        served.submit(one)
    events = [event for _ in range(when) for event in served.turn()]
    served.cancel(jobs[0])
    served.cancel(jobs[4])  # it waits
    events += drain(served)
    assert [event.finish for event in events if event.job is jobs[0]][-1] == "cancelled"
    assert [event.finish for event in events if event.job is jobs[4]] == ["cancelled"]
    assert jobs[0].text.tokens == alone(engine, PROMPTS[0], 20)[: len(jobs[0].text.tokens)]
    for i in (1, 2, 3):
        assert jobs[i].text.tokens == alone(engine, PROMPTS[i], 20, key=i)


def test_running_sequences_wait_for_one_chunk_at_most() -> None:
    engine = ToyEngine(V)
    served = scheduler(engine, 3, chunk=4)
    first = job(served, [1, 2], 40)
    served.submit(first)
    served.turn()
    for _ in range(2):
        served.submit(job(served, [3] * 60, 3))
    engine.passes.clear()
    for turn in range(1, 20):
        before = len(first.text.tokens)
        events = served.turn()
        assert len(first.text.tokens) > before, "every turn gives a running sequence its token"
        assert any(event.job is first for event in events)
        assert len(engine.passes) == 2 * turn
    assert max(rows for _, rows, _ in engine.passes) == 4


def test_alone_a_prompt_is_fed_in_whole_chunks() -> None:
    engine = ToyEngine(V)
    served = scheduler(engine, 2, chunk=4)
    served.submit(job(served, [3] * 60, 1))
    drain(served)
    assert [rows for _, rows, _ in engine.passes] == [60]


def test_an_error_ends_those_who_shared_the_pass_and_nobody_else() -> None:
    class Broken(ToyEngine):
        def forward(self, cache: Any, step: Step, **flags: Any) -> Outputs:
            if step.tokens.shape[1] == 30:
                raise RuntimeError("out of memory")
            return super().forward(cache, step, **flags)

    engine = Broken(V)
    served = scheduler(engine, 3, chunk=100)
    jobs = [job(served, prompt, 9) for prompt in PROMPTS]
    for one in jobs:
        served.submit(one)
    events = drain(served)
    (failed,) = [event for event in events if event.error]
    assert failed.job is jobs[4]
    assert str(failed.error) == "out of memory"
    assert [one.text.tokens for one in jobs[:4]] == [alone(engine, prompt, 9) for prompt in PROMPTS[:4]]


def test_events_add_up() -> None:
    engine = ToyEngine(V)
    served = scheduler(engine, 3, drafters())
    jobs = [job(served, prompt, 20) for prompt in PROMPTS]
    for one in jobs:
        served.submit(one)
    events = drain(served)
    for one in jobs:
        mine = [event for event in events if event.job is one]
        assert [token for event in mine for token in event.tokens] == one.text.tokens[one.text.prompt :]
        assert [event.finish for event in mine] == [None] * (len(mine) - 1) + ["length"]
        assert one.stats.tokens == 20
        assert one.stats.passes == len(mine) - 1 == sum(one.stats.accepted.values())
        assert sum(count * times for count, times in one.stats.accepted.items()) == 20 - len(mine)
        assert sum(one.stats.widths.values()) == one.stats.purposes["plain"] + one.stats.purposes["verify"] == one.stats.passes
        assert one.stats.purposes["prefill"] >= 1
    assert sum(one.stats.passes for one in jobs) == served.stats.sequences
    whole = served.run.stats
    assert sum(sum(one.stats.drafted_by.values()) for one in jobs) == sum(whole.drafted_by.values()) > 0
    assert 1 < served.stats.mean <= 3


# regroup


def test_regrouping_takes_the_largest_group_then_the_shortest() -> None:
    none = dict.fromkeys(range(6), 0)
    assert regroup({0: 5, 1: 7, 2: 5, 3: 9}, none, 4, 8) == [0, 2]
    assert regroup({0: 5, 1: 7, 3: 9}, none, 4, 8) == [0]
    assert regroup({0: 7, 1: 7, 2: 5, 3: 5}, none, 4, 8) == [2, 3]
    assert regroup({0: 5, 1: 5, 2: 5}, {0: 0, 1: 3, 2: 1}, 2, 8) == [1, 2]
    assert regroup({0: 5, 1: 7, 2: 5}, {0: 0, 1: 8, 2: 0}, 4, 8) == [1]


@pytest.mark.parametrize("speculative", [False, True])
def test_regrouping_needs_one_past_length_and_starves_nobody(speculative: bool) -> None:
    class OneLength(ToyEngine):
        def forward(self, cache: Any, step: Step, **flags: Any) -> Outputs:
            which = slice(None) if step.sequences is None else step.sequences
            assert len(set(cache.lengths[which].tolist())) == 1
            return super().forward(cache, step, **flags)

    engine, rng = OneLength(V), np.random.default_rng(0)
    prompts = [rng.integers(0, V, int(rng.integers(1, 12))).tolist() for _ in range(14)]
    served = scheduler(engine, 8, drafters() if speculative else None, batching=Batching(policy="regroup", sequences=4, patience=5))
    jobs = [job(served, prompt, 30, key=i) for i, prompt in enumerate(prompts)]
    for one in jobs:
        served.submit(one)
    longest = 0
    while not served.idle:
        served.turn()
        check(served)
        longest = max(longest, *(one.waited for one in jobs))
    assert [one.text.tokens for one in jobs] == [alone(engine, prompt, 30, key=i) for i, prompt in enumerate(prompts)]
    assert longest <= 5 + 8  # of several that are hungry only one goes at a time
    if not speculative:
        assert served.stats.grouped > served.stats.sequences / 2


@pytest.mark.parametrize("batching", [Batching(sequences=4), Batching(policy="regroup", sequences=4)])
def test_no_keys_or_values_are_moved_to_align_sequences(batching: Batching, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ToyEngine(V)
    served = scheduler(engine, 4, [Oracle([[1] * 200] * 4, V, right=2)], batching=batching)
    moved, keep = [], type(served.run.cache).keep

    def counted(cache: Any, sequence: int, rows: np.ndarray) -> None:
        moved.extend(row for slot, row in enumerate(rows.tolist()) if slot != row)
        keep(cache, sequence, rows)

    monkeypatch.setattr(type(served.run.cache), "keep", counted)
    for prompt in PROMPTS:
        served.submit(job(served, prompt))
    drain(served)
    assert moved == []


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_property_random_arrivals_and_cancels(data: st.DataObject) -> None:
    draw = data.draw
    vocab = draw(st.integers(2, 30))
    engine = ToyEngine(
        vocab, seed=draw(st.integers(0, 99)), predictable=draw(st.sampled_from([0.0, 0.5, 1.0])), least=2, ragged=draw(st.booleans())
    )
    eos = draw(st.sets(st.integers(0, vocab - 1), max_size=1))
    batching = draw(st.sampled_from([Batching(), Batching(policy="regroup", sequences=2, patience=2)]))
    made = draw(st.sampled_from([None, [PromptLookup().build(vocab), TokenRecycling(k=3).build(vocab)], [Bush(vocab, 1)]]))
    served = scheduler(engine, draw(st.integers(1, 4)), made, batching=batching, chunk=draw(st.integers(1, 9)), eos=eos)
    kinds = st.sampled_from([Sampling(), Sampling(temperature=1.0, seed=3), Sampling(repetition_penalty=1.4)])
    requests = draw(
        st.lists(
            st.tuples(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=12), st.integers(1, 16), kinds, st.integers(0, 9)),
            max_size=7,
        )
    )
    jobs, cancelled = [], set()
    for prompt, new, sampling, key in requests:
        jobs.append(job(served, prompt, new, sampling, key))
        served.submit(jobs[-1])
        for _ in range(draw(st.integers(0, 4))):
            served.turn()
            check(served)
        if draw(st.integers(0, 4)) == 0:
            cancelled.add(draw(st.integers(0, len(jobs) - 1)))
            served.cancel(jobs[max(cancelled)])
    drain(served)
    for i, (one, (prompt, new, sampling, key)) in enumerate(zip(jobs, requests, strict=True)):
        wanted = alone(engine, prompt, new, sampling, key, eos=eos)
        assert one.text.tokens == wanted or (i in cancelled and one.text.tokens == wanted[: len(one.text.tokens)])
