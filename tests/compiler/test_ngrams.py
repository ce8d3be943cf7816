"""Counting the table of an n-gram model, and the way from a plan to its file and into an artifact."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import model
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from toy_engine import ToyEngine

import planc
from planc.compiler.heads.texts import Texts, write_texts
from planc.compiler.ngrams import Expected, agreement_of, count, expected, fit_ngrams
from planc.compiler.plan import Plan
from planc.runtime.artifact import read_artifact
from planc.runtime.decode import Decode
from planc.runtime.engine import Step
from planc.runtime.errors import InputError, PlanError
from planc.runtime.executable import Executable
from planc.runtime.text import Text

V = 6


def plan(drafter: Any) -> Plan:
    return Plan.from_dict({"decode": {"speculative": {"drafter": [drafter], "tree": {"budget": 3, "shape": "chain"}}}})


@st.composite
def texts(draw: st.DrawFn) -> list[Expected]:
    made = []
    for length in draw(st.lists(st.integers(2, 9), min_size=1, max_size=4)):
        random = np.random.default_rng(draw(st.integers(0, 99)))
        top = np.stack([random.permutation(V)[:3] for _ in range(length - 1)])
        made.append(Expected(random.integers(0, V, length), top, random.dirichlet(np.ones(4), length - 1)[:, :3].astype(np.float32), 1))
    return made


def values(known: list[Expected], order: int, successors: int) -> dict[tuple[int, ...], dict[int, float]]:
    """The definition, context by context: the mean over its places and one place more that is the value of the next shorter one."""
    found: dict[tuple[int, ...], dict[int, float]] = {}
    for n in range(1, order + 1):
        sums: dict[tuple[int, ...], dict[int, float]] = defaultdict(lambda: defaultdict(float))
        places: dict[tuple[int, ...], int] = defaultdict(int)
        for text in known:
            for at in range(n - 1, len(text.top)):
                context = tuple(text.tokens[at - n + 1 : at + 1].tolist())
                places[context] += 1
                for token, p in zip(text.top[at].tolist(), text.p[at].tolist(), strict=True):
                    sums[context][token] += p
        for context, after in sums.items():
            shorter = found.get(context[1:], {})
            best = sorted(shorter.items(), key=lambda item: (-item[1], item[0]))[:successors]
            tokens = {*after, *(token for token, _ in best)}
            more = 1.0 if n > 1 else 0.0
            found[context] = {t: (after.get(t, 0.0) + more * shorter.get(t, 0.0)) / (places[context] + more) for t in tokens}
    return found


@settings(max_examples=60, deadline=None)
@given(texts(), st.integers(1, 4))
def test_the_table_is_what_its_definition_says(known: list[Expected], order: int) -> None:
    table = count(known, order, V, V)
    for context, after in values(known, order, V).items():
        row, length = table.find(context)
        best = max(after.items(), key=lambda item: (item[1], -item[0]))
        share = int(table.shares[row, table.ids[row].tolist().index(best[0])]) / 255
        if length == len(context):
            assert share == pytest.approx(best[1], abs=0.003) and after[int(table.ids[row, 0])] == pytest.approx(best[1], abs=1e-9)
        else:  # left out, because a shorter one says the same
            assert int(table.ids[row, 0]) == best[0] or after[int(table.ids[row, 0])] == pytest.approx(best[1], abs=1e-9)
            assert abs(share - best[1]) <= 0.1 * (len(context) - length) + 0.003
    assert 0.0 <= agreement_of(table, known) <= 1.0


def test_what_the_target_expects_is_what_its_passes_say() -> None:
    exe = planc.compile(model("llama"), Plan(), measure=False)
    ids = np.random.default_rng(0).integers(0, 97, 200)
    (known,) = expected(exe.engine, Texts((ids,), (5,)))
    cache = exe.engine.new_cache(1, 240)
    logits = exe.engine.forward(cache, Step(ids[None, :-1]), logits=True).logits[0]
    assert (known.top[:, 0] == logits.argmax(1)).mean() > 0.99 and len(known.top) == 199
    shares = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(known.p[:, 0], shares.max(1) / shares.sum(1), rtol=1e-3)


def test_from_a_plan_to_a_file_and_into_the_artifact(tmp_path: Path) -> None:
    part: dict[str, Any] = {"ngram_model": {"file": str(tmp_path / "table.npz"), "order": 3}}
    prompts = [np.random.default_rng(seed).integers(5, 90, 6).tolist() for seed in range(12)]
    made = fit_ngrams(model("llama"), plan(part), prompts, tmp_path / "work", tokens=2500, longest=40)
    assert made.contexts > 50 and made.tokens >= 2500 and made.file.is_file()
    first = made.file.read_bytes()
    again = fit_ngrams(model("llama"), plan(part), prompts, tmp_path / "work", tokens=2500, longest=40)
    assert again == made and made.file.read_bytes() == first, "everything was there already"
    exe = planc.compile(model("llama"), plan(part), out=tmp_path / "artifact", measure=False)
    shutil.move(tmp_path / "artifact", tmp_path / "moved")
    made.file.unlink()
    assert "drafters/0.npz" in read_artifact(tmp_path / "moved").files
    for found in (exe, planc.load(tmp_path / "moved")):
        if found is exe:
            continue  # its files have moved
        answer, plain = (e.generate(prompts[0], max_new_tokens=40) for e in (found, found.plain()))
        assert answer.ids == plain.ids and answer.stats.drafted_by["ngram_model"] > 0


def test_the_model_writes_the_questions_too(tmp_path: Path) -> None:
    letters = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstu")}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=letters, merges=[]))
    template = "{% for m in messages %}q{{ m.content }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    exe = Executable(ToyEngine(21), Text(tokenizer, chat_template=template, eos_ids=[20]), Decode(max_new_tokens=8))
    made = write_texts(exe, None, tmp_path, 400, 30, lambda done, total: None)
    asked = {tuple(ids[:start].tolist()) for ids, start in zip(made.tokens, made.starts, strict=True)}
    assert made.written >= 400 and len(asked) > 10
    assert all(question[0] == letters["q"] and question[-1] == letters["a"] for question in asked)
    again = write_texts(exe, None, tmp_path, 400, 30, lambda done, total: None)
    assert all(np.array_equal(one, other) for one, other in zip(made.tokens, again.tokens, strict=True)), "everything was there already"


def test_one_plan_for_many_models(tmp_path: Path) -> None:
    part = {"ngram_model": {"file": str(tmp_path / "{model}.npz"), "optional": True}}
    notes = list[str]()
    exe = planc.compile(model("llama"), plan(part), measure=False, out=tmp_path / "none")
    assert exe.decode.speculative is None, "the only drafter was left out"
    prompts = [np.random.default_rng(seed).integers(5, 90, 6).tolist() for seed in range(12)]
    made = fit_ngrams(
        model("llama"), plan(part), prompts, tmp_path / "work", tokens=2500, longest=40, progress=lambda w, d, t: notes.append(w)
    )
    assert made.file.name == f"{type(model('llama')).__name__}.npz" and "the target writes" in notes
    exe = planc.compile(model("llama"), plan(part), measure=False, out=tmp_path / "some")
    assert exe.generate(prompts[0], max_new_tokens=20).stats.drafted_by["ngram_model"] > 0


def test_other_drafters_files_lie_in_the_artifact_too(tmp_path: Path) -> None:
    np.save(tmp_path / "warm.npy", np.random.default_rng(0).integers(0, 97, (97, 4)))
    exe = planc.compile(
        model("llama"), plan({"token_recycling": {"k": 4, "warm": str(tmp_path / "warm.npy")}}), out=tmp_path / "artifact", measure=False
    )
    (tmp_path / "warm.npy").unlink()
    loaded = planc.load(tmp_path / "artifact")
    assert loaded.generate([5, 6, 7], max_new_tokens=20).ids == exe.plain().generate([5, 6, 7], max_new_tokens=20).ids  # type: ignore[union-attr]


def test_what_cannot_be_counted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no ngram_model"):
        fit_ngrams(model("llama"), Plan(), [[1, 2]], tmp_path)
    with pytest.raises(PlanError, match="no file to write"):
        fit_ngrams(model("llama"), plan("ngram_model"), [[1, 2]], tmp_path)
    with pytest.raises(InputError, match="no chat template"):
        fit_ngrams(model("llama"), plan({"ngram_model": {"file": str(tmp_path / "t.npz")}}), None, tmp_path / "work", tokens=100)
    with pytest.raises(InputError, match="tokens, and a table needs"):
        fit_ngrams(
            model("llama"), plan({"ngram_model": {"file": str(tmp_path / "t.npz")}}), [[5, 6, 7]], tmp_path / "work", tokens=5, longest=5
        )
    with pytest.raises(PlanError, match=r"cannot read the table none\.npz"):
        planc.compile(model("llama"), plan({"ngram_model": {"file": "none.npz"}}), measure=False)
