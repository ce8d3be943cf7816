"""Paper 41, batch speculative decoding: the five working conditions of its card, on SmolLM2-135M."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter, process_time
from typing import Any

import numpy as np

from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.store import open_plan
from planc.runtime.contract import CostTable
from planc.runtime.controller import Controller
from planc.runtime.decode import Batching
from planc.runtime.executable import Executable
from planc.runtime.scheduler import Job, Scheduler
from planc.runtime.server import Server
from planc.runtime.trees import Draft
from planc_paper_checks.common import MIXED, MODEL, answer, chats

PLAN = ROOT / "examples/papers/41-batch-spec.yaml"


@paper(41)
def batch_spec() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    base, _ = open_plan(PLAN, MODEL)
    more = chats(base, MIXED, 16)
    prompts = more[:8]
    yield _identical(base, prompts)
    yield _invariants(base, prompts)
    yield _end_inside(base, prompts[:4])
    yield _realigned(base, prompts)
    yield _throughput(base, more)


def _served(server: Server, prompts: Sequence[list[int]], tokens: int, **options: Any) -> list[list[int]]:
    handles = [server.submit(ids, max_new_tokens=tokens, **options) for ids in prompts]
    return [handle.result().ids for handle in handles]


def _identical(base: Executable, prompts: list[list[int]]) -> Item:
    same = {}
    for name, exe in (("speculative", base), ("plain", base.plain())):
        for kind, options in (("greedy", {}), ("sampled", {"temperature": 0.8, "seed": 7})):
            wanted = [answer(exe, ids, 32, **options).ids for ids in prompts]
            for batch in (2, 3, 8):
                with exe.serve(batch) as server:
                    found = _served(server, prompts[::-1], 32, **options)[::-1]
                same[f"{name} {kind} {batch}"] = sum(a == b for a, b in zip(found, wanted, strict=True))
    return Item(1, "every row equals its run alone", set(same.values()) == {len(prompts)}, {"prompts": len(prompts), **same})


def _scheduler(base: Executable, prompts: Sequence[list[int]], batching: Batching, tokens: int) -> tuple[Scheduler, list[Job]]:
    """The plan's scheduler with jobs for the prompts, to be turned by hand."""
    scheduler = base._scheduler(base._take_lane(), batching, 1024)
    decode = base.decode.model_copy(update={"max_new_tokens": tokens})
    jobs = [Job(scheduler.run.text(ids, decode)) for ids in prompts]
    for job in jobs:
        scheduler.submit(job)
    return scheduler, jobs


def _invariants(base: Executable, prompts: list[list[int]]) -> Item:
    """After every turn the cached length is that of the text without its pending token, and a place that is free is empty."""
    scheduler, _ = _scheduler(base, prompts, Batching(), 96)
    turns = broken = 0
    while not scheduler.idle:
        scheduler.turn()
        turns += 1
        for b, job in enumerate(scheduler.places):
            length = int(scheduler.run.cache.lengths[b])
            fed = job is not None and len(job.text.tokens) > job.text.prompt
            broken += length != len(job.text.tokens) - 1 if job is not None and fed else job is None and length != 0
    return Item(2, "lengths hold after each of 100 rounds", turns >= 100 and not broken, {"turns": turns, "broken": broken})


def _end_inside(base: Executable, prompts: list[list[int]]) -> Item:
    """The end token stands in the prompts: padding is known by lengths, never by ids."""
    odd = [[*ids[:5], *base.eos_ids, *ids[5:], *base.eos_ids, ids[-1]] for ids in prompts]
    wanted = [answer(base, ids, 32).ids for ids in odd]
    with base.serve(4) as server:
        same = sum(a == b for a, b in zip(_served(server, odd, 32), wanted, strict=True))
    return Item(3, "end tokens inside a prompt change nothing", same == len(odd), {"prompts": len(odd), "same": same})


def _realigned(base: Executable, prompts: list[list[int]]) -> Item:
    """Slots that keeping accepted rows moves, counted; chains move none, and no policy moves any to align sequences."""
    figures: dict[str, Any] = {}
    for policy, batching in (("lengths", Batching()), ("regroup", Batching(policy="regroup", window=16))):
        scheduler, _ = _scheduler(base, sorted(prompts, key=len), batching, 48)
        moved, cache = 0, scheduler.run.cache
        keep = cache.keep

        def counted(sequence: int, rows: Any, keep: Any = keep) -> None:
            nonlocal moved
            moved += int((np.asarray(rows) != np.arange(len(rows))).sum())
            keep(sequence, rows)

        cache.keep = counted  # type: ignore[method-assign]
        while not scheduler.idle:
            scheduler.turn()
        figures[f"{policy}_moved_slots"] = moved
        figures[f"{policy}_grouped"] = round(scheduler.stats.grouped / max(1, scheduler.stats.sequences), 4)
    passed = figures["lengths_moved_slots"] == figures["regroup_moved_slots"] == 0
    return Item(4, "no key or value is moved to align sequences", passed, figures)


def _throughput(base: Executable, prompts: list[list[int]]) -> Item:
    seconds, cpu, tokens = {1: 0.0, 4: 0.0}, {1: 0.0, 4: 0.0}, 0
    for turn in range(2):
        for batch in (1, 4) if turn else (4, 1):
            with base.serve(batch) as server:
                _served(server, prompts[:batch], 4)  # its memory is taken
                begin, busy = perf_counter(), process_time()
                found = _served(server, prompts, 64)
                seconds[batch] += perf_counter() - begin
                cpu[batch] += process_time() - busy
        tokens = sum(map(len, found))
    gain = seconds[1] / seconds[4]
    figures = {"tokens": tokens, "gain_of_batch_4": round(gain, 4), "gain_in_cpu_seconds": round(cpu[1] / cpu[4], 4)}
    figures["rows_past_the_knee"] = _rows_past_the_knee()
    return Item(
        5, "batch 4 gives >= 1.2 x batch 1; no drafts where rows are dear", gain >= 1.2 and not figures["rows_past_the_knee"], figures
    )


def _rows_past_the_knee() -> int:
    """Guesses that the controller takes when, for a batch, each row more costs a pass."""
    table = CostTable(rows=(1, 2, 32), past=(16,), batch=(1, 4), measured=(((10.0, 10.1, 12.0),), ((10.0, 20.0, 320.0),)))
    drafts = [Draft(0) for _ in range(4)]
    for draft in drafts:
        for row in range(6):
            draft.add(row, row, ("x",), 0.6)
    chosen = Controller(cost=table).select(drafts, [64] * 4, 100, 4, ragged=True)
    return sum(len(draft) - 1 for draft in chosen)
