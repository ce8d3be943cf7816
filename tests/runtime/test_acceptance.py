"""Acceptance rules: the law of the committed text, enumerated exactly; what each rule needs; what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from planc.runtime.acceptance import RULES, Target, Transferred, block_thresholds, rejected, rule_of, transferred, trials, walk
from planc.runtime.decode import Sampling, Speculative
from planc.runtime.drafters import DrafterPart
from planc.runtime.errors import PlanError
from planc.runtime.registry import parts
from planc.runtime.sampling import Sampler
from planc.runtime.trees import Draft, Kind, Proposal, chain

Floats = NDArray[np.float64]
EXACT = 1e-12


def distributions(size: int, seed: int) -> list[tuple[Floats, Floats]]:
    """Pairs (p, q): random, peaked, flat, disjoint in part, equal, equal but for one token, certain."""
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.ones(size)), rng.dirichlet(np.ones(size))
    peaked, flat, one = rng.dirichlet(np.full(size, 0.1)), np.full(size, 1.0 / size), np.eye(size)[1]
    left = np.where(np.arange(size) < size // 2 + 1, p, 0.0)
    right = np.where(np.arange(size) >= size // 2 - 1, q, 0.0)
    pairs = [(p, q), (p, peaked), (peaked, p), (p, flat), (left, right), (right, left), (p, p), (flat, flat), (one, q), (p, one), (left, p)]
    return [(a / a.sum(), b / b.sum()) for a, b in pairs]


def normed(q: NDArray[np.float32]) -> Floats:
    wide = q.astype(np.float64)
    return wide / wide.sum()


def draws(q: Floats, count: int, kind: Kind) -> Iterator[tuple[list[int], float]]:
    """Every sequence of `count` draws with its probability; shorter where nothing is left to draw."""
    if not count or q.sum() == 0.0:
        yield [], 1.0
        return
    for x in np.flatnonzero(q):
        rest = q.copy()
        if kind == "without_replacement":
            rest[x] = 0.0
        for more, weight in draws(rest, count - 1, kind):
            yield [int(x), *more], weight * q[x] / q.sum()


def law(p: Floats, q: NDArray[np.float32], count: int, kind: Kind) -> Floats:
    """Distribution of the token that `recursive` commits at a node with `count` draws."""
    committed = np.zeros(p.size)
    for drawn, weight in draws(normed(q), count, kind):
        rest = p
        for x, acceptance, left in trials(p, Proposal(q, kind, drawn, list(range(1, len(drawn) + 1)))):
            assert 0.0 <= acceptance <= 1.0
            committed[x] += weight * acceptance
            weight, rest = weight * (1.0 - acceptance), left
            assert weight == 0.0 or rest[x] == 0.0  # a rejected token cannot come back
        committed += weight * rest
    return committed


@pytest.mark.parametrize("kind", ["without_replacement", "with_replacement"])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [2, 4, 6])
def test_recursive_commits_p_exactly(kind: Kind, count: int, size: int) -> None:
    for seed in range(3):
        for p, q in distributions(size, seed):
            assert np.abs(law(p, q.astype(np.float32), count, kind) - p).max() < EXACT


@pytest.mark.parametrize("count", [1, 2, 3])
def test_guesses_of_others_beside_the_draws_keep_the_law(count: int) -> None:
    """They are matched with the sample of what the tests left, so they may even be chosen for the draws."""
    for p, q in distributions(5, 7):
        committed = np.zeros(5)
        for drawn, weight in draws(normed(q.astype(np.float32)), count, "without_replacement"):
            beside = (drawn[0] + 1) % 5
            rest = p
            for x, acceptance, left in trials(p, Proposal(q.astype(np.float32), drawn=drawn)):
                committed[x] += weight * acceptance
                weight, rest = weight * (1.0 - acceptance), left
            committed[beside] += weight * rest[beside]  # met
            committed += weight * np.where(np.arange(5) == beside, 0.0, rest)  # not met
        assert np.abs(committed - p).max() < EXACT


def test_without_replacement_accepts_more() -> None:
    for p, q in distributions(6, 3)[:6]:
        accepted = {}
        for kind in ("without_replacement", "with_replacement"):
            missed = 0.0
            for drawn, weight in draws(normed(q.astype(np.float32)), 3, kind):  # type: ignore[arg-type]
                for _, acceptance, _ in trials(p, Proposal(q.astype(np.float32), kind, drawn)):  # type: ignore[arg-type]
                    weight *= 1.0 - acceptance
                missed += weight
            accepted[kind] = 1.0 - missed
        assert accepted["without_replacement"] >= accepted["with_replacement"] - EXACT


# ---- block verification ------------------------------------------------------------------------------------------------------------

Table = Callable[[tuple[int, ...]], Floats]


def table(size: int, seed: int, sharpness: float = 1.0) -> Table:
    """A distribution [size] after every text."""
    return lambda text: np.random.default_rng([seed, *(x + 1 for x in text)]).dirichlet(np.full(size, sharpness))


def text_law(
    p: Table, q: Table, size: int, length: int, stop: Callable[[tuple[int, ...]], bool], points: bool = False
) -> tuple[Floats, float]:
    """Distribution of the first `length` + 1 tokens under `block` with chains of up to `length` guesses; expected accepted guesses.

    `stop` ends a chain behind a guess. With `points` every second guess is the likeliest of q instead of a draw.
    """
    out, mean = np.zeros((size,) * (length + 1)), 0.0

    def plain(text: tuple[int, ...], weight: float) -> None:
        if len(text) == length + 1 or weight == 0.0:
            out[text] += weight if len(text) == length + 1 else 0.0
            return
        for x, mass in enumerate(p(text)):
            plain((*text, x), weight * mass)

    def verify(guesses: tuple[int, ...], proposals: list[Proposal | None], weight: float) -> None:
        nonlocal mean
        rows = [p(guesses[:i]) for i in range(len(guesses) + 1)]
        thresholds, rests = block_thresholds(guesses, rows, proposals)
        for accepted in reversed(range(len(guesses) + 1)):
            h = thresholds[accepted - 1] if accepted else 1.0
            assert -EXACT <= h <= 1.0 + EXACT
            mean += weight * h * accepted
            for x, mass in enumerate(rests[accepted]):
                plain((*guesses[:accepted], x), weight * h * mass)
            weight *= 1.0 - h

    def grow(guesses: tuple[int, ...], proposals: list[Proposal | None], weight: float) -> None:
        if len(guesses) == length or (guesses and stop(guesses)):
            return verify(guesses, proposals, weight)
        q32 = q(guesses).astype(np.float32)
        if points and len(guesses) % 2:
            return grow((*guesses, int(q32.argmax())), [*proposals, None], weight)
        for x, mass in enumerate(normed(q32)):
            if mass > 0.0:
                grow((*guesses, x), [*proposals, Proposal(q32, drawn=[x])], weight * mass)
        return None

    grow((), [], 1.0)
    return out, mean


def plain_law(p: Table, size: int, length: int) -> Floats:
    out = np.zeros((size,) * length)
    for text in itertools.product(range(size), repeat=length):
        out[text] = np.prod([p(text[:i])[x] for i, x in enumerate(text)])
    return out


@pytest.mark.parametrize("points", [False, True])
@pytest.mark.parametrize(("size", "length"), [(6, 1), (4, 2), (3, 3), (2, 4)])
def test_block_commits_p_exactly(size: int, length: int, points: bool) -> None:
    for seed, sharpness in itertools.product(range(3), (0.2, 1.0)):
        p, q = table(size, seed), table(size, seed + 10, sharpness)
        for stop in (lambda text: False, lambda text: text[-1] == 0, lambda text, q=q: q(text[:-1])[text[-1]] < 0.3):
            out, _ = text_law(p, q, size, length, stop, points)
            assert np.abs(out - plain_law(p, size, length + 1)).max() < EXACT
    same = table(size, 5)
    out, mean = text_law(same, same, size, length, lambda text: False)
    assert np.abs(out - plain_law(same, size, length + 1)).max() < EXACT
    assert mean == pytest.approx(length, abs=1e-4)  # q is rounded to float32


def test_block_accepts_more_than_one_test_after_the_other() -> None:
    for seed in range(6):
        p, q = table(3, seed), table(3, seed + 10)
        one_by_one, reach = 0.0, {(): 1.0}
        for _ in range(3):
            reach = {(*text, x): w * min(p(text)[x], q(text)[x]) for text, w in reach.items() for x in range(3)}
            one_by_one += sum(reach.values())
        assert text_law(p, q, 3, 3, lambda text: False)[1] >= one_by_one - 1e-6


# ---- rules -------------------------------------------------------------------------------------------------------------------------


def target(logits: Sequence[Sequence[float]], place: int = 5, **sampling: float) -> Target:
    return Target(np.array(logits, dtype=np.float32), Sampler(Sampling.model_validate({"temperature": 1.0, **sampling})), 3, place)


def test_rules_by_name_and_greedy_at_temperature_zero() -> None:
    assert [rule_of(name, 1.0) is RULES[name] for name in ("coupled", "recursive", "block")] == [True] * 3
    assert {rule_of(name, 0.0) for name in RULES} == {RULES["coupled"]}


@pytest.mark.parametrize("name", ["coupled", "recursive", "block"])
def test_an_empty_draft_gives_the_plain_token(name: str) -> None:
    rng = np.random.default_rng(1)
    for place in range(50):
        one = target(rng.normal(size=(1, 9)), place)
        assert walk(Draft(0), RULES[name].choices(Draft(0), one)).tokens == [one.choose(0, [])]


def test_without_proposals_recursive_is_coupled_token_by_token() -> None:
    rng = np.random.default_rng(2)
    for place in range(60):
        draft = Draft(0)
        for _ in range(9):
            draft.add(int(rng.integers(len(draft))), int(rng.integers(5)), ("any",), 0.5)
        one = target(rng.normal(size=(len(draft), 5)) * 2, place)
        assert walk(draft, RULES["recursive"].choices(draft, one)) == walk(draft, one.choose)


def test_a_block_of_equal_models_accepts_everything() -> None:
    draft = chain([0, 2, 1, 3])
    logits = np.random.default_rng(0).normal(size=(4, 5))
    for row in range(3):
        q = np.exp(logits[row].astype(np.float32)).astype(np.float32)
        draft.proposals[row] = Proposal(q / q.sum(), drawn=[draft.tokens[row + 1]], marks=[row + 1])
    for place in range(40):
        assert walk(draft, RULES["block"].choices(draft, target(logits, place))).rows == [0, 1, 2, 3]


def test_tests_are_independent_of_samples_and_differ_between_rounds_and_rows() -> None:
    one, other = target([[0.0]], 5), target([[0.0]], 6)
    streams = [one.uniforms(0, 50), one.uniforms(1, 50), other.uniforms(0, 50)]
    assert len(np.unique(np.concatenate(streams))) == 150


# ---- plans -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafters that draw chains and trees, for the time of a test."""
    monkeypatch.setattr("planc.runtime.registry._PARTS", {kind: parts(kind) for kind in ("", "pass", "drafter", "builder")})

    class DrawsChain(DrafterPart):
        """Draws a chain."""

        draws = property(lambda self: "chain")

    class DrawsTree(DrafterPart):
        """Draws a tree."""

        draws = property(lambda self: "tree")


