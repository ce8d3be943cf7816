"""Paper 20, Token Recycling: the five working conditions of its card, on SmolLM2-135M."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from planc.compiler.bench import load_prompts
from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.store import open_plan
from planc.runtime.contract import CostTable
from planc.runtime.decode import Speculative, Tree
from planc.runtime.drafters.base import Verified
from planc.runtime.drafters.token_recycling import RecyclingDrafter, TokenRecycling
from planc.runtime.executable import Executable, Generation

MODEL = "smollm2-135m"
PLAN = ROOT / "examples/papers/20-token-recycling.yaml"
TREE_PLAN = ROOT / "benchmarks/papers/p20-tree.yaml"  # the same with trees in the graph, whatever is fastest on this machine

#: Six categories of user prompts where the data is at hand, else a set of our own of the same kinds.
PROMPTS = next(
    p
    for p in (
        Path(os.environ.get("PLANC_DATA", ROOT.parent / "shared/data"), "spec_bench/prompts.jsonl"),
        ROOT / "benchmarks/prompts/mixed.jsonl",
    )
    if p.is_file()
)

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
            )
        )


class _Variant(Executable):
    """The compiled plan with another drafter or tree, and optionally another class of drafter state."""

    def __init__(
        self, base: Executable, part: TokenRecycling, tree: Tree, state: type[RecyclingDrafter] | None = None, cost: CostTable | None = None
    ) -> None:
        decode = base.decode.model_copy(update={"speculative": Speculative(drafter=(part,), tree=tree), "min_rows": base.min_rows})
        contract = base.contract if cost is None else base.contract.model_copy(update={"cost": cost})
        super().__init__(base.engine, base.text, decode, contract, base.manifest, base.directory)
        self._state = state

    def drafter(self) -> RecyclingDrafter:
        """The state that the last call used."""
        (drafter,) = self._idle[-1].drafters
        assert isinstance(drafter, RecyclingDrafter)
        return drafter

    def _take_lane(self) -> Any:
        lane = super()._take_lane()
        if self._state is not None:
            lane.drafters[0].__class__ = self._state  # same data, another `update`
        return lane


def _generate(exe: Executable, ids: Sequence[int], tokens: int) -> Generation:
    answer = exe.generate(list(ids), max_new_tokens=tokens, temperature=0.0)
    assert isinstance(answer, Generation)
    return answer


def _per_pass(answers: Sequence[Generation]) -> float:
    """Tokens per decoding pass over all answers."""
    passes = sum(answer.stats.passes for answer in answers)
    return round(sum(answer.stats.tokens_per_pass * answer.stats.passes for answer in answers) / max(1, passes), 4)


@paper(20)
def token_recycling() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    base, _ = open_plan(PLAN, MODEL)
    trees, _ = open_plan(TREE_PLAN, MODEL)
    prompts = [base.text.apply_chat([{"role": "user", "content": p.text}]) for p in load_prompts(str(PROMPTS), 24)]
    measured, warm = prompts[:20], prompts[20:]
    yield _identical(base, trees, prompts[::4])
    yield _tokens_per_pass(trees, measured, warm)
    yield _memory(trees, measured[:3])
    yield _ablations(trees, measured[:10])
    yield _wall_clock(base, measured)


def _identical(base: Executable, trees: Executable, prompts: list[list[int]]) -> Item:
    plain = [_generate(base.plain(), ids, 64).ids for ids in prompts]
    vocab = base.engine.spec.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        random, zeros = Path(folder) / "random.npy", Path(folder) / "zeros.npy"
        np.save(random, np.random.default_rng(0).integers(0, vocab, (vocab, 8), dtype=np.int32))
        np.save(zeros, np.zeros((vocab, 8), dtype=np.int32))
        variants = {
            "plan": base,
            "random M": _Variant(base, TokenRecycling(warm=str(random)), Tree(budget=8)),
            "zero M": _Variant(base, TokenRecycling(warm=str(zeros)), Tree(budget=8)),
            "k=1": _Variant(base, TokenRecycling(k=1), Tree(budget=8)),
            "one node": _Variant(base, TokenRecycling(template=((0,),)), Tree(budget=1)),
        }
        same = {"80-node template": sum(_generate(trees, ids, 64).ids == _generate(trees.plain(), ids, 64).ids for ids in prompts)}
        same |= {
            name: sum(_generate(exe, ids, 64).ids == p for ids, p in zip(prompts, plain, strict=True)) for name, exe in variants.items()
        }
    return Item(1, "greedy output is identical", all(count == len(prompts) for count in same.values()), {"prompts": len(prompts), **same})


def _tokens_per_pass(base: Executable, prompts: list[list[int]], warm: list[list[int]]) -> Item:
    hot = _Variant(base, TokenRecycling(template="paper"), PAPER_TREE)
    for ids in warm:
        _generate(hot, ids, 128)
    figures = {"hot": _per_pass([_generate(hot, ids, 128) for ids in prompts])}
    cold = _Variant(base, TokenRecycling(template="paper", scope="request"), PAPER_TREE)
    figures["cold"] = _per_pass([_generate(cold, ids, 128) for ids in prompts])
    small = _Variant(base, TokenRecycling(), SMALL_TREE)
    for ids in warm:
        _generate(small, ids, 128)
    figures["hot_16_nodes"] = _per_pass([_generate(small, ids, 128) for ids in prompts])
    figures["share_of_16_nodes"] = round(figures["hot_16_nodes"] / figures["hot"], 4)
    passed = figures["hot"] >= 1.8 and figures["cold"] >= 1.5 and figures["share_of_16_nodes"] >= 0.85
    return Item(
        2,
        "tokens per pass: hot >= 1.8, cold >= 1.5, 16 nodes >= 85 % of 80",
        passed,
        {"prompts": len(prompts), "set": PROMPTS.parent.name, **figures},
    )


def _memory(base: Executable, prompts: list[list[int]]) -> Item:
    exe = _Variant(base, TokenRecycling(), SMALL_TREE)
    sizes: list[int] = []
    for ids in prompts:
        _generate(exe, ids, 64)
        drafter = exe.drafter()
        sizes.append(sum(value.nbytes for value in vars(drafter).values() if isinstance(value, np.ndarray)))
    limit = base.engine.spec.vocab_size * 8 * 4
    matrix = exe.drafter().matrix.nbytes
    return Item(
        3,
        "M takes V k 4 bytes and nothing grows",
        matrix <= limit and len(set(sizes)) == 1,
        {"M_bytes": matrix, "limit": limit, "all_bytes": sizes[-1]},
    )


def _ablations(base: Executable, prompts: list[list[int]]) -> Item:
    def tokens(new: int, state: type[RecyclingDrafter] | None = None, **options: Any) -> float:
        exe = _Variant(base, TokenRecycling(scope="request", **options), SMALL_TREE, state)
        return _per_pass([_generate(exe, ids, new) for ids in prompts])

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
    _generate(plain, prompts[0], 8)
    for turn, ids in enumerate(prompts):
        for name in ("plan", "plain") if turn % 2 else ("plain", "plan"):
            answer = _generate(base if name == "plan" else plain, ids, 96)
            seconds[name] += answer.stats.seconds
            tokens[name] += answer.stats.tokens
    ratio = tokens["plan"] / seconds["plan"] / (tokens["plain"] / seconds["plain"])

    def rows(price: float) -> float:
        """Rows per pass when each row more costs `price` passes."""
        widths = (1, 2, 64)
        table = CostTable(
            rows=widths, past=(16,), measured=((tuple(10.0 * (1 + price * max(0, width - base.min_rows)) for width in widths),),)
        )
        exe = _Variant(base, TokenRecycling(), Tree(), cost=table)
        answers = [_generate(exe, ids, 64) for ids in prompts[:4]]
        return round(sum(a.stats.rows for a in answers) / sum(a.stats.passes for a in answers), 2)

    free, dear = rows(1e-4), rows(5.0)
    figures = {"ratio_to_plain": round(ratio, 4), "rows_when_free": free, "rows_when_dear": dear, "min_rows": base.min_rows}
    passed = ratio >= 0.97 and dear <= base.min_rows + 0.5 and free > dear
    return Item(5, "the node count follows the measured cost and is never > 3 % slower than plain", passed, figures)
