"""Paper 12, DySpec: the five working conditions of its card, on SmolLM2-135M with the distilled draft.

Tokens per pass of greedy text do not need the target again: the text that it wrote says which guesses of a tree are right. So builders are
compared on the same texts at the cost of their draft passes alone (`replay`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.store import open_plan
from planc.runtime.acceptance import RULES, Target, walk
from planc.runtime.builders import BuilderPart, Chain, Dynamic, Static
from planc.runtime.contract import CostTable
from planc.runtime.decode import Sampling, Speculative, Tree
from planc.runtime.drafters import Context, DraftModel, Loaded
from planc.runtime.executable import Executable, Generation
from planc.runtime.sampling import Drawing, Sampler, probabilities
from planc.runtime.trees import Draft, Rates
from planc_paper_checks.common import MIXED, MODEL, TableSource, chats, replay

PLAN = ROOT / "examples/papers/12-dyspec.yaml"
TOKENS = 64
KEY = "draft_model"


@paper(12)
def dyspec() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    exe, _ = open_plan(PLAN, MODEL)
    prompts = chats(exe, MIXED, 16)  # the draft has seen none of them in training
    plain = [_generate(exe.plain(), ids) for ids in prompts]
    texts = [(ids, answer.ids) for ids, answer in zip(prompts, plain, strict=True)]
    yield _exact(exe, prompts[:6], plain)
    model = exe.models["draft"]
    yield _against_static(model, texts)
    yield _calibration(model, texts)
    yield _thresholds(model, texts)
    yield _stops(exe, prompts[:6])


def _generate(exe: Executable, ids: Sequence[int]) -> Generation:
    answer = exe.generate(list(ids), max_new_tokens=TOKENS, temperature=0.0)
    assert isinstance(answer, Generation)
    return answer


def _variant(exe: Executable, tree: Tree, cost: CostTable | None = None, **options: Any) -> Executable:
    """The plan with another builder or tree; `cost` replaces what was measured of the target's passes."""
    part = DraftModel(artifact="draft", **options)
    decode = exe.decode.model_copy(update={"speculative": Speculative(drafter=(part,), tree=tree)})
    contract = exe.contract if cost is None else exe.contract.model_copy(update={"cost": cost})
    return Executable(exe.engine, exe.text, decode, contract, exe.manifest, exe.directory, exe.models)


# ---- 1. exactness ------------------------------------------------------------------------------------------------------------------


def _exact(exe: Executable, prompts: list[list[int]], plain: list[Generation]) -> Item:
    variants = {
        "plan": exe,
        "budgeted 12": _variant(exe, Tree(shape="tree", budget=12), min_p=0.0, builder=Dynamic(threshold=0.0)),
        "threshold 12": _variant(exe, Tree(shape="tree", budget=12), min_p=0.0, builder=Dynamic()),
    }
    same = {name: sum(_generate(e, ids).ids == p.ids for ids, p in zip(prompts, plain, strict=False)) for name, e in variants.items()}
    worst = max(_chi_square(builder, seed) for seed, builder in enumerate((Dynamic(budget=12, threshold=0.0), Dynamic(threshold=0.08))))
    passed = set(same.values()) == {len(prompts)} and worst < LIMIT
    figures = {"prompts": len(prompts), **same, "chi_square": round(worst, 1), "limit": LIMIT}
    return Item(1, "greedy text is identical; three tokens of drawn trees have the target's distribution", passed, figures)


WORDS, LEVELS, TRIALS = 4, 3, 20_000
LIMIT = 103.44  # 0.999 quantile of chi-square with 63 degrees of freedom


def _chi_square(builder: BuilderPart, seed: int) -> float:
    """Of the joint of three tokens, up to four siblings a place; what the walk did not decide is sampled plainly."""
    rng = np.random.default_rng(seed)
    p, q = (np.log(rng.dirichlet(np.full(WORDS, 0.7), WORDS).clip(0.05)).astype(np.float32) for _ in range(2))
    sampling, counts = Sampling(temperature=1.0, seed=seed), np.zeros((WORDS,) * LEVELS)
    sampler = Sampler(sampling)
    for text in range(TRIALS):
        draft = Draft(0)
        builder.grow(TableSource(q), Context(0, [0], 12, LEVELS, Drawing(sampling, text, 1, tested=True)), draft, KEY)
        tokens = walk(draft, RULES["recursive"].choices(draft, Target(p[draft.tokens], sampler, text, 1))).tokens
        while len(tokens) < LEVELS:
            tokens = [*tokens, sampler.choose(p[tokens[-1]], text, 90 + len(tokens))]
        counts[tuple(tokens[:LEVELS])] += 1
    after = np.stack([probabilities(row.astype(np.float64)) for row in p])
    expected = TRIALS * after[0][:, None, None] * after[:, :, None] * after[None]
    return float(((counts - expected) ** 2 / expected).sum())


# ---- 2. to 4. on texts that the target wrote ----------------------------------------------------------------------------------------


