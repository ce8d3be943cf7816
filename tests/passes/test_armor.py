"""The pass armor: an N:M core between block-diagonal wrappers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import applied, apply, before_and_after, close, decoding, one_layer, onnx_engine, raised, token_ids
from torch import Tensor

from planc.backends.reference import probe
from planc.compiler.factors import Factors, factorise
from planc.compiler.passbase import Context
from planc.compiler.plan import Plan
from planc.compiler.program import Program
from planc.passes.armor import Armor
from planc.passes.prune import Prune
from planc.runtime.engine import Step
from planc.runtime.errors import CompileError, PlanError

IDS = token_ids(2, 9)
CONTEXT = Context(token_ids(4, 48, seed=7))


def matrix(outputs: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight whose rows and columns differ in size, and the energy of its inputs."""
    random = torch.Generator().manual_seed(seed)
    spread = [torch.rand(size, generator=random) + 0.2 for size in (outputs, inputs)]
    weight = torch.randn(outputs, inputs, generator=random) * spread[0][:, None] * spread[1]
    return weight, torch.rand(inputs, generator=random).double() * 3


def found(weight: Tensor, energy: Tensor, steps: int = 40, block: int = 8, pattern: tuple[int, int] = (2, 4), **options: Any) -> Factors:
    return factorise(weight, energy, pattern, block, **{"steps": steps, "rate": 3e-3, "select": "random", "seed": 0, **options})


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden(before_and_after(Armor(block=8, steps=0, modules=("gate_proj",)), one_layer(), CONTEXT), "armor.txt")


def test_without_steps_it_is_the_masked_matrix() -> None:
    """Wrappers that only scale back, and the heaviest of every four: the plain 2:4 layer."""
    weight, energy = matrix(16, 24)
    factors = found(weight, energy, steps=0)
    columns = weight.norm(dim=0)
    worth = (weight / columns / (weight / columns).norm(dim=1, keepdim=True)).pow(2) * energy
    lightest = worth.reshape(16, 6, 4).argsort(-1)[..., :2]
    masked = weight.reshape(16, 6, 4).scatter(-1, lightest, 0.0).reshape(16, 24)
    close(factors.dense(), masked, 1e-4)  # lengths are kept away from zero by 1e-5
    assert factors.first == factors.last


@pytest.mark.parametrize("select", ["random", "greedy", "uniform"])
def test_the_search_lowers_its_loss(select: Any) -> None:
    weight, energy = matrix(32, 48)
    factors = found(weight, energy, steps=80, select=select)
    assert factors.last < 0.9 * factors.first
    error = (factors.dense() - weight).pow(2) / (columns := weight.norm(dim=0)).pow(2) / (weight / columns).norm(dim=1, keepdim=True).pow(2)
    scale = (weight / columns / (weight / columns).norm(dim=1, keepdim=True)).pow(2)
    assert float((error * energy).sum() / (scale * energy).sum()) == pytest.approx(factors.last, rel=2e-2)
    assert bool(((factors.core.reshape(32, -1, 4) != 0).sum(-1) <= 2).all())


def test_an_exact_step_finds_a_group_that_fits() -> None:
    """A matrix that is sparse already but for one group: the first choices put the mask where the matrix has its entries."""
    weight = torch.zeros(8, 8)
    weight[:, 0::4], weight[:, 3::4] = 1.0, 2.0
    factors = found(weight, torch.ones(8).double(), steps=0)
    assert factors.last < 1e-8
    close(factors.dense(), weight, 1e-3)


def test_inputs_that_are_never_seen_count_as_others_do() -> None:
    weight, energy = matrix(8, 16)
    energy[3], energy[7] = 0.0, float("nan")
    factors = found(weight, energy, steps=10)
    assert bool(torch.isfinite(factors.dense()).all()) and factors.last <= factors.first


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_wrapped_program_computes_the_product_of_its_factors(family: str) -> None:
    program = raised(family)
    new = applied(Armor(block=8, steps=5), program, CONTEXT)
    cores = [name for name in new.params if name.endswith(".core")]
    assert len(cores) == len([n for n in program.main.nodes if n.target is torch.ops.aten.linear.default]) - 1
    dense = dict(program.params)
    for name in (core.removesuffix(".core") for core in cores):
        dense[name] = Factors(*(new.params[f"{name}.{part}"] for part in ("left", "core", "right")), 0.0, 0.0).dense()
    close(probe(new, IDS)["logits"], probe(program.replace(params=dense), IDS)["logits"], 1e-5)


def test_nearer_to_the_dense_model_than_wanda() -> None:
    """On what it optimises for, the outputs of its layers; measured on the logits."""
    program, modules = raised("llama"), ("mlp.*",)

    def distance(other: Program) -> float:
        return float((probe(other, IDS)["logits"] - probe(program, IDS)["logits"]).pow(2).mean())

    wanda = Prune(score="wanda", granularity="2:4", modules=modules).apply(program, CONTEXT)
    assert distance(Armor(block=16, steps=300, rate=3e-3, modules=modules).apply(program, CONTEXT)) < 0.85 * distance(wanda)


@pytest.mark.parametrize("ops", ["fast", "standard"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_wrappers_are_lowered(family: str, ops: Any, tmp_path: Path) -> None:
    """OPT's products have inputs of rank two and biases."""
    program = apply(raised(family), Armor(block=8, steps=2), context=CONTEXT)
    ids = token_ids(1, 6)
    engine = onnx_engine(decoding(program), tmp_path, ops)
    cache, rows = engine.new_cache(1, 8), []
    for start, end in ((0, 4), (4, 6)):
        out = engine.forward(cache, Step(ids[:, start:end].numpy()), logits=True)
        assert out.logits is not None
        rows.append(out.logits.copy())
        cache.keep(0, np.arange(end - start))
    close(np.concatenate(rows, 1), probe(program, ids)["logits"].numpy(), 1e-4)


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        ({"block": 7, "pattern": "2:7"}, "prune-pattern", "block"),
        ({"block": 6}, "prune-pattern", "block"),
        ({"modules": ("experts",)}, "pass-no-match", "explain"),
    ],
)
def test_refuses(options: dict[str, Any], code: str, word: str) -> None:
    with pytest.raises(CompileError) as caught:
        Armor(**options).apply(raised("llama"), CONTEXT)
    assert caught.value.code == code and word in (caught.value.fix or "")


@pytest.mark.parametrize("options", [{"pattern": "4:4"}, {"pattern": "2:9"}, {"block": 1}, {"select": "best"}])
def test_refuses_plans(options: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        Plan.from_dict({"passes": [{"armor": options}]})


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([((2, 4), 4), ((2, 4), 8), ((1, 2), 6), ((3, 4), 8), ((1, 4), 4), ((2, 3), 6)]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 12),
    st.sampled_from(["random", "greedy", "uniform"]),
    st.integers(0, 99),
)
def test_property(form: tuple[tuple[int, int], int], rows: int, columns: int, steps: int, select: Any, seed: int) -> None:
    """Whatever the matrix: the pattern holds, the loss never rises, and the same seed gives the same factors."""
    pattern, block = form
    weight, energy = matrix(rows * block, columns * block, seed)
    one, two = (found(weight, energy, steps, block, pattern, select=select, seed=seed) for _ in range(2))
    assert one.last <= one.first
    assert bool(((one.core.reshape(len(weight), -1, pattern[1]) != 0).sum(-1) <= pattern[0]).all())
    assert torch.equal(one.dense(), two.dense())
