"""Models that fill masked slots, from the front door to the answer: checkpoints, forms, artifacts, refusals."""

from __future__ import annotations

import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1]))

from masked_tiny import END, MASK, VOCAB, bert, dream, home, llada
from models_tiny import close, model
from typer.testing import CliRunner

import planc
from planc.compiler.cli import app
from planc.runtime.errors import CompileError, InputError, ModelError, PlanError
from planc.runtime.filler import Filled, Filler
from planc.runtime.masked.engine import Query

FIELD = 16
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [3], [20, 21], [22, 23, 24], [25], [26, 27, 28, 29]]
PLAN: dict[str, Any] = {
    "decode": {"max_new_tokens": FIELD, "masked": {"window": {"blocks": {"size": 8}}, "cache": "elastic", "fusion": "credit"}}
}

MASKED: dict[str, Any] = {"decode": {"max_new_tokens": FIELD, "masked": {}}}


@cache
def filler(kind: str, backend: str = "onnx") -> Filler:
    """Everything that the loop can ask for, so that a test may choose its plan with `with_plan`."""
    source = bert() if kind == "bert" else home(kind)
    exe = planc.compile(source, {**PLAN, "target": {"backend": backend}})
    assert isinstance(exe, Filler)
    return exe.with_plan(cache="uncached", fusion=None)


@cache
def eager(kind: str) -> nn.Module:
    if kind == "bert":
        return bert()
    folder = home(kind).with_suffix(".copy")
    return {"llada": llada, "dream": dream}[kind](folder)


def by_hand(kind: str, prompt: list[int], per_pass: int = 1, block: int = 8) -> list[int]:
    """The surest slots of the leftmost block, again and again, with the model itself."""
    ids = torch.tensor([[*prompt, *[MASK] * FIELD]])
    while bool((ids == MASK).any()):
        with torch.no_grad():
            logits = eager(kind)(input_ids=ids).logits[0]
        logits[:, MASK] = -torch.inf
        if kind == "dream":  # the output of a slot is about the next one
            logits = torch.cat([logits[:1], logits[:-1]])
        sure, tokens = torch.softmax(logits, -1).max(-1)
        left = torch.nonzero(ids[0] == MASK)[:, 0]
        start = len(prompt) + (int(left[0]) - len(prompt)) // block * block
        left = left[left < start + block]
        chosen = left[sure[left].topk(min(per_pass, len(left))).indices]
        ids[0, chosen] = tokens[chosen]
    return ids[0].tolist()  # type: ignore[no-any-return]


def answers(exe: Filler, prompts: list[list[int]] = PROMPTS, **options: Any) -> list[Filled]:
    made = exe.generate(prompts, **options)
    assert isinstance(made, list)
    return made


@pytest.mark.parametrize(("kind", "backend"), [("llada", "onnx"), ("dream", "onnx"), ("bert", "onnx"), ("dream", "reference")])
def test_one_slot_a_pass_is_what_the_model_says(kind: str, backend: str) -> None:
    for prompt in PROMPTS[:2]:
        [made] = answers(filler(kind, backend), [prompt])
        assert made.canvas == by_hand(kind, prompt)
        assert made.stats.passes == FIELD
        assert made.stats.token_layers == FIELD * (len(prompt) + FIELD) * filler(kind).engine.spec.layers


@pytest.mark.parametrize("kind", ["llada", "dream", "bert"])
@pytest.mark.parametrize("options", [{}, {"cache": "dual", "select": {"threshold": {"tau": 0.3}}}, {"cache": "prefix", "fusion": "credit"}])
def test_a_batch_of_eight_is_eight_single_runs(kind: str, options: dict[str, Any]) -> None:
    exe = filler(kind).with_plan(**options)
    for one, prompt in zip(answers(exe), PROMPTS, strict=True):
        [alone] = answers(exe, [prompt])
        assert one.canvas == alone.canvas
        assert [commit.slots for commit in one.trace] == [commit.slots for commit in alone.trace]


@pytest.mark.parametrize("kind", ["llada", "dream", "bert"])
def test_caches_that_leave_nothing_out_are_none(kind: str) -> None:
    """Layers that are refreshed in every pass, from the first on."""
    exe, prompts = filler(kind), PROMPTS[:3]
    whole = answers(exe.with_plan(window="whole"), prompts)
    other = answers(exe.with_plan(cache={"elastic": {"gamma": 2.0}}, window={"sliding": {"width": 99}}), prompts)
    assert [a.canvas for a in other] == [a.canvas for a in whole]
    assert other[0].stats.token_layers > whole[0].stats.token_layers
    assert sum(a.stats.kv_bytes for a in whole) == 0