Texts = list[tuple[list[int], list[int]]]


def _against_static(model: Loaded, texts: Texts) -> Item:
    rates, learned = Rates(), Rates()
    replay(model, Static(branching=4), texts[:6], 16, rates)  # acceptance by rank, from which the best static tree is computed
    replay(model, Dynamic(threshold=0.0), texts[:6], 16, learned)  # and by probability, as a server has learned it after six answers
    figures: dict[str, Any] = {
        "dynamic_16": replay(model, Dynamic(threshold=0.0), texts, 16, learned).per_pass,
        "static_16": replay(model, Static(branching=4), texts, 16, rates).per_pass,
        "chain_16": replay(model, Chain(), texts, 16).per_pass,
    }
    noise = 0.02
    small = {m: [replay(model, builder, texts, m).per_pass for builder in (Dynamic(threshold=0.0), Chain())] for m in (1, 2, 3, 4)}
    figures |= {f"dynamic_over_chain_{m}": tree / chain for m, (tree, chain) in small.items()}
    figures["over_static"] = figures["dynamic_16"] / figures["static_16"]
    passed = figures["over_static"] >= 1.05 and figures["dynamic_16"] > figures["chain_16"]
    passed = passed and all(tree >= (1 - noise) * chain for tree, chain in small.values())
    rounded = {name: round(value, 4) for name, value in figures.items()}
    return Item(2, "16 nodes: >= 1.05 x best static tree, > chain; never below chains of 1 to 4", passed, {"texts": len(texts), **rounded})


def _calibration(model: Loaded, texts: Texts) -> Item:
    played = replay(model, Dynamic(threshold=0.0), texts, 16)
    correlation = float(np.corrcoef(played.predicted, played.tokens)[0, 1])
    ratio = float(np.mean(played.predicted)) / played.per_pass
    figures = {"rounds": len(played.tokens), "correlation": round(correlation, 4), "predicted_over_measured": round(ratio, 4)}
    return Item(
        3, "predicted tokens: correlation >= 0.3, mean within 0.6 .. 1.4 of measured", correlation >= 0.3 and 0.6 <= ratio <= 1.4, figures
    )


def _thresholds(model: Loaded, texts: Texts) -> Item:
    """The budgeted variant at the mean size of the other, between the two whole sizes around it."""
    leveled = replay(model, Dynamic(), texts, 16)
    size = float(np.mean(leveled.guesses))
    low = int(size)
    below, above = (replay(model, Dynamic(threshold=0.0), texts, max(1, n)).per_pass for n in (low, low + 1))
    budgeted = below + (size - low) * (above - below)
    extra = max(calls - depth for calls, depth in zip(leveled.calls, leveled.depths, strict=True))
    figures = {
        "mean_guesses": round(size, 2),
        "calls_over_depth": extra,
        "by_threshold": round(leveled.per_pass, 4),
        "by_budget": round(budgeted, 4),
    }
    passed = extra <= 1 and leveled.per_pass >= 0.95 * budgeted
    return Item(4, "draft calls <= depth + 1; tokens per pass within 5 % of the budgeted tree of that size", passed, figures)


# ---- 5. what a guess costs ----------------------------------------------------------------------------------------------------------


def _stops(exe: Executable, prompts: list[list[int]]) -> Item:
    """How much is drafted where a row more, or a pass of the draft, costs nothing or a lot; and the plan as measured, paired with plain."""

    def guesses(price: float) -> float:
        """Guesses per round where each row more costs `price` passes."""
        widths = (1, 2, 64)
        times = tuple(1e3 * (1 + price * max(0, width - exe.min_rows)) for width in widths)  # passes so long that drafting costs nothing
        variant = _variant(exe, Tree(shape="tree"), CostTable(rows=widths, past=(16,), measured=((times,),)), builder=Dynamic())
        answers = [_generate(variant, ids) for ids in prompts[:3]]
        return round(sum(a.stats.rows for a in answers) / sum(a.stats.passes for a in answers) - 1, 2)

    plain, seconds, tokens = exe.plain(), {"plan": 0.0, "plain": 0.0}, {"plan": 0, "plain": 0}
    for turn, ids in enumerate(prompts):
        for name in ("plan", "plain") if turn % 2 else ("plain", "plan"):
            answer = _generate(exe if name == "plan" else plain, ids)
            seconds[name] += answer.stats.seconds
            tokens[name] += answer.stats.tokens
    ratio = tokens["plan"] / seconds["plan"] / (tokens["plain"] / seconds["plain"])
    figures = {"guesses_when_free": guesses(1e-4), "guesses_at_a_tenth": guesses(0.1), "guesses_when_dear": guesses(2.0)}
    passed = figures["guesses_when_free"] > figures["guesses_at_a_tenth"] > figures["guesses_when_dear"]
    passed = passed and figures["guesses_when_dear"] <= exe.min_rows - 0.5
    return Item(5, "the builder returns fewer nodes where rows cost more", passed, {**figures, "ratio_to_plain": round(ratio, 4)})
