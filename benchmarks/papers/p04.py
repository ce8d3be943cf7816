"""Paper 4, ADED: the five working conditions of its card, on SmolLM2-135M."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import numpy as np

from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.store import open_plan
from planc.runtime.decode import Tree
from planc.runtime.drafters import Context, NgramTable
from planc.runtime.drafters.ngram_table import write_table
from planc.runtime.executable import Executable, Generation
from planc.runtime.trees import Draft
from planc_paper_checks.common import MIXED, MODEL, answers, chats, drafting, equal, per_pass

PLAN = ROOT / "examples/papers/04-aded.yaml"
NEW = 64  # tokens of an answer


@paper(4)
def aded() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    base, _ = open_plan(PLAN, MODEL)
    prompts = chats(base, MIXED, 20)
    plain = answers(base.plain(), prompts, NEW)
    with tempfile.TemporaryDirectory() as folder:
        yield _identical(base, prompts, plain, Path(folder))
        yield _tokensper_pass(base, prompts, plain, Path(folder))
    yield _adaptation(base, prompts)
    yield _host_time(base, prompts, plain)
    yield _budgets(base, prompts[:8])


def _identical(base: Executable, prompts: list[list[int]], plain: list[Generation], folder: Path) -> Item:
    vocab, rng = base.engine.spec.vocab_size, np.random.default_rng(0)
    write_table(folder / "random.npz", rng.integers(0, vocab, (2, 4000)).tolist(), vocab, least=1)
    parts = {
        "empty table": NgramTable(),
        "random table": NgramTable(source=str(folder / "random.npz")),
        "monte carlo": NgramTable(search="monte_carlo"),
    }
    same = {name: equal(answers(drafting(base, part, Tree(budget=8)), prompts, NEW), plain) for name, part in parts.items()}
    return Item(1, "greedy output is identical", set(same.values()) == {len(prompts)}, {"prompts": len(prompts), **same})


def _tokensper_pass(base: Executable, prompts: list[list[int]], plain: list[Generation], folder: Path) -> Item:
    """The table is counted on the model's own answers to the even prompts and used on the odd ones."""
    texts = [ids + answer.ids for ids, answer in zip(prompts, plain, strict=True)]
    write_table(folder / "own.npz", texts[::2], base.engine.spec.vocab_size, least=1)
    cold = per_pass(answers(drafting(base, NgramTable(scope="request"), Tree(budget=16)), prompts[1::2], NEW))
    own = per_pass(answers(drafting(base, NgramTable(source=str(folder / "own.npz")), Tree(budget=16)), prompts[1::2], NEW))
    return Item(
        2, "tokens per pass >= 1.3 with a table of own outputs, never below 1", own >= 1.3 and cold >= 1.0, {"own": own, "cold": cold}
    )


def _adaptation(base: Executable, prompts: list[list[int]]) -> Item:
    exe = drafting(base, NgramTable(), Tree(budget=8))
    first, second = (sum(answer.stats.passes for answer in answers(exe, prompts, NEW)) for _ in range(2))
    return Item(3, "a second run needs >= 15 % fewer passes", second <= 0.85 * first, {"first": first, "second": second})


def _host_time(base: Executable, prompts: list[list[int]], plain: list[Generation]) -> Item:
    """Drafting alone, 16 guesses a round, on the texts of the plain run when the table already knows them: the most it ever has to do."""
    drafter, spent = NgramTable().build(base.engine.spec.vocab_size), list[float]()
    for known in (False, True):
        for ids, answer in zip(prompts, plain, strict=True):
            drafter.start(0)
            for end in range(1, len(answer.ids)):
                text = ids + answer.ids[:end]
                draft = Draft(text[-1])
                begin = perf_counter()
                drafter.propose(Context(0, text, 16, 12), draft)
                if known:
                    spent.append((perf_counter() - begin) * 1e3)
    assert base.contract.cost is not None
    mean = float(np.mean(spent))
    share = mean / base.contract.cost.ms(base.min_rows, 128)
    return Item(4, "drafting takes < 5 % of a pass", share < 0.05, {"mean_ms": round(mean, 4), "share": round(share, 4)})


def _budgets(base: Executable, prompts: list[list[int]]) -> Item:
    found, seconds = dict[int, float](), dict[int, float]()
    for budget in (2, 4, 8, 16):
        made = answers(drafting(base, NgramTable(depth=16, scope="request"), Tree(budget=budget, depth=16)), prompts, NEW)
        found[budget] = per_pass(made)
        seconds[budget] = round(sum(answer.stats.seconds for answer in made), 4)
    rates = list(found.values())
    rising = all(b >= 0.99 * a for a, b in zip(rates, rates[1:], strict=False))
    best = min(seconds, key=seconds.__getitem__)
    return Item(
        5, "tokens per pass rise with the budget, and time has an optimum", rising, {"per_pass": found, "seconds": seconds, "best": best}
    )
