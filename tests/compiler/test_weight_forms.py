"""Formats of weights: packing, tables, rounding, low rank, allocation; against formulas written out here."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from planc.compiler.allocation import allocate
from planc.compiler.codebooks import bits_of, lookup, normal_float, pack
from planc.compiler.dialect import unpack_codes
from planc.compiler.joint import joint, kmeans, learned
from planc.compiler.low_rank import decompose
from planc.compiler.rounding import gptq, output_error
from planc.compiler.weight_forms import Format, store
from planc.runtime.errors import CompileError

FORMS: tuple[Format, ...] = ("int8", "int8_blocks", "int4_blocks", "nf2", "nf3", "nf4")


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram_of(inputs: int, seed: int = 1) -> Tensor:
    """Of inputs that hang together."""
    x = some(300, inputs, seed=seed) @ (torch.eye(inputs) + 0.3 * some(inputs, inputs, seed=seed + 1))
    return x.t() @ x / len(x)


def test_normal_float_has_the_published_levels() -> None:
    wanted = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]
    assert (normal_float(4)[0] / 127 - torch.tensor(wanted)).abs().max() <= 0.5 / 127 + 1e-4
    assert normal_float(2)[0].tolist() == [-127, 0, 43, 127]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([2, 3, 4]), st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))
def test_property_packing_round_trip(bits: int, rows: int, eights: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, 8 * eights), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.shape == (rows, eights * bits)
    assert torch.equal(unpack_codes(packed, bits), codes)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(FORMS), st.sampled_from([16, 32]), st.integers(1, 5), st.integers(1, 3), st.integers(0, 99), st.booleans())
def test_property_error_is_within_half_a_gap(form: Format, block: int, outputs: int, blocks: int, seed: int, zero: bool) -> None:
    """Half the largest gap between levels times the scale (a whole one in integer blocks, whose range has one step less on one side), and what
    8 bits do to scales and tables."""
    weight = some(outputs, block * blocks, seed=seed) * (0 if zero else 10.0 ** (seed % 5 - 2))
    found = store(weight, form, block)
    peaks = weight.reshape(-1, weight.shape[1] if form == "int8" else block).abs().amax(1)
    spread = float(peaks.max() - peaks.min())  # a stored scale is off by half a step of it
    gap = {"int8": 1 / 127, "int8_blocks": 2 / 128, "int4_blocks": 2 / 8, "nf2": 1.0, "nf3": 0.53, "nf4": 0.31}[form]
    bound = peaks * gap / 2 * (1 + 1e-5) + (spread / 510 * 1.01 + peaks / 254 if form.startswith("nf") else 0) + 1e-7
    error = (found.weight - weight).abs().reshape(len(peaks), -1).amax(1)
    assert bool((error <= bound).all())
    if form.startswith("nf"):
        assert found.bits() == bits_of(outputs, block * blocks, int(form[-1]), block)
        again = lookup(found.weight, int(form[-1]), block)
        assert float((again.weight() - found.weight).abs().max()) <= float(peaks.max()) / 100  # as good as unchanged


@pytest.mark.parametrize("form", FORMS)
def test_gptq_lowers_the_error_of_outputs(form: Format) -> None:
    weight, gram = some(24, 64), gram_of(64)
    nearest, compensated = (output_error(weight, store(weight, form, 16, g).weight, gram) for g in (None, gram))
    assert compensated < 0.9 * nearest


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(FORMS), st.integers(1, 6), st.integers(1, 3), st.integers(0, 99))
def test_property_searched_scales_lower_the_weighed_error(form: Format, outputs: int, blocks: int, seed: int) -> None:
    weight, importance = some(outputs, 16 * blocks, seed=seed), some(16 * blocks, seed=seed + 1).exp()
    weight[0] *= seed % 2  # a row of zeros
    peak, searched = (((store(weight, form, 16, None, i).weight - weight).pow(2) * importance).sum() for i in (None, importance))
    assert float(searched) <= float(peak) * (1.02 if form.startswith("nf") else 1 + 1e-5)  # scales of nf are rounded to 8 bits afterwards


def test_searched_scales_find_the_grid_that_is_there() -> None:
    """Levels -8 .. 7 of a scale, where the largest magnitude is 7 steps: the peak would make it the eighth."""
    levels = torch.tensor([7.0, 5, -3, 1, 0, -6, 2, 4, 7, -7, 6, -1, 3, -2, -4, -5])
    for sign in (1, -1):
        weight = 0.3 * sign * levels[None]
        assert float((store(weight, "int4_blocks", 16, None, torch.ones(16)).weight - weight).abs().max()) < 1e-6
        assert float((store(weight, "int4_blocks", 16).weight - weight).abs().max()) > 0.05


def test_gptq_without_correlation_is_rounding_to_nearest() -> None:
    weight, gram = some(7, 32), torch.diag(torch.rand(32) + 0.1)
    gram[5, 5] = 0  # a channel that was never seen
    assert torch.equal(gptq(weight, gram, torch.full_like(weight, 0.3), torch.round), torch.round(weight / 0.3))
    with pytest.raises(CompileError) as caught:
        gptq(weight, torch.full((32, 32), float("nan")), torch.ones_like(weight), torch.round)
    assert caught.value.code == "pass-refused"


@pytest.mark.parametrize("form", ["nf2", "nf3", "int4_blocks"])
def test_low_rank_lowers_the_error_until_it_stops(form: Format) -> None:
    weight = some(48, 64) + 2 * some(48, 2) @ some(2, 64)
    split = decompose(weight, 4, lambda value: store(value, form, 16))
    kept = split.errors[: split.errors.index(min(split.errors)) + 1]
    assert list(kept) == sorted(kept, reverse=True)
    whole = split.stored.weight + split.left.float() @ split.right.float()
    assert float((weight - whole).norm()) == pytest.approx(min(split.errors), rel=1e-5)
    assert min(split.errors) < 0.8 * float((weight - store(weight, form, 16).weight).norm())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 20)), min_size=1, max_size=4), min_size=1, max_size=4), st.floats(0, 1))
def test_property_allocation_is_the_best_of_all(items: list[list[tuple[float, int]]], share: float) -> None:
    costs, sizes = [[c for c, _ in row] for row in items], [[s for _, s in row] for row in items]
    low, high = (sum(map(pick, sizes)) for pick in (min, max))
    budget = int(low + share * (high - low))
    chosen = allocate(costs, sizes, budget)
    assert sum(row[j] for row, j in zip(sizes, chosen, strict=True)) <= budget
    every = itertools.product(*(range(len(row)) for row in items))
    fitting = [ch for ch in every if sum(row[j] for row, j in zip(sizes, ch, strict=True)) <= budget]
    best = min(sum(row[j] for row, j in zip(costs, ch, strict=True)) for ch in fitting)
    assert sum(row[j] for row, j in zip(costs, chosen, strict=True)) <= best + 1e-4


def test_allocation_names_what_would_fit() -> None:
    with pytest.raises(CompileError) as caught:
        allocate([[1.0, 0.5]], [[10, 20]], 9)
    assert caught.value.code == "pass-refused" and "10" in caught.value.message


def test_kmeans_finds_the_levels_that_are_there() -> None:
    levels = torch.tensor([-1.0, -0.2, 0.3, 0.9])
    values = levels[torch.randint(0, 4, (5, 200), generator=torch.Generator().manual_seed(0))]
    assert (kmeans(values, torch.ones(200), 4) / 127 - levels).abs().max() <= 1 / 127


def test_tables_per_group_and_learning_lower_the_error() -> None:
    weight = torch.cat((some(32, 64), torch.sign(some(32, 64, seed=3)) * (1 + 0.1 * some(32, 64, seed=4))))  # two kinds of rows
    one, two = (float((weight - learned(weight, 3, 16, count).weight()).norm()) for count in (1, 2))
    assert two < 0.9 * one
    gram = gram_of(64)
    start = learned(weight, 3, 16, 2, gram)
    made = joint(start, weight, gram, 15)
    assert output_error(weight, made.weight(), gram) < 0.8 * output_error(weight, start.weight(), gram)
    moved = (made.codes.int() - start.codes.int()).abs()
    assert bool((moved > 0).any()) and float((moved > 1).sum()) <= 0.1 * float((moved > 0).sum())
    assert joint(start, weight, gram, 0) is start