def test_plans_name_the_rule(drawing: None) -> None:
    assert Speculative.model_validate({"drafter": "prompt_lookup"}).acceptance == "coupled"
    for drafter in ("prompt_lookup", "draws_tree", "draws_chain", ["draws_tree", "prompt_lookup"]):
        assert Speculative.model_validate({"drafter": drafter, "acceptance": "recursive"}).acceptance == "recursive"
    assert Speculative.model_validate({"drafter": "draws_chain", "acceptance": "block"})
    assert Speculative.model_validate({"drafter": ["draws_tree", "draws_chain"]})


@pytest.mark.parametrize(("plan", "message"), [
    ({"drafter": "draws_chain", "acceptance": "block", "tree": {"shape": "tree"}}, "shape: tree"),
    ({"drafter": "draws_tree", "acceptance": "block"}, "the builder of draws_tree makes trees"),
    ({"drafter": ["draws_tree", "draws_chain"], "acceptance": "recursive"}, "draws_tree and draws_chain would both draw"),
])  # fmt: skip
def test_rules_that_cannot_be_used_are_refused(drawing: None, plan: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as refusal:
        Speculative.model_validate(plan)
    error = refusal.value.errors()[0]["ctx"]["error"]
    assert isinstance(error, PlanError)
    assert (error.code, bool(error.fix)) == ("plan-conflict", True)


def transfer_law(p: Floats, q: Floats, strength: float, floor: float) -> Floats:
    """The law of the token committed after a row with one draw from q."""
    moved = transferred(p, q, strength, floor)
    accepted, rest = np.minimum(q, moved), rejected(p, q, moved)
    left = 1.0 - accepted.sum()
    return accepted + left * (rest / rest.sum() if rest.any() else p)


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_transfer_of_strength_0_keeps_the_law_and_more_moves_it_towards_the_draft(floor: float) -> None:
    for p, q in distributions(8, 1):
        assert transfer_law(p, q, 0.0, floor) == pytest.approx(p, abs=1e-9)
        accepted = [np.minimum(q, transferred(p, q, strength, 0.0)).sum() for strength in (0.0, 0.5)]
        assert accepted[1] >= accepted[0] - 1e-9


def test_transfer_leaves_alone_what_the_draft_thinks_unlikely() -> None:
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.05, 0.25, 0.7])
    moved = transferred(p, q, 5.0, 0.1)
    assert moved[2] > p[2] and moved[0] / moved[1] == pytest.approx(p[0] * np.exp(5 * 0.0) / (p[1] * np.exp(-5 * 0.05)))


