"""Codebooks and the places of weights in them, learned together (JLCM, Yvinec et al. 2023)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from planc.compiler.codebooks import UNIT, Lookup, block_scales, lookup, quantize_scales

_QUANTILES, _ROUNDS, _BINS = 32, 25, 2048
RATE = 4.0  #: of the first step, in units of a move that no other move gets in the way of

Rule = Literal["near", "distance"]


def learned(
    weight: Tensor,
    bits: int,
    block: int,
    tables: int,
    gram: Tensor | None = None,
    steps: int = 0,
    rounding: Tensor | None = None,
) -> Lookup:
    """Quantise weight [N,K] with tables of its own.

    Rows of like distribution share one of `tables` tables, fitted by k-means to the weights over the scales of their blocks (weighted by the
    inputs' mean squares, the diagonal of `gram` [K,K]); then `steps` of joint learning on `gram`. `rounding` gives places by GPTQ instead.
    """
    relative = _relative(weight, block)
    importance = torch.ones(weight.shape[1]) if gram is None else gram.diagonal().clamp(min=0).float() + 1e-12
    scale = _scale(weight, block)
    rows = group_rows(relative, tables)
    importance = importance * scale.pow(2)  # an error of a level is one of the weight times its scale
    fitted = torch.stack([kmeans(relative[rows == g], importance[rows == g], 2**bits) for g in range(int(rows.max()) + 1)])
    form = lookup(weight, bits, block, fitted, rows.to(torch.uint8) if len(fitted) > 1 else None, rounding)
    return joint(form, weight, gram, steps) if steps and gram is not None else form


def group_rows(relative: Tensor, count: int) -> Tensor:
    """Groups [N] of rows by the quantiles of their weights: k-means from evenly spaced rows in the order of their spread."""
    count = min(count, len(relative))
    points = torch.quantile(relative, torch.linspace(0, 1, _QUANTILES), dim=1).t()
    order = torch.argsort(points.std(1))
    centres = points[order[torch.linspace(0, len(order) - 1, 2 * count + 1).long()[1::2]]]
    groups = torch.zeros(len(points), dtype=torch.long)
    for _ in range(_ROUNDS):
        groups = torch.cdist(points, centres).argmin(1)
        centres = torch.stack([points[groups == g].mean(0) if bool((groups == g).any()) else centres[g] for g in range(count)])
    used: Tensor = torch.unique(groups, return_inverse=True)[1]
    return used


def kmeans(values: Tensor, weights: Tensor, levels: int) -> Tensor:
    """Weighted 1-d k-means of values in -1 .. 1 on a histogram: `levels` rising entries, int8 in steps of 1/127, 0 and the ends not special."""
    weights = weights.expand(values.shape)
    bins = ((values + 1) * ((_BINS - 1) / 2)).round().long().clamp(0, _BINS - 1).flatten()
    mass = torch.bincount(bins, weights.flatten().double(), _BINS)
    moment = torch.bincount(bins, (weights * values).flatten().double(), _BINS)
    share = mass.pow(1 / 3).cumsum(0)  # the density of the best levels is that of the weights to the power of a third
    centres = torch.linspace(-1, 1, _BINS, dtype=torch.float64)
    book = centres[torch.searchsorted(share, share[-1] * (torch.arange(levels) + 0.5).double() / levels).clamp(max=_BINS - 1)]
    for _ in range(4 * _ROUNDS):
        nearest = torch.searchsorted((book[1:] + book[:-1]) / 2, centres)
        total = torch.zeros(levels, dtype=torch.float64).index_add_(0, nearest, mass)
        mean = torch.zeros(levels, dtype=torch.float64).index_add_(0, nearest, moment) / total.clamp(min=1e-300)
        book = torch.where(total > 0, mean, book).sort().values
    return torch.round(book * UNIT).clamp(-UNIT, UNIT).to(torch.int8)


def joint(form: Lookup, weight: Tensor, gram: Tensor, steps: int, rule: Rule = "near", rate: float = RATE) -> Lookup:
    """Learn tables and places together for the least error of the layer's outputs, tr(D G D^T) with D = W_hat - W and G = `gram`.

    A weight has one number that says how far it is on the way to a neighbouring entry of its table. The gradient of the output error moves it,
    less the larger the gap (`near`; `distance` moves it more the larger the gap, as plain differentiation would). Beyond one half it takes the
    neighbour's place, where that move alone would lower the error; `rate` is the size of the first step. Entries of tables follow the gradient by
    Adam. The state with the least error is kept.
    """
    outputs, inputs = weight.shape
    rows = torch.zeros(outputs, dtype=torch.long) if form.rows is None else form.rows.long()
    table = form.tables.float() / UNIT
    size, scale = table.shape[1], block_scales(form, outputs * inputs // form.block).reshape(outputs, -1).repeat_interleave(form.block, 1)
    codes, way = form.codes.long(), torch.zeros_like(weight)
    first, second = torch.zeros_like(table), torch.zeros_like(table)
    best, least = form, float("inf")
    speed = 1 / (_curvature(gram) * gram.diagonal().clamp(min=float(gram.diagonal().mean()) * 1e-3))
    for step in range(1, steps + 1):
        index = rows[:, None] * size + codes
        gradient = (table.flatten()[index] * scale - weight) @ gram
        # what is stored has whole steps of 1/127: judge that
        stored = torch.round(table * UNIT).clamp(-UNIT, UNIT)
        difference = stored.flatten()[index] / UNIT * scale - weight
        error = float(((difference @ gram) * difference).sum())
        if error < least:
            best, least = replace(form, codes=codes.to(torch.uint8), tables=stored.to(torch.int8)), error
        # tables
        pull = torch.zeros(table.numel()).index_add_(0, index.flatten(), (gradient * scale).flatten()).reshape(table.shape)
        first, second = 0.9 * first + 0.1 * pull, 0.99 * second + 0.01 * pull**2
        table = table - 2e-3 * (1 - step / (steps + 1)) * (first / (1 - 0.9**step)) / ((second / (1 - 0.99**step)).sqrt() + 1e-20)
        table = table.sort(1).values.clamp(-1, 1)
        # places: the neighbour on the side that the gradient points to
        side = -gradient.sign().long()
        neighbour = (codes + side).clamp(0, size - 1)
        gap = ((table.flatten()[rows[:, None] * size + neighbour] - table.flatten()[index]) * scale).abs()
        wanted = (gradient * speed).abs()  # a step of this size in all weights at once does not overshoot
        mean = gap.mean()
        factor = torch.exp(-gap / mean) if rule == "near" else gap
        factor = factor / factor.mean()  # both rules take steps of the same mean size
        way = way + side * rate * (1 - step / (steps + 1)) ** 2 * (wanted / gap.clamp(min=1e-12)).clamp(max=1) * factor
        moved = (way.abs() > 0.5) & (neighbour != codes) & (2 * gradient.abs() > gap * gram.diagonal())  # alone it would lower the error
        codes = torch.where(moved, neighbour, codes)
        way = torch.where(moved, torch.zeros_like(way), way.clamp(-0.6, 0.6))
    return best


def _curvature(gram: Tensor) -> float:
    """Largest eigenvalue of the Gram matrix with its diagonal scaled to one, by power iteration."""
    root = gram.diagonal().clamp(min=float(gram.diagonal().mean()) * 1e-3).rsqrt()
    vector = torch.ones(len(gram)) / len(gram) ** 0.5
    for _ in range(_ROUNDS):
        vector = root * (gram @ (root * vector))
        size = float(vector.norm())
        vector = vector / max(size, 1e-30)
    return max(size, 1.0)


def _scale(weight: Tensor, block: int) -> Tensor:
    """Scale of every weight as it is stored, [N,K]."""
    codes, coarse, offset = quantize_scales(weight.float().reshape(-1, block).abs().amax(1))
    scales = (offset + codes.float() * (coarse / 255)).reshape(-1)[: weight.numel() // block]
    return scales.repeat_interleave(block).reshape(weight.shape)


def _relative(weight: Tensor, block: int) -> Tensor:
    return (weight.float() / _scale(weight, block)).clamp(-1, 1)
