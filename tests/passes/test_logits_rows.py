"""The pass logits_rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import POOL, applied, apply, before_and_after, close, eager, model, one_layer, pooled, raised, token_ids
from torch import Tensor

from planc.backends.reference import run
from planc.compiler.program import Program
from planc.passes.argmax import Argmax
from planc.passes.logits_rows import LogitsRows
from planc.passes.quantize_weights import QuantizeWeights
from planc.runtime.errors import CompileError


def outputs(program: Program, ids: Tensor, start: int) -> dict[str, Tensor]:
    positions = torch.arange(ids.shape[1])[None].repeat(ids.shape[0], 1)
    return run(program, {"input_ids": ids, "position_ids": positions, "logits_from": torch.tensor([start])})


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden(before_and_after(LogitsRows(), one_layer()), "logits_rows.txt")


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])  # gemma2: a soft cap behind the product
def test_equals_eager(family: str) -> None:
    ids, program = token_ids(2, 9), applied(LogitsRows(), raised(family))
    want = eager(model(family), ids)
    for start in (0, 3, 8):
        close(outputs(program, ids, start)["logits"], want[:, start:])


def test_quantised_head() -> None:
    ids, program = token_ids(1, 6), apply(raised("llama"), QuantizeWeights(format="int8"))
    whole = outputs(program, ids, 0)["logits"]
    assert torch.equal(outputs(applied(LogitsRows(), program), ids, 4)["logits"], whole[:, 4:])


def test_refuses() -> None:
    edit = raised("llama").edit("test")
    embedding = next(n for n in edit.graph.nodes if n.target is torch.ops.aten.embedding.default)
    edit.outputs(logits=embedding)
    with pytest.raises(CompileError) as caught:
        apply(edit.done(1, 1), LogitsRows())
    assert caught.value.code == "raise-missing"
    assert caught.value.node


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(POOL), st.integers(1, 9), st.data())
def test_property(name: str, rows: int, data: st.DataObject) -> None:
    _, program = pooled(name)
    start, ids = data.draw(st.integers(0, rows - 1)), token_ids(2, rows)
    program = apply(program, Argmax())
    new = applied(LogitsRows(), program)
    whole, cut = outputs(program, ids, 0), outputs(new, ids, start)
    assert cut["argmax"].shape == (2, rows - start)  # what is computed from the logits is cut, too
    close(cut["logits"], whole["logits"][:, start:])
