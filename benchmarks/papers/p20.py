"""Paper 20, Token Recycling: the five working conditions of its card, on SmolLM2-135M."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.store import open_plan
from planc.runtime.contract import CostTable
from planc.runtime.decode import Tree
from planc.runtime.drafters.base import Verified
from planc.runtime.drafters.token_recycling import RecyclingDrafter, TokenRecycling
from planc.runtime.executable import Executable
from planc_paper_checks.common import MIXED, MODEL, answer, answers, chats, data, drafting, equal, per_pass

PLAN = ROOT / "examples/papers/20-token-recycling.yaml"
TREE_PLAN = ROOT / "benchmarks/papers/p20-tree.yaml"  # the same with trees in the graph, whatever is fastest on this machine

#: Six categories of user prompts where the data is at hand, else a set of our own of the same kinds.
PROMPTS = data("spec_bench/prompts.jsonl") or MIXED

PAPER_TREE = Tree(shape="tree", budget=80, depth=6)
SMALL_TREE = Tree(shape="tree", budget=16, depth=16)  # as deep as 16 nodes can be; which of them are worth it is learned


class _Frozen(RecyclingDrafter):
    """Ablation: M is never written."""

    def update(self, verified: Verified) -> None:
        return None


class _AcceptedOnly(RecyclingDrafter):
    """Ablation: rows that were rejected are not written back."""

    def update(self, verified: Verified) -> None:
        rows = verified.rows
        super().update(
            Verified(
                verified.sequence,
                [verified.tokens[row] for row in rows],
                [verified.depths[row] for row in rows],
                list(range(len(rows))),
                verified.chosen,
                None if verified.top_ids is None else verified.top_ids[rows],
                None if verified.top_logits is None else verified.top_logits[rows],
            )
        )


def _state(exe: Executable, kind: type[RecyclingDrafter] | None = None) -> RecyclingDrafter:
    """What the drafter knows and the next call will use; made one of `kind`: the same data, another `update`."""
    lane = exe._take_lane()
    exe._return_lane(lane)
    (drafter,) = lane.drafters
    assert isinstance(drafter, RecyclingDrafter)
    if kind is not None:
        drafter.__class__ = kind
    return drafter


@paper(20)
def token_recycling() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    base, _ = open_plan(PLAN, MODEL)
    trees, _ = open_plan(TREE_PLAN, MODEL)
    prompts = chats(base, PROMPTS, 24)
    measured, warm = prompts[:20], prompts[20:]
    yield _identical(base, trees, prompts[::4])
    yield _tokens_per_pass(trees, measured, warm)
    yield _memory(trees, measured[:3])
    yield _ablations(trees, measured[:10])
    yield _wall_clock(base, measured)


def _identical(base: Executable, trees: Executable, prompts: list[list[int]]) -> Item:
    plain = answers(base.plain(), prompts, 64)
    vocab = base.engine.spec.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        random, zeros = Path(folder) / "random.npy", Path(folder) / "zeros.npy"
        np.save(random, np.random.default_rng(0).integers(0, vocab, (vocab, 8), dtype=np.int32))
        np.save(zeros, np.zeros((vocab, 8), dtype=np.int32))
        variants = {
            "plan": base,
            "random M": drafting(base, TokenRecycling(warm=str(random)), Tree(budget=8)),
            "zero M": drafting(base, TokenRecycling(warm=str(zeros)), Tree(budget=8)),
            "k=1": drafting(base, TokenRecycling(k=1), Tree(budget=8)),
            "one node": drafting(base, TokenRecycling(template=((0,),)), Tree(budget=1)),
        }
        same = {"80-node template": equal(answers(trees, prompts, 64), answers(trees.plain(), prompts, 64))}
        same |= {name: equal(answers(exe, prompts, 64), plain) for name, exe in variants.items()}
    return Item(1, "greedy output is identical", all(count == len(prompts) for count in same.values()), {"prompts": len(prompts), **same})


def _tokens_per_pass(base: Executable, prompts: list[list[int]], warm: list[list[int]]) -> Item:
    hot = drafting(base, TokenRecycling(template="paper"), PAPER_TREE)
    answers(hot, warm, 128)
    figures = {"hot": per_pass(answers(hot, prompts, 128))}
    cold = drafting(base, TokenRecycling(template="paper", scope="request"), PAPER_TREE)
    figures["cold"] = per_pass(answers(cold, prompts, 128))
    small = drafting(base, TokenRecycling(), SMALL_TREE)
    answers(small, warm, 128)
    figures["hot_16_nodes"] = per_pass(answers(small, prompts, 128))
    figures["share_of_16_nodes"] = round(figures["hot_16_nodes"] / figures["hot"], 4)
    passed = figures["hot"] >= 1.8 and figures["cold"] >= 1.5 and figures["share_of_16_nodes"] >= 0.85
    return Item(
        2,
        "tokens per pass: hot >= 1.8, cold >= 1.5, 16 nodes >= 85 % of 80",
        passed,
        {"prompts": len(prompts), "set": PROMPTS.parent.name, **figures},
    )


def _memory(base: Executable, prompts: list[list[int]]) -> Item:
    exe = drafting(base, TokenRecycling(), SMALL_TREE)
    sizes: list[int] = []
    for ids in prompts:
        answer(exe, ids, 64)
        drafter = _state(exe)
        sizes.append(sum(value.nbytes for value in vars(drafter).values() if isinstance(value, np.ndarray)))
    limit = base.engine.spec.vocab_size * 8 * 4
    matrix = _state(exe).matrix.nbytes
    return Item(
        3,
        "M takes V k 4 bytes and nothing grows",
        matrix <= limit and len(set(sizes)) == 1,
        {"M_bytes": matrix, "limit": limit, "all_bytes": sizes[-1]},
    )


def _ablations(base: Executable, prompts: list[list[int]]) -> Item:
    def tokens(new: int, state: type[RecyclingDrafter] | None = None, **options: Any) -> float:
        exe = drafting(base, TokenRecycling(scope="request", **options), SMALL_TREE)
        _state(exe, state)
        return per_pass(answers(exe, prompts, new))

    figures = {
        "all_rows": tokens(96),
        "accepted_rows": tokens(96, _AcceptedOnly),
        "no_update": tokens(96, _Frozen),
        "prompt_update_32": tokens(32),
        "no_prompt_update_32": tokens(32, prefill_update=False),
    }
    passed = figures["no_update"] <= 1.1 and figures["accepted_rows"] < figures["all_rows"]
    passed = passed and figures["prompt_update_32"] > figures["no_prompt_update_32"]
    return Item(4, "no update <= 1.1; accepted rows < all rows; prompt update > none", passed, figures)


def _wall_clock(base: Executable, prompts: list[list[int]]) -> Item:
    """The compiled plan as it is, paired with plain; and what it drafts when drafting is made to cost nothing, or everything."""
    plain, seconds = base.plain(), {"plan": 0.0, "plain": 0.0}
    tokens = {"plan": 0, "plain": 0}
    answer(plain, prompts[0], 8)
    for turn, ids in enumerate(prompts):
        for name in ("plan", "plain") if turn % 2 else ("plain", "plan"):
            stats = answer(base if name == "plan" else plain, ids, 96).stats
            seconds[name] += stats.seconds
            tokens[name] += stats.tokens
    ratio = tokens["plan"] / seconds["plan"] / (tokens["plain"] / seconds["plain"])

    def rows(price: float) -> float:
        """Rows per pass when each row more costs `price` passes."""
        widths = (1, 2, 64)
        table = CostTable(
            rows=widths, past=(16,), measured=((tuple(10.0 * (1 + price * max(0, width - base.min_rows)) for width in widths),),)
        )
        exe = drafting(base, TokenRecycling(), Tree(), cost=table)
        made = answers(exe, prompts[:4], 64)
        return round(sum(a.stats.rows for a in made) / sum(a.stats.passes for a in made), 2)

    free, dear = rows(1e-4), rows(5.0)
    figures = {"ratio_to_plain": round(ratio, 4), "rows_when_free": free, "rows_when_dear": dear, "min_rows": base.min_rows}
    passed = ratio >= 0.97 and dear <= base.min_rows + 0.5 and free > dear
    return Item(5, "the node count follows the measured cost and is never > 3 % slower than plain", passed, figures)
