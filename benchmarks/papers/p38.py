"""Paper 38, ParallelBench: the loop against closed forms with an exact model, and the tiny trained one on the tasks."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from typing import Any

from planc.compiler.papers import Item, paper
from planc.compiler.suites.exact import valid_share
from planc.compiler.suites.parallelbench import orders, replace_random_valid, shuffle_valid
from planc.compiler.suites.run import draw
from planc.runtime.filler import Filler
from planc_paper_checks.lists import DETERMINISTIC, filler, held_out, judge, passes, same

RUNS = 20_000
COUNT = 100


@paper(38)
def parallel_bench() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    exe = filler(38)
    assert exe.plan.select.key == "top_k", "the plan is not the method that is checked"
    figures, held = dict[str, Any](), True
    for task, size, wanted in (
        ("shuffle", 2, shuffle_valid(orders(6, 2))),
        ("shuffle", 3, shuffle_valid(orders(6, 3))),
        ("replace_random", 2, replace_random_valid(orders(6, 2))),
    ):
        found = valid_share(task, 6, size, RUNS)
        held = held and abs(found - wanted) <= 3 * sqrt(wanted * (1 - wanted) / RUNS)
        figures[f"{task}_{size}"] = [round(found, 4), round(wanted, 4)]
    yield Item(1, f"{RUNS} runs of the exact model within three standard errors of the closed forms", held, figures)
    at_once, one = valid_share("replace_random", 6, 6, 500, temperature=0.0), valid_share("replace_random", 6, 1, 500)
    yield Item(
        2,
        "the likeliest words are never right, one slot a pass always is",
        at_once == 0.0 and one == 1.0,
        {"likeliest": at_once, "one_a_pass": one},
    )
    yield _trained(exe)
    examples = held_out(10)
    plain = judge(exe.with_plan(select="top_k"), examples)
    neutral = [judge(exe.with_plan(select=select), examples) for select in ({"factor": {"factor": 0.0}}, {"threshold": {"tau": 1.5}})]
    yield Item(
        4, "factor 0 and a threshold above 1 are one slot a pass", all(same(run, plain) for run in neutral), {"passes": passes(plain)}
    )


def _trained(exe: Filler) -> Item:
    """One pass where nothing depends on anything; shuffles of five sampled one slot a pass and all at once; what a threshold does there."""
    independent = held_out(COUNT, ("copy", "reverse"))
    once = judge(exe.with_plan(select="all"), independent)
    examples = draw(("shuffle",), COUNT, 7, {"shuffle": 5})
    ordered = judge(exe.with_plan(select="top_k"), examples, temperature=1.0)
    together = judge(exe.with_plan(select="all"), examples, temperature=1.0)
    threshold = judge(exe.with_plan(select="threshold"), examples)
    greedy = judge(exe.with_plan(select="top_k"), examples)
    formula = shuffle_valid([5], different=True)
    figures = {
        "copy_once": once.share("copy"),
        "reverse_once": once.share("reverse"),
        "shuffle_one_a_pass": ordered.share(),
        "shuffle_once": together.share(),
    }
    figures |= {
        "formula": round(formula, 4),
        "threshold": threshold.share(),
        "threshold_passes": passes(threshold),
        "one_a_pass_greedy": greedy.share(),
    }
    figures |= {f"one_a_pass_{task}": judge(exe.with_plan(select="top_k"), held_out(40, (task,))).share() for task in DETERMINISTIC}
    held = min(figures["copy_once"], figures["reverse_once"]) >= 0.95 and ordered.share() >= 0.9 and together.share() <= 2 * formula + 0.02
    return Item(
        3,
        "one pass copies and reverses (95 %); shuffles need their passes (90 % one a pass, at once no more than twice the formula)",
        held,
        figures,
    )
