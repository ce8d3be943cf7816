"""The drafter that is a model: on toy engines, where the draft model is the target itself, another model, or one of another vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from drafting import generate
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, models
from tokenizers.decoders import ByteLevel
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from toy_engine import ToyCache, ToyEngine

from planc.runtime.contract import CostTable
from planc.runtime.controller import Controller
from planc.runtime.decode import Decode, Sampling, Speculative, Tree
from planc.runtime.drafters import Context, DraftModel, Host, Loaded
from planc.runtime.drafters.draft_model import Economy, ModelDrafter, probability
from planc.runtime.drafters.model_source import ModelSource
from planc.runtime.drafters.vocabulary import Vocabulary, vocabulary
from planc.runtime.engine import Outputs, Step
from planc.runtime.errors import PlanError
from planc.runtime.loops import Stats
from planc.runtime.text import Text
from planc.runtime.trees import Draft

V = 23
PROMPTS = [[1, 2, 3, 4, 5], [7, 8], list(range(20)) * 9, [3]]


def drafter(engine: ToyEngine, capacity: int = 512, min_p: float = 0.0, eos: tuple[int, ...] = (), **model: Any) -> ModelDrafter:
    return ModelDrafter(Host(ToyEngine(V), eos), Loaded(engine, capacity, **model), min_p)


def sampled(temperature: float = 0.8, **options: Any) -> Decode:
    return Decode(max_new_tokens=24, sampling=Sampling(temperature=temperature, seed=5, **options))


# ---- the text is the plain one ----


@pytest.mark.parametrize("decode", [Decode(max_new_tokens=24), sampled(), sampled(0.0, repetition_penalty=1.3), sampled(top_k=5)])
def test_a_perfect_draft_is_accepted_whole(decode: Decode) -> None:
    for prompt in PROMPTS:
        stats = Stats()
        plain, _ = generate(ToyEngine(V), [prompt], decode, capacity=256)
        text, _ = generate(ToyEngine(V), [prompt], decode, [drafter(ToyEngine(V))], Tree(budget=4), stats=stats, capacity=256)
        assert text == plain
        assert stats.accepted_by == stats.drafted_by
        assert stats.tokens_per_pass > 4


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 5),
    predictable=st.sampled_from([0.5, 0.8, 1.0]),
    budget=st.integers(1, 6),
    temperature=st.sampled_from([0.0, 1.0]),
    shape=st.sampled_from(["chain", "tree"]),
    eos=st.sampled_from([(), (4, 9)]),
)
def test_any_draft_model_gives_the_plain_text(
    seed: int, predictable: float, budget: int, temperature: float, shape: Any, eos: tuple[int, ...]
) -> None:
    target = ToyEngine(V, predictable=0.8)
    decode = sampled(temperature)
    plain = generate(target, PROMPTS, decode, capacity=256, eos=eos)
    drafts = [drafter(ToyEngine(V, seed=seed, predictable=predictable), eos=eos)]
    assert generate(target, PROMPTS, decode, drafts, Tree(budget=budget, shape=shape), capacity=256, eos=eos) == plain


def test_rows_of_a_batch_equal_single_runs() -> None:
    target, decode = ToyEngine(V, predictable=0.9), sampled()
    together, _ = generate(target, PROMPTS, decode, [drafter(ToyEngine(V, seed=0, predictable=1.0))], capacity=256)
    alone = [
        generate(target, [prompt], decode, [drafter(ToyEngine(V, seed=0, predictable=1.0))], capacity=256, ids=[i])[0][0]
        for i, prompt in enumerate(PROMPTS)
    ]
    assert together == alone


def test_nothing_is_drafted_behind_the_end() -> None:
    plain, _ = generate(ToyEngine(V), [[1, 2, 3]], Decode(max_new_tokens=12))
    end = plain[0][9]
    drafts = drafter(ToyEngine(V), eos=(end,))
    draft = Draft(plain[0][6])
    drafts.propose(Context(0, plain[0][:7], 8, 8), draft)
    assert draft.tokens[1:] == plain[0][7 : plain[0].index(end, 7) + 1]
    stats, before = Stats(), drafts.passes
    text, finish = generate(ToyEngine(V), [[1, 2, 3]], Decode(max_new_tokens=12), [drafts], eos=(end,), stats=stats)
    assert stats.purposes["draft"] == drafts.passes - before > 0
    assert text[0] == plain[0][: plain[0].index(end) + 1]
    assert finish == ["eos"]


def test_one_drafter_serves_one_request_after_another() -> None:
    drafts, controller = drafter(ToyEngine(V)), Controller(Tree(budget=4))
    for prompt in (*PROMPTS, PROMPTS[0]):
        plain, _ = generate(ToyEngine(V), [prompt], capacity=256)
        stats = Stats()
        assert generate(ToyEngine(V), [prompt], None, [drafts], controller=controller, stats=stats, capacity=256)[0] == plain
        assert stats.accepted_by == stats.drafted_by


# ---- the draft model's cache ----


@pytest.mark.parametrize("accepted", range(6))
def test_catching_up_after_any_number_of_accepted_guesses(accepted: int) -> None:
    engine = ToyEngine(V)
    source, tokens = ModelSource(Loaded(engine, 64)), [1, 2, 3, 4]
    source.begin(tokens)
    draft, row = Draft(4), 0
    for guess in (5, 6, 7, 8, 9):
        row = draft.add(row, guess, ("test",), 1.0)
        source.expand(draft, [row])
    text = [*tokens, 5, 6, 7, 8, 9][: 4 + accepted] + [20]
    engine.passes.clear()
    found = source.begin(text)
    assert np.array_equal(found, engine.logits(list(enumerate(text))))
    assert engine.passes == [([4 + accepted], 1, False)]  # what was accepted is not fed again
    assert source.held == text


def test_text_is_fed_in_chunks_and_only_once() -> None:
    engine = ToyEngine(V)
    source, tokens = ModelSource(Loaded(engine, 1024), longest=400), [i % V for i in range(300)]
    assert np.array_equal(source.begin(tokens), engine.logits(list(enumerate(tokens))))
    assert [rows for _, rows, _ in engine.passes] == [128, 128, 44]
    source.begin(tokens[:200])  # another request with the same beginning
    assert engine.passes[-1] == ([199], 1, False)


def test_a_text_that_outgrows_the_cache_moves_to_a_larger_one() -> None:
    engine = ToyEngine(V)
    source = ModelSource(Loaded(engine, 1024))
    for length in (10, 300, 301, 900):
        tokens = [i % V for i in range(length)]
        assert np.array_equal(source.begin(tokens), engine.logits(list(enumerate(tokens))))


@pytest.mark.parametrize("trees", [True, False])
def test_rows_of_a_tree(trees: bool) -> None:
    engine = ToyEngine(V, trees=trees)
    source, tokens = ModelSource(Loaded(engine, 64)), [1, 2, 3]
    source.begin(tokens)
    draft = Draft(3)
    stem = draft.add(0, 4, ("test",), 1.0)
    a, b = draft.add(stem, 5, ("test",), 1.0), draft.add(stem, 6, ("test",), 1.0)
    c, other = draft.add(b, 7, ("test",), 1.0), draft.add(0, 9, ("test",), 1.0)
    for rows in ([stem], [a, b], [c, a, stem], [other, c], [c], [c, c]):
        engine.passes.clear()
        found = source.expand(draft, rows)
        for row, logits in zip(rows, found, strict=True):
            path: list[int] = []
            while row:
                path, row = [draft.tokens[row], *path], draft.parents[row]
            assert np.array_equal(logits, engine.logits(list(enumerate(tokens + path))))
        assert not trees or len(engine.passes) <= 2
    assert np.array_equal(source.begin([*tokens, 9]), engine.logits(list(enumerate([*tokens, 9]))))


def test_a_full_draft_cache_ends_drafting_and_nothing_else() -> None:
    plain, _ = generate(ToyEngine(V), [PROMPTS[0]])
    stats = Stats()
    text, _ = generate(ToyEngine(V), [PROMPTS[0]], None, [drafter(ToyEngine(V), capacity=16)], stats=stats)
    assert text == plain
    assert 0 < stats.accepted_by["draft_model"] < 16


# ---- how much is drafted ----


def test_drafting_stops_where_the_path_is_improbable() -> None:
    lengths = []
    for min_p in (0.0, 0.01, 0.3, 1.0):
        draft = Draft(3)
        drafter(ToyEngine(V), min_p=min_p).propose(Context(0, [1, 2, 3], 8, 8), draft)
        lengths.append(len(draft) - 1)
        assert all(reach >= min_p for reach in draft.reach()[:-1])
    assert lengths[0] == 8 > lengths[1] > 0
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] == 1


def test_a_draft_model_as_slow_as_the_target_is_not_asked() -> None:
    def cost(ms: float) -> CostTable:
        return CostTable(rows=(1, 16), past=(0,), measured=(((ms, ms + 1.5),),))

    host = Host(ToyEngine(V), cost=cost(10.0), min_rows=1)
    assert Economy(host, "auto", 10.0).floor(50) > 1.0
    assert Economy(host, "auto", 1.0).floor(50) == pytest.approx(0.11)  # a pass of 1 ms and 0.1 ms for one more row, of 10 ms
    assert Economy(host, 0.25, 1.0).floor(50) == 0.25
    assert 0.0 < Economy(Host(ToyEngine(V)), "auto", None).floor(50) < 0.2
    engine, draft = ToyEngine(V), Draft(3)
    ModelDrafter(host, Loaded(engine, 64, cost=cost(10.0))).propose(Context(0, [1, 2, 3], 8, 8), draft)
    assert len(draft) == 1 and not engine.passes
    slow = Economy(host, "auto", 1.0)
    for _ in range(200):
        slow.observe(30.0)  # another machine than the one that measured
    assert slow.floor(50) > 1.0


def test_drafting_rests_while_it_loses() -> None:
    """A draft model that is never right is asked ever more rarely; one that is right, always."""
    cost = CostTable(rows=(1, 16), past=(0,), measured=(((10.0, 11.5),),))
    for seed, low, high in ((1, 0, 40), (0, 190, 200)):
        drafts, asked = ModelDrafter(Host(ToyEngine(V), cost=cost), Loaded(ToyEngine(V, seed=seed), 512, cost=cost)), 0
        drafts._economy.observe = lambda ms: None  # type: ignore[method-assign]
        drafts._economy.ms, text, target = 1.0, [1, 2], ToyEngine(V)
        for _ in range(200):
            draft = Draft(text[-1])
            drafts.propose(Context(0, text, 1, 1), draft)
            asked += len(draft) > 1
            text.append(int(target.logits(list(enumerate(text))).argmax()))
        assert low <= asked <= high


def test_a_pause_of_speculation_costs_no_passes() -> None:
    engine, draft = ToyEngine(V), Draft(3)
    drafter(engine).propose(Context(0, [1, 2, 3], 8, 8, paused=True), draft)
    assert len(draft) == 1 and not engine.passes


def test_the_time_of_drafting_counts_against_it() -> None:
    """Drafts that are all accepted, but cost more than the passes they save: the controller pauses."""
    controller = Controller(Tree(), lambda rows, past: 1.0 + 0.01 * rows)
    for _ in range(4):
        controller.observe(1, 10, 1, 1.0, 1.01)
    for _ in range(60):
        controller.observe(4, 10, 1, 4.0, 1.04, draft_ms=4.0)
    assert controller.paused
    assert not Controller(Tree(budget=3)).paused


def test_probability() -> None:
    logits = np.array([1.0, 2000.0, -np.inf, 1999.0], dtype=np.float32)
    assert probability(logits, 1) == pytest.approx(1 / (1 + np.exp(-1)))
    assert probability(logits, 2) == probability(logits, 0) == 0.0


# ---- vocabularies ----


def bare(words: dict[str, int], decoder: Any = None) -> Text:
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    if decoder is not None:
        tokenizer.decoder = decoder
    return Text(tokenizer)


def test_equal_vocabularies_are_the_same_ids() -> None:
    words = {"a": 0, "b": 1, "c": 2}
    assert vocabulary(bare(words), bare(words), 3, 3) is None
    assert vocabulary(Text(), Text(), 5, 5) is None
    wider = vocabulary(bare(words), bare(words), 4, 3)  # a head that was padded
    assert wider is not None
    assert wider.feed([2, 0, 3]) == [2, 0, 0]
    assert wider.logits(np.array([[1, 2, 3]], dtype=np.float32)).tolist() == [[1, 2, 3, -np.inf]]


def test_tokens_are_matched_by_their_bytes() -> None:
    ours = bare({"a": 0, "\u0120a": 1, "b": 2, "\u00c3": 3, "ab": 4}, ByteLevel())
    theirs = bare({"b": 0, "\u2581a": 1, "<0xC3>": 2, "a": 3, "zz": 4}, MetaspaceDecoder())
    words = vocabulary(ours, theirs, 5, 5)
    assert words is not None
    assert words.ids.tolist() == [3, 1, 0, 2, -1]
    assert words.feed([0, 4, 1]) == [3, 3, 0, 1]  # the draft model spells "ab" in its own way
    assert words.logits(np.arange(5, dtype=np.float32)[None]).tolist() == [[3, 1, 0, 2, -np.inf]]


@pytest.mark.parametrize(
    ("ours", "theirs", "sizes"),
    [
        (bare({"a": 0, "b": 1, "c": 2}), bare({"x": 0, "y": 1, "c": 2}), (3, 3)),
        (Text(), Text(), (5, 6)),
        (bare({"a": 0}), Text(), (1, 1)),
    ],
)
def test_other_vocabularies_are_refused(ours: Text, theirs: Text, sizes: tuple[int, int]) -> None:
    with pytest.raises(PlanError) as caught:
        vocabulary(ours, theirs, *sizes)
    assert caught.value.code == "draft-mismatch"
    assert caught.value.fix


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), shared=st.integers(3, V), temperature=st.sampled_from([0.0, 1.0]))
def test_a_draft_model_of_another_vocabulary(seed: int, shared: int, temperature: float) -> None:
    """Ids permuted, some missing on either side: the text is the plain one."""
    rng = np.random.default_rng(seed)
    ids = np.full(V, -1, dtype=np.int64)
    ids[rng.choice(V, shared, replace=False)] = rng.choice(V + 7, shared, replace=False)
    drafts = [drafter(ToyEngine(V + 7, predictable=1.0), vocabulary=Vocabulary(ids, {}))]
    decode = sampled(temperature)
    assert generate(ToyEngine(V), PROMPTS, decode, drafts, capacity=256) == generate(ToyEngine(V), PROMPTS, decode, capacity=256)


# ---- the plan ----


@pytest.mark.parametrize("options", [{}, {"artifact": "a", "plan": "b"}, {"model": "m"}, {"artifact": "a", "model": "m"}, {"min_p": 0.5}])
def test_a_plan_names_one_draft_model(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        Speculative.model_validate({"drafter": [{"draft_model": options}]})
    assert caught.value.errors()[0]["ctx"]["error"].code == "plan-bad-value"


def test_options_of_the_part() -> None:
    part = DraftModel(artifact="draft", min_p=0.2)
    assert Speculative.model_validate({"drafter": part}).model_dump(mode="json")["drafter"] == [
        {"draft_model": {"artifact": "draft", "min_p": 0.2}}
    ]


# ---- a fuzzy form on the same cache (papers/14) ----


class Fuzzy(ToyEngine):
    """What it writes into the cache is marked, and changes what any form says behind it."""

    def forward(self, cache: Any, step: Step, **options: Any) -> Outputs:
        outputs = super().forward(cache, step, **options)
        start = int(cache.lengths[0])
        for slot in range(start, start + step.tokens.shape[1]):
            position, token = cache.slots[0][slot]
            cache.slots[0][slot] = (position, token + MARK)
        return outputs


MARK = 1000


def rounds(
    calibrate: bool, decode: Decode, budget: int = 4, fuzzy: ToyEngine | None = None
) -> tuple[list[int], ToyEngine, Fuzzy, ToyCache]:
    """The text of a prompt, both forms of the draft model, and its cache; the target's logits are the exact form's."""
    exact, approximate = ToyEngine(V, predictable=0.9), fuzzy or Fuzzy(V, predictable=0.9)
    model = Loaded(exact, 512, fuzzy=approximate)
    drafts = ModelDrafter(Host(ToyEngine(V)), model, 0.0, calibrate=calibrate)
    [text], _ = generate(ToyEngine(V, predictable=0.9), [PROMPTS[0]], decode, [drafts], Tree(budget=budget))
    return text, exact, approximate, drafts._sources[0]._cache  # type: ignore[return-value]


@pytest.mark.parametrize("calibrate", [True, False])
@pytest.mark.parametrize("decode", [Decode(max_new_tokens=24), sampled()])
def test_a_fuzzy_form_changes_no_token(calibrate: bool, decode: Decode) -> None:
    plain, _ = generate(ToyEngine(V, predictable=0.9), [PROMPTS[0]], decode)
    assert rounds(calibrate, decode)[0] == plain[0]
    assert rounds(calibrate, decode, fuzzy=Fuzzy(V, seed=7))[0] == plain[0]


def test_calibration_is_one_exact_pass_per_round() -> None:
    text, exact, fuzzy, cache = rounds(True, Decode(max_new_tokens=24))
    lengths = [lengths[0] for lengths, _, _ in exact.passes]
    rows = [rows for _, rows, _ in exact.passes]
    assert lengths == [0, *(a + b for a, b in zip(lengths, rows, strict=False))][:-1]  # behind what was exact; nothing is written twice
    assert rows[0] == len(PROMPTS[0]) + 1  # the prompt, and the token that the target took after it
    assert {rows for _, rows, _ in fuzzy.passes} == {1}
    certain = lengths[-1] + rows[-1]
    assert cache.slots[0][:certain] == list(enumerate(text[:certain]))
    assert len(fuzzy.passes) <= 3 * len(exact.passes)  # of four guesses a round the exact pass makes the first


def test_without_calibration_the_prompt_alone_is_exact() -> None:
    text, exact, _, cache = rounds(False, Decode(max_new_tokens=24))
    assert [rows for _, rows, _ in exact.passes] == [len(PROMPTS[0]) + 1]
    known = int(cache.lengths[0])
    start = len(PROMPTS[0]) + 1
    assert known > start + 8
    assert cache.slots[0][:start] == list(enumerate(text[:start]))
    assert all(token >= MARK for _, token in cache.slots[0][start:known])


def test_another_text_is_read_exactly() -> None:
    source = ModelSource(Loaded(ToyEngine(V), 512, fuzzy=Fuzzy(V)), calibrate=False)
    wanted = ModelSource(Loaded(ToyEngine(V), 512))
    draft = Draft(3)
    source.begin([1, 2, 3])
    source.expand(draft, [draft.add(0, 5, ("x",), 0.5)])
    assert not np.array_equal(source.begin([1, 2, 3, 5, 6]), wanted.begin([1, 2, 3, 5, 6]))  # goes on, fuzzily
    assert np.array_equal(source.begin([1, 9, 3, 5]), wanted.begin([1, 9, 3, 5]))
    assert source.exact == len(source.held) == 4
