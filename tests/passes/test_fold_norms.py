"""The pass fold_norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import FAMILIES, POOL, applied, before_and_after, close, eager, info, make, model, one_layer, pooled, raised, token_ids

from planc.backends.reference import probe
from planc.compiler.dialect import OPS
from planc.compiler.passbase import Context
from planc.compiler.program import Program
from planc.compiler.raising import raise_program
from planc.compiler.residual import find_states
from planc.compiler.trace import trace
from planc.passes.fold_norms import FoldNorms
from planc.runtime.errors import CompileError

IDS = token_ids(2, 9)
SANDWICHED = ("gemma2", "gemma3")  # norms behind the sublayers


def scales(program: Program) -> list[torch.Tensor]:
    """Of all norms over the hidden state."""
    return [program.params[str(norm.node.args[1].target)] for s in find_states(program) for norm in s.norms]  # type: ignore[union-attr]


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden(before_and_after(FoldNorms(), one_layer()), "fold_norms.txt")


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in SANDWICHED])
def test_equals_eager(family: str) -> None:
    new = applied(FoldNorms(), raised(family))
    close(probe(new, IDS)["logits"], eager(model(family), IDS), 1e-5)
    assert not any(n.target is torch.ops.aten.layer_norm.default for n in new.main.nodes)
    assert all(bool((scale == 1).all()) for scale in scales(new))


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox"])
def test_nothing_is_left_for_layer_norm_to_subtract(family: str) -> None:
    """Every value of the hidden state has mean zero."""
    program = FoldNorms().apply(raised(family), Context())
    edit = program.edit("test")
    edit.outputs(**{f"state{i}": edit[state.node] for i, state in enumerate(find_states(program))})
    seen = probe(edit.done(1, 1), IDS)
    values = [value for name, value in seen.items() if name.startswith("state")]
    assert len(values) > 2
    assert all(float(v.mean(-1).abs().max()) < 1e-5 for v in values)


def test_a_head_that_is_the_embedding_keeps_its_scale() -> None:
    module = make("llama", tie_word_embeddings=True)
    new = applied(FoldNorms(), raise_program(trace(module, info("llama"))))
    close(probe(new, IDS)["logits"], eager(module, IDS), 1e-5)
    ones = [bool((scale == 1).all()) for scale in scales(new)]
    assert ones == [True] * (len(ones) - 1) + [False]
    assert sum(name.startswith(("lm_head", "model.embed_tokens")) for name in new.params) == 1


@pytest.mark.parametrize("family", SANDWICHED)
def test_refuses_norms_behind_sublayers(family: str) -> None:
    with pytest.raises(CompileError) as caught:
        FoldNorms().apply(raised(family), Context())
    assert caught.value.code == "residual-form" and "post_attention_layernorm" in (caught.value.node or "")


def changed(change: Callable[[Any, Any], None]) -> Program:
    """A Llama of one layer whose graph was changed at its last sum."""
    program = one_layer()
    edit = program.edit("test")
    total = edit[find_states(program)[-1].node]
    change(edit, total)
    return edit.done(1, 1)


def test_refuses_who_reads_the_hidden_state_itself() -> None:
    def output(edit: Any, total: Any) -> None:
        edit.outputs(hidden=total)

    def activation(edit: Any, total: Any) -> None:
        with edit.after(total):
            edit.outputs(other=edit.call(torch.ops.aten.relu.default, total))

    for change in (output, activation):
        with pytest.raises(CompileError) as caught:
            FoldNorms().apply(changed(change), Context())
        assert caught.value.code == "residual-form" and "without a norm" in caught.value.message


def test_refuses_norms_that_others_read() -> None:
    def read(edit: Any, total: Any) -> None:
        norm = next(u for u in total.users if u.target is OPS.rms_norm.default)
        edit.outputs(normed=norm)

    with pytest.raises(CompileError) as caught:
        FoldNorms().apply(changed(read), Context())
    assert caught.value.code == "residual-form" and "no dense product" in caught.value.message


def test_refuses_post_norms() -> None:
    """OPT with the norm behind the sum: it is the hidden state of the next sublayer."""
    options = {
        "vocab_size": 97,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 24,
        "word_embed_proj_dim": 16,
    }
    config = transformers.OPTConfig(**options, do_layer_norm_before=False, max_position_embeddings=64)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(CompileError) as caught:
        FoldNorms().apply(raise_program(trace(module, info("opt"))), Context())
    assert caught.value.code == "residual-form"


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([name for name in POOL if name not in SANDWICHED]), st.integers(0, 99))
def test_property(name: str, seed: int) -> None:
    """Whatever the weights of the norms: nothing changes, and a second run finds nothing to do."""
    program, random = pooled(name)[1], torch.Generator().manual_seed(seed)
    params = {n: torch.randn(v.shape, generator=random) if "norm" in n or ".ln_" in n else v for n, v in program.params.items()}
    program = program.replace(params=params)
    new, ids = FoldNorms().apply(program, Context()), token_ids(1, 5, seed=seed)
    close(probe(new, ids)["logits"], probe(program, ids)["logits"], 2e-5)
    assert FoldNorms().apply(new, Context()) is new
