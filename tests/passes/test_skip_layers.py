"""The pass skip_layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import POOL, applied, apply, before_and_after, close, decoding, eager, layers_of, model, pooled, raised, token_ids
from torch import Tensor, nn

from planc.backends.reference import probe
from planc.compiler.blocks import find_blocks
from planc.compiler.plan import Plan
from planc.compiler.units import find_units
from planc.passes.skip_layers import SkipLayers
from planc.passes.tap import Tap
from planc.runtime.errors import CompileError, PlanError


def without(module: nn.Module, layers: Iterable[int], ids: Tensor) -> Tensor:
    """Eager logits with some layers turned into the identity."""
    hooks = [
        layers_of(module)[i].register_forward_hook(
            lambda _, args, kwargs, out: (args[0], *out[1:]) if isinstance(out, tuple) else args[0], with_kwargs=True
        )
        for i in layers
    ]
    try:
        return eager(module, ids)
    finally:
        for hook in hooks:
            hook.remove()


def without_sublayers(module: nn.Module, sublayers: Iterable[tuple[int, str]], ids: Tensor) -> Tensor:
    """Eager logits with the outputs of some attentions and MLPs set to zero."""
    names = {"attention": ("self_attn", "attn", "attention"), "mlp": ("mlp",)}
    hooks = []
    for i, kind in sublayers:
        layer = layers_of(module)[i]
        part = next(getattr(layer, name) for name in names[kind] if hasattr(layer, name))
        hooks.append(
            part.register_forward_hook(
                lambda _, args, out: (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)
            )
        )
    try:
        return eager(module, ids)
    finally:
        for hook in hooks:
            hook.remove()


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden(before_and_after(SkipLayers(layers=(0,)), raised("llama")), "skip_layers.txt")


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt", "phi3"])
def test_equals_eager(family: str) -> None:
    module, ids = model(family), token_ids(2, 19)
    last = len(layers_of(module)) - 1
    choices = [(0,), (last,)] + ([(1, 2), (0, 3, 5)] if last > 2 else [])
    for layers in choices:
        want = without(module, layers, ids)
        assert not torch.allclose(want, eager(module, ids), atol=1e-2)  # the layer does something
        close(probe(applied(SkipLayers(layers=layers), raised(family)), ids)["logits"], want)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox"])  # gpt_neox: attention and MLP in parallel
def test_sublayers_equal_eager(family: str) -> None:
    module, ids = model(family), token_ids(2, 19)
    for attention, mlp in (((0,), ()), ((), (1,)), ((1,), (0, 1)), ((1,), (1,))):
        want = without_sublayers(module, [*((i, "attention") for i in attention), *((i, "mlp") for i in mlp)], ids)
        new = applied(SkipLayers(attention=attention, mlp=mlp), raised(family))
        close(probe(new, ids)["logits"], want)
        close(probe(decoding(new), ids)["logits"], want)
        assert len(decoding(new).states) == len(layers_of(module)) - len(attention)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "gemma3"])
def test_a_layer_without_attention_is_still_a_layer(family: str) -> None:
    """Its number stays, its MLP can go as well, and a tap finds what it hands on."""
    program = applied(SkipLayers(attention=(1,)), raised(family))
    before, after = (find_blocks(p) for p in (raised(family), program))
    assert [b.index for b in after] == [b.index for b in before]
    assert [(u.layer, u.kind) for u in find_units(program) if u.layer == 1] == [(1, "mlp")]
    tapped, ids = apply(program, Tap(layers=(0, 1))), token_ids(1, 7)
    out = probe(tapped, ids)
    assert not torch.equal(out["tap.0"], out["tap.1"])
    both = apply(program, SkipLayers(mlp=(1,)))
    close(probe(both, ids)["logits"], probe(apply(raised(family), SkipLayers(layers=(1,))), ids)["logits"])


def test_sublayers_beside_whole_layers() -> None:
    ids, program = token_ids(1, 9), raised("gemma3")
    both = applied(SkipLayers(layers=(1, 3), attention=(2, 3), mlp=(0, 2)), program)
    apart = apply(program, SkipLayers(layers=(3, 1)), SkipLayers(attention=(2,)), SkipLayers(mlp=(0,)))
    assert not any(".layers.2." in name and "self_attn" in name for name in both.params)
    close(
        probe(apply(apart, SkipLayers(mlp=())), ids)["logits"],
        probe(apply(program, SkipLayers(layers=(1, 3), attention=(2,), mlp=(0,))), ids)["logits"],
    )


def test_skipped_layers_leave_nothing_behind() -> None:
    program = decoding(apply(raised("gemma3"), SkipLayers(layers=(1, 4))))
    assert [b.index for b in find_blocks(program)] == [0, 2, 3, 5]  # the numbers stay those of the model
    assert [s.window for s in program.states] == [8, 8, 8, 0]
    assert not any(f".layers.{i}." in name for i in (1, 4) for name in program.params)


def test_skipping_in_two_steps_is_skipping_at_once() -> None:
    ids, program = token_ids(1, 9), raised("gemma3")
    twice = apply(program, SkipLayers(layers=(1,)), SkipLayers(layers=(2, 5)))
    assert torch.equal(probe(twice, ids)["logits"], probe(apply(program, SkipLayers(layers=(1, 2, 5))), ids)["logits"])


def test_keeping_is_skipping_the_others() -> None:
    ids, program = token_ids(1, 9), raised("gemma3")
    kept = applied(SkipLayers(keep=(5, 0)), program)
    assert torch.equal(probe(kept, ids)["logits"], probe(apply(program, SkipLayers(layers=(1, 2, 3, 4))), ids)["logits"])
    assert apply(program, SkipLayers(keep=tuple(range(6)))) is program
    with pytest.raises(CompileError) as caught:
        apply(program, SkipLayers(keep=(0, 6)))
    assert caught.value.code == "skip-out-of-range"
    for options in ({"layers": [0], "keep": [1]}, {"keep": []}):
        with pytest.raises(PlanError) as refused:
            Plan.from_dict({"passes": [{"skip_layers": options}]})
        assert refused.value.code == "plan-bad-value"


def test_refuses() -> None:
    program = raised("llama")
    for layers, text in (
        ((2,), "layer 2 does not exist (the model has 2 decoder layers, 0..1)"),
        ((0, -1, 7), "layer -1, 7 does not exist"),
    ):
        with pytest.raises(CompileError) as caught:
            apply(program, SkipLayers(layers=layers))
        assert caught.value.code == "skip-out-of-range"
        assert text in caught.value.message
        assert "0..1" in (caught.value.fix or "")
    with pytest.raises(CompileError) as caught:
        apply(program, SkipLayers(layers=(1, 0, 1)))
    assert caught.value.code == "pass-refused"
    with pytest.raises(CompileError, match="all attentions are skipped"):
        apply(program, SkipLayers(layers=(0,), attention=(1,)))
    with pytest.raises(CompileError, match="layer 5 does not exist"):
        apply(program, SkipLayers(mlp=(5,)))
    assert apply(program, SkipLayers(layers=())) is program


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(POOL), st.data())
def test_property(name: str, data: st.DataObject) -> None:
    module, program = pooled(name)
    count = len(layers_of(module))
    layers = tuple(data.draw(st.lists(st.integers(0, count - 1), unique=True, max_size=count - 1)))
    ids = token_ids(data.draw(st.integers(1, 2)), data.draw(st.integers(1, 13)), seed=data.draw(st.integers(0, 99)))
    new = applied(SkipLayers(layers=layers), program)
    assert len(find_blocks(new)) == count - len(layers)
    close(probe(new, ids)["logits"], without(module, layers, ids))
