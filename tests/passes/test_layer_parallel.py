"""The pass layer_parallel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import applied, apply, before_and_after, close, decoding, eager, info, layers_of, make, raised, token_ids
from torch import Tensor, nn

from planc.backends.reference import probe
from planc.compiler.blocks import ATTENTIONS
from planc.compiler.program import Program
from planc.compiler.raising import raise_program
from planc.compiler.trace import trace
from planc.passes.fuse_projections import FuseProjections
from planc.passes.layer_parallel import LayerParallel
from planc.runtime.errors import CompileError

LAYERS = 5
SERIAL = ("llama", "qwen2", "qwen3", "gemma3", "phi3", "gpt2", "opt")  # families with neighbours to group
JOINED = ("llama", "qwen2", "phi3", "gpt2")  # nothing but a product between norm and attention


@cache
def deep(family: str) -> tuple[nn.Module, Program]:
    """A model of five layers, and its program in the dialect."""
    if family == "gemma3":  # the last of its layers sees everything, the others a window
        options = {"layer_types": ["sliding_attention"] * (LAYERS - 1) + ["full_attention"], "num_hidden_layers": LAYERS}
    else:
        options = {"n_layer" if family == "gpt2" else "num_hidden_layers": LAYERS}
    module = make(family, **options)
    return module, raise_program(trace(module, info(family)))


def fuzzy(module: nn.Module, groups: Sequence[Sequence[int]], ids: Tensor) -> Tensor:
    """Eager logits with the norms in front of a group's attentions fed with what the first of them reads."""
    hooks, seen = [], dict[int, Tensor]()
    for number, group in enumerate(groups):
        for place, index in enumerate(group):
            layer = layers_of(module)[index]
            norm = next(getattr(layer, name) for name in ("input_layernorm", "ln_1", "self_attn_layer_norm") if hasattr(layer, name))

            def feed(_: nn.Module, args: tuple[Tensor], number: int = number, place: int = place) -> tuple[Tensor]:
                if place == 0:
                    seen[number] = args[0]
                return (seen[number],)

            hooks.append(norm.register_forward_pre_hook(feed))
    try:
        return eager(module, ids)
    finally:
        for hook in hooks:
            hook.remove()


def chain(program: Program) -> int:
    """Attentions on the longest way through the graph."""
    depth: dict[object, int] = {}
    for node in program.main.nodes:
        depth[node] = max((depth[a] for a in node.all_input_nodes), default=0) + (node.target in ATTENTIONS)
    return max(depth.values())


@pytest.mark.parametrize("fused", [False, True])
def test_golden(fused: bool, golden: Callable[[str, str], None]) -> None:
    part = LayerParallel(n=2, first=0, last=0, fused=fused)
    golden(before_and_after(part, raised("llama")), "layer_parallel_fused.txt" if fused else "layer_parallel.txt")


@pytest.mark.parametrize("family", SERIAL)
def test_equals_eager(family: str) -> None:
    module, program = deep(family)
    ids = token_ids(2, 19)
    want = fuzzy(module, [(1, 2, 3)], ids)
    assert not torch.allclose(want, eager(module, ids), atol=1e-2)
    new = applied(LayerParallel(n=3), program)
    assert new.history[-1].notes == ("1..3",) and new.params.keys() == program.params.keys()
    assert (chain(program), chain(new)) == (LAYERS, LAYERS - 2)
    close(probe(new, ids)["logits"], want)
    if family in JOINED:
        joined = applied(LayerParallel(n=3, fused=True), program)
        assert sum(n.target in ATTENTIONS for n in joined.main.nodes) == LAYERS - 2
        close(probe(joined, ids)["logits"], want, 1e-5)
    else:
        with pytest.raises(CompileError) as caught:
            apply(program, LayerParallel(n=3, fused=True))
        assert caught.value.code == "pass-refused" and "remove `fused`" in (caught.value.fix or "")


def test_one_layer_per_group_is_the_model() -> None:
    assert apply(raised("llama"), LayerParallel(n=1)) is raised("llama")


def test_groups_end_where_attention_changes() -> None:
    _, program = deep("gemma3")
    for last, notes in ((0, ("0..3",)), (1, ("0..3",)), (2, ("0..2",)), (3, ("0..1",))):
        assert apply(program, LayerParallel(first=0, last=last)).history[-1].notes == notes
    new = decoding(apply(program, LayerParallel(n=5, first=0, last=0)))
    assert [s.window for s in new.states] == [8, 8, 8, 8, 0]


def test_joined_attentions_have_one_state_and_one_product() -> None:
    program = decoding(apply(deep("llama")[1], LayerParallel(n=3, fused=True), FuseProjections()))
    assert [s.heads for s in program.states] == [2, 6, 2]  # the heads of the layers in order
    products = [n for n in program.main.nodes if n.target is torch.ops.aten.linear.default]
    assert len(products) == LAYERS * 3 + 3 + 1  # o, gate and up, down; q, k and v of three attentions; the head


def test_refuses() -> None:
    llama, gemma = deep("llama")[1], deep("gemma3")[1]
    for program, part, code, text in (
        (raised("gpt_neox"), LayerParallel(), "pass-refused", "parallel as they are"),
        (raised("gemma2"), LayerParallel(first=0, last=0), "pass-refused", "attend alike"),
        (raised("llama"), LayerParallel(), "pass-refused", "0 layers between"),
        (llama, LayerParallel(last=7), "pass-refused", "0 layers between"),
        (gemma, LayerParallel(groups=((3, 4),)), "pass-refused", "layer 4 does not attend like layer 3"),
        (llama, LayerParallel(groups=((1, 3),)), "pass-refused", "neighbouring"),
        (llama, LayerParallel(groups=((2,),)), "pass-refused", "two or more"),
        (llama, LayerParallel(groups=((1, 2), (2, 3))), "pass-refused", "two groups"),
        (llama, LayerParallel(groups=((4, 5),)), "skip-out-of-range", "layer 5"),
    ):
        with pytest.raises(CompileError) as caught:
            apply(program, part)
        assert (caught.value.code, text in caught.value.message) == (code, True), caught.value.message


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(JOINED), st.data())
def test_property(family: str, data: st.DataObject) -> None:
    """Any cut of the layers into groups, joined or not."""
    module, program = deep(family)
    cuts = sorted(data.draw(st.sets(st.integers(0, LAYERS), min_size=2)))
    groups = tuple(tuple(range(a, b)) for a, b in zip(cuts, cuts[1:], strict=False) if b - a > 1)
    ids = token_ids(data.draw(st.integers(1, 2)), data.draw(st.integers(1, 13)), seed=data.draw(st.integers(0, 99)))
    if not groups:
        return
    new = applied(LayerParallel(groups=groups, fused=data.draw(st.booleans())), program)
    assert chain(new) == LAYERS - sum(len(group) - 1 for group in groups)
    close(probe(new, ids)["logits"], fuzzy(module, groups, ids), 1e-5)