@pytest.mark.parametrize("strength", [0.0, 3.0])
def test_transfer_commits_by_its_law(strength: float) -> None:
    p, q, trials_made = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.1, 0.2, 0.3, 0.4], dtype=np.float32), 6000
    rng, counts = np.random.default_rng(0), np.zeros(4)
    for place in range(trials_made):
        draft = Draft(0)
        draft.proposals[0] = Proposal(q, "without_replacement")
        draft.draw(0, int(rng.choice(4, p=normed(q))), ("x",), 0.5)
        logits = np.log(p)
        counts[walk(draft, Transferred(strength, 0.1).choices(draft, target([logits.tolist()] * 2, place))).tokens[0]] += 1
    expected = trials_made * transfer_law(p, normed(q), strength, 0.1)
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # 0.1 % of chi-square with 3 degrees of freedom
    if strength:
        assert np.abs(expected / trials_made - p).max() > 0.05


@pytest.mark.parametrize(
    "options",
    [
        {"drafter": "prompt_lookup"},
        {"drafter": {"retrieval": {"builder": "chain"}}, "acceptance": "recursive"},
        {"drafter": {"retrieval": {"builder": "chain"}}, "tree": {"shape": "tree"}},
        {"drafter": {"retrieval": {"builder": "constant"}}},
    ],
)
def test_transfer_is_refused_where_no_chain_is_drawn(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="transfer"):
        Speculative.model_validate({"transfer": {}, **options})
