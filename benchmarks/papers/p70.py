"""Paper 70, SmartSpec: the five working conditions of its card, on SmolLM2-135M, and a simulated server with the measured costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import Any

import numpy as np

from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.store import open_plan
from planc.runtime.contract import CostTable
from planc.runtime.controller import Controller, Cut
from planc.runtime.decode import Control, Tree
from planc.runtime.executable import Executable, Generation
from planc.runtime.profile import measure_cost
from planc.runtime.trees import chain

MODEL = "smollm2-135m"
PLAN = ROOT / "examples/papers/70-smartspec.yaml"
CLASSES = {
    "copy": (
        "Repeat this text three times, word for word: The ferry leaves the north pier at six, calls at both islands and is back by noon.",
        "Copy the list twice without changes: flour, butter, brown sugar, two eggs, a pinch of salt, dark chocolate, chopped hazelnuts.",
    ),
    "code": (
        "Write a Python class Stack with the methods push, pop, peek, is_empty and size, each with a docstring.",
        "Write a C function that reads numbers from a file and returns their sum, then one that returns their mean.",
    ),
    "prose": (
        "Describe the smell of a forest after rain to somebody who has never left the city.",
        "Tell a short story about a clockmaker who forgets the time.",
    ),
}
DEPTH, TOKENS = 8, 64


@paper(70)
def smartspec() -> Iterator[Item]:
    """Every condition of the card, in its order; then load."""
    base, _ = open_plan(PLAN, MODEL)
    yield _brute_force()
    yield _wall_time(base)
    yield _latency_model(base)
    yield _phases(base)
    yield _any_schedule(base)
    yield _load(base)


def _settled(control: Control, cost: Any) -> Controller:
    return Controller(Tree(shape="chain", depth=DEPTH), cost, control)


def _learn(controller: Controller, alpha: float, rounds: int = 3000) -> None:
    """Rounds with one guess that is accepted at a rate of `alpha`, evenly spread."""
    for i in range(rounds):
        controller.judge(chain([0, 1]), [0, 1] if int((i + 1) * alpha) > int(i * alpha) else [0])


def _brute_force() -> Item:
    """One rate for all positions, a cost that is linear in rows, and a draft that costs c passes a guess."""
    right = off = cells = wanted_off = 0
    control = Control(estimate="constant", margin=1.1, smoothing=0.001)
    for alpha in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95):
        for c, batch in product((0.02, 0.05, 0.1, 0.2, 0.3, 0.5), (1, 2, 4, 8, 16, 32, 64)):
            controller = _settled(control, lambda rows, past: 1.0 + 0.01 * rows)  # rows of all sequences
            _learn(controller, alpha, 300)
            learned = controller._expected(1)[1]
            controller._draft_ms = c
            goodput = [
                sum(learned**i for i in range(k + 1)) / (1.0 + 0.01 * batch * (k + 1) + c * k) / (1.1 if k else 1.0) for k in range(33)
            ]
            best = int(np.argmax(goodput))
            chosen = controller.ahead([100] * batch, 200, batch).guesses
            cells, right = cells + 1, right + (chosen == best)
            wanted_off, off = wanted_off + (best == 0), off + (best == 0 and chosen == 0)
    passed = right >= 0.99 * cells and off == wanted_off
    return Item(1, "the length is the brute-force optimum, off included", passed, {"cells": cells, "same": right, "off": off})


def _variant(base: Executable, **changes: Any) -> Executable:
    """The plan with another `speculative` section."""
    assert base.decode.speculative is not None
    speculative = base.decode.speculative.model_copy(update=changes)
    decode = base.decode.model_copy(update={"speculative": speculative, "min_rows": base.min_rows})
    return Executable(base.engine, base.text, decode, base.contract, base.manifest, base.directory)


def _answer(exe: Executable, ids: Sequence[int], tokens: int = TOKENS) -> Generation:
    answer = exe.generate(list(ids), max_new_tokens=tokens)
    assert isinstance(answer, Generation)
    return answer


def _wall_time(base: Executable) -> Item:
    """Runs in turns; the least time of each prompt counts, since other work on the machine only adds."""
    runs = {"plain": base.plain(), "smartspec": base}
    for k in (1, 2, 4, 8):
        runs[f"fixed {k}"] = _variant(base, tree=Tree(budget=k, shape="chain", depth=DEPTH), controller=Control())
    prompts = {kind: [base.text.apply_chat([{"role": "user", "content": text}]) for text in texts] for kind, texts in CLASSES.items()}
    least = defaultdict[tuple[str, str, int], float](lambda: float("inf"))
    for turn in range(5):
        for name, exe in list(runs.items())[:: -1 if turn % 2 else 1]:
            for kind, texts in prompts.items():
                for number, ids in enumerate(texts):
                    seconds = _answer(exe, ids).stats.seconds
                    if turn:  # the first turn is for what the controller and the drafters learn
                        least[name, kind, number] = min(least[name, kind, number], seconds)
    seconds = {name: {kind: sum(least[name, kind, i] for i in range(len(prompts[kind]))) for kind in prompts} for name in runs}
    against_plain = {kind: round(seconds["smartspec"][kind] / seconds["plain"][kind], 4) for kind in prompts}
    best = {kind: min((name for name in runs if name != "smartspec"), key=lambda name: seconds[name][kind]) for kind in prompts}
    against_best = {kind: round(seconds["smartspec"][kind] / seconds[best[kind]][kind], 4) for kind in prompts}
    passed = max(against_best.values()) <= 1.05 and max(against_plain.values()) <= 1.03
    figures = {"best_fixed": best, "time_to_best": against_best, "time_to_plain": against_plain}
    return Item(2, "time <= best of plain and fixed lengths + 5 %, <= plain + 3 %, by class of prompts", passed, figures)


def _latency_model(base: Executable) -> Item:
    """Every other point of a fresh grid is left out of the table and read from it."""
    rows, past, batch = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16), (16, 128, 256, 512), (1, 2, 4)
    seen = measure_cost(base.engine, rows=rows, past=past, batch=batch, capacity=1024, seconds=25.0, repeats=25)
    kept_rows, kept_past, kept_batch = (1, 2, 3, 4, 6, 8, 12, 16), (16, 128, 512), (1, 4)

    def cell(b: int, p: int, r: int) -> float:
        return seen.measured[batch.index(b)][past.index(p)][rows.index(r)]

    table = CostTable(
        rows=kept_rows,
        past=kept_past,
        batch=kept_batch,
        measured=tuple(tuple(tuple(cell(b, p, r) for r in kept_rows) for p in kept_past) for b in kept_batch),
    )
    held_out = [(b, p, r) for b, p, r in product(batch, past, rows) if b not in kept_batch or p not in kept_past or r not in kept_rows]
    errors = [abs(table.ms(r, p, b) / cell(b, p, r) - 1.0) for b, p, r in held_out]
    median = float(np.median(errors))
    figures = {"cells": len(held_out), "median_error": round(median, 4), "90 %": round(float(np.quantile(errors, 0.9)), 4)}
    return Item(3, "median error of the cost table on held-out cells <= 15 %", median <= 0.15, figures)


def _round(controller: Controller, cost: CostTable, alphas: Sequence[float], rng: Random) -> tuple[int, list[int], float]:
    """One simulated pass for a batch: guesses, tokens of each sequence, milliseconds by the table."""
    batch = len(alphas)
    n = controller.ahead([128] * batch, 256, batch, tested=False).guesses
    n = min(n, DEPTH)
    tokens = []
    for alpha in alphas:
        accepted = next((i for i in range(n) if rng.random() >= alpha), n)
        controller.judge(chain([0] * (n + 1)), range(accepted + 1))
        tokens.append(accepted + 1)
    ms = cost.ms(n + 1, 128, batch)
    controller.observe(n + 1, 128, batch, sum(tokens) / batch, ms)
    return n, tokens, ms


def _phases(base: Executable) -> Item:
    """Acceptance falls from that of copied text to that of prose, and rises again; the costs are the measured ones."""
    cost, rng, steps = _cost(base), Random(0), 200
    control = base.decode.speculative.controller if base.decode.speculative is not None else Control()
    controller, taken = _settled(control, cost), list[int]()
    for alpha in (0.95, 0.02, 0.95):
        taken += [_round(controller, cost, [alpha], rng)[0] for _ in range(steps)]

    def best(alpha: float) -> int:
        return max(range(DEPTH + 1), key=lambda k: sum(alpha**i for i in range(k + 1)) / cost.ms(k + 1, 128))

    long = best(0.95)
    down = next((i for i in range(steps) if max(taken[steps + i : steps + i + 10]) == 0), steps)
    up = next((i for i in range(steps) if min(taken[2 * steps + i : 2 * steps + i + 4]) >= long / 2), steps)
    figures = {
        "best": [long, best(0.02), long],
        "steps_down": down,
        "steps_up": up,
        "tries_while_off": sum(n > 0 for n in taken[steps + down : 2 * steps]),
    }
    return Item(4, "the length adapts within 40 steps to a change of text, both ways", down <= 40 and up <= 40 and long >= 4, figures)


def _cost(base: Executable) -> CostTable:
    assert base.contract.cost is not None
    return base.contract.cost


def _any_schedule(base: Executable) -> Item:
    """The text does not depend on how long the drafts were."""
    rng, same, lengths = Random(1), 0, set[int]()
    texts = [text for texts in CLASSES.values() for text in texts]
    prompts = [base.text.apply_chat([{"role": "user", "content": text}]) for text in texts]
    exe = _variant(base)
    lane = exe._take_lane()

    def ahead(*args: Any, tested: bool = False, **options: Any) -> Cut:
        lengths.add(n := rng.randint(0, DEPTH))
        return Cut(n, chain=True, tested=tested)

    lane.controller.ahead = ahead  # type: ignore[method-assign]
    exe._return_lane(lane)
    plain = base.plain()
    for ids in prompts:
        same += _answer(exe, ids).ids == _answer(plain, ids).ids
    passed = same == len(prompts) and len(lengths) == DEPTH + 1
    return Item(5, "any schedule of lengths gives the plain text", passed, {"prompts": len(prompts), "same": same, "lengths": len(lengths)})


@dataclass
class _Request:
    arrived: float
    left: int
    alpha: float


def _load(base: Executable) -> Item:
    """Requests of 64 tokens arrive at random; at most 16 share a pass. One device has the measured costs, one is full at 12 rows."""
    assert base.decode.speculative is not None
    full = tuple((tuple(max(12.0, float(r * b)) for r in range(1, 10)),) for b in (1, 4, 16))
    devices = {"measured": _beyond(_cost(base)), "full": CostTable(rows=tuple(range(1, 10)), past=(128,), batch=(1, 4, 16), measured=full)}
    figures, passed = dict[str, Any](), True
    for (device, cost), load in product(devices.items(), (0.1, 0.4, 0.8, 1.2)):
        capacity = 1e3 * 16 / (64 * cost.ms(1, 128, 16))  # requests a second that plain decoding can just serve
        latency, length = dict[str, float](), dict[str, float]()
        for name in ("goodput", *(str(k) for k in (0, 1, 2, 4, 8))):
            fixed = None if name == "goodput" else int(name)
            latency[name], length[name] = _serve(cost, base.decode.speculative.controller, load * capacity, fixed)
        best = min((name for name in latency if name != "goodput"), key=lambda name: latency[name])
        ratio = latency["goodput"] / latency[best]
        figures[f"{device} {load}"] = {"latency_to_best": round(ratio, 4), "best_fixed": int(best), "length": round(length["goodput"], 2)}
        passed = passed and ratio <= 1.05
    return Item(6, "simulated server: mean latency <= best fixed length + 5 % at any load", passed, figures)


def _beyond(cost: CostTable) -> CostTable:
    """The table with a batch of 16: what a row more of one sequence more costs stays as it is from 1 to 4."""
    last, first = cost.measured[-1], cost.measured[0]
    step = (cost.batch[-1] - cost.batch[0]) / (16 - cost.batch[-1])
    far = tuple(tuple(max(b, b + (b - a) / step) for a, b in zip(one, four, strict=True)) for one, four in zip(first, last, strict=True))
    return CostTable(rows=cost.rows, past=cost.past, batch=(*cost.batch, 16), measured=(*cost.measured, far))


def _serve(cost: CostTable, control: Control, rate: float, fixed: int | None, requests: int = 300) -> tuple[float, float]:
    """Mean latency in seconds and mean length of the drafts; texts differ in how well they can be guessed."""
    rng = Random(3)
    arrivals, now = list[_Request](), 0.0
    for _ in range(requests):
        now += rng.expovariate(rate)
        arrivals.append(_Request(now, 64, rng.choice((0.3, 0.5, 0.8))))
    controller = Controller(Tree(budget="auto" if fixed is None else fixed, shape="chain", depth=DEPTH), cost, control)
    waiting, active = arrivals[::-1], list[_Request]()
    now, total, lengths, passes = 0.0, 0.0, 0, 0
    while waiting or active:
        if not active:
            now = max(now, waiting[-1].arrived)
        while waiting and waiting[-1].arrived <= now and len(active) < 16:
            active.append(waiting.pop())
        n, tokens, ms = _round(controller, cost, [request.alpha for request in active], rng)
        now, lengths, passes = now + ms / 1e3, lengths + n, passes + 1
        for request, count in zip(active, tokens, strict=True):
            request.left -= count
            total += now - request.arrived if request.left <= 0 else 0.0
        active = [request for request in active if request.left > 0]
    return total / requests, lengths / passes
