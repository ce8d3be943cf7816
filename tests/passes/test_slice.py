"""The pass slice: a rotation that changes nothing, and a cut that is a projection of the hidden state."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models_tiny import (
    FAMILIES,
    POOL,
    applied,
    apply,
    before_and_after,
    close,
    decoding,
    eager,
    info,
    make,
    model,
    one_layer,
    onnx_engine,
    pooled,
    raised,
    token_ids,
)
from torch import Tensor

from planc.backends.reference import execute, probe
from planc.compiler.calibration import Moments, collect
from planc.compiler.compile import demanded
from planc.compiler.passbase import Context
from planc.compiler.plan import Plan
from planc.compiler.program import Program
from planc.compiler.raising import raise_program
from planc.compiler.residual import find_states, tied
from planc.compiler.trace import trace
from planc.passes.fold_norms import FoldNorms
from planc.passes.fuse_projections import FuseProjections
from planc.passes.prune import Prune
from planc.passes.quantize_weights import QuantizeWeights
from planc.passes.realise import Realise
from planc.passes.skip_layers import SkipLayers
from planc.passes.slice import Slice
from planc.runtime.engine import Step
from planc.runtime.errors import CompileError

IDS = token_ids(2, 9)
CONTEXT = Context(token_ids(4, 48, seed=7))
ROTATED = tuple(f for f in FAMILIES if not f.startswith("gemma"))


@cache
def tied_llama() -> Any:
    """A Llama whose head is its embedding, with its program."""
    module = make("llama", tie_word_embeddings=True)
    return module, raise_program(trace(module, info("llama")))


@cache
def folded(name: str) -> Program:
    """Ready to be sliced."""
    return apply(tied_llama()[1] if name == "tied" else pooled(name)[1], FoldNorms())


def width_of(program: Program) -> int:
    """Channels that the head reads, as many as all other values of the hidden state have."""
    head = program.outputs["logits"]
    return int(head.args[0].meta["val"].shape[-1])  # type: ignore[union-attr]


def projected(program: Program, part: Slice, ids: Tensor, context: Context = CONTEXT) -> Tensor:
    """Logits of the whole program with every value of the hidden state, and a table that is a head, projected onto what the pass keeps."""
    states = find_states(program)
    bases = part.bases_of(program, states, context)
    onto = {state.node: (basis @ basis.t()).float() for state, basis in zip(states, bases, strict=True)}
    tables = {name: program.params[name] @ (bases[i] @ bases[i].t()).float() for name, i in tied(states).items()}
    inputs = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1]).expand(ids.shape)}
    run = execute(program.replace(params={**program.params, **tables}), inputs)
    node, value = next(run)
    while node.op != "output":
        node, value = run.send(value @ onto[node] if node in onto else None)
    return value["logits"]  # type: ignore[no-any-return]


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden(before_and_after(Slice(sparsity=0.25, bases="layer"), FoldNorms().apply(one_layer(), Context()), CONTEXT), "slice.txt")


@pytest.mark.parametrize(
    ("family", "bases"), [*((family, "layer") for family in ROTATED), ("tied", "layer"), ("tied", "one"), ("llama", "one"), ("gpt2", "one")]
)
def test_a_rotation_changes_nothing(family: str, bases: Any) -> None:
    rotated = applied(Slice(sparsity=0.0, bases=bases), folded(family) if family == "tied" else apply(raised(family), FoldNorms()), CONTEXT)
    close(probe(rotated, IDS)["logits"], eager(tied_llama()[0] if family == "tied" else model(family), IDS), 1e-5)
    changes = [value.double() for name, value in rotated.params.items() if ".from." in name]
    assert (len(changes) > 0) is (bases == "layer")
    for change in changes:  # orthogonal
        close(change @ change.t(), torch.eye(len(change), dtype=torch.float64), 1e-6)


@pytest.mark.parametrize(
    ("family", "bases"), [("llama", "layer"), ("tied", "layer"), ("tied", "one"), ("gpt2", "one"), ("opt", "layer"), ("gpt_neox", "layer")]
)
def test_a_cut_is_a_projection(family: str, bases: Any) -> None:
    whole, part = folded(family) if family == "tied" else apply(raised(family), FoldNorms()), Slice(sparsity=0.25, bases=bases)
    small = applied(part, whole, CONTEXT)
    close(probe(small, IDS)["logits"], projected(whole, part, IDS), 2e-5)
    assert width_of(small) == 24
    assert small.bytes() < whole.bytes()


def test_a_shared_table_is_stored_once() -> None:
    small = Slice(sparsity=0.25).apply(folded("tied"), CONTEXT)
    assert [v.shape for n, v in small.params.items() if v.shape[0] == 97] == [(97, 24)]
    assert small.params["lm_head.weight.basis"].shape == (24, 24)


def test_principal_components_keep_more_energy_than_channels() -> None:
    """Of the values of the hidden state, scaled to the same length: what a basis keeps of their energy."""
    program = folded("llama")
    states = find_states(program)

    def kept(directions: Any) -> float:
        [basis, *_] = Slice(sparsity=0.5, directions=directions).bases_of(program, states, CONTEXT)
        total = 0.0
        for row in CONTEXT.calibration:  # type: ignore[union-attr]
            for node, value in execute(program, {"input_ids": row[None], "position_ids": torch.arange(len(row))[None]}):
                if node in {s.node for s in states}:
                    x = value.double() / value.double().pow(2).mean(-1, keepdim=True).sqrt()
                    total += float((x @ basis).pow(2).sum())
        return total

    assert kept("principal") > 1.02 * kept("channels")


def test_later_bases_see_earlier_cuts() -> None:
    """With a basis per layer, a text's second state is measured with the first one cut."""
    program, part = folded("llama"), Slice(sparsity=0.5, bases="layer", spread=False)
    states = find_states(program)
    bases = part.bases_of(program, states, CONTEXT)
    whole = Slice(sparsity=0.0, bases="layer", spread=False).bases_of(program, states, CONTEXT)
    assert torch.equal(bases[0], whole[0][:, :16])
    assert not torch.allclose(bases[1].abs(), whole[1][:, :16].abs(), atol=1e-3)


