"""The pass proposals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import VOCAB, applied, before_and_after, close, eager, model, one_layer, pooled, raised, token_ids

from planc.backends.onnx.lower import lower_forms
from planc.backends.onnx.masked import OnnxRunner
from planc.backends.reference import run
from planc.compiler.program import Program
from planc.passes.proposals import Proposals
from planc.runtime.errors import CompileError
from planc.runtime.masked.engine import reply_of

MASK = 5


def with_mask(program: Program) -> Program:
    return program.replace(info=replace(program.info, mask_id=MASK))


def outputs(program: Program, ids: torch.Tensor, tracked: torch.Tensor) -> dict[str, torch.Tensor]:
    return run(program, {"input_ids": ids, "position_ids": torch.arange(ids.shape[1]).repeat(len(ids), 1), "tracked": tracked})


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden(before_and_after(Proposals(tracked=2), with_mask(one_layer())), "proposals.txt")


def test_equals_eager(tmp_path: Path) -> None:
    """What is computed in the graph, by both backends, is what the logits say on the host."""
    ids, tracked = token_ids(2, 9), torch.randint(0, VOCAB, (2, 9, 3))
    program = applied(Proposals(tracked=3), with_mask(raised("llama")))
    logits = eager(model("llama"), ids).numpy().copy()
    logits[..., MASK] = -1e30
    want = reply_of(logits, tracked.numpy())
    lower_forms({"form": program}, tmp_path, positions=64)
    feeds = {"input_ids": ids.numpy(), "position_ids": np.arange(9)[None].repeat(2, 0), "tracked": tracked.numpy()}
    names = ["best", "top", "second", "total", "mean", "tracked_logits"]
    lowered = OnnxRunner(tmp_path, 1).run("form", feeds, {}, names)
    for have in (outputs(program, ids, tracked), lowered):
        for name, field in zip(names, ("best", "top", "second", "total", "mean", "tracked"), strict=True):
            close(have[name], getattr(want, field), 1e-5)


def test_refuses_a_model_without_a_mask_token() -> None:
    with pytest.raises(CompileError, match="no mask token") as refused:
        Proposals().apply(raised("llama"), None)  # type: ignore[arg-type]
    assert refused.value.code == "pass-refused"


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(["llama", "gpt2", "gemma2", "variant 0"]), st.integers(1, 2), st.integers(1, 7), st.integers(0, 99))
def test_property(name: str, batch: int, rows: int, seed: int) -> None:
    """The mask token is never the best, and probabilities are those of the others."""
    ids = token_ids(batch, rows, seed=seed)
    out = outputs(applied(Proposals(), with_mask(pooled(name)[1])), ids, torch.zeros(batch, rows, 0))
    assert bool((out["best"] != MASK).all())
    p = torch.softmax(out["logits"], -1)
    close(torch.exp(out["top"] - out["total"]), p.amax(-1), 1e-5)
    close(out["mean"] - out["total"], torch.special.entr(p).sum(-1).neg(), 1e-4)
