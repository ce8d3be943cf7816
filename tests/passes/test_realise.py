"""The pass realise."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import FAMILIES, applied, apply, before_and_after, close, decoding, one_layer, onnx_engine, pooled, raised, token_ids
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from vision_tiny import images, random_cnn

from planc.backends.reference import probe
from planc.compiler.groups import find_groups
from planc.compiler.passbase import Context
from planc.compiler.program import Program
from planc.passes.fuse_projections import FuseProjections
from planc.passes.prune import Prune
from planc.passes.quantize_weights import QuantizeWeights
from planc.passes.realise import Realise
from planc.runtime.engine import Step

IDS = token_ids(2, 19)


def logits(program: Program, ids: Tensor = IDS) -> Tensor:
    return probe(program, ids)["logits"]


@functools.cache
def masked(family: str) -> Program:
    return apply(raised(family), Prune(granularity="channels", allocation="everywhere", sparsity=0.5))


def silence(
    program: Program, share: float, seed: int, kinds: tuple[str, ...] = ("heads", "channels"), groups: int | None = None
) -> Program:
    """Zero the columns that read a random share of the units of the first groups."""
    random, params = np.random.default_rng(seed), dict(program.params)
    for group in [g for g in find_groups(program).groups if g.kind in kinds][:groups]:
        gone = random.permutation(group.size) < share * group.size
        for site in group.read:
            columns = torch.from_numpy(np.append(gone, False)[site.units])
            weight = params[site.param]
            params[site.param] = weight.masked_fill(columns.reshape(1, -1, *[1] * (weight.dim() - 2)), 0.0)
    return program.replace(params=params)


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden(before_and_after(Realise(), apply(one_layer(), Prune(granularity="units", sparsity=0.5))), "realise.txt")


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_masked_program(family: str) -> None:
    before = silence(raised(family), 0.5, 0)
    after = applied(Realise(), before)
    close(logits(after), logits(before), 1e-5)
    assert after.bytes() < before.bytes()
    joined = applied(Realise(), apply(before, FuseProjections()))
    close(logits(joined), logits(before), 1e-5)


@pytest.mark.parametrize("ops", ["fast", "standard"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_layers_of_different_size_are_lowered_and_cached(family: str, ops: str, tmp_path: Path) -> None:
    """Prefill and single steps of the ONNX engine equal the masked program; the cache has as many heads as each layer."""
    before = silence(masked(family), 0.5, 0, ("heads",), 1)
    program = decoding(apply(before, Realise()))
    assert len({s.heads for s in program.states}) > 1
    engine = onnx_engine(program, tmp_path, ops)  # type: ignore[arg-type]
    ids = token_ids(1, 12)
    cache, rows = engine.new_cache(1, 16), []
    for start, end in ((0, 8), (8, 9), (9, 12)):
        out = engine.forward(cache, Step(ids[:, start:end].numpy()), logits=True)
        assert out.logits is not None
        rows.append(out.logits.copy())  # the engine may use its memory again
        cache.keep(0, np.arange(end - start))
    close(np.concatenate(rows, 1), logits(before, ids).numpy(), 1e-4)


def test_quantises_afterwards() -> None:
    small = apply(masked("llama"), Realise(), FuseProjections(), QuantizeWeights(format="int8"))
    assert float((logits(small) - logits(masked("llama"))).pow(2).mean().sqrt()) < 0.1 * float(logits(small).std())


def test_nothing_silent_is_nothing_to_do() -> None:
    assert apply(raised("llama"), Realise()) is raised("llama")


def test_one_unit_of_a_group_stays() -> None:
    program = raised("llama")
    silent = program.replace(
        params={n: v * 0 if n.endswith(("o_proj.weight", "down_proj.weight")) else v for n, v in program.params.items()}
    )
    small = applied(Realise(), silent)
    assert {g.size for g in find_groups(small).groups} == {1}
    close(logits(small), logits(silent), 1e-5)


def test_a_unit_is_heard_while_any_reader_hears_it() -> None:
    """One column that is not zero keeps a whole head."""
    program = raised("llama")
    name = "model.layers.0.self_attn.o_proj.weight"
    weight = torch.zeros_like(program.params[name])
    weight[0, 17] = 1.0  # in the second of two key/value heads
    small = apply(program.replace(params={**program.params, name: weight}), Realise())
    assert small.params[f"{name}*r"].shape == (32, 16)


@functools.cache
def still(name: str) -> Program:
    """A small transformer with one sequence of four tokens for input: shapes without symbols are computed many times as fast."""
    edit = (one_layer() if name == "one layer" else pooled(name)[1]).edit("still")
    edit.mode = FakeTensorMode()
    with edit.mode:
        for node in edit.graph.nodes:
            if node.op in ("get_attr", "placeholder"):
                old = node.meta["val"]
                node.meta["val"] = torch.empty((1, 4) if node.op == "placeholder" else old.shape, dtype=old.dtype)
    for node in edit.graph.nodes:
        if node.op == "call_function":
            edit.compute(node)
    return edit.done(1, 1)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["one layer", "variant 0", "cnn"]), st.floats(0, 1), st.integers(0, 2**32 - 1), st.data())
def test_property(name: str, share: float, seed: int, data: st.DataObject) -> None:
    """Whatever units of a transformer or a CNN fall silent: the smaller program computes the same, and nothing silent is left."""
    if name == "cnn":
        program = random_cnn(lambda low, high: data.draw(st.integers(low, high)), 9, 7)
        x = images(1, 9, 7, seed % 97, torch.float64)
    else:
        program, x = still(name), token_ids(1, 4, seed=seed % 97)
    silent = silence(program, share, seed)
    small = Realise().apply(silent, Context())
    close(logits(small, x), logits(silent, x), 1e-5)
    assert Realise().apply(small, Context()) is small
    assert small.bytes() <= silent.bytes()


def test_still_programs_have_the_groups_of_the_others() -> None:
    for name in ("one layer", "variant 0"):
        program = one_layer() if name == "one layer" else pooled(name)[1]
        assert [(g.kind, g.name, g.costs.tolist()) for g in find_groups(still(name)).groups] == [
            (g.kind, g.name, g.costs.tolist()) for g in find_groups(program).groups
        ]
