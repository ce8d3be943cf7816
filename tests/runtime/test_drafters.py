"""The drafters by themselves, and token recycling's checks (papers/20, "Works when") on the toy engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from drafting import generate
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_engine import ToyEngine

from planc.runtime.decode import Decode, Tree
from planc.runtime.drafters import Context, PromptLookup, TokenRecycling, Verified
from planc.runtime.drafters.token_recycling import RecyclingDrafter, paper_template
from planc.runtime.errors import PlanError
from planc.runtime.loops import Stats
from planc.runtime.trees import Draft

V = 30


def lookup(tokens: list[int], *, budget: int = 8, depth: int = 8, **options: int) -> Draft:
    drafter = PromptLookup.model_validate(options).build(V)
    drafter.start(0)
    draft = Draft(tokens[-1])
    drafter.propose(Context(0, tokens, budget, depth), draft)
    return draft


def paths(draft: Draft) -> list[list[int]]:
    def down(row: int) -> list[list[int]]:
        return [[draft.tokens[row], *rest] for child in draft.children[row].values() for rest in down(child)] or [[draft.tokens[row]]]

    return [path[1:] for path in down(0)]


def test_lookup_copies_what_followed_the_longest_match() -> None:
    #        the 3-gram 1 2 3 was followed by 4; the later 2-gram 2 3 by 9
    tokens = [1, 2, 3, 4, 5, 6, 7, 2, 3, 9, 8, 1, 2, 3]
    assert paths(lookup(tokens, candidates=1, depth=3)) == [[4, 5, 6]]
    assert paths(lookup(tokens, candidates=2, depth=3)) == [[4, 5, 6], [9, 8, 1]]
    assert paths(lookup(tokens, candidates=1, max_ngram=2, depth=3)) == [[9, 8, 1]]


def test_lookup_prefers_the_latest_of_equal_matches() -> None:
    assert paths(lookup([1, 2, 5, 1, 2, 6, 1, 2], candidates=1, depth=1, max_ngram=2)) == [[6]]


def test_lookup_finds_nothing_in_new_text() -> None:
    assert len(lookup([1, 2, 3, 4])) == 1
    assert len(lookup([1])) == 1
    assert len(lookup([1, 2, 3, 1], min_ngram=2)) == 1


def test_lookup_continues_a_repetition_beyond_the_end_of_the_text() -> None:
    assert paths(lookup([7, 1, 2, 1, 2, 1, 2], candidates=1, depth=6)) == [[1, 2, 1, 2, 1, 2]]


def test_lookup_trusts_longer_matches_more() -> None:
    short = lookup([9, 1, 5, 6, 1], candidates=1)
    long = lookup([9, 8, 7, 1, 5, 6, 9, 8, 7, 1], candidates=1)
    assert long.p[1] > short.p[1]
    assert short.p[2] > short.p[1]  # given that the first guess is right, the match is one longer


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=60), st.integers(1, 4))
def test_lookup_index_equals_a_rescan(tokens: list[int], n: int) -> None:
    """Built token by token, the index names the last place that a scan of the whole text finds."""
    drafter = PromptLookup(max_ngram=n, min_ngram=n, candidates=1).build(V)
    drafter.start(0)
    for length in range(1, len(tokens) + 1):
        text, draft = tokens[:length], Draft(tokens[length - 1])
        drafter.propose(Context(0, text, 1, 1), draft)
        found = [end for end in range(n, length) if text[end - n : end] == text[length - n :]] if length >= n else []
        assert draft.tokens[1:] == ([text[found[-1]]] if found else [])


def test_lookup_starts_afresh() -> None:
    drafter = PromptLookup().build(V)
    for text in ([1, 2, 1, 2, 1], [1, 9]):
        drafter.start(0)
        draft = Draft(text[-1])
        drafter.propose(Context(0, text, 4, 4), draft)
    assert len(draft) == 1


def verified(tokens: list[int], depths: list[int], rows: list[int], chosen: list[int], top: list[list[int]]) -> Verified:
    return Verified(0, tokens, depths, rows, chosen, np.array(top, dtype=np.int64))


def test_recycling_writes_every_row_and_settles_duplicates() -> None:
    drafter = RecyclingDrafter(V, k=2)
    #                      root  accepted  rejected: deep, shallow; 4 is accepted and rejected
    drafter.update(verified([3, 4, 6, 6, 4], [0, 1, 2, 1, 1], [0, 1], [4, 5], [[4, 1], [5, 2], [7, 8], [9, 10], [11, 12]]))
    assert drafter.matrix[3].tolist() == [4, 1]
    assert drafter.matrix[4].tolist() == [5, 2]  # the accepted row won
    assert drafter.matrix[6].tolist() == [9, 10]  # the shallow row won
    assert (np.delete(drafter.matrix, [3, 4, 6], axis=0) == -1).all()


@pytest.mark.parametrize("width", [1, 2, 5])
def test_recycling_takes_any_width_of_top_ids(width: int) -> None:
    drafter = RecyclingDrafter(V, k=3)
    drafter.update(verified([3], [0], [0], [4], [list(range(4, 4 + width))]))
    assert drafter.matrix[3].tolist() == ([4, 5, 6][:width] + [-1, -1, -1])[:3]
    drafter.update(Verified(0, [3], [0], [0], [4]))  # no top ids: nothing happens
    assert drafter.matrix[3, 0] == 4


def test_recycling_prefers_the_successor_that_the_model_was_sure_of() -> None:
    drafter, draft = RecyclingDrafter(V, k=2), Draft(1)
    sure, torn = [9.0, 1.0], [1.0, 1.0]  # logits
    top = [[2, 3], [4, 5], [6, 7]]
    drafter.update(Verified(0, [1, 2, 3], [0, 1, 1], [0], [2], np.array(top), np.array([torn, torn, sure], dtype=np.float32)))
    drafter.propose(Context(0, [1], 3, 5), draft)
    assert paths(draft) == [[2], [3, 6]]
    assert draft.p[1] == draft.p[2] < draft.p[3]


def test_recycling_of_logits_alone_changes_no_row() -> None:
    """Shares say in which order guesses are made, never which."""
    with_logits, without = (RecyclingDrafter(V, k=3) for _ in range(2))
    rng = np.random.default_rng(0)
    for _ in range(40):
        tokens, top = rng.integers(0, V, 4).tolist(), np.stack([rng.permutation(V)[:3] for _ in range(4)])
        logits = -np.sort(-rng.normal(size=(4, 3)).astype(np.float32))
        with_logits.update(Verified(0, tokens, [0, 1, 2, 3], [0, 1], top[:2, 0].tolist(), top, logits))
        without.update(Verified(0, tokens, [0, 1, 2, 3], [0, 1], top[:2, 0].tolist(), top))
    assert np.array_equal(with_logits.matrix, without.matrix)
    drafts = []
    for drafter in (with_logits, without):
        drafts.append(Draft(1))
        drafter.propose(Context(0, [1], 400, 3), drafts[-1])
    assert sorted(paths(drafts[0])) == sorted(paths(drafts[1]))


def test_recycling_grows_likeliest_first_and_skips_cold_rows() -> None:
    drafter, draft = RecyclingDrafter(V, k=2), Draft(1)
    drafter.matrix[1], drafter.matrix[2] = [2, 3], [4, 4]  # 3 and 4 are cold; 4 stands there twice
    drafter.propose(Context(0, [1], 16, 5), draft)
    assert paths(draft) == [[2, 4], [3]]
    cold = Draft(9)
    drafter.propose(Context(0, [9], 16, 5), cold)
    assert len(cold) == 1
    little = Draft(1)
    drafter.propose(Context(0, [1], 1, 5), little)
    assert paths(little) == [[2]]
    flat = Draft(1)
    drafter.propose(Context(0, [1], 16, 1), flat)
    assert paths(flat) == [[2], [3]]


def test_recycling_spends_its_budget_however_unlikely_the_guesses() -> None:
    """A rank that failed for long is still tried where there is room, so that it can recover."""
    drafter, draft = RecyclingDrafter(V, k=4), Draft(1)
    drafter.matrix[1] = [2, 3, 4, 5]
    for rank in range(4):
        for _ in range(300):
            draft.rates.observe((("token_recycling", rank, 0, False),), rank == 0)
    drafter.propose(Context(0, [1], 4, 3), draft)
    assert paths(draft) == [[2], [3], [4], [5]]
    assert draft.p[4] < 0.01
    before = draft.p[4]
    draft.rates.learn(draft, [5])
    again = Draft(1, draft.rates)
    drafter.propose(Context(0, [1], 4, 3), again)
    assert again.p[again.children[0][5]] > 5 * before


def test_recycling_fills_below_the_guesses_of_another_drafter() -> None:
    drafter, draft = RecyclingDrafter(V, k=2), Draft(1)
    drafter.matrix[1], drafter.matrix[7] = [2, 7], [8, 9]
    row = draft.add(0, 7, ("prompt_lookup", 0, 3), 0.5)
    drafter.propose(Context(0, [1], 16, 2), draft)
    assert paths(draft) == [[7, 8], [7, 9], [2]]
    assert [cell[0] for cell in draft.cells[row]] == ["prompt_lookup", "token_recycling"]
    assert draft.p[row] > 0.5
    assert draft.p[draft.children[0][2]] < 0.3  # contested: another drafter thinks otherwise


def test_recycling_trusts_a_confirmed_successor_more() -> None:
    drafter, p = RecyclingDrafter(V, k=1), []
    for _ in range(3):
        drafter.update(verified([3], [0], [0], [4], [[4]]))
        draft = Draft(3)
        drafter.propose(Context(0, [3], 1, 1), draft)
        p.append(draft.p[1])
    assert p[0] < p[1] < p[2]
    drafter.update(verified([3], [0], [0], [5], [[4]]))
    assert drafter.streak[3] == 0


def test_the_paper_template() -> None:
    template = paper_template()
    assert [sum(len(path) == depth for path in template) for depth in range(1, 8)] == [8, 21, 25, 15, 8, 3, 0]
    assert all(path[:-1] in template for path in template if len(path) > 1)
    assert len(set(template)) == 80
    assert {(0, 7, 0), (3, 0, 0, 0), (0, 2, 0, 0), (0, 0, 0, 0, 0, 1), (0, 0, 0, 1, 0, 0)} <= set(template)
    drafter, draft = RecyclingDrafter(1000, k=8, template=template), Draft(0)
    drafter.matrix[:] = (np.arange(1000)[:, None] * 8 + np.arange(1, 9)) % 1000  # all 80 tokens differ along the tree
    drafter.propose(Context(0, [0], 80, 12), draft)
    assert len(draft) == 81


def test_scope_and_warm_matrix(tmp_path: Path) -> None:
    warm = np.tile(np.array([3, 4], dtype=np.int64), (V, 1))
    np.save(tmp_path / "warm.npy", warm)
    for scope, kept in (("process", 9), ("request", 3)):
        drafter = TokenRecycling.model_validate({"k": 3, "scope": scope, "warm": str(tmp_path / "warm.npy")}).build(V)
        assert drafter.matrix[5].tolist() == [3, 4, -1]
        drafter.update(verified([5], [0], [0], [9], [[9, 8, 7]]))
        drafter.start(0)
        assert drafter.matrix[5, 0] == kept


@pytest.mark.parametrize(
    "content", [None, np.zeros((V + 1, 2), dtype=np.int64), np.zeros((V, 2)), np.full((V, 2), V), np.zeros(V, dtype=np.int64)]
)
def test_a_bad_warm_matrix_is_refused(tmp_path: Path, content: np.ndarray | None) -> None:
    if content is not None:
        np.save(tmp_path / "warm.npy", content)
    with pytest.raises(PlanError) as refusal:
        TokenRecycling(warm=str(tmp_path / "warm.npy")).build(V)
    assert refusal.value.code == "plan-bad-value"


def test_a_warm_matrix_is_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "warm.npy", np.array([[{}]] * V, dtype=object), allow_pickle=True)
    with pytest.raises(PlanError, match="warm"):
        TokenRecycling(warm=str(tmp_path / "warm.npy")).build(V)


# Works when, items 3 and 4


def test_memory_is_the_matrix_and_does_not_grow() -> None:
    engine, drafter = ToyEngine(V), TokenRecycling(k=4).build(V)
    assert drafter.matrix.nbytes == V * 4 * 4
    generate(engine, [[1, 2]], drafters=[drafter])
    before = {name: getattr(value, "nbytes", value) for name, value in vars(drafter).items()}
    generate(engine, [[3, 2, 1]], Decode(max_new_tokens=100), drafters=[drafter])
    assert {name: getattr(value, "nbytes", value) for name, value in vars(drafter).items()} == before


class NoUpdate(RecyclingDrafter):
    def update(self, verified: Verified) -> None: ...


class AcceptedOnly(RecyclingDrafter):
    def update(self, verified: Verified) -> None:
        assert verified.top_ids is not None
        rows = verified.rows
        accepted = Verified(
            0, [verified.tokens[r] for r in rows], [verified.depths[r] for r in rows], list(range(len(rows))), verified.chosen
        )
        accepted.top_ids = verified.top_ids[rows]
        accepted.top_logits = None if verified.top_logits is None else verified.top_logits[rows]
        super().update(accepted)


def tokens_per_pass(make: type[RecyclingDrafter], *, prompt_rows: int, new: int, prompt: int, seeds: int = 12) -> float:
    """Mean over several toy models; the prompt is the model's own text, as prompts resemble answers."""
    passes = 0
    for seed in range(seeds):
        engine = ToyEngine(60, seed=seed, predictable=0.7, top_k=4)
        text, _ = generate(engine, [[seed]], Decode(max_new_tokens=prompt))
        stats = Stats()
        drafter = make(60, 4, prompt_rows)
        generate(engine, text, Decode(max_new_tokens=new), [drafter], Tree(budget=12), stats=stats, capacity=400)
        passes += stats.passes
    return seeds * (new - 1) / passes


def test_ablations_of_the_updates() -> None:
    all_rows = tokens_per_pass(RecyclingDrafter, prompt_rows=0, new=100, prompt=1)
    assert tokens_per_pass(NoUpdate, prompt_rows=0, new=30, prompt=1, seeds=2) <= 1.1
    assert tokens_per_pass(AcceptedOnly, prompt_rows=0, new=100, prompt=1) < all_rows
    with_prompt = tokens_per_pass(RecyclingDrafter, prompt_rows=512, new=32, prompt=60)
    assert with_prompt > tokens_per_pass(RecyclingDrafter, prompt_rows=0, new=32, prompt=60)
