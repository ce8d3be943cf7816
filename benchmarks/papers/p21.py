"""Paper 21, RSD: the five working conditions of its card; three of them on SmolLM2-135M with the distilled draft.

Trees are compared by the tokens that a pass yields on average over the tests that it would make (`_expected_tokens`), all of them at the same
places of the same texts: an estimate without the noise of the tests, and with that of the places in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from math import prod
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.store import open_plan
from planc.runtime.acceptance import RULES, Target, trials, walk
from planc.runtime.builders import Beam, BuilderPart, Chain, Constant
from planc.runtime.decode import Sampling
from planc.runtime.drafters import Context
from planc.runtime.drafters.model_source import ModelSource
from planc.runtime.engine import Cache, Floats, Step
from planc.runtime.executable import Executable, Generation
from planc.runtime.sampling import Drawing, Purpose, Sampler, arrivals, probabilities, uniforms
from planc.runtime.trees import Draft, Proposal, pack
from planc_paper_checks.common import MIXED, MODEL, TableSource, chats

PLAN = ROOT / "examples/papers/21-rsd.yaml"
KEY = "draft_model"
SAMPLING = Sampling(temperature=1.0, seed=21)
V = 8
JOINT = 103.44  # 0.999 quantile of chi-square with 63 degrees of freedom
BINS, BIN_LIMIT = 16, 37.70  # with 15

Distribution = NDArray[np.float64]


@paper(21)
def rsd() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    yield _toy_exactness()
    yield _mistakes()
    exe, _ = open_plan(PLAN, MODEL)
    prompts = chats(exe, MIXED, 20)  # the draft has seen none of them in training
    plain = [_generate(exe.plain(), ids, 100, seed=i) for i, ids in enumerate(prompts)]
    yield _acceptance(exe, list(zip(prompts, plain, strict=True)))
    yield _perplexity(exe, prompts, plain)
    yield _greedy(exe, prompts[:6])


def _generate(exe: Executable, ids: Sequence[int], tokens: int, **options: Any) -> list[int]:
    answer = exe.generate(list(ids), max_new_tokens=tokens, **options)
    assert isinstance(answer, Generation)
    return answer.ids


# ---- 1. and 2. tables of eight words -------------------------------------------------------------------------------------------------


def _tables(sharp: float, seed: int = 11) -> tuple[Floats, Floats]:
    """Log-probabilities [V, V] of target and draft by the last token."""
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.full(V, 0.7), V).clip(0.03), rng.dirichlet(np.full(V, sharp), V).clip(1e-3)  # no joint of p that is never seen
    return np.log(p).astype(np.float32), np.log(q).astype(np.float32)


def _chi_square(
    builder: BuilderPart, texts: int, sharp: float, change: Callable[[Draft], None] | None = None, rolled: bool = False
) -> float:
    """Of the joint of two tokens. `change` makes a mistake in the draft; `rolled` judges every row by the logits of the row before it."""
    p, q = _tables(sharp)
    sampling = SAMPLING.model_copy(update={"seed": crc32(repr(builder).encode())})
    sampler, counts, source = Sampler(sampling), np.zeros((V, V)), TableSource(q)
    for text in range(texts):
        draft = Draft(0)
        builder.grow(source, Context(0, [0], 30, 2, Drawing(sampling, text, 1, tested=True)), draft, KEY)
        if change is not None:
            change(draft)
        logits = p[draft.tokens]
        tokens = walk(
            draft, RULES["recursive"].choices(draft, Target(np.roll(logits, 1, 0) if rolled else logits, sampler, text, 1))
        ).tokens
        second = tokens[1] if len(tokens) > 1 else sampler.choose(p[tokens[0]], text, 99)
        counts[tokens[0], second] += 1
    after = np.stack([probabilities(row.astype(np.float64)) for row in p])
    expected = texts * after[0][:, None] * after
    return float(((counts - expected) ** 2 / expected).sum())


def _law(p: Distribution, q: Distribution, k: int) -> Distribution:
    """Exact distribution of the token after a row with k children: the sum over all draws, in all orders."""
    law = np.zeros(V)
    for drawn in permutations(range(V), k):
        left = 1.0 - np.cumsum([0.0, *q[list(drawn[:-1])]])
        reach = prod(q[list(drawn)] / left)
        rest = p
        for x, acceptance, rest in trials(p, Proposal(q.astype(np.float32), "without_replacement", list(drawn))):  # noqa: B007 - used below
            law[x] += reach * acceptance
            reach *= 1.0 - acceptance
        law += reach * rest
    return law


def _toy_exactness() -> Item:
    figures = dict[str, Any]()
    builders = {
        **{f"constant {k} {k}": Constant(branching=(k, k)) for k in (1, 2, 3, 4)},
        **{f"with replacement {k} {k}": Constant(branching=(k, k), replacement=True) for k in (2, 3, 4)},
        **{f"beam {w}": Beam(width=w, depth=2) for w in (2, 3, 4)},
    }
    draws = {name: 100_000 if name in ("constant 4 4", "with replacement 4 4", "beam 4") else 20_000 for name in builders}
    for name, builder in builders.items():
        figures[name] = round(_chi_square(builder, draws[name], 0.7), 1)
    worst = max(figures.values())
    rng, error = np.random.default_rng(0), 0.0
    for k in (1, 2, 3):
        for sharp in (0.3, 1.0):
            p, q = rng.dirichlet(np.full(V, 0.7)), rng.dirichlet(np.full(V, sharp)).clip(1e-4)
            q = (q / q.sum()).astype(np.float32).astype(np.float64)  # what a proposal can hold
            error = max(error, float(np.abs(_law(p, q / q.sum(), k) - p).max()))
    figures |= {"draws": sum(draws.values()), "limit": JOINT, "enumeration_error": float(f"{error:.2g}")}
    return Item(1, "joint of two tokens: chi-square, p > 0.001; enumeration < 1e-12", worst < JOINT and error < 1e-12, figures)


def _undepleted(draft: Draft) -> None:
    for proposal in draft.proposals.values():
        proposal.kind = "with_replacement"


def _sorted_by_q(draft: Draft) -> None:
    for proposal in draft.proposals.values():
        proposal.drawn.sort(key=lambda x: -proposal.q[x])


def _draws_by_bin(half: bool) -> float:
    """Chi-square of the first draws from a flat q over 49152 tokens, in bins of neighbouring ids; `half`: noise in float16."""
    size, draws, counts = 49152, 1600, np.zeros(BINS)
    q = np.full(size, 1.0 / size, np.float32)
    for text in range(draws):
        u = uniforms(SAMPLING.seed, text, 1, size, Purpose.DRAW)
        times = -np.log(
            (u.astype(np.float16) if half else u).clip(1e-9).astype(np.float64)
        )  # the winners are next to 1, where halves are coarse
        counts[int(np.argmin(arrivals(q, times))) * BINS // size] += 1
    return float(((counts - draws / BINS) ** 2 / (draws / BINS)).sum())


def _mistakes() -> Item:
    tree, texts = Constant(branching=(3, 3)), 6000
    figures = {
        "undepleted": _chi_square(tree, texts, 0.2, _undepleted),
        "sorted": _chi_square(tree, texts, 0.7, _sorted_by_q),
        "wrong_row": _chi_square(tree, texts, 0.7, rolled=True),
        "none": max(_chi_square(tree, texts, sharp) for sharp in (0.2, 0.7)),
        "float16_noise": _draws_by_bin(half=True),
        "float64_noise": _draws_by_bin(half=False),
    }
    passed = min(figures["undepleted"], figures["sorted"], figures["wrong_row"]) > JOINT > figures["none"]
    passed = passed and figures["float16_noise"] > BIN_LIMIT > figures["float64_noise"]
    return Item(
        2,
        "mistakes are seen: undepleted q, siblings sorted, wrong parent's row, noise in float16",
        passed,
        {**{name: round(value, 1) for name, value in figures.items()}, "limit": JOINT, "noise_limit": BIN_LIMIT},
    )


# ---- 3. at places of texts that the target sampled -------------------------------------------------------------------------------------


def _expected_tokens(draft: Draft, logits: Floats) -> tuple[float, float]:
    """Tokens that a pass over the draft yields on average over its tests, and the chance that a child of the root is accepted."""
    reach, tokens, first = {0: 1.0}, 1.0, 0.0
    for row, proposal in sorted(draft.proposals.items()):
        p, left = probabilities(logits[row].astype(np.float64)), reach.get(row, 0.0)
        for x, acceptance, _ in trials(p, proposal):
            child = draft.children[row][x]
            reach[child] = reach.get(child, 0.0) + left * acceptance
            tokens += left * acceptance
            left *= 1.0 - acceptance
        if row == 0:
            first = 1.0 - left
    return tokens, first


class _Places:
    """Every few tokens of sampled texts; a tree is drawn and judged at each."""

    def __init__(self, exe: Executable, texts: Sequence[tuple[list[int], list[int]]], every: int) -> None:
        self._exe, self._texts, self._every = exe, texts, every
        self._source = ModelSource(exe.models["draft"], max(len(a) + len(b) for a, b in texts) + 64)

    def compare(self, trees: dict[str, tuple[BuilderPart, int]]) -> dict[str, NDArray[np.float64]]:
        """For each builder and its number of guesses: (tokens, chance of the first guess, guesses) at all places, [places, 3]."""
        found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in trees}
        engine = self._exe.engine
        for number, (prompt, answer) in enumerate(self._texts):
            text = [*prompt, *answer]
            cache = engine.new_cache(1, len(text) + 64)
            self._feed(cache, text[: len(prompt)])
            for place in range(len(prompt) + 1, len(text), self._every):
                self._feed(cache, text[int(cache.lengths[0]) : place - 1])
                for name, (builder, guesses) in trees.items():
                    draft = Draft(text[place - 1])
                    drawing = Drawing(SAMPLING, number, place, tested=True)
                    builder.grow(self._source, Context(0, text[:place], guesses, 32, drawing), draft, KEY)
                    step = pack([draft], max(2, self._exe.min_rows))
                    outputs = engine.forward(cache, step, logits=True)
                    assert outputs.logits is not None
                    found[name].append((*_expected_tokens(draft, outputs.logits[0]), len(draft) - 1))
        return {name: np.array(rows) for name, rows in found.items()}

    def _feed(self, cache: Cache, ids: Sequence[int]) -> None:
        for first in range(0, len(ids), 128):
            part = np.array([ids[first : first + 128]], dtype=np.int64)
            self._exe.engine.forward(cache, Step(part, logits_from=part.shape[1] - 1))
            cache.keep(0, np.arange(part.shape[1]))


#: Rows of the target -> RSD-S and RSD-C of the shapes that the card names for them.
BUDGETS = {6: (Beam(width=2, depth=3), Constant(branching=(2, 1, 1))), 14: (Beam(width=4, depth=4), Constant(branching=(2, 2, 2))),
           30: (Beam(width=6, depth=5), Constant(branching=(2, 2, 2, 2)))}  # fmt: skip


def _acceptance(exe: Executable, texts: Sequence[tuple[list[int], list[int]]]) -> Item:
    places = _Places(exe, texts, 10)
    four = places.compare({"without": (Constant(branching=(4,)), 4), "with": (Constant(branching=(4,), replacement=True), 4)})
    chances = {name: float(rows[:, 1].mean()) for name, rows in four.items()}
    figures: dict[str, Any] = {"places": len(four["with"]), **{f"one_of_4_{name}": round(value, 4) for name, value in chances.items()}}
    passed = chances["without"] >= chances["with"] + 0.03
    for guesses, (beam, constant) in BUDGETS.items():
        rows = places.compare({"beam": (beam, guesses), "constant": (constant, guesses), "chain": (Chain(), guesses)})
        tokens = {name: float(value[:, 0].mean()) for name, value in rows.items()}
        figures |= {f"{name}_{guesses}": round(value, 4) for name, value in tokens.items()}
        figures[f"guesses_{guesses}"] = {name: round(float(value[:, 2].mean()), 1) for name, value in rows.items()}
        passed = passed and tokens["beam"] >= 0.98 * tokens["constant"] and tokens["constant"] >= 0.98 * tokens["chain"]
    return Item(3, "without replacement >= with + 3 points; tokens per pass beam >= constant >= chain", passed, figures)


# ---- 4. and 5. in the loop -------------------------------------------------------------------------------------------------------------


def _surprise(exe: Executable, prompt: list[int], answer: list[int]) -> float:
    """Negative log-likelihood of an answer under the target."""
    ids = np.array([[*prompt, *answer]], dtype=np.int64)
    cache = exe.engine.new_cache(1, ids.shape[1])
    logits = exe.engine.forward(cache, Step(ids[:, :-1], logits_from=len(prompt) - 1), logits=True).logits
    assert logits is not None
    wide = logits[0].astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    return float((np.log(np.exp(wide).sum(1)) - wide[np.arange(len(answer)), answer]).sum())


def _perplexity(exe: Executable, prompts: list[list[int]], plain: list[list[int]]) -> Item:
    """Of 2000 tokens each; the sampling error is that of the difference of means over prompts."""
    drawn = [_generate(exe, ids, 100, seed=1000 + i) for i, ids in enumerate(prompts)]
    means = {}
    for name, answers in (("recursive", drawn), ("plain", plain)):
        means[name] = np.array([(_surprise(exe, ids, answer), len(answer)) for ids, answer in zip(prompts, answers, strict=True)])
    rate = {name: rows[:, 0].sum() / rows[:, 1].sum() for name, rows in means.items()}
    spread = {name: (rows[:, 0] - rate[name] * rows[:, 1]) / rows[:, 1].mean() for name, rows in means.items()}
    error = float(np.sqrt(sum(values.var(ddof=1) / len(values) for values in spread.values())))
    apart = float(rate["recursive"] - rate["plain"])
    figures = {name: round(float(np.exp(value)), 3) for name, value in rate.items()}
    counts = {f"{name}_tokens": int(rows[:, 1].sum()) for name, rows in means.items()}
    passed = abs(apart) <= 2.0 * error
    return Item(
        4,
        "perplexity of sampled text within sampling error of plain",
        passed,
        {**counts, **figures, "errors_apart": round(apart / error, 2)},
    )


def _greedy(exe: Executable, prompts: list[list[int]]) -> Item:
    """At temperature 0, and in its limit."""
    wanted = [_generate(exe.plain(), ids, 64, temperature=0.0) for ids in prompts]
    same = {
        f"at_{temperature:g}": sum(
            _generate(exe, ids, 64, temperature=temperature) == want for ids, want in zip(prompts, wanted, strict=True)
        )
        for temperature in (0.0, 1e-5)
    }
    return Item(
        5, "as the temperature falls to 0: identical to greedy", set(same.values()) == {len(prompts)}, {"prompts": len(prompts), **same}
    )
