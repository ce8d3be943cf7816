"""The pass tap."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import POOL, applied, apply, before_and_after, close, eager, layers_of, model, one_layer, pooled, raised, token_ids
from torch import Tensor, nn

from planc.backends.reference import probe
from planc.compiler.plan import Plan
from planc.passes.skip_layers import SkipLayers
from planc.passes.tap import Tap
from planc.runtime.errors import CompileError, PlanError


def hidden(module: nn.Module, ids: Tensor) -> list[Tensor]:
    """What leaves each layer of the model itself."""
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers_of(module)
    ]
    try:
        eager(module, ids)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden(before_and_after(Tap(layers=(0,)), one_layer()), "tap.txt")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_equals_eager(family: str) -> None:
    ids = token_ids(2, 11)
    out = probe(applied(Tap(layers=(1, 0)), raised(family)), ids)
    assert list(out) == ["logits", "tap.1", "tap.0"]
    for i, want in enumerate(hidden(model(family), ids)):
        close(out[f"tap.{i}"], want)


def test_refuses() -> None:
    with pytest.raises(CompileError) as caught:
        apply(raised("llama"), Tap(layers=(0, 2)))
    assert caught.value.code == "skip-out-of-range"
    assert "layer 2" in caught.value.message
    with pytest.raises(CompileError) as caught:  # a layer that an earlier pass has removed
        apply(raised("gemma3"), SkipLayers(layers=(3,)), Tap(layers=(3,)))
    assert caught.value.code == "skip-out-of-range"
    with pytest.raises(PlanError) as refused:
        Plan.from_dict({"passes": [{"tap": {"layers": []}}]})
    assert refused.value.code == "plan-bad-value"


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(POOL), st.data())
def test_property(name: str, data: st.DataObject) -> None:
    module, program = pooled(name)
    layers = tuple(data.draw(st.lists(st.integers(0, len(layers_of(module)) - 1), unique=True, min_size=1)))
    ids = token_ids(1, data.draw(st.integers(1, 9)))
    new = applied(Tap(layers=layers), program)
    assert len(new.main.nodes) == len(program.main.nodes)  # nothing is computed that was not
    out, want = probe(new, ids), hidden(module, ids)
    assert torch.equal(out["logits"], probe(program, ids)["logits"])
    for i in layers:
        close(out[f"tap.{i}"], want[i])
