"""Drawn trees and their tests together: text has the target's distribution, and the usual mistakes are seen (papers/21)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import pytest
from drafting import Drawn, Oracle, ToySource, blurred, generate
from numpy.typing import NDArray
from toy_engine import ToyEngine

from planc.runtime.acceptance import RULES, Rule, Target, Walk, walk
from planc.runtime.builders import Beam, BuilderPart, Chain, Constant, Dynamic, Source, Static
from planc.runtime.controller import Controller
from planc.runtime.decode import Decode, Sampling, Tree
from planc.runtime.drafters import Context, Drafter, PromptLookup
from planc.runtime.errors import InputError
from planc.runtime.loops import Stats
from planc.runtime.sampling import Drawing, Sampler, probabilities
from planc.runtime.trees import Draft

V = 8
SAMPLING = Sampling(temperature=1.0, seed=5)
LIMIT = 103.44  # 0.999 quantile of chi-square with 63 degrees of freedom
LOOP_LIMIT = 124.84  # with 80


def tables(name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log-probabilities of target and draft after every text of at most one token, [1 + V, V] each."""
    rng = np.random.default_rng(11)
    p = rng.dirichlet(np.full(V, 0.7), 1 + V)
    q = {
        "other": rng.dirichlet(np.full(V, 0.7), 1 + V),
        "peaked": rng.dirichlet(np.full(V, 0.2), 1 + V),
        "flat": np.full((1 + V, V), 1.0 / V),
        "equal": p,
    }[name]
    return np.log(np.maximum(p, 1e-3)), np.log(np.maximum(q, 1e-3))


def after(table: NDArray[np.float64]) -> Callable[[list[int]], NDArray[np.float64]]:
    """Logits after a text whose first token is the root."""
    return lambda text: table[0] if len(text) == 1 else table[1 + text[1]]


Change = Callable[[Draft], Draft]


class Grows(Protocol):
    def grow(self, source: Source, context: Context, draft: Draft, key: str) -> None: ...


def chi_square(
    name: str, builder: Grows, rule: Rule | Callable[[Draft, Target, int], Walk], trials: int, change: Change | None = None
) -> float:
    """Chi-square of the joint of two tokens over `trials` texts, the second one sampled plainly where the walk gave one."""
    p, q = tables(name)
    source, sampler, counts = ToySource(after(q)), Sampler(SAMPLING), np.zeros((V, V))
    for text in range(trials):
        draft = Draft(0)
        builder.grow(source, Context(0, [0], 30, 2, Drawing(SAMPLING, text, 1, tested=True)), draft, "drawn")
        if change is not None:
            draft = change(draft)
        logits = np.stack([after(p)([0, *draft.path(row)[:1]]) for row in range(len(draft))]).astype(np.float32)
        target = Target(logits, sampler, text, 1)
        tokens = (rule(draft, target, text) if callable(rule) else walk(draft, rule.choices(draft, target))).tokens
        if len(tokens) == 1:
            tokens = [*tokens, sampler.choose(p[1 + tokens[0]], text, 99)]
        counts[tokens[0], tokens[1]] += 1
    first = probabilities(p[0])
    expected = trials * first[:, None] * np.stack([probabilities(p[1 + x]) for x in range(V)])
    return float(((counts - expected) ** 2 / expected).sum())


RECURSIVE, BLOCK = RULES["recursive"], RULES["block"]


@pytest.mark.parametrize("name", ["other", "peaked", "equal"])
@pytest.mark.parametrize(("builder", "rule"), [
    *((Constant(branching=(k, k)), RECURSIVE) for k in (1, 2, 3, 4)),
    (Constant(branching=(3, 2), replacement=True), RECURSIVE),
    (Beam(width=3, depth=2), RECURSIVE),
    (Dynamic(budget=6, threshold=0.0), RECURSIVE),
    (Dynamic(threshold=0.1), RECURSIVE),
    (Static(budget=5, branching=3), RECURSIVE),
    (Chain(), BLOCK),
    (Chain(threshold=0.2), BLOCK),
], ids=lambda value: repr(value) if isinstance(value, BuilderPart) else "")  # fmt: skip
def test_two_tokens_have_the_joint_distribution_of_the_target(builder: BuilderPart, rule: Rule, name: str) -> None:
    assert chi_square(name, builder, rule, 3000) < LIMIT


# ---- the usual mistakes ------------------------------------------------------------------------------------------------------------


def undepleted(draft: Draft) -> Draft:
    """Later siblings are tested with the whole q."""
    for proposal in draft.proposals.values():
        proposal.kind = "with_replacement"
    return draft


