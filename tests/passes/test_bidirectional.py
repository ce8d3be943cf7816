"""The pass bidirectional."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import applied, before_and_after, close, eager, make, one_layer, pooled, raised, token_ids

from planc.backends.reference import probe
from planc.compiler.masked_models import bidirectional
from planc.passes.bidirectional import Bidirectional
from planc.runtime.errors import CompileError


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden(before_and_after(Bidirectional(), one_layer()), "bidirectional.txt")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_equals_eager(family: str) -> None:
    ids = token_ids(2, 9)
    module = bidirectional(make(family))
    close(probe(applied(Bidirectional(), raised(family)), ids)["logits"], eager(module, ids))


def test_refuses_a_sliding_window() -> None:
    with pytest.raises(CompileError, match="sliding window") as refused:
        Bidirectional().apply(raised("mistral"), None)  # type: ignore[arg-type]
    assert refused.value.code == "pass-refused"


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(["llama", "qwen3", "gpt2", "gpt_neox", "variant 1"]), st.integers(0, 99))
def test_property(name: str, seed: int) -> None:
    """The last token shows in the first row, which it could not before."""
    _, program = pooled(name)
    ids = token_ids(1, 6, seed=seed)
    other = ids.clone()
    other[0, -1] = (other[0, -1] - 3 + 1) % 90 + 3
    after = applied(Bidirectional(), program)
    assert not (probe(after, ids)["logits"][0, 0] == probe(after, other)["logits"][0, 0]).all()
    assert (probe(program, ids)["logits"][0, 0] == probe(program, other)["logits"][0, 0]).all()