def test_spread_evens_out_the_channels() -> None:
    """The same space, hence the same logits; the largest channel is nearer to the others."""
    program = folded("llama")
    plain, even = (Slice(sparsity=0.25, spread=spread).apply(program, CONTEXT) for spread in (False, True))
    close(probe(even, IDS)["logits"], probe(plain, IDS)["logits"], 2e-5)
    peaks = []
    for sliced in (plain, even):
        states = find_states(sliced)
        found = collect(sliced, {s.node: {Moments} for s in states}, CONTEXT.calibration)  # type: ignore[arg-type]
        peaks.append(max(float(m.max() / m.mean()) for s in states for m in [found[s.node, Moments].mean_square]))
    assert peaks[1] < peaks[0]


@pytest.mark.parametrize("ops", ["fast", "standard"])
@pytest.mark.parametrize(("family", "bases"), [("llama", "layer"), ("gpt2", "one"), ("tied", "one"), ("tied", "layer")])
def test_smaller_matrices_reach_onnx(family: str, bases: Any, ops: Any, tmp_path: Path) -> None:
    """Prefill and single steps of the engine equal the sliced program; a shared table is stored once."""
    small = apply(folded(family), Slice(sparsity=0.25, bases=bases), context=CONTEXT)
    ids = token_ids(1, 9)
    engine = onnx_engine(decoding(small), tmp_path, ops)
    tensors = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer
    assert [sorted(t.dims) for t in tensors if 97 in t.dims and len(t.dims) == 2] == [[24, 97]] * (1 if family == "tied" else 2)
    cache, rows = engine.new_cache(1, 16), []
    for start, end in ((0, 6), (6, 7), (7, 9)):
        out = engine.forward(cache, Step(ids[:, start:end].numpy()), logits=True)
        assert out.logits is not None
        rows.append(out.logits.copy())
        cache.keep(0, np.arange(end - start))
    close(np.concatenate(rows, 1), probe(small, ids)["logits"].numpy(), 1e-4)


def test_composes_with_pruning_and_quantisation() -> None:
    masked = apply(folded("llama"), Prune(granularity="channels", sparsity=0.25), Realise())
    small = apply(masked, Slice(sparsity=0.25), context=CONTEXT)
    close(probe(small, IDS)["logits"], projected(masked, Slice(sparsity=0.25), IDS), 2e-5)
    int8 = apply(small, FuseProjections(), QuantizeWeights(format="int8"))
    want = probe(small, IDS)["logits"]
    assert float((probe(int8, IDS)["logits"] - want).pow(2).mean().sqrt()) < 0.1 * float(want.std())


def test_a_plan_gets_the_norms_folded_first() -> None:
    assert "fold_norms" in [p.key for p in demanded(Plan.from_dict({"passes": [{"slice": {"sparsity": 0.1}}]}))]


def test_refuses() -> None:
    for part, context, word in (
        (Slice(sparsity=0.9), CONTEXT, "sparsity"),
        (Slice(sparsity=0.25), Context(), "calibration"),
    ):
        with pytest.raises(CompileError) as caught:
            part.apply(folded("llama"), context)
        assert caught.value.code == "pass-refused" and word in (caught.value.fix or "")
    with pytest.raises(CompileError) as caught:
        Slice(sparsity=0.25).apply(raised("gemma2"), CONTEXT)
    assert caught.value.code == "residual-form"


def test_layers_cannot_be_skipped_between_bases() -> None:
    small = Slice(sparsity=0.25, bases="layer").apply(folded("llama"), CONTEXT)
    with pytest.raises(CompileError) as caught:
        SkipLayers(layers=(1,)).apply(small, CONTEXT)
    assert caught.value.code == "pass-refused" and "one" in (caught.value.fix or "")
    one = Slice(sparsity=0.25).apply(folded("llama"), CONTEXT)
    assert SkipLayers(layers=(1,)).apply(one, CONTEXT).bytes() < one.bytes()


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from([*(name for name in POOL if name != "gemma2"), "tied"]),
    st.sampled_from(["one", "layer"]),
    st.floats(0, 0.8),
    st.sampled_from([1, 4, 8]),
    st.booleans(),
    st.integers(0, 99),
)
def test_property(name: str, bases: Any, sparsity: float, multiple: int, spread: bool, seed: int) -> None:
    """Whatever the model and the cut: the small program is the projected whole one, within a multiple of the width asked for."""
    part = Slice(sparsity=sparsity, bases=bases, multiple=multiple, spread=spread, seed=seed)
    context = Context(token_ids(2, 24, seed=seed))
    whole = find_states(folded(name))[0].width
    width = whole if not sparsity else int((1 - sparsity) * whole) // multiple * multiple
    assume(width > 0)
    small = part.apply(folded(name), context)
    assert width_of(small) == width
    assert part.apply(small, context) is small
    ids = token_ids(1, 5, seed=seed)
    close(probe(small, ids)["logits"], projected(folded(name), part, ids, context), 5e-5)