def sorted_by_q(draft: Draft) -> Draft:
    """Siblings are tested by falling probability, not in draw order."""
    for proposal in draft.proposals.values():
        proposal.drawn.sort(key=lambda x: -proposal.q[x])
    return draft


def argmax_for_draws(draft: Draft) -> Draft:
    """The likeliest token takes the place of the draw."""
    changed = Draft(0)
    for row, proposal in draft.proposals.items():
        if row == 0:
            changed.proposals[0] = type(proposal)(proposal.q)
            changed.draw(0, int(proposal.q.argmax()), ("x",), 0.5)
    return changed


def pruned_by_q(draft: Draft) -> Draft:
    """Three are drawn, the two with the highest q stay, in draw order."""
    for proposal in draft.proposals.values():
        kept = sorted(proposal.drawn, key=lambda x: -proposal.q[x])[:2]
        proposal.drawn = [x for x in proposal.drawn if x in kept]
    return draft


def row_of_the_wrong_parent(draft: Draft, target: Target, text: int) -> Walk:
    """A row is judged by the logits of the row before it."""
    return walk(draft, RECURSIVE.choices(draft, Target(np.roll(target.logits, 1, 0), target.sampler, text, 1)))


def sample_per_path(draft: Draft, target: Target, text: int) -> Walk:
    """Every path from the root to a leaf samples for itself, and the longest one wins."""
    best = Walk([0], [])
    for leaf in [row for row in range(len(draft)) if not draft.children[row]]:
        rng, tokens, row = np.random.default_rng([text, leaf]), list[int](), 0
        for guess in [*draft.path(leaf), None]:
            tokens.append(int(rng.choice(V, p=probabilities(target.logits[row].astype(np.float64)))))
            if tokens[-1] != guess:
                break
            row = draft.children[row][tokens[-1]]
        if len(tokens) > len(best.tokens):
            best = Walk([0], tokens)
    return best


@pytest.mark.parametrize(("name", "rule", "change"), [
    ("peaked", RECURSIVE, undepleted), ("other", RECURSIVE, sorted_by_q), ("other", RECURSIVE, argmax_for_draws),
    ("other", RECURSIVE, pruned_by_q), ("other", row_of_the_wrong_parent, None), ("other", sample_per_path, None),
], ids=["undepleted", "sorted by q", "argmax", "pruned by q", "wrong parent", "sample per path"])  # fmt: skip
def test_mistakes_are_seen(name: str, rule: Any, change: Change | None) -> None:
    assert chi_square(name, Constant(branching=(3, 3)), rule, 3000, change) > 1.5 * LIMIT


def test_matching_a_pruned_tree_is_no_mistake() -> None:
    """Without its proposals the same tree is a set of guesses, which any rule may cut and match."""

    def pruned(draft: Draft) -> Draft:
        reach = draft.reach()
        return draft.take(draft.ranking(reach)[:4])

    assert chi_square("other", Constant(branching=(3, 3)), RECURSIVE, 3000, pruned) < LIMIT
    assert chi_square("other", Constant(branching=(3, 3)), RULES["coupled"], 3000) < LIMIT


def test_legal_cuts_are_no_mistake() -> None:
    for cut in (lambda draft: draft.first(5), lambda draft: draft.first(2), lambda draft: draft.first_path(2)):
        assert chi_square("other", Constant(branching=(3, 3)), RECURSIVE, 3000, cut) < LIMIT
    assert chi_square("other", Constant(branching=(3, 3), replacement=True), RECURSIVE, 3000, lambda draft: draft.first(3)) < LIMIT


def test_guesses_of_others_in_the_same_tree_keep_the_distribution() -> None:
    """Guesses without a distribution stand in the tree before the draws, or come after them and know them."""

    class Among:
        def __init__(self, before: bool) -> None:
            self.before = before

        def grow(self, source: Source, context: Context, draft: Draft, key: str) -> None:
            def guess() -> None:
                for token in (3, 1):
                    row = draft.add(0, token, ("other",), 0.5)
                    for known in list(draft.children[0])[:2]:  # after the draws: depends on what was drawn
                        draft.add(row, known, ("other",), 0.5)

            if self.before:
                guess()
            Constant(branching=(2, 2)).grow(source, context, draft, key)
            if not self.before:
                guess()

    for before in (True, False):
        assert chi_square("other", Among(before=before), RECURSIVE, 3000) < LIMIT
        assert chi_square("other", Among(before=before), RECURSIVE, 3000, lambda draft: draft.first(5)) < LIMIT


# ---- in the loop -------------------------------------------------------------------------------------------------------------------


