"""Builders: trees that obey their options and the protocol, in every mode of drawing."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from drafting import ToySource
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from planc.runtime.builders import Beam, BuilderItem, BuilderPart, Chain, Constant, Dynamic, Static
from planc.runtime.builders.static import best_template
from planc.runtime.decode import Sampling
from planc.runtime.drafters import Context
from planc.runtime.registry import json_schema, parts
from planc.runtime.sampling import Drawing, noise, probabilities
from planc.runtime.trees import Draft, Rates

V = 11


def logits(text: list[int]) -> NDArray[np.float64]:
    return np.asarray(np.random.default_rng(text[-3:]).normal(size=V) * 2.0)


def grown(builder: BuilderPart, draft: Draft | None = None, source: ToySource | None = None, **context: Any) -> Draft:
    draft = draft if draft is not None else Draft(3)
    options: dict[str, Any] = {"budget": 12, "depth": 6, **context}
    builder.grow(source or ToySource(logits), Context(0, [1, 2, 3], **options), draft, "drawn")
    return draft


templates = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), min_size=1, max_size=6).map(
    lambda paths: tuple(
        sorted(
            {
                (*head[:-1], rank)
                for path in paths
                for end in range(1, len(path) + 1)
                for head in [path[:end]]
                for rank in range(head[-1] + 1)
            }
        )
    )
)
builders = st.one_of(
    st.builds(Chain, threshold=st.sampled_from([0.0, 0.2, 0.9])),
    st.builds(Constant, branching=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple), replacement=st.booleans()),
    st.builds(Beam, width=st.integers(1, 6), depth=st.integers(1, 5)),
    st.builds(
        Dynamic,
        budget=st.none() | st.integers(1, 20),
        threshold=st.sampled_from(["auto", 0.0, 0.05, 0.5]),
        temperature=st.sampled_from([None, 0.5, 1.5]),
    ),
    st.builds(Static, branching=st.integers(1, 5), budget=st.none() | st.integers(1, 20)),
    st.builds(Static, template=templates),
)
drawings = st.one_of(
    st.none(),
    st.builds(
        Drawing,
        sampling=st.builds(
            Sampling,
            temperature=st.sampled_from([0.0, 0.7, 1.5]),
            top_k=st.sampled_from([0, 1, 3]),
            repetition_penalty=st.sampled_from([1.0, 1.3]),
            seed=st.integers(0, 9),
        ),
        text=st.integers(0, 3),
        place=st.just(3),
        tested=st.booleans(),
    ),
)


@settings(max_examples=300, deadline=None)
@given(builders, drawings, st.integers(1, 30), st.integers(1, 6), st.sets(st.integers(0, V - 1), max_size=3), st.integers(0, 99))
def test_property(builder: BuilderPart, drawing: Drawing | None, budget: int, depth: int, eos: set[int], seed: int) -> None:
    rng, draft = np.random.default_rng(seed), Draft(3, Rates())
    for _ in range(seed % 4):  # guesses of another drafter
        draft.add(int(rng.integers(len(draft))), int(rng.integers(V)), ("other", 0), 0.5)
    before, known = len(draft), list(draft.tokens)
    if drawing is not None and drawing.sampling.temperature == 0.0:
        drawing = Drawing(drawing.sampling, tested=False)
    context = {"budget": budget, "depth": depth, "drawing": drawing, "eos": frozenset(eos)}
    source = ToySource(logits)
    grown(builder, draft, source, **context)
    limit = min(budget, getattr(builder, "budget", None) or budget)
    assert draft.tokens[:before] == known
    assert 0 <= len(draft) - before <= limit
    for row in range(before, len(draft)):
        parent = draft.parents[row]
        assert parent < row  # parents before children
        assert draft.depths[row] == draft.depths[parent] + 1 <= max(depth, *draft.depths[:before])
        assert parent == 0 or draft.tokens[parent] not in eos
        assert draft.cells[row][0][0] == "drawn"
        assert 0.0 <= draft.p[row] <= 1.0
    tested = drawing is not None and drawing.tested
    assert bool(draft.proposals) == tested
    for parent, proposal in draft.proposals.items():
        assert proposal.q.dtype == np.float32
        assert (proposal.q[proposal.drawn] > 0.0).all()
        assert [draft.children[parent][x] <= mark for x, mark in zip(proposal.drawn, proposal.marks, strict=True)]
        assert proposal.kind == "with_replacement" or len(set(proposal.drawn)) == len(proposal.drawn)
    if builder.draws == "chain" and before == 1:
        assert draft.is_chain
    again = Draft(3, Rates())
    for row in range(1, before):
        again.add(draft.parents[row], draft.tokens[row], ("other", 0), 0.5)
    assert grown(builder, again, **context).tokens == draft.tokens  # a function of its arguments


@settings(max_examples=100, deadline=None)
@given(builders, st.integers(0, 12), st.integers(0, 99))
def test_property_legal_cuts(builder: BuilderPart, count: int, seed: int) -> None:
    """A smaller budget draws the beginning of what a larger one draws, so `first` is what a smaller budget would have drawn."""
    if (isinstance(builder, Static) and builder.template is None) or (isinstance(builder, Dynamic) and builder.threshold == "auto"):
        return  # these plan for their budget
    drawing = Drawing(Sampling(temperature=1.0, seed=seed), 0, 3, tested=True)
    whole = grown(builder, drawing=drawing)
    part = whole.first(count)
    assert len(part) == min(count + 1, len(whole))
    if count:
        small = grown(builder, drawing=drawing, budget=count)
        assert (small.tokens, small.parents) == (part.tokens, part.parents)
        assert {row: p.drawn for row, p in small.proposals.items()}.items() <= {
            row: p.drawn for row, p in part.proposals.items()
        }.items() or (isinstance(builder, Constant) and builder.replacement)
    path = whole.first_path(count)
    assert path.is_chain
    assert all(p.drawn == [path.tokens[row + 1]] and p.marks == [row + 1] for row, p in path.proposals.items())
    assert len(path.proposals) == len(path) - 1


# ---- shapes ------------------------------------------------------------------------------------------------------------------------


def test_chain_and_its_threshold() -> None:
    greedy = grown(Chain())
    assert greedy.is_chain
    assert len(greedy) == 7  # the depth
    text = [1, 2, 3]
    for token in greedy.tokens[1:]:
        assert token == int(logits(text).argmax())
        text.append(token)
    short = grown(Chain(threshold=0.5))
    assert short.reach()[-1] < 0.5 <= short.reach()[-2]  # the unlikely guess stays


def test_constant_has_the_children_it_says_by_rank() -> None:
    draft = grown(Constant(branching=(3, 2)))
    assert [len(children) for children in draft.children] == [3, 2, 2, 2] + [0] * 6
    assert draft.parents[4:] == [1, 2, 3, 1, 2, 3]  # first children first
    for row in range(4):
        ranking = np.argsort(-logits([1, 2, 3, *draft.path(row)]), kind="stable")
        assert list(draft.children[row]) == ranking[: len(draft.children[row])].tolist()


def test_one_draft_pass_per_level_or_guess() -> None:
    for builder, calls in ((Constant(branching=(2, 2, 1)), [1, 2, 4]), (Beam(width=3, depth=4), [1, 3, 3, 3]), (Chain(), [1] * 6)):
        source = ToySource(logits)
        grown(builder, source=source, budget=40)
        assert source.calls == calls
    source = ToySource(logits)
    draft = grown(Dynamic(threshold=0.02), source=source, budget=40)
    assert len(source.calls) <= max(draft.depths) + 1 < len(draft) - 1


def test_greedy_beam_keeps_the_likeliest_texts() -> None:
    draft = grown(Beam(width=3, depth=2))
    scores = {}
    for first, second in itertools.product(range(V), repeat=2):
        scores[first, second] = np.log(probabilities(logits([1, 2, 3]))[first]) + np.log(probabilities(logits([1, 2, 3, first]))[second])
    beam = [draft.tokens[row] for row in range(len(draft)) if draft.depths[row] == 1]
    wanted = sorted((pair for pair in scores if pair[0] in beam), key=lambda pair: -scores[pair])[:3]
    assert [tuple(draft.path(row)) for row in range(len(draft)) if draft.depths[row] == 2] == wanted


def test_stochastic_beam_draws_texts_without_replacement() -> None:
    """The first text of a beam is a sample of the model, the first two are one without replacement."""
    small = lambda text: logits(text)[:3]  # noqa: E731
    p = np.array([probabilities(small([1, 2, 3]))[a] * probabilities(small([1, 2, 3, a])) for a in range(3)]).ravel()
    counts, trials = np.zeros((9, 9)), 4000
    for text in range(trials):
        drawing = Drawing(Sampling(temperature=1.0), text, 3, tested=True)
        draft = grown(Beam(width=2, depth=2), source=ToySource(small), drawing=drawing)
        found = [3 * a + b for a, b in (draft.path(row) for row in range(len(draft)) if draft.depths[row] == 2)]
        counts[found[0], found[1]] += 1
    expected = trials * np.outer(p, p) / (1.0 - p[:, None])
    np.fill_diagonal(expected, 0.0)
    likely = expected > 4
    assert counts[np.eye(9, dtype=bool)].sum() == 0
    assert (((counts - expected) ** 2)[likely] / expected[likely]).sum() < likely.sum() + 4 * np.sqrt(2 * likely.sum())


def test_dynamic_takes_the_most_valuable_slot_first() -> None:
    draft = grown(Dynamic(threshold=0.0), budget=9)
    reach = draft.reach()
    values = []  # of the slot that each guess took: of its parent, without what the siblings before took
    for row in range(1, len(draft)):
        parent = draft.parents[row]
        values.append(reach[parent] * (1.0 - sum(draft.p[other] for other in draft.children[parent].values() if other < row)))
    assert values == sorted(values, reverse=True)
    level = grown(Dynamic(threshold=values[-1] - 1e-9), budget=40)
    assert {tuple(draft.path(row)) for row in range(1, 10)} == {tuple(level.path(row)) for row in range(1, len(level))}


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_dynamic_draws_nothing_that_costs_more_than_it_is_worth(seed: int | None) -> None:
    """A dear row is a threshold, a dear draft pass ends the tree above the level that it would give."""
    drawing = None if seed is None else Drawing(Sampling(temperature=1.0, seed=seed), 0, 3, tested=True)

    def tree(**prices: float) -> tuple[Draft, int]:
        source, draft = ToySource(logits), Draft(3)
        Dynamic(threshold=0.05).grow(source, Context(0, [1, 2, 3], 60, 9, drawing, **prices), draft, "x")
        return draft, len(source.calls)

    free, calls = tree()
    assert tree(row_price=0.2)[0].tokens == grown(Dynamic(threshold=0.2), budget=60, drawing=drawing).tokens
    assert len(tree(row_price=0.2)[0]) < len(free)
    first, second = (sum(v for v, d in zip(free.reach(), free.depths, strict=True) if d == depth and v >= 0.05) for depth in (1, 2))
    shorter, fewer = tree(pass_price=(first + second) / 2)  # less than what the first level may lead to, more than the second
    assert fewer == 2 < calls and (shorter.tokens, shorter.parents) == (free.tokens[: len(shorter)], free.parents[: len(shorter)])
    assert max(tree(pass_price=1.5)[0].depths) == 1 and tree(pass_price=1.5)[1] == 1, "no level is worth more than a pass"


def test_dynamic_believes_what_was_learned() -> None:
    rates, fresh = Rates(), grown(Dynamic(threshold=0.2))
    for _ in range(200):
        rates.observe(fresh.cells[1], hit=False)
    learned = grown(Dynamic(threshold=0.2), Draft(3, rates))
    assert fresh.children[1]
    assert not learned.children[1]


def test_coupled_drafts_use_the_noise_of_the_target() -> None:
    drawing = Drawing(Sampling(temperature=1.0, seed=4), 7, 3, tested=False)
    draft = grown(Constant(branching=(3, 2)), drawing=drawing)
    for row, depth in ((0, 0), (1, 1), (3, 1)):
        perturbed = logits([1, 2, 3, *draft.path(row)]) + noise(4, 7, 3 + depth, V)
        assert list(draft.children[row]) == np.argsort(-perturbed)[: len(draft.children[row])].tolist()


def test_tested_draws_have_noise_of_their_own_in_every_round_and_row() -> None:
    def race(place: int = 3, row: int = 0, depth: int = 0, draw: int = 0, text: int = 0, tested: bool = True) -> NDArray[np.float64]:
        return Drawing(Sampling(temperature=1.0), text, place, tested).race(np.ones(40), row, depth, draw)

    streams = [race(), race(4), race(row=1), race(draw=1), race(text=1), race(tested=False), race(4, tested=False)]
    assert len(np.unique(np.concatenate(streams))) == 40 * len(streams)
    assert (race(depth=1) == race()).all()  # a row has one depth
    assert (race(3, 5, 1, tested=False) == race(4, tested=False)).all()  # the place decides, whatever the round


@settings(max_examples=60, deadline=None)
@given(builders, st.booleans(), st.integers(0, 9))
def test_property_a_round_of_chains_gets_a_chain(builder: BuilderPart, tested: bool, seed: int) -> None:
    draft = grown(builder, drawing=Drawing(Sampling(temperature=1.0, seed=seed), 0, 3, tested), siblings=False)
    assert draft.is_chain
    assert len(draft.proposals) == (len(draft) - 1 if tested else 0)


# ---- static trees ------------------------------------------------------------------------------------------------------------------


def tokens_of(template: tuple[tuple[int, ...], ...], acceptance: tuple[float, ...]) -> float:
    return 1.0 + sum(float(np.prod([acceptance[rank] for rank in path])) for path in template)


@pytest.mark.parametrize("acceptance", [(0.6, 0.2, 0.1), (0.9, 0.05), (0.3, 0.3, 0.3), (0.2, 0.5), (1.0,), (0.0, 0.0)])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_no_tree_of_the_same_size_expects_more_tokens(acceptance: tuple[float, ...], depth: int) -> None:
    def trees(guesses: int) -> set[frozenset[tuple[int, ...]]]:
        if not guesses:
            return {frozenset()}
        found = set()
        for tree in trees(guesses - 1):
            for parent in [(), *tree]:
                rank = sum(path[:-1] == parent for path in tree)
                if rank < len(acceptance) and len(parent) < depth:
                    found.add(tree | {(*parent, rank)})
        return found | trees(guesses - 1)

    for guesses in range(6):
        solved = best_template(acceptance, guesses, depth)
        assert not solved or Static(template=solved)  # is a tree
        assert len(solved) <= guesses
        assert tokens_of(solved, acceptance) == pytest.approx(max(tokens_of(tuple(tree), acceptance) for tree in trees(guesses)))


def test_static_follows_the_measured_rates() -> None:
    rates = Rates(strength=1.0)
    for _ in range(100):
        rates.observe((("drawn", "rank", 0),), hit=True)
        rates.observe((("drawn", "rank", 1),), hit=False)
    assert grown(Static(), Draft(3, rates), depth=12).is_chain
    assert not grown(Static(), Draft(3), depth=12).is_chain


def test_static_fills_its_template() -> None:
    template = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0))
    draft = grown(Static(template=template))
    ranks = {0: ()}
    for row in range(1, len(draft)):
        parent = draft.parents[row]
        ranks[row] = (*ranks[parent], list(draft.children[parent].values()).index(row))  # type: ignore[assignment]
    assert set(ranks.values()) - {()} == set(template)


# ---- plans -------------------------------------------------------------------------------------------------------------------------


class Holder(BaseModel):
    builder: BuilderItem = Chain()


def test_builders_in_a_plan() -> None:
    assert Holder.model_validate({"builder": "chain"}).builder == Chain()
    assert Holder.model_validate({"builder": {"constant": {"branching": [4, 1]}}}).builder == Constant(branching=(4, 1))
    assert Holder.model_validate({"builder": {"dynamic": {"budget": 16, "threshold": 0.05}}}).builder == Dynamic(budget=16, threshold=0.05)
    assert Holder.model_validate({"builder": {"static": {"template": [[0], [0, 0]]}}}).builder == Static(template=((0,), (0, 0)))
    assert set(parts("builder")) == {"beam", "chain", "constant", "dynamic", "static"}
    assert json_schema(Holder)["$defs"]["builder"]["oneOf"]


@pytest.mark.parametrize("bad", [
    {"constant": {"branching": []}}, {"constant": {"branching": [0]}}, {"beam": {"width": 0}}, {"dynamic": {"threshold": -1.0}},
    {"dynamic": {"threshold": 1.5}}, {"dynamic": {"temperature": 0.0}}, {"static": {"template": [[1]]}}, {"static": {"template": [[0, 0]]}},
    {"static": {"template": [[]]}}, {"static": {"template": []}}, {"static": {"acceptance": [2.0]}},
    {"static": {"budget": 3, "template": [[0]]}}, "bush",
])  # fmt: skip
def test_refuses(bad: Any) -> None:
    with pytest.raises(ValidationError):
        Holder.model_validate({"builder": bad})
