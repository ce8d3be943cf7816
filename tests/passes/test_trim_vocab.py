"""The pass trim_vocab."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import POOL, VOCAB, applied, apply, before_and_after, close, eager, model, one_layer, pooled, raised, token_ids
from safetensors.torch import save_file

import planc
from planc.backends.reference import probe
from planc.compiler.passbase import Context
from planc.passes.load_weights import VOCABULARY
from planc.passes.quantize_weights import QuantizeWeights
from planc.passes.trim_vocab import NEVER, TrimVocab
from planc.runtime.errors import CompileError, PlanError

EOS = 2  # of the tiny models


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden(before_and_after(TrimVocab(keep=5), one_layer()), "trim_vocab.txt")


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt_neox"])
def test_equals_eager(family: str) -> None:
    """Whatever follows the head (a soft cap, say) is kept for the kept tokens."""
    ids, want = token_ids(2, 9), eager(model(family), token_ids(2, 9))
    have = probe(applied(TrimVocab(keep=30), raised(family)), ids)["logits"]
    close(have[..., :30], want[..., :30])
    assert bool((have[..., 30:] == NEVER).all())


def test_the_head_gets_smaller() -> None:
    program, trimmed = raised("llama"), apply(raised("llama"), TrimVocab(keep=10))
    assert program.bytes() - trimmed.bytes() == (VOCAB - 10) * 32 * 4 - VOCAB * 8  # rows of 32 floats, less the table of places
    assert "lm_head.weight" not in trimmed.params
    assert apply(trimmed, TrimVocab(keep=10)) is trimmed  # a second time changes nothing


def test_a_tied_embedding_stays_whole() -> None:
    program = raised("gemma2")  # head and embedding are one table
    [table] = [str(n.args[0].target) for n in program.main.nodes if n.target is torch.ops.aten.embedding.default]
    trimmed = apply(program, TrimVocab(keep=10))
    assert trimmed.params[table] is program.params[table] and trimmed.params[f"{table}.kept"].shape == (10, 32)


def test_listed_tokens(tmp_path: Path) -> None:
    save_file({VOCABULARY: torch.tensor([90, 7, 7], dtype=torch.int32)}, tmp_path / "v.safetensors")
    program = TrimVocab(file="v.safetensors").apply(raised("llama"), Context(folder=tmp_path))
    logits = probe(program, token_ids(1, 4))["logits"][0, 0]
    assert (logits > NEVER).nonzero()[:, 0].tolist() == [EOS, 7, 90], "the end of the text is never cut"


def test_everything_kept_is_no_change() -> None:
    assert apply(raised("llama"), TrimVocab(keep=VOCAB)) is raised("llama")
    assert apply(raised("llama"), TrimVocab(keep=10 * VOCAB)) is raised("llama")


def test_refuses(tmp_path: Path) -> None:
    for options in ({}, {"keep": 3, "file": "x"}, {"keep": 0}):
        with pytest.raises(PlanError) as wrong:
            planc.Plan.from_dict({"passes": [{"trim_vocab": options}]})
        assert wrong.value.code == "plan-bad-value"
    save_file({VOCABULARY: torch.tensor([VOCAB])}, tmp_path / "v.safetensors")
    save_file({"other": torch.tensor([1])}, tmp_path / "o.safetensors")
    for file, code, text in (
        ("v", "pass-refused", f"token {VOCAB} is outside"),
        ("o", "input-invalid", VOCABULARY),
        ("n", "input-invalid", "n.s"),
    ):
        with pytest.raises(CompileError) as caught:
            TrimVocab(file=f"{file}.safetensors").apply(raised("llama"), Context(folder=tmp_path))
        assert caught.value.code == code and text in caught.value.message
    with pytest.raises(CompileError) as caught:
        apply(apply(raised("llama"), QuantizeWeights()), TrimVocab(keep=9))
    assert caught.value.code == "pass-refused" and "float product" in caught.value.message


def test_as_a_draft(tmp_path: Path) -> None:
    """Files count from the plan's folder, in the draft model's passes too; guesses are of the kept tokens, the text is the plain one."""
    save_file({VOCABULARY: torch.arange(40)}, tmp_path / "v.safetensors")
    (tmp_path / "plan.yaml").write_text(
        "passes: [quantize_weights: {format: int8}]\ntarget: {capacity: 128}\n"
        "decode: {speculative: {drafter: [draft_model: {min_p: 0.0, passes: [trim_vocab: {file: v.safetensors}]}], tree: {budget: 3}}}\n"
    )
    exe = planc.compile(model("llama"), tmp_path / "plan.yaml", out=tmp_path / "made", measure=False)
    for options in ({}, {"temperature": 0.9, "seed": 3}):
        answer, plain = (e.generate([5, 9, 5], max_new_tokens=40, **options) for e in (exe, exe.plain()))
        assert not isinstance(answer, list) and not isinstance(plain, list)
        assert answer.ids == plain.ids
        assert 0 < answer.stats.accepted_by["draft_model"] < answer.stats.drafted_by["draft_model"]


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(POOL), st.integers(1, VOCAB - 1), st.integers(0, 99))
def test_property(name: str, keep: int, seed: int) -> None:
    module, program = pooled(name)
    ids = token_ids(1, 5, seed=seed)
    have, want = probe(applied(TrimVocab(keep=keep), program), ids)["logits"], eager(module, ids)
    kept = sorted({*range(keep), *program.info.eos_ids})
    close(have[..., kept], want[..., kept])
    assert int((have > NEVER).sum()) == 5 * len(kept)
    assert set(have.argmax(-1).flatten().tolist()) <= set(kept)