def decode(acceptance: str, new: int = 7, temperature: float = 1.0) -> Decode:
    speculative = {"drafter": "prompt_lookup", "acceptance": acceptance}
    return Decode.model_validate({"max_new_tokens": new, "speculative": speculative, "sampling": {"temperature": temperature, "seed": 2}})


def loop_chi_square(engine: ToyEngine, made: Sequence[Drafter], acceptance: str, tree: Tree, texts: int = 1500) -> float:
    """Chi-square of the joint of new tokens 2 to 5 of 7, in the loop. Rounds follow each other, so noise that served twice would show."""
    size, batch, prompt, new = engine.spec.vocab_size, 50, [1, 2], 5
    expected, counts = np.ones((size,) * new), np.zeros((size,) * (new - 1))
    for length in range(new):
        for text in np.ndindex((size,) * length):
            expected[text] *= probabilities(engine.logits(list(enumerate([*prompt, *text]))).astype(float)).reshape(
                -1, *[1] * (new - 1 - length)
            )
    expected = texts * expected.sum(0)
    controller = Controller(tree)
    for start in range(0, texts, batch):
        found, _ = generate(
            engine, [prompt] * batch, decode(acceptance), made, controller=controller, ids=range(start, start + batch), capacity=40
        )
        for text in found:
            counts[tuple(text[3:7])] += 1
    return float(((counts - expected) ** 2 / expected).sum())


class Soft(ToyEngine):
    """A toy engine whose every token is well possible, so that all texts are expected often enough."""

    def logits(self, visible: list[tuple[int, int]]) -> NDArray[np.float32]:
        return super().logits(visible) * np.float32(0.3)


@pytest.mark.parametrize(("builder", "acceptance", "budget"), [
    (Constant(branching=(2, 1)), "recursive", 3), (Beam(width=2, depth=2), "recursive", 4), (Dynamic(threshold=0.0), "recursive", 3),
    (Dynamic(), "recursive", "auto"), (Chain(), "block", "auto"), (Chain(), "block", 3), (Chain(), "recursive", "auto"),
    (Dynamic(), "coupled", "auto"),
])  # fmt: skip
def test_text_of_the_loop_has_the_distribution_of_the_target(builder: BuilderPart, acceptance: str, budget: int | str) -> None:
    engine = Soft(3)
    made = [Drawn(builder, blurred(engine))]
    assert loop_chi_square(engine, made, acceptance, Tree.model_validate({"budget": budget})) < LOOP_LIMIT


def test_two_drafters_in_the_loop() -> None:
    engine = Soft(3)
    for made in ([PromptLookup().build(3), Drawn(Constant(), blurred(engine))], [Drawn(Beam(), blurred(engine)), PromptLookup().build(3)]):
        assert loop_chi_square(engine, made, "recursive", Tree(budget=5)) < LOOP_LIMIT


BUILDERS = [
    Chain(), Chain(threshold=0.3), Constant(branching=(3, 2, 1)), Constant(branching=(2, 2), replacement=True), Beam(width=3, depth=3),
    Dynamic(), Dynamic(threshold=0.0), Dynamic(temperature=0.7), Static(branching=3), Static(template=((0,), (1,), (0, 0), (0, 1), (1, 0))),
]  # fmt: skip
PROMPTS = [[1, 2, 3, 4], [5], [7, 8, 9, 10, 11], [2, 2]]


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.8, top_p=0.95, repetition_penalty=1.2, seed=11)], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize("builder", BUILDERS, ids=repr)
def test_coupled_text_is_the_plain_text(builder: BuilderPart, sampling: Sampling) -> None:
    engine, plan = ToyEngine(23, least=2), Decode(max_new_tokens=24, sampling=sampling)
    plain = generate(engine, PROMPTS, plan, eos={4})
    for tree in (Tree(budget=6), Tree(budget=40), Tree(budget=1), Tree(budget=5, shape="chain"), Tree()):
        stats = Stats()
        assert generate(engine, PROMPTS, plan, [Drawn(builder, blurred(engine, weight=0.9))], tree, eos={4}, stats=stats) == plain
        assert stats.accepted_by["drawn"] > 0


@pytest.mark.parametrize("acceptance", ["recursive", "block"])
@pytest.mark.parametrize("builder", BUILDERS, ids=repr)
def test_at_temperature_zero_every_rule_is_greedy(builder: BuilderPart, acceptance: str) -> None:
    engine = ToyEngine(23)
    plain = generate(engine, PROMPTS, Decode(max_new_tokens=24))
    assert generate(engine, PROMPTS, decode(acceptance, 24, 0.0), [Drawn(builder, blurred(engine))]) == plain
    if acceptance == "recursive":  # the limit, where logits have no ties
        smooth = Unequal(23)
        nearly = generate(smooth, PROMPTS, decode(acceptance, 24, 1e-4), [Drawn(builder, blurred(smooth))])
        assert nearly == generate(smooth, PROMPTS, Decode(max_new_tokens=24))