@pytest.mark.parametrize("kind", ["llada", "bert"])
def test_elastic_without_refreshes_drifts_but_fills(kind: str) -> None:
    made = answers(filler(kind).with_plan(cache={"elastic": {"gamma": -2.0}}, window={"sliding": {"width": 4}}), PROMPTS[:2])
    for answer in made:
        assert set(answer.stats.modes) == {"fill", "elastic"}
        assert MASK not in answer.canvas
        assert answer.stats.token_layers < FIELD * len(answer.canvas) * filler(kind).engine.spec.layers / 2


def test_blocks_see_what_lies_before_them_only() -> None:
    """A block-causal cache is exact: it gives what queries of everything give with the same segments."""
    exe = filler("llada").with_plan(cache={"block_causal": {"size": 8}})
    [made] = answers(exe, [PROMPTS[0]])
    tokens = np.array([made.canvas])
    segments = np.where(np.arange(19) < 3, 0, 1 + (np.arange(19) - 3) // 8)[None]
    before = tokens.copy()
    before[0, 11:] = MASK
    engine = exe.engine
    whole = engine.forward(engine.new_cache(1, 19), Query(np.array([0]), before, np.arange(19)[None], segments, cached=False))
    early = engine.forward(
        engine.new_cache(1, 11), Query(np.array([0]), before[:, :11], np.arange(11)[None], segments[:, :11], cached=False)
    )
    close(whole.total[:, :11], early.total)
    assert MASK not in made.canvas
    assert made.stats.token_layers < FIELD * 19 * 2


@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_sampling_is_a_function_of_seed_and_place(kind: str) -> None:
    exe = filler(kind).with_plan(select={"top_k": {"tokens": 4}})
    first, again, other = (answers(exe, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert [a.canvas for a in first] == [a.canvas for a in again] != [a.canvas for a in other]
    assert all(MASK not in a.canvas for a in first)


def test_an_artifact_runs_and_can_be_copied(tmp_path: Path) -> None:
    exe = planc.compile(
        home("llada"), {"decode": {"max_new_tokens": FIELD, "masked": {"window": {"blocks": {"size": 8}}}}}, out=tmp_path / "made"
    )
    assert isinstance(exe, Filler)
    copy = planc.load(exe.save(tmp_path / "copy"))
    assert isinstance(copy, Filler)
    assert [a.canvas for a in answers(copy)] == [a.canvas for a in answers(exe)]
    assert copy.report()["exactness"] == "bitwise"
    with pytest.raises(InputError, match="that the artifact was not given"):
        copy.with_plan(fusion="credit")
    text = exe.generate("w5 w6 w7")
    assert isinstance(text, Filled)
    assert text.canvas == by_hand("llada", [5, 6, 7])
    assert "[MASK]" not in text.text


def test_quantised_weights_go_through_every_form() -> None:
    plan = {**MASKED, "passes": [{"quantize_weights": {"format": "int8"}}]}
    exe, reference = (planc.compile(home("llada"), {**plan, "target": {"backend": backend}}) for backend in ("onnx", "reference"))
    assert isinstance(exe, Filler) and isinstance(reference, Filler)
    assert MASK not in answers(exe, PROMPTS[:1])[0].canvas
    slots = np.arange(19)[None]
    query = Query(np.array([0]), np.array([[5, 6, 7, *[MASK] * FIELD]]), slots, np.zeros((1, 19), np.int64))
    tops = [e.engine.forward(e.engine.new_cache(1, 19), query).top for e in (exe, reference)]
    close(tops[0], tops[1], 1e-4)


# ---- refusals ----------------------------------------------------------------------------------------------------------------------


def test_a_causal_model_is_refused() -> None:
    with pytest.raises(PlanError, match="no mask token") as caught:
        planc.compile(model("llama"), MASKED)
    assert "bidirectional" in str(caught.value.fix)
    named = {"decode": {"masked": {"mask_token": 90}}}
    with pytest.raises(CompileError, match="cannot look at what stands to the right"):
        planc.compile(model("llama"), named)
    exe = planc.compile(model("llama"), {**named, "passes": ["bidirectional"]})  # as the messages say
    assert isinstance(exe, Filler)
    assert MASK not in answers(exe, [[5, 6]], max_new_tokens=4)[0].canvas


def test_a_mask_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="is not in the vocabulary of 97"):
        planc.compile(home("llada"), {"decode": {"masked": {"mask_token": VOCAB}}})
    llada(tmp_path / "wrong", mask_token_id=VOCAB + 5)
    with pytest.raises(PlanError, match="mask token 102 is not in the vocabulary"):
        planc.compile(tmp_path / "wrong", MASKED)


def test_a_masked_model_does_not_write_from_left_to_right() -> None:
    with pytest.raises(CompileError, match="causal"):
        planc.compile(home("llada"), {})


@pytest.mark.parametrize("changes", [{"n_layers": 3}, {"block_type": "sequential"}, {"d_model": 31}])
def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    llada(tmp_path / "wrong", **changes)
    with pytest.raises(ModelError) as caught:
        planc.compile(tmp_path / "wrong", MASKED)
    assert caught.value.code == "model-load"


@pytest.mark.parametrize(
    ("prompt", "options", "code"),
    [
        ([5] * 120, {}, "prompt-too-long"),
        ([VOCAB], {}, "input-invalid"),
        ([5], {"max_new_tokens": 12}, "plan-conflict"),
    ],
)
def test_calls_that_cannot_be_filled(prompt: list[int], options: dict[str, Any], code: str) -> None:
    with pytest.raises((InputError, PlanError)) as caught:
        filler("llada").generate(prompt, **options)
    assert caught.value.code == code


def test_forced_words_and_their_refusal() -> None:
    exe = filler("llada").with_plan(forced=[{"offset": 3, "token": "w40"}, {"offset": 4, "token": 41}])
    [made] = answers(exe, [[5, 6]])
    assert made.canvas[5:7] == [40, 41]
    with pytest.raises(InputError, match="is not one token"):
        filler("llada").with_plan(forced=[{"offset": 3, "token": "w40 w41"}]).generate([5, 6])


def test_sampling_needs_logits_that_layers_do_not_give() -> None:
    with pytest.raises(InputError, match="no logits to sample from"):
        filler("llada").with_plan(cache="elastic", window={"sliding": {"width": 4}}).generate([5], temperature=1.0)


def test_run_shows_the_canvas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal, and as a picture and a film."""
    from PIL import Image

    monkeypatch.setenv("PLANC_CACHE", str(tmp_path / "cache"))
    plan = tmp_path / "plan.yaml"
    plan.write_text("planc: 1\ndecode: {max_new_tokens: 16, masked: {window: {blocks: {size: 8}}, select: {threshold: {tau: 0.2}}}}\n")
    shutil.copytree(home("llada"), tmp_path / "model")
    pictures = ["--png", str(tmp_path / "a.png"), "--gif", str(tmp_path / "a.gif")]
    done = CliRunner().invoke(app, ["run", str(plan), "w5 w6", "--model", str(tmp_path / "model"), "--trace", "--json", *pictures])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    shown = [line for line in lines if line.strip()[:2].strip().isdigit() and "·" in line]
    assert shown[0].count("·") > shown[-1].count("·")
    assert "slot a pass (16 passes" in done.output
    import json

    result = json.loads(lines[-1])
    assert sum(len(commit["slots"]) for commit in result["trace"]) == 16
    with Image.open(tmp_path / "a.png") as png, Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == result["passes"]  # type: ignore[attr-defined]
        assert png.size == gif.size
    assert END not in result["ids"][:-1]


# ---- two models --------------------------------------------------------------------------------------------------------------------


def test_two_models_take_turns(tmp_path: Path) -> None:
    """With equal weights in both roles nothing changes, wherever they switch; the second model reads first what the first has decided."""
    other = tmp_path / "other"
    llada(other, seed=5)
    shared = {"window": {"blocks": {"size": 4}}, "cache": {"block_causal": {"size": 4}}, "select": {"top_k": {"tokens": 2}}}

    def plan(second: Path) -> Filler:
        masked = {**shared, "models": {"switch": {"at": 2}}, "second_model": str(second)}
        decode = {"max_new_tokens": FIELD, "sampling": {"temperature": 1.0}, "masked": masked}
        exe = planc.compile(home("llada"), {"decode": decode, "target": {"backend": "reference"}})
        assert isinstance(exe, Filler)
        return exe

    twin, pair = plan(home("llada")), plan(other)
    want = [a.canvas for a in answers(twin.with_plan(models={"switch": {"at": 99}}))]
    for at in range(5):
        assert [a.canvas for a in answers(twin.with_plan(models={"switch": {"at": at}}))] == want
    assert [a.canvas for a in answers(pair.with_plan(models={"switch": {"at": 4}}))] == want
    mixed = answers(pair)
    for made, first in zip(mixed, want, strict=True):
        start = made.prompt_tokens
        assert made.canvas[: start + 8] == first[: start + 8]
    assert [a.canvas for a in mixed] != want
    assert mixed[0].stats.passes == FIELD // 2


def test_a_switch_needs_two_models_of_one_vocabulary(tmp_path: Path) -> None:
    masked = {"models": {"switch": {"at": 2}}}
    with pytest.raises(PlanError, match="chooses between two"):
        planc.compile(home("llada"), {"decode": {"masked": masked}})
    with pytest.raises(InputError, match="a second model"):
        filler("llada").with_plan(**masked, second_model="other")
    llada(tmp_path / "other", mask_token_id=MASK - 1)
    with pytest.raises(PlanError, match="second model has 97 tokens and the mask 89"):
        planc.compile(home("llada"), {"decode": {"masked": {**masked, "second_model": str(tmp_path / "other")}}})
