"""The identity switches: whatever is drafted, speculative text is the plain text (papers/A0 section 11)."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from drafting import Adversary, Bush, Helped, Oracle, generate
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_engine import ToyCache, ToyEngine

from planc.runtime.controller import Controller
from planc.runtime.decode import Decode, Sampling, Tree
from planc.runtime.drafters import Drafter, PromptLookup, TokenRecycling
from planc.runtime.drafters.token_recycling import RecyclingDrafter
from planc.runtime.engine import CHAIN
from planc.runtime.errors import InputError
from planc.runtime.loops import Stats, Text, autoregressive
from planc.runtime.sampling import Sampler

V = 23
PROMPTS = [[1, 2, 3, 4], [5], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [2, 2]]
SAMPLED = Sampling(temperature=0.7, top_p=0.95, repetition_penalty=1.2, seed=11)


def recycling(matrix: np.ndarray | None = None, **options: object) -> RecyclingDrafter:
    drafter = TokenRecycling.model_validate(options).build(V)
    if matrix is not None:
        drafter.matrix[:] = matrix
    return drafter


def drafters(name: str, plain: list[list[int]]) -> list[Drafter]:
    rng = np.random.default_rng(0)
    made: dict[str, list[Drafter]] = {
        "empty": [Adversary()],
        "right": [Oracle(plain, V)],
        "wrong": [Oracle(plain, V, right=0)],
        **{f"right {n} then wrong": [Oracle(plain, V, right=n)] for n in (1, 2, 3, 5)},
        "random": [Bush(V, 1)],
        "random and right": [Helped(plain, V, 2)],
        "lookup": [PromptLookup().build(V)],
        "recycling": [recycling(k=4)],
        "recycling k=1": [recycling(k=1)],
        "recycling, random M": [recycling(rng.integers(0, V, (V, 8)), prefill_update=False)],
        "recycling, M of zeros": [recycling(np.zeros((V, 8)), prefill_update=False)],
        "recycling, template of one node": [recycling(template=((0,),))],
        "recycling, paper template": [recycling(template="paper")],
        "both": [PromptLookup().build(V), recycling()],
        "both, other order": [recycling(scope="request"), PromptLookup(max_ngram=2).build(V), Bush(V, 3)],
    }
    return made[name]


NAMES = list(drafters("both", [[]]) and [
    "empty", "right", "wrong", "right 1 then wrong", "right 2 then wrong", "right 3 then wrong", "right 5 then wrong", "random", "random and right",
    "lookup", "recycling", "recycling k=1", "recycling, random M", "recycling, M of zeros", "recycling, template of one node",
    "recycling, paper template", "both", "both, other order",
])  # fmt: skip


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", NAMES)
def test_identity(name: str, sampling: Sampling) -> None:
    engine, decode = ToyEngine(V, least=2), Decode(max_new_tokens=24, sampling=sampling)
    plain, finish = generate(engine, PROMPTS, decode)
    assert finish == ["length"] * 4
    for tree in (Tree(budget=6), Tree(budget=80, depth=12), Tree(budget=1), Tree(budget=5, shape="chain"), Tree(budget="auto")):
        assert generate(engine, PROMPTS, decode, drafters(name, plain), tree) == (plain, finish), tree


def test_the_toy_engine_notices_a_wrong_cache() -> None:
    """The suite above is worth something only if a slot that was kept wrongly changes the text."""
    engine = ToyEngine(V, predictable=0.3)
    cache, text = engine.new_cache(1, 40), [1, 2, 3]
    (plain,), _ = generate(engine, [text])
    for piece in autoregressive(engine, cache, [text], Decode(max_new_tokens=24)):
        text += piece.tokens
        if len(text) == 10:
            cache.slots[0][4] = (4, (cache.slots[0][4][1] + 1) % V)
    assert text != plain


def test_budget_zero_is_plain_decoding_pass_by_pass() -> None:
    engine, other = ToyEngine(V), ToyEngine(V)
    plain = generate(engine, PROMPTS)
    assert generate(other, PROMPTS, drafters=[Oracle(plain[0], V)], tree=Tree(budget=0)) == plain
    assert other.passes == engine.passes


def test_an_oracle_commits_budget_plus_one_tokens_a_pass() -> None:
    engine, stats = ToyEngine(V), Stats()
    plain, _ = generate(engine, PROMPTS[:1], Decode(max_new_tokens=25))
    generate(engine, PROMPTS[:1], Decode(max_new_tokens=25), [Oracle(plain, V)], Tree(budget=5), stats=stats)
    assert (stats.passes, stats.tokens, dict(stats.accepted)) == (4, 25, {5: 4})  # 1 from the prompt, then 4 x 6
    assert stats.tokens_per_pass == 6
    assert stats.drafted_by == stats.accepted_by == {"oracle": 20}


def test_wrong_guesses_cost_no_token() -> None:
    engine, stats, plain_stats = ToyEngine(V), Stats(), Stats()
    plain, _ = generate(engine, PROMPTS[:1], stats=plain_stats)
    generate(engine, PROMPTS[:1], drafters=[Oracle(plain, V, right=0)], tree=Tree(budget=3), stats=stats)
    assert stats.passes == plain_stats.passes == 23
    assert stats.accepted == {0: 23}


@pytest.mark.parametrize("position", range(1, 12))
def test_an_end_inside_the_draft_cuts_there(position: int) -> None:
    engine = ToyEngine(61, predictable=0.2)
    plain, _ = generate(engine, [[3, 1]])
    eos = {plain[0][1 + position], 60}
    cut, finish = generate(engine, [[3, 1]], eos=eos)
    assert finish == ["eos"]
    assert cut[0] == plain[0][: len(cut[0])]
    assert [token in eos for token in cut[0][2:]] == [False] * (len(cut[0]) - 3) + [True]
    for oracle in (Oracle(plain, 61), Helped(plain, 61, position)):  # the oracle drafts past the end
        assert generate(engine, [[3, 1]], drafters=[oracle], tree=Tree(budget=9), eos=eos) == (cut, finish)


def test_a_stop_condition_is_asked_after_every_token() -> None:
    engine = ToyEngine(V)

    def stop(text: Text) -> bool:
        return len(text.tokens) - text.prompt >= 3 and text.tokens[-1] % 3 == 0

    plain = generate(engine, PROMPTS, stop=stop)
    assert set(plain[1]) == {"stop"}
    full, _ = generate(engine, PROMPTS)
    assert generate(engine, PROMPTS, drafters=[Oracle(full, V)], stop=stop) == plain


@pytest.mark.parametrize("new", [1, 2, 3, 7])
def test_max_new_tokens_is_exact(new: int) -> None:
    engine, decode = ToyEngine(V), Decode(max_new_tokens=new)
    full, _ = generate(engine, PROMPTS)
    for made in (None, [Oracle(full, V)], [Bush(V, 0)]):
        texts, finish = generate(engine, PROMPTS, decode, made)
        assert texts == [text[: len(prompt) + new] for text, prompt in zip(full, PROMPTS, strict=True)]
        assert finish == ["length"] * 4


@pytest.mark.parametrize("min_rows", [1, 2, 5])
def test_a_full_cache_ends_both_loops_at_the_same_token(min_rows: int) -> None:
    engine, decode = ToyEngine(V, max_length=30, least=min_rows), Decode(max_new_tokens=100)
    plain, finish = generate(engine, PROMPTS, decode, min_rows=min_rows)
    assert [len(text) for text in plain] == [31 - min_rows] * 4
    assert finish == ["length"] * 4
    full, _ = generate(ToyEngine(V), PROMPTS, decode)
    for drafter in (Oracle(full, V), Helped(full, V, 5)):
        assert generate(engine, PROMPTS, decode, [drafter], min_rows=min_rows) == (plain, finish)


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_equals_its_singles_in_every_order(order: tuple[int, ...], sampling: Sampling) -> None:
    engine, decode, eos = ToyEngine(V), Decode(max_new_tokens=20, sampling=sampling), {4}
    singles = [generate(engine, [PROMPTS[i]], decode, ids=[i], eos=eos)[0][0] for i in range(3)]
    wanted, prompts = [singles[i] for i in order], [PROMPTS[i] for i in order]
    assert generate(engine, prompts, decode, ids=order, eos=eos)[0] == wanted
    for made in ([Helped(wanted, V, 1)], [PromptLookup().build(V), recycling()]):
        assert generate(engine, prompts, decode, made, Tree(budget=7), ids=order, eos=eos, chunk=3)[0] == wanted


def test_sampled_texts_of_a_batch_differ_and_depend_on_the_seed() -> None:
    engine = ToyEngine(V)
    texts, _ = generate(engine, [[1, 2]] * 3, Decode(max_new_tokens=24, sampling=Sampling(temperature=1.0)))
    other, _ = generate(engine, [[1, 2]] * 3, Decode(max_new_tokens=24, sampling=Sampling(temperature=1.0, seed=1)))
    assert len({tuple(text) for text in texts + other}) == 6


@pytest.mark.parametrize("chunk", [2, 3, 5, 512])
@pytest.mark.parametrize("wants_prompt", [False, True])
def test_prefill_in_chunks_of_any_size(chunk: int, wants_prompt: bool) -> None:
    engine = ToyEngine(V, least=2)
    plain = generate(engine, PROMPTS)
    assert generate(engine, PROMPTS, chunk=chunk) == plain
    drafter = recycling(prefill_update=wants_prompt, prefill_rows=4)
    assert generate(engine, PROMPTS, drafters=[drafter], chunk=chunk, tree=Tree(budget=0)) == plain


def test_prefill_asks_for_no_more_outputs_than_it_needs() -> None:
    class Watch(ToyEngine):
        def forward(self, cache, step, **flags):  # type: ignore[no-untyped-def]
            self.first = [*getattr(self, "first", []), step.logits_from]
            return super().forward(cache, step, **flags)

    for made, wanted in ((None, [4, 4, 1]), ([recycling(prefill_rows=7)], [4, 2, 0]), ([recycling()], [0, 0, 0])):
        engine = Watch(V)
        generate(engine, [list(range(15))], Decode(max_new_tokens=1), made, chunk=6)
        assert engine.first == wanted


def test_a_cache_that_holds_the_beginning_is_used() -> None:
    engine = ToyEngine(V)
    (first,), _ = generate(engine, PROMPTS[:1])
    cache, longer = engine.new_cache(1, 160), [*first, 9, 8, 7]
    list(autoregressive(engine, cache, PROMPTS[:1], Decode(max_new_tokens=24)))
    engine.passes.clear()
    again = [token for piece in autoregressive(engine, cache, [longer], Decode(max_new_tokens=9)) for token in piece.tokens]
    assert engine.passes[0][:2] == ([len(first) - 1], 4)  # the pending token and the three new ones
    assert longer + again == generate(engine, [longer], Decode(max_new_tokens=9))[0][0]


def test_trees_stay_inside_the_block_and_chains_may_leave_it() -> None:
    engine, decode = ToyEngine(V), Decode(max_new_tokens=60)
    plain, _ = generate(engine, PROMPTS[:2], decode)
    engine.passes.clear()
    assert generate(engine, PROMPTS[:2], decode, [Helped(plain, V, 4)], Tree(budget=7), block=16)[0] == plain
    trees = [(length, rows) for lengths, rows, tree in engine.passes if tree for length in lengths if length]
    assert trees
    assert all(length + rows <= (length // 16 + 1) * 16 for length, rows in trees)
    assert any(length + rows > (length // 16 + 1) * 16 for lengths, rows, tree in engine.passes if not tree for length in lengths)


@pytest.mark.parametrize(("shape", "allowed", "spec", "expected"), [
    ("auto", True, True, True), ("auto", False, True, False), ("auto", True, False, False), ("chain", True, True, False), ("tree", False, True, True),
])  # fmt: skip
def test_who_decides_about_trees(shape: str, allowed: bool, spec: bool, expected: bool) -> None:
    engine = ToyEngine(V, trees=spec)
    plain, _ = generate(engine, PROMPTS[:1])
    tree = Tree.model_validate({"shape": shape, "budget": 6})
    assert generate(engine, PROMPTS[:1], drafters=[Helped(plain, V, 4)], tree=tree, trees_allowed=allowed)[0] == plain
    assert any(tree for *_, tree in engine.passes) == expected


def test_passes_are_never_narrower_than_min_rows() -> None:
    engine = ToyEngine(V, least=4)  # the engine itself asserts it
    plain = generate(engine, PROMPTS, min_rows=4)
    assert generate(engine, PROMPTS, drafters=[Oracle(plain[0], V)], tree=Tree(budget=1), min_rows=4) == plain
    assert generate(engine, PROMPTS, Decode(max_new_tokens=24, min_rows=4)) == plain


def test_statistics_add_up() -> None:
    engine, stats = ToyEngine(V), Stats()
    texts, _ = generate(engine, PROMPTS, drafters=[PromptLookup().build(V), recycling()], stats=stats, chunk=4)
    assert stats.tokens == sum(map(len, texts)) - sum(map(len, PROMPTS)) == 96
    assert sum((1 + a) * n for a, n in stats.accepted.items()) == 96 - 4  # the first token of each text comes from its prompt
    assert stats.purposes["prefill"] == 4
    assert stats.passes + 4 == len(engine.passes)
    assert stats.rows == sum(rows for _, rows, _ in engine.passes[4:])
    assert 0 < stats.first_token_seconds < stats.total_seconds
    assert stats.total_seconds == pytest.approx(stats.host_seconds + stats.engine_seconds + stats.prefill_seconds)


@pytest.mark.parametrize(("prompts", "code"), [
    ([[]], "prompt-empty"), ([[1] * 40], "prompt-too-long"), ([[1] * 39], "prompt-too-long"), ([[V]], "input-invalid"), ([[-1]], "input-invalid"),
])  # fmt: skip
def test_bad_prompts_are_refused(prompts: list[list[int]], code: str) -> None:
    with pytest.raises(InputError) as refusal:
        generate(ToyEngine(V), prompts, capacity=40)
    assert refusal.value.code == code


def test_the_longest_prompt_that_fits_gives_one_token() -> None:
    assert len(generate(ToyEngine(V), [[1] * 38], capacity=40)[0][0]) == 39


def test_an_engine_that_cannot_serve_the_plan_is_refused() -> None:
    with pytest.raises(InputError, match="top-k") as refusal:
        generate(ToyEngine(V, top_k=0), PROMPTS, drafters=[recycling()])
    assert refusal.value.code == "output-missing"
    with pytest.raises(InputError, match="trees"):
        generate(ToyEngine(V, trees=False), PROMPTS, drafters=[Adversary()], tree=Tree(shape="tree"))
    with pytest.raises(InputError, match="prompts"):
        list(autoregressive(ToyEngine(V), ToyEngine(V).new_cache(2, 50), [[1]], Decode()))


def test_a_plain_step_is_a_chain() -> None:
    engine = ToyEngine(V)
    generate(engine, PROMPTS)
    assert CHAIN is None
    assert not any(tree for *_, tree in engine.passes)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_property_speculative_equals_plain(data: st.DataObject) -> None:
    draw = data.draw
    vocab = draw(st.integers(2, 30))
    engine_options = {
        "seed": draw(st.integers(0, 99)),
        "predictable": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "top_k": draw(st.integers(1, vocab)),
    }
    prompts = draw(st.lists(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=9), min_size=1, max_size=3))
    sampling = draw(st.sampled_from([Sampling(), Sampling(temperature=1.0, seed=3), Sampling(repetition_penalty=1.4), SAMPLED]))
    decode = Decode(max_new_tokens=draw(st.integers(1, 20)), sampling=sampling)
    options = {
        "eos": draw(st.sets(st.integers(0, vocab - 1), max_size=2)),
        "min_rows": draw(st.integers(1, 4)),
        "chunk": draw(st.integers(1, 8)),
        "capacity": draw(st.sampled_from([14, 20, 60])),
    }
    engine = ToyEngine(vocab, least=options["min_rows"], **engine_options)  # type: ignore[arg-type]
    plain = generate(engine, prompts, decode, **options)  # type: ignore[arg-type]
    seed = draw(st.integers(0, 99))
    made: list[Drafter] = draw(
        st.permutations(
            [Helped(plain[0], vocab, seed), Bush(vocab, seed, 20), PromptLookup().build(vocab), TokenRecycling(k=3).build(vocab)]
        )
    )[: draw(st.integers(1, 4))]
    budget: int | str = draw(st.one_of(st.just("auto"), st.integers(0, 24)))
    tree = Tree.model_validate(
        {"budget": budget, "depth": draw(st.integers(1, 12)), "shape": draw(st.sampled_from(["auto", "chain", "tree"]))}
    )
    controller = Controller(tree, cost=lambda rows, past: 1.0 + draw(st.just(0.02)) * rows)
    assert generate(engine, prompts, decode, made, controller=controller, block=draw(st.sampled_from([None, 4, 16])), **options) == plain  # type: ignore[arg-type]
    # the same drafters and controller again: what they learned must not matter
    assert generate(engine, prompts, decode, made, controller=controller, **options) == plain  # type: ignore[arg-type]


def test_prompts_of_a_batch_ask_for_the_outputs_of_their_last_rows_only() -> None:
    class Watch(ToyEngine):
        def forward(self, cache, step, **flags):  # type: ignore[no-untyped-def]
            self.outputs = [*getattr(self, "outputs", []), step.tokens.shape[1] - step.logits_from]
            return super().forward(cache, step, **flags)

    engine = Watch(V)
    generate(engine, [[1] * 12, [2] * 3, [3] * 30], Decode(max_new_tokens=1))
    assert engine.outputs == [2, 2, 2]


def test_a_finished_sequence_of_a_batch_gives_its_cache_back() -> None:
    engine = ToyEngine(V)
    plain, _ = generate(engine, PROMPTS[:3])
    end = next(token for token in plain[0][len(PROMPTS[0]) :] if token not in plain[2][len(PROMPTS[2]) :])
    engine.passes.clear()
    _, finish = generate(engine, PROMPTS[:3], eos={end})
    assert finish[0] == "eos"
    assert finish[2] == "length"
    assert engine.passes[-1][0][0] == 0


def test_nothing_is_drafted_beyond_the_last_token() -> None:
    class Ruler(Oracle):
        def propose(self, context, draft):  # type: ignore[no-untyped-def]
            assert len(context.tokens) + context.depth < 2 + 10  # the pass adds one token of its own
            super().propose(context, draft)

    plain, _ = generate(ToyEngine(V), [[1, 2]], Decode(max_new_tokens=30))
    assert generate(ToyEngine(V), [[1, 2]], Decode(max_new_tokens=10), [Ruler(plain, V)])[0][0] == plain[0][:12]


@given(st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=6))
def test_a_text_knows_its_tokens(parts: list[list[int]]) -> None:
    text = Text(0, [3], 1, 100, Sampler(Sampling()))
    for part in parts:
        text.tokens += part
        assert text.seen == set(text.tokens)


# ---- caches with a policy ----


class Blocks(ToyCache):
    """What its rows see changes at every fifth token, once the prompt is complete."""

    def __init__(self, batch: int, capacity: int) -> None:
        super().__init__(batch, capacity)
        self.sealed: dict[int, tuple[int, int]] = {}  # sequence -> length and guesses when it was sealed

    def seal(self, sequence: int, guessed: int = 0) -> None:
        assert sequence not in self.sealed
        self.sealed[sequence] = int(self.lengths[sequence]), guessed

    def horizon(self, sequence: int) -> int:
        return 5 - int(self.lengths[sequence]) % 5 if sequence in self.sealed else super().horizon(sequence)

    def keep(self, sequence: int, rows: np.ndarray) -> None:
        assert len(rows) <= self.horizon(sequence), "the rows behind the change saw what plain decoding would not have shown them"
        super().keep(sequence, rows)


class BlockEngine(ToyEngine):
    def new_cache(self, batch: int, capacity: int) -> ToyCache:
        self.cache = Blocks(batch, capacity)
        return self.cache


@pytest.mark.parametrize("guesses", [0, 3])
def test_no_draft_crosses_the_horizon(guesses: int) -> None:
    """Every prompt is sealed once, when it is complete; where the cache wants guesses they go through the model and are dropped."""
    plain, finish = generate(ToyEngine(V), PROMPTS)
    engine = BlockEngine(V)
    engine.spec = replace(engine.spec, guesses=guesses)
    for tree in (Tree(budget=12), Tree(budget=12, shape="chain"), Tree()):
        assert generate(engine, PROMPTS, None, [Oracle(plain, V)], tree) == (plain, finish)
        assert isinstance(engine.cache, Blocks)
        assert engine.cache.sealed == {b: (len(prompt), guesses and guesses + 1) for b, prompt in enumerate(PROMPTS)}
    stats = Stats()
    assert generate(engine, PROMPTS[:1], None, [Oracle(plain, V)], Tree(budget=12), stats=stats)[0] == plain[:1]
    assert max(stats.accepted) == 4  # as far as the horizon allows
