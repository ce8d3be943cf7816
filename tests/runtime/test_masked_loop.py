"""The loop of masked models: identity switches, traps, and what it guarantees whatever the policies say (papers/A2 sections 2, 6 and 10)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from toy_masked import END, MASK, PROMPT, VOCAB, ToyEngine, course, fill

from planc.runtime.decode import Decode
from planc.runtime.engine import Floats
from planc.runtime.errors import InputError, PlanError
from planc.runtime.loops.masked import Filling
from planc.runtime.masked import Canvas, Credit, GumbelTopK, LearnedFilter, Oracle, SelectHook, WindowHook
from planc.runtime.masked.canvas import Mask, Slots
from planc.runtime.masked.engine import Reply, reply_of

BLOCKS = {"blocks": {"size": 8}}
ONE = {"window": BLOCKS, "select": {"top_k": {"tokens": 1}}}
THRESHOLD = {"window": BLOCKS, "select": {"threshold": {"tau": 0.6}}}


def zero_filter(folder: Path, size: int = 8, offset: float = 0.0) -> str:
    """A filter whose output is sigmoid(offset) for every slot."""
    shapes = {"first.weight": (size, size), "first.bias": (size,), "second.weight": (size, size), "second.bias": (size,)}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    tensors["second.bias"] += offset
    save_file(tensors, folder / "filter.safetensors")
    return "filter.safetensors"


@pytest.mark.parametrize(
    ("neutral", "plain"),
    [
        ({"select": {"threshold": {"tau": 1.1}}}, {}),
        ({"select": {"factor": {"factor": 0.0}}}, {}),
        ({"select": {"schedule": {"steps": 16}}}, {}),
        ({"select": {"local_relaxed": {"tau": 0.6, "tau_relaxed": 0.6}}}, {"select": {"threshold": {"tau": 0.6}}}),
        ({"select": {"local_relaxed": {"tau": 0.6, "tau_relaxed": 0.3, "radius": 0}}}, {"select": {"threshold": {"tau": 0.6}}}),
        ({"select": {"local_relaxed": {"tau": 1.1, "tau_relaxed": 0.2}}}, {}),
        ({"select": {"threshold": {"tau": 0.6}}, "fusion": {"credit": {"alpha": 0.0}}}, {"select": {"threshold": {"tau": 0.6}}}),
        ({"stop": {"gap_all_in": {"thresholds": [np.inf], "knots": []}}}, {}),
        (
            {"stop": {"stable_window": {"passes": 2, "epsilon": 0.0, "offset": 15}}, "select": {"top_k": {"tokens": 16}}},
            {"select": {"top_k": {"tokens": 16}}},
        ),
        ({"revise": {"remdm": {"rounds": 0}}}, {}),
        ({"window": {"sliding": {"width": 99}}}, {"window": "whole"}),
        ({"window": {"blocks": {"size": 16}}}, {"window": "whole"}),
    ],
)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_neutral_policy_is_none(neutral: dict[str, Any], plain: dict[str, Any], seed: int) -> None:
    [changed], [wanted] = (fill(ToyEngine(seed), {**ONE, **options}) for options in (neutral, plain))
    assert course(changed) == course(wanted)
    assert changed.cost == wanted.cost


def test_a_filter_that_never_fires_commits_the_surest(tmp_path: Path) -> None:
    part = LearnedFilter(file=zero_filter(tmp_path, offset=50.0), theta=1.0).bind(tmp_path)
    [changed], [wanted] = fill(ToyEngine(1), {**ONE, "select": part}), fill(ToyEngine(1), ONE)
    assert course(changed) == course(wanted)
    eager = LearnedFilter(file="filter.safetensors", theta=0.5).bind(tmp_path)
    assert fill(ToyEngine(1), {**ONE, "select": eager})[0].cost.passes == 2  # one for each block


def test_a_gap_that_is_always_enough_fills_at_once() -> None:
    engine = ToyEngine(4)
    [canvas] = fill(engine, {"stop": {"gap_all_in": {"thresholds": [-1.0], "knots": []}}, **ONE})
    one_shot = engine.forward(engine.new_cache(1, 20), _all(Canvas([*PROMPT, 0], 16, MASK)))
    assert canvas.cost.passes == 1
    assert canvas.tokens[4:].tolist() == one_shot.best[0, 4:].tolist()
    assert canvas.trace[0].reason == "all_in"


def _all(canvas: Canvas) -> Any:
    from planc.runtime.masked.engine import Query

    slots = len(canvas.tokens)
    return Query(np.array([0]), canvas.tokens[None], np.arange(slots)[None], canvas.visible[None], cached=False)


def test_an_early_stop_asks_again_for_what_its_pass_left_out() -> None:
    """With a cache the pass holds a block only: proposals of later blocks are old, and are not written as they are."""
    engine = ToyEngine(4)
    stop = {"gap_all_in": {"thresholds": [1e9, -1.0], "knots": [0.1], "length": 2}}
    [canvas] = fill(engine, {**ONE, "cache": "dual", "stop": stop})
    assert canvas.cost.modes["all_in"] == 1
    assert set(engine.queries[-1].slots[0].tolist()) >= set(canvas.trace[-1].slots)


@pytest.mark.parametrize(
    "options", [ONE, THRESHOLD, {**THRESHOLD, "fusion": "credit", "end": "truncate"}, {**THRESHOLD, "cache": "dual", "revise": "remdm"}]
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_is_its_rows_alone(options: dict[str, Any], temperature: float) -> None:
    """Also with prompts of other lengths beside them: noise, credit and caches belong to a row."""
    prompts = [[*PROMPT, 1], [2], [5, 5, 5, 5, 5, 5, 1], [*PROMPT, 2], [9, 8], [1, 2, 3], [4] * 5, [7]]
    together = fill(ToyEngine(5), options, prompts=prompts, temperature=temperature)
    for key, prompt in enumerate(prompts):
        decode = Decode.model_validate({"masked": options, "sampling": {"temperature": temperature}})
        alone = Canvas(prompt, 16, MASK, ends=(END,), key=key)
        assert decode.masked is not None
        list(Filling(ToyEngine(5), [alone], decode.masked, decode.sampling))  # type: ignore[arg-type]
        assert course(alone) == course(together[key])
        assert alone.cost == together[key].cost


def test_finished_rows_leave_the_batch() -> None:
    engine = ToyEngine(5)
    canvases = fill(engine, {**THRESHOLD, "end": "truncate"}, rows=6)
    passes = {canvas.cost.passes for canvas in canvases}
    assert len(passes) > 1, "the rows should take different numbers of passes"
    assert sum(len(query.rows) for query in engine.queries) == sum(canvas.cost.passes for canvas in canvases)


@pytest.mark.parametrize("seed", range(5))
def test_the_oracle_reproduces_its_reference(seed: int) -> None:
    """Also where a model never proposes some of it."""
    [reference] = fill(ToyEngine(seed), ONE)
    wanted = tuple(int(t) for t in reference.tokens[4:])
    for engine in (ToyEngine(seed), ToyEngine(seed + 1)):
        [canvas] = fill(engine, {**ONE, "select": Oracle(reference=wanted)})
        assert tuple(canvas.tokens[4:]) == wanted
        assert canvas.cost.passes <= 16
    assert fill(ToyEngine(seed), {**ONE, "select": Oracle(reference=wanted)})[0].cost.passes < 16


# ---- traps -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [ONE, THRESHOLD, {"select": "all"}, {**ONE, "score": "random"}])
def test_the_mask_token_is_never_written(options: dict[str, Any]) -> None:
    [canvas] = fill(ToyEngine(7, loves_masks=True), options, temperature=1.0)
    assert MASK not in canvas.tokens
    assert canvas.done


class Greedy(SelectHook):
    """Chooses everything, and more than it was asked about."""

    kind: ClassVar[str] = "test_selection"

    def select(self, canvas: Canvas, slots: Slots, confidence: Floats) -> Mask:
        return np.ones(len(slots) + 1, dtype=bool)


def test_a_policy_cannot_write_what_it_was_not_asked_about() -> None:
    with pytest.raises(IndexError):
        _run_with(select=Greedy())
    canvas = Canvas(PROMPT, 4, MASK)
    for slot in (0, 1):  # the prompt is locked, and not masked
        with pytest.raises(AssertionError, match="unlocked"):
            canvas.write(np.array([slot]), "chosen")
    with pytest.raises(AssertionError, match="mask token"):
        canvas.write(np.array([4]), "chosen")  # no proposal was made for it
    with pytest.raises(AssertionError, match="locked"):
        canvas.remask(np.array([0]))


def test_forced_tokens_stay() -> None:
    canvas = Canvas(PROMPT, 16, MASK, forced={3: 5, 12: 6})
    decode = Decode.model_validate({"masked": {**THRESHOLD, "revise": {"remdm": {"rounds": 3, "tokens": 4}}}})
    assert decode.masked is not None
    list(Filling(ToyEngine(8), [canvas], decode.masked, decode.sampling))  # type: ignore[arg-type]
    assert (canvas.tokens[[6, 15]] == [5, 6]).all()
    assert not {6, 15} & {slot for commit in canvas.trace if commit.reason != "forced" for slot in commit.slots}


def test_later_blocks_do_not_take_part() -> None:
    """Their confidences are no candidates, whatever they are: the first block is finished before the second is touched."""
    for options in (ONE, THRESHOLD, {**ONE, "select": {"factor": {"factor": 3.0}}}):
        [canvas] = fill(ToyEngine(9), options)
        assert canvas.commit_step[4:12].max() < canvas.commit_step[12:].min()


def test_truncation_inside_a_block_leaves_the_filter_its_inputs(tmp_path: Path) -> None:
    """What was cut off counts as sure, and is not written."""
    part = LearnedFilter(file=zero_filter(tmp_path, offset=-50.0), theta=0.9).bind(tmp_path)
    seen: list[int] = []
    for seed in range(20):
        [canvas] = fill(ToyEngine(seed), {**ONE, "select": part, "end": {"truncate": {"mode": "predicted", "confidence": 0.3}}})
        assert canvas.done
        assert not canvas.masked.any()
        seen.append(canvas.length - 4)
    assert any(length % 8 for length in seen), "no canvas was cut inside a block"


def test_the_early_stop_does_not_look_at_padding() -> None:
    """Proposals of end tokens have enormous gaps; a region of them alone never stops anything."""
    engine = ToyEngine(1)
    engine.own[:, END] += 100.0
    stop = {"gap_all_in": {"thresholds": [5.0], "knots": []}}
    assert fill(engine, {**ONE, "stop": stop})[0].cost.passes == 16


def test_nothing_is_kept_between_requests() -> None:
    """The same plan object runs another prompt and then the first again."""
    decode = Decode.model_validate({"masked": {**THRESHOLD, "fusion": "credit", "cache": "dual", "revise": "remdm"}})
    assert decode.masked is not None
    engine, courses = ToyEngine(3), []
    for prompt in ([1, 2], [3, 3, 3], [1, 2]):
        canvas = Canvas(prompt, 16, MASK, ends=(END,))
        list(Filling(engine, [canvas], decode.masked, decode.sampling))  # type: ignore[arg-type]
        courses.append(course(canvas))
    assert courses[0] == courses[2] != courses[1]


def test_tokens_behind_the_end_do_not_count() -> None:
    canvas = Canvas([1], 6, MASK, ends=(END,))
    canvas.tokens[1:] = [4, 5, END, 7, END, END]
    assert canvas.ids == [4, 5, END]


class Nothing(SelectHook):
    """Chooses nothing."""

    kind: ClassVar[str] = "test_selection"

    def select(self, canvas: Canvas, slots: Slots, confidence: Floats) -> Mask:
        return np.zeros(len(slots), dtype=bool)


class Closed(WindowHook):
    """Opens nothing."""

    kind: ClassVar[str] = "test_window"

    def place(self, canvas: Canvas) -> tuple[int, int, Mask]:
        return 0, 1, np.zeros(len(canvas.tokens), dtype=bool)


def _run_with(**hooks: Any) -> Canvas:
    decode = Decode.model_validate({"masked": ONE})
    assert decode.masked is not None
    canvas = Canvas(PROMPT, 16, MASK)
    list(Filling(ToyEngine(1), [canvas], decode.masked.model_copy(update=hooks), decode.sampling))  # type: ignore[arg-type]
    return canvas


def test_a_selection_of_nothing_still_makes_progress() -> None:
    canvas = _run_with(select=Nothing())
    assert [commit.reason for commit in canvas.trace] == ["progress"] * 16


def test_a_window_of_nothing_is_an_error() -> None:
    with pytest.raises(InputError, match="no masked slot") as caught:
        _run_with(window=Closed())
    assert caught.value.code == "decode-stuck"


@pytest.mark.parametrize(
    ("masked", "message"),
    [
        ({"window": {"blocks": {"size": 5}}}, "do not divide"),
        ({"window": BLOCKS, "select": {"schedule": {"steps": 3}}}, "do not divide"),
        ({"window": BLOCKS, "select": {"schedule": {"steps": 1}}}, "do not divide"),
        ({"stop": {"gap_all_in": {"offset": 16}}}, "offset 16"),
        ({"forced": [{"offset": 3, "token": 1}], "end": "truncate"}, "cut the canvas"),
    ],
)
def test_what_cannot_be_filled_is_refused_with_the_plan(masked: dict[str, Any], message: str) -> None:
    from planc.compiler.plan import Plan

    with pytest.raises(PlanError, match=message) as caught:
        Plan.from_dict({"decode": {"max_new_tokens": 16, "masked": masked}})
    assert caught.value.code == "plan-conflict"


@pytest.mark.parametrize("other", [{"speculative": {"drafter": ["prompt_lookup"]}}, {"batching": {}}])
def test_one_loop_at_a_time(other: dict[str, Any]) -> None:
    from planc.compiler.plan import Plan

    with pytest.raises(PlanError, match="from left to right"):
        Plan.from_dict({"decode": {"masked": {}, **other}})


# ---- rules one by one --------------------------------------------------------------------------------------------------------------


def test_the_factor_rule_leaves_out_the_first_that_fails_even_as_the_last() -> None:
    from planc.runtime.masked import Factor

    confidence = np.array([0.99, 0.95, 0.2], np.float32)  # the third fails with factor 1: 0.2 < 1 - 1/4
    canvas = Canvas([1], 3, MASK)
    assert Factor(factor=1.0).select(canvas, np.arange(1, 4), confidence).tolist() == [True, True, False]
    assert Factor(factor=4.0).select(canvas, np.arange(1, 4), confidence).tolist() == [True, True, True]


def test_run_max_takes_the_best_of_every_run() -> None:
    from planc.runtime.masked import RunMax

    slots, confidence = np.array([1, 2, 3, 6, 7]), np.array([0.65, 0.7, 0.95, 0.5, 0.55], np.float32)
    assert RunMax(low=0.6, tau=0.9).select(Canvas([1], 9, MASK), slots, confidence).tolist() == [False, False, True, False, False]
    assert RunMax(low=0.5, tau=0.9).select(Canvas([1], 9, MASK), slots, confidence).tolist() == [False, False, True, False, True]


def test_schedules_spread_what_is_left_over_first() -> None:
    [canvas] = fill(ToyEngine(2), {"window": BLOCKS, "select": {"schedule": {"steps": 6}}})
    assert [len(commit.slots) for commit in canvas.trace] == [3, 3, 2, 3, 3, 2]


def test_revisions_take_back_and_fill_again_within_their_budget() -> None:
    for revise, select in (({"remdm": {"rounds": 2, "tokens": 2}}, "top_k"), ({"running_confidence": {"tokens": 2}}, "all")):
        [canvas] = fill(ToyEngine(2), {"window": BLOCKS, "select": select, "revise": revise})
        assert canvas.remasked > 0
        assert not canvas.masked.any()
    assert fill(ToyEngine(2), {"window": BLOCKS, "revise": {"remdm": {"rounds": 2, "tokens": 2}}})[0].cost.passes == 16 + 2 * 2 * 2


def test_block_end_fills_what_follows() -> None:
    engine = ToyEngine(3)
    engine.own[6, END] += 100.0
    [canvas] = fill(engine, {**ONE, "end": "block_end"})
    assert canvas.cost.passes == 8
    assert (canvas.tokens[12:] == END).all()


def test_credit_of_a_steady_proposal_passes_when_the_formula_says() -> None:
    """Top-1 probability 0.85, threshold 0.9: after one pass 0.85 counts as 0.898, after two it passes (effective threshold 0.827)."""
    part = Credit(alpha=0.65, beta=0.7, gamma=0.2).start(canvas := Canvas([1], 4, MASK))
    logits = np.full((4, VOCAB), np.log(0.15 / (VOCAB - 1)), np.float32)
    logits[:, 5] = np.log(0.85)
    canvas.start, canvas.stop = 1, 5
    slots, sure = np.arange(1, 5), []
    for _ in range(2):
        tracked = part.track(canvas, slots)
        fused = part.fuse(canvas, slots, reply_of(logits, tracked))
        sure.append(float(np.exp(fused.top - fused.total)[0]))
    assert sure[0] < 0.9 <= sure[1]
    odds = 0.85 / 0.15 * (1 + 0.85**0.2) ** 0.65
    assert sure[0] == pytest.approx(odds / (1 + odds), abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7), st.floats(0.0, 2.0), st.floats(0.0, 0.95))
def test_sparse_credit_is_dense_credit(seed: int, passes: int, alpha: float, beta: float) -> None:
    """While no slot has had more than four likeliest tokens, the credit of all tokens gives the same."""
    rng = np.random.default_rng(seed)
    slots, canvas = np.arange(1, 6), Canvas([1], 5, MASK)
    canvas.start, canvas.stop = 1, 6
    part, dense = Credit(alpha=alpha, beta=beta, gamma=0.3).start(canvas), np.zeros((5, VOCAB))
    base = rng.normal(size=(5, VOCAB)) * 2
    for _ in range(passes):
        logits = (base + rng.normal(size=base.shape)).astype(np.float32)
        plain = reply_of(logits, part.track(canvas, slots))
        fused = part.fuse(canvas, slots, plain)
        dense *= beta
        dense[np.arange(5), plain.best] += np.exp(plain.top - plain.total) ** 0.3
        if part.overflows:
            return
        wanted = reply_of((logits + alpha * np.log1p(dense)).astype(np.float32))
        for name in ("top", "second", "total", "mean"):
            np.testing.assert_allclose(getattr(fused, name), getattr(wanted, name), atol=2e-5, rtol=1e-5)
        assert (fused.best == wanted.best).all()


def test_credit_is_of_masked_slots_and_their_block_only() -> None:
    part = Credit().start(canvas := Canvas([1], 8, MASK))
    canvas.tokens[2] = 4
    canvas.start, canvas.stop = 1, 5
    canvas.window = (np.arange(9) >= 1) & (np.arange(9) < 5)
    slots, logits = np.arange(9), np.random.default_rng(0).normal(size=(9, VOCAB)).astype(np.float32)
    plain = reply_of(logits, part.track(canvas, slots))
    fused = part.fuse(canvas, slots, plain)
    changed = np.flatnonzero(np.abs(fused.total - plain.total) > 1e-6)
    assert changed.tolist() == [1, 3, 4]
    canvas.start, canvas.stop = 5, 9
    canvas.window = np.arange(9) >= 5
    part.fuse(canvas, slots, plain)
    assert (part.credits[1:5] == 0).all(), "credit ends with its block"


def test_replies_on_the_host_are_those_of_the_logits() -> None:
    logits = np.array([[[1.0, 3.0, 2.0, -np.inf]]], np.float32)
    reply: Reply = reply_of(logits, np.array([[[2, 0]]]))
    p = np.exp([1.0, 3.0, 2.0]) / np.exp([1.0, 3.0, 2.0]).sum()
    assert (reply.best[0, 0], reply.top[0, 0], reply.second[0, 0]) == (1, 3.0, 2.0)
    assert np.exp(reply.top - reply.total)[0, 0] == pytest.approx(p[1])
    assert (reply.mean - reply.total)[0, 0] == pytest.approx((p * np.log(p)).sum())
    assert reply.tracked is not None
    assert reply.tracked[0, 0].tolist() == [2.0, 1.0]


# ---- masked images -----------------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(1, 80), st.sampled_from(["cosine", "power"]))
def test_schedules_of_images_fill_every_slot(steps: int, field: int, shape: str) -> None:
    """At least one slot a step, few in the beginning and all in the end."""
    if steps > field:
        return
    counts = GumbelTopK(steps=steps, shape=shape).counts(field)  # type: ignore[arg-type]
    assert len(counts) == steps and sum(counts) == field and min(counts) >= 1


def test_without_local_steps_the_cache_of_groups_is_none() -> None:
    options = {"select": {"gumbel_top_k": {"steps": 6}}}
    [local], [plain] = (fill(ToyEngine(5), {**options, "cache": cache}, temperature=1.0) for cache in ("local", "uncached"))
    assert course(local) == course(plain)
    assert set(local.cost.modes) == {"fill"}


def test_local_steps_run_their_group_alone() -> None:
    """Slices come in the order of the full step's ranking; nothing outside the group is run or written meanwhile."""
    engine = ToyEngine(5)
    [canvas] = fill(engine, {"select": {"gumbel_top_k": {"steps": 8, "full_first": 2, "locals": 2}}, "cache": "local"}, temperature=1.0)
    assert canvas.cost.modes == {"fill": 4, "local": 4}
    counts = GumbelTopK(steps=8).counts(16)
    assert [len(commit.slots) for commit in canvas.trace] == counts
    groups = [canvas.trace[2:5], canvas.trace[5:8]]
    for first, group in zip((2, 5), groups, strict=True):
        slots = {slot for commit in group for slot in commit.slots}
        for query in engine.queries[first + 1 : first + 3]:
            assert set(query.slots[0].tolist()) - {20} == slots | {0, 1, 2, 3}


@pytest.mark.parametrize(
    "masked", [{"window": BLOCKS, "select": {"gumbel_top_k": {"steps": 4}}}, {"select": {"gumbel_top_k": {"steps": 17}}}]
)
def test_image_schedules_that_cannot_finish_are_refused(masked: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="do not fill"):
        fill(ToyEngine(), masked)
