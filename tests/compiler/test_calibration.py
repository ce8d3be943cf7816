"""Statistics over calibration text, against hooks on the model itself and the definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import close, eager, model, raised, token_ids
from torch import Tensor

from planc.backends.reference import execute
from planc.compiler.calibration import (
    Gram,
    Gram32,
    Moments,
    Peaks,
    RowPeaks,
    Statistic,
    WithinVariance,
    calibration_text,
    collect,
    propagate,
)
from planc.compiler.dialect import OPS
from planc.compiler.passbase import Context
from planc.runtime.errors import CompileError

aten = torch.ops.aten
IDS = token_ids(3, 17)
KINDS = (Moments, WithinVariance, Gram, Gram32, Peaks, RowPeaks)


def test_equals_hooks_on_the_model() -> None:
    module, program = model("llama"), raised("llama")
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"]
    seen: dict[str, Tensor] = {}
    modules = dict(module.named_modules())
    hooks = [modules[n].register_forward_pre_hook(lambda _, args, n=n: seen.update({n: args[0].double()})) for n in names]
    eager(module, IDS)
    for hook in hooks:
        hook.remove()
    inputs = {str(n.args[1].target).removesuffix(".weight"): n.args[0] for n in program.main.nodes if n.target is aten.linear.default}
    have = collect(program, {inputs[n]: set(KINDS) for n in names}, IDS)
    for name in names:
        x, value = seen[name], inputs[name]
        rows = x.flatten(0, 1)
        moments = have[value, Moments]
        assert moments.mean.dtype == moments.variance.dtype == torch.float64 and moments.count == IDS.numel()
        close(moments.mean, rows.mean(0))
        close(moments.mean_square, rows.pow(2).mean(0))
        close(moments.variance, rows.var(0, correction=0))
        close(have[value, WithinVariance].value, x.var(1, correction=0).mean(0))
        close(have[value, Gram].matrix, rows.t() @ rows)
        assert have[value, Gram].matrix.dtype == torch.float64 and have[value, Gram32].matrix.dtype == torch.float32
        close(have[value, Gram32].matrix, rows.t() @ rows, 1e-5)
        close(have[value, Peaks].value, rows.abs().amax(0))
        close(have[value, RowPeaks].value, rows.abs().amax(1))


def test_the_order_of_text_does_not_matter() -> None:
    program = raised("llama")
    wanted = {n: {Moments} for n in program.main.nodes if n.target is OPS.rms_norm.default}
    one, two, twice = (collect(program, wanted, ids) for ids in (IDS, IDS.flip(0), torch.cat((IDS, IDS))))
    for node in wanted:
        close(one[node, Moments].variance, two[node, Moments].variance, 1e-14)
        close(twice[node, Moments].mean_square, one[node, Moments].mean_square, 1e-14)


def test_runs_can_be_merged() -> None:
    program = raised("llama")
    wanted = {n: set(KINDS) for n in program.main.nodes if n.target is OPS.glu.default}
    whole, first, second = collect(program, wanted, IDS), collect(program, wanted, IDS[:1]), collect(program, wanted, IDS[1:])
    first.merge(second)
    for (_, want), (_, have) in zip(whole.items(), first.items(), strict=True):
        assert have.count == want.count
        close(have.value, want.value, 1e-6)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.integers(1, 5), min_size=3, max_size=3), st.floats(-1e3, 1e3), st.integers(0, 99))
def test_merging_is_associative(kind: type[Statistic], lengths: list[int], shift: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    texts = [torch.randn(2, length, 3, generator=random) + shift for length in lengths]

    def seen(text: Tensor) -> Statistic:
        statistic = kind()
        statistic.add(text)
        return statistic

    left, right, tail, empty = seen(texts[0]), seen(texts[0]), seen(texts[1]), kind()
    left.merge(seen(texts[1]))
    left.merge(seen(texts[2]))
    tail.merge(seen(texts[2]))
    right.merge(tail)
    empty.merge(right)
    empty.merge(kind())
    assert left.count == right.count == empty.count == 2 * sum(lengths)
    close(left.value, right.value, 1e-6)
    close(left.value, empty.value, 1e-6)


def test_other_inputs_and_axes() -> None:
    """Inputs by name, and channels that are not the last axis."""
    program = raised("llama")
    norm = next(n for n in program.main.nodes if n.target is OPS.rms_norm.default)
    batches = [{"input_ids": IDS, "position_ids": torch.arange(17)[None].expand(3, -1)}]
    by_name, by_text = collect(program, {norm: {Moments}}, batches), collect(program, {norm: {Moments}}, IDS)
    close(by_name[norm, Moments].variance, by_text[norm, Moments].variance, 1e-6)
    assert collect(program, {norm: {Peaks}}, IDS, axes={norm: 1})[norm, Peaks].value.shape == (17,)


def test_progress_and_nothing_to_watch() -> None:
    told: list[str] = []

    def progress(rows: Tensor, text: str) -> Tensor:
        told.append(text)
        return rows

    program = raised("llama")
    assert not list(collect(program, {}, IDS).items())
    collect(program, {next(n for n in program.main.nodes if n.target is OPS.glu.default): {Moments}}, IDS, progress)
    assert told == ["calibrating"]


def test_propagate_shows_what_changes_so_far_made_of_the_text() -> None:
    """Every product halved: its successors see what a program with the halved weights in front of them gives."""
    program = raised("qwen2")
    products = [n for n in program.main.nodes if n.target is aten.linear.default]
    seen: dict[str, Tensor] = {}

    def halve(name: str) -> object:
        def change(inputs: list[Tensor]) -> object:
            seen[name] = torch.cat(inputs)
            return lambda x, weight, bias=None: torch.nn.functional.linear(x, weight / 2, bias)

        return change

    propagate(program, {n: halve(n.name) for n in products}, IDS)  # type: ignore[arg-type]
    assert list(seen) == [n.name for n in products]
    halved = program.replace(params={n: v / 2 if v.dim() == 2 and "embed" not in n else v for n, v in program.params.items()})
    inputs = {n.args[0]: n.name for n in products}
    for node, value in execute(halved, {"input_ids": IDS, "position_ids": torch.arange(IDS.shape[1])[None].expand(len(IDS), -1)}):
        if node in inputs:
            close(seen[inputs[node]], value)


def test_propagate_stops_at_the_last_change_and_refuses() -> None:
    program = raised("llama")
    first = next(n for n in program.main.nodes if n.target is aten.linear.default)
    told: list[str] = []

    def progress(nodes: list[object], text: str) -> object:
        return (told.append(n.name) or n for n in nodes)  # type: ignore[attr-defined, func-returns-value]

    propagate(program, {first: lambda inputs: first.target}, IDS, progress)  # type: ignore[dict-item, return-value]
    assert told[-1] == first.name
    for ids in (IDS[:0], IDS[:1, :1]):
        with pytest.raises(CompileError, match="too little"):
            propagate(program, {first: lambda inputs: first.target}, ids)  # type: ignore[dict-item, return-value]
    broken = program.replace(params={n: v * torch.inf if "embed" in n else v for n, v in program.params.items()})
    with pytest.raises(CompileError) as caught:
        propagate(broken, {first: lambda inputs: first.target}, IDS)  # type: ignore[dict-item, return-value]
    assert caught.value.code == "calibration-not-finite"


def test_refuses() -> None:
    program = raised("llama")
    wanted = {next(n for n in program.main.nodes if n.target is OPS.glu.default): {Moments}}
    for ids in (IDS[:0], IDS[:, :0], IDS[:1, :1], []):
        with pytest.raises(CompileError) as caught:
            collect(program, wanted, ids)
        assert caught.value.code == "calibration-short" and "calibration=" in (caught.value.fix or "")
    broken = program.replace(params={n: v * torch.nan if n.endswith("up_proj.weight") else v for n, v in program.params.items()})
    with pytest.raises(CompileError) as caught:
        collect(broken, wanted, IDS)
    assert caught.value.code == "calibration-not-finite" and "mlp" in (caught.value.node or "")
    with pytest.raises(CompileError, match="prune needs text"):
        calibration_text(Context(), "prune")