class Unequal(ToyEngine):
    """A toy engine without ties."""

    def logits(self, visible: list[tuple[int, int]]) -> NDArray[np.float32]:
        return super().logits(visible) + np.linspace(0.0, 0.1, self.spec.vocab_size, dtype=np.float32)


@pytest.mark.parametrize("acceptance", ["recursive", "block"])
def test_nothing_drawn_is_plain_sampling(acceptance: str) -> None:
    engine, plan = ToyEngine(23), decode(acceptance, 24)
    plain = generate(engine, PROMPTS, Decode(max_new_tokens=24, sampling=plan.sampling))
    drawn = Drawn(Chain(), blurred(engine))
    assert generate(engine, PROMPTS, plan, [drawn], Tree(budget=0)) == plain
    assert drawn.budgets == []
    if acceptance == "recursive":  # guesses without a distribution alone: matched with the plain tokens
        assert generate(engine, PROMPTS, plan, [Oracle(plain[0], 23), PromptLookup().build(23)], Tree(budget=7)) == plain


@pytest.mark.parametrize("acceptance", ["recursive", "block"])
def test_a_draft_that_equals_the_target_is_accepted_whole(acceptance: str) -> None:
    engine, stats = ToyEngine(23), Stats()
    made = [Drawn(Chain(), blurred(engine, weight=1.0))]
    generate(engine, [[1, 2]], decode(acceptance, 25), made, Tree(budget=5), stats=stats)
    assert dict(stats.accepted) == {5: 4}


def test_how_much_is_drafted_is_settled_before_anything_is_drawn() -> None:
    """The budget of a round may not know the draft of that round, and all that was drafted within it is verified."""
    engine, stats = ToyEngine(23), Stats()
    drawn = Drawn(Constant(branching=(3, 3)), blurred(engine, weight=0.9))
    generate(engine, [[1, 2]], decode("recursive", 40), [drawn], Tree(budget=7), stats=stats)
    assert set(drawn.budgets) == {7}
    assert stats.rows > 7 * stats.passes  # only the last rounds have less to draft
    lookup_first = Drawn(Chain(), blurred(engine))
    generate(engine, [[1, 2] * 5], decode("recursive", 20), [PromptLookup().build(23), lookup_first], Tree(budget=9))
    assert all(0 < budget <= 9 for budget in lookup_first.budgets)


def test_a_builder_of_trees_makes_chains_where_siblings_cannot_be_verified() -> None:
    engine = ToyEngine(23)
    for options in ({"tree": Tree(budget=6, shape="chain")}, {"tree": Tree(budget=6), "trees_allowed": False}):
        for acceptance in ("coupled", "recursive", "block"):
            stats, engine.passes = Stats(), []
            made = [Drawn(Beam(width=3, depth=6), blurred(engine, weight=1.0))]
            generate(engine, [[1, 2]], decode(acceptance, 29), made, stats=stats, **options)  # type: ignore[arg-type]
            assert not any(tree for *_, tree in engine.passes)
            assert dict(stats.accepted) == {6: 4}
    with pytest.raises(InputError, match="chains only"):
        generate(engine, [[1, 2]], decode("block"), made, Tree(budget=6, shape="tree"))


def test_auto_learns_how_much_to_draft() -> None:
    """Cheap rows and a good draft: long chains; dear rows or a bad draft: none, but for a few that try again."""
    engine = ToyEngine(23)
    rows = {}
    for slope, weight in ((0.02, 1.0), (0.02, 0.0), (2.0, 1.0)):
        stats = Stats()
        controller = Controller(Tree(), cost=lambda rows, past, slope=slope: 1.0 + slope * (rows - 1))  # type: ignore[misc]
        controller.observe = lambda *args, **options: None  # type: ignore[method-assign]  # the toy's passes cost time like nothing real
        made = [Drawn(Chain(), blurred(engine, seed=3, weight=weight))]
        generate(engine, [[1, 2]], decode("recursive", 120), made, controller=controller, stats=stats, min_rows=1)
        rows[slope, weight] = stats.rows / stats.passes
    assert rows[0.02, 1.0] > 9
    assert rows[0.02, 0.0] < rows[0.02, 1.0] / 2
    assert rows[2.0, 1.0] < 1.2
