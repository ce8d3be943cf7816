"""The pass attach_head."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import POOL, VOCAB, applied, apply, before_and_after, close, one_layer, pooled, raised, token_ids
from torch import Tensor

from planc.backends.reference import probe, run
from planc.compiler.blocks import find_blocks
from planc.compiler.passbase import Pass
from planc.compiler.program import Program
from planc.passes.attach_head import AttachHead
from planc.passes.kv_cache import KvCache
from planc.passes.quantize_weights import QuantizeWeights
from planc.passes.skip_layers import SkipLayers
from planc.passes.trim_vocab import TrimVocab
from planc.runtime.drafters.head_source import FEEDBACK
from planc.runtime.errors import CompileError

LINEAR, GATED = AttachHead(), AttachHead(fuse="gated", feedback="own")
HYDRA, MEDUSA = AttachHead(body="mlp", level=2, blocks=2), AttachHead(body="mlp", fuse="none", level=2)


def outputs(program: Program, ids: Tensor, states: Tensor) -> dict[str, Tensor]:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return run(program, {"input_ids": ids, "position_ids": positions, "states": states})


def width(program: Program) -> int:
    return int(program.inputs["states"].meta["val"].shape[-1])


def with_params(program: Program, **values: Tensor) -> Program:
    return program.replace(params={**program.params, **{f"draft_head.{name.replace('_', '.')}": value for name, value in values.items()}})


@pytest.mark.parametrize(("part", "name"), [(LINEAR, "linear"), (GATED, "gated"), (HYDRA, "hydra"), (MEDUSA, "medusa")])
def test_golden(part: Pass, name: str, golden: Callable[[str, str], None]) -> None:
    golden(before_and_after(part, one_layer()), f"attach_head_{name}.txt")


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(POOL), st.integers(1, 9), st.integers(0, 99))
def test_a_fuse_that_reads_the_token_alone_changes_nothing(name: str, rows: int, seed: int) -> None:
    """Whatever the states are: the head is then the model that it was made from (papers/A1 section 12, reductions)."""
    plain = pooled(name)[1]
    for part in (LINEAR, GATED):
        head = applied(part, plain)
        size = width(head)
        head = with_params(head, fuse_weight=torch.cat([torch.eye(size), torch.zeros(size, size)], 1))
        ids, states = token_ids(2, rows, seed=seed), torch.randn(2, rows, size, generator=torch.Generator().manual_seed(seed))
        have = outputs(head, ids, states) if not plain.states else {}
        close(have["logits"], probe(plain, ids)["logits"])


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(POOL), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_an_untrained_mlp_hands_on_the_state(name: str, rows: int, level: int, tokens: bool, seed: int) -> None:
    """Its logits are those of the state it reads; what the next level reads are that state and the tokens so far."""
    part = AttachHead(body="mlp", level=level, blocks=1 + seed % 3, fuse="concat" if tokens else "none")
    head = applied(part, pooled(name)[1])
    read, size = width(head), width(head) // (level if tokens else 1)
    ids, states = token_ids(2, rows, seed=seed), torch.randn(2, rows, read, generator=torch.Generator().manual_seed(seed))
    have = outputs(head, ids, states)
    other = outputs(head, (ids + 1) % VOCAB, states)
    plain = outputs(applied(AttachHead(body="mlp", fuse="none"), pooled(name)[1]), ids, states[..., :size])
    close(have["logits"], plain["logits"])
    assert torch.equal(have[FEEDBACK][..., :read], states) and have[FEEDBACK].shape[-1] == (read + size if tokens else read)
    assert torch.equal(other["logits"], have["logits"]) and (not tokens or not torch.equal(other[FEEDBACK], have[FEEDBACK]))


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_the_state_counts_as_much_as_the_token(scale: float) -> None:
    """However small the embeddings are: another token moves the logits about as much as another state does."""
    plain = raised("llama")
    table = {"model.embed_tokens.weight": plain.params["model.embed_tokens.weight"] * scale}
    head = applied(LINEAR, plain.replace(params={**plain.params, **table}))
    ids, states = token_ids(1, 1), torch.randn(2, 1, 1, width(head), generator=torch.Generator().manual_seed(0))
    logits = [outputs(head, token, state)["logits"] for token, state in ((ids, states[0]), (ids + 1, states[0]), (ids, states[1]))]
    by_token, by_state = ((other - logits[0]).norm() for other in logits[1:])
    assert 0.2 < by_token / by_state < 5.0


def test_gate_and_own_feedback_start_without_effect() -> None:
    linear, gated = applied(LINEAR, raised("llama")), applied(GATED, raised("llama"))
    ids, states = token_ids(2, 7), torch.randn(2, 7, width(linear))
    want, have = outputs(linear, ids, states), outputs(gated, ids, states)
    close(have["logits"], want["logits"])
    close(have[FEEDBACK], want[FEEDBACK])


def test_what_makes_logits_and_what_is_fed_back_are_apart() -> None:
    """With other weights for the feedback the logits stay, and the other way round (papers/83: swapping the halves must show)."""
    head = applied(GATED, raised("llama"))
    ids, states = token_ids(2, 7), torch.randn(2, 7, width(head))
    want = outputs(head, ids, states)
    moved = outputs(with_params(head, feedback_weight=torch.randn(head.params["draft_head.feedback.weight"].shape)), ids, states)
    assert torch.equal(moved["logits"], want["logits"]) and (moved[FEEDBACK] - want[FEEDBACK]).abs().max() > 0.1
    last = find_blocks(raised("llama"))[-1].path + ".mlp.down_proj.weight"
    other = outputs(head.replace(params={**head.params, last: torch.randn(head.params[last].shape)}), ids, states)
    assert torch.equal(other[FEEDBACK], want[FEEDBACK]) and (other["logits"] - want["logits"]).abs().max() > 0.1


def test_the_feedback_makes_the_logits_where_it_is_shared() -> None:
    head = applied(LINEAR, raised("llama"))
    out = outputs(head, token_ids(1, 5), torch.randn(1, 5, width(head)))
    close(out[FEEDBACK] @ head.params["lm_head.weight"].T, out["logits"])


def test_composes() -> None:
    program = apply(raised("gemma2"), SkipLayers(keep=(1,)), GATED, TrimVocab(keep=20), QuantizeWeights(format="int8"), KvCache())
    out = probe(program, token_ids(2, 5))
    assert out["logits"].shape == (2, 5, VOCAB) and len(program.states) == 1 and "draft_head.fuse.weight.int8" in program.params


def test_own_feedback_needs_an_mlp_at_the_end() -> None:
    program = apply(raised("llama"), SkipLayers(mlp=(1,)))
    with pytest.raises(CompileError, match="does not end in one") as caught:
        GATED.apply(program, None)  # type: ignore[arg-type]
    assert caught.value.code == "pass-refused" and "feedback: shared" in (caught.value.fix or "")
