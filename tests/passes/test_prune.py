"""The pass prune: scores, allocations, granularities and repairs, each against its definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models_tiny import POOL, applied, apply, before_and_after, close, eager, model, one_layer, pooled, raised, token_ids
from torch import Tensor
from torch.fx import Node
from vision_tiny import images, tiny_program

from planc.backends.reference import probe
from planc.compiler.calibration import Gram, Moments, collect
from planc.compiler.compile import demanded
from planc.compiler.groups import find_groups
from planc.compiler.passbase import Context
from planc.compiler.plan import Plan
from planc.compiler.program import Program
from planc.passes.fold_batch_norm import FoldBatchNorm
from planc.passes.prune import Prune
from planc.passes.pruning import Cubic
from planc.passes.pruning.allocations import cheapest, lowest
from planc.passes.realise import Realise
from planc.runtime.errors import CompileError, PlanError

TEXT = token_ids(6, 64, seed=7)
CONTEXT = Context(TEXT)
UNIT_PARTS: tuple[dict[str, Any], ...] = (
    {"score": "magnitude"},
    {"score": "wanda", "repair": "mean_bias"},
    {"score": "fluctuation", "allocation": "everywhere", "repair": "mean_bias"},
    {"score": "obs", "allocation": "everywhere", "repair": "least_squares"},
    {"score": "magnitude", "repair": "obs_update"},
)


def products(program: Program) -> dict[str, Node]:
    """Module path -> product, all but the head."""
    found = [n for n in program.main.nodes if n.target is torch.ops.aten.linear.default]
    return {str(n.args[1].target).partition(".weight")[0]: n for n in found[:-1]}


def weights(program: Program) -> dict[str, Tensor]:
    return {name: program.params[str(n.args[1].target)] for name, n in products(program).items()}


def prune(program: Program, **options: Any) -> Program:
    return Prune(**options).apply(program, CONTEXT)


def test_golden(golden: Callable[[str, str], None]) -> None:
    part = Prune(score="fluctuation", granularity="units", allocation="everywhere", sparsity=0.4, repair="mean_bias")
    golden(before_and_after(part, one_layer(), CONTEXT), "prune.txt")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3", "gemma2"])
def test_equals_the_model_with_zeros(family: str) -> None:
    """Wanda on the program, and the same by hooks on the model itself."""
    module, program = model(family), raised(family)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    new = applied(Prune(score="wanda", allocation="rows", sparsity=0.5), program, CONTEXT)
    try:
        with torch.no_grad():
            for name, weight in weights(new).items():
                own = module.get_submodule(name)
                own.weight.copy_(weight.t() if type(own).__name__ == "Conv1D" else weight)
        close(probe(new, token_ids(2, 9))["logits"], eager(module, token_ids(2, 9)), 1e-5)
    finally:
        module.load_state_dict(before, strict=False)


# ---- weights -------------------------------------------------------------------------------------------------------------------------


def test_wanda_compares_inside_a_row() -> None:
    program = raised("llama")
    new = prune(program, score="wanda", allocation="rows", sparsity=0.25)
    nodes = products(program)
    seen = collect(program, {n.args[0]: {Moments} for n in nodes.values()}, TEXT)  # type: ignore[misc]
    for name, weight in weights(new).items():
        old = weights(program)[name]
        score = old.abs() * seen[nodes[name].args[0], Moments].mean_square.sqrt()  # type: ignore[index]
        gone = weight == 0
        assert set(gone.sum(1).tolist()) == {old.shape[1] // 4}
        assert bool((score.masked_fill(~gone, 0).amax(1) <= score.masked_fill(gone, torch.inf).amin(1)).all())
        assert torch.equal(weight[~gone], old[~gone])


@pytest.mark.parametrize(("allocation", "exact"), [("uniform", True), ("everywhere", False)])
def test_budget_of_weights(allocation: str, exact: bool) -> None:
    """Exactly the nearest count, of every matrix or of all."""
    new = weights(prune(raised("llama"), allocation=allocation, sparsity=0.37))
    zeros = {name: (int((w == 0).sum()), w.numel()) for name, w in new.items()}
    assert all(z == round(0.37 * n) for z, n in zeros.values()) is exact
    assert sum(z for z, _ in zeros.values()) == pytest.approx(
        0.37 * sum(n for _, n in zeros.values()), abs=len(zeros) / 2 if exact else 0.5
    )


def test_a_sparsity_per_module() -> None:
    """The first pattern that matches wins, what none matches stays whole, and one pattern for all is one number for all."""
    program = raised("llama")
    some = prune(program, allocation="rows", sparsity={"layers.1.mlp.*": 0.75, "layers.*.mlp.up_proj": 0.25})
    shares = {name: float((w == 0).float().mean()) for name, w in weights(some).items()}
    assert {n: v for n, v in shares.items() if v} == {
        "model.layers.0.mlp.up_proj": 0.25,
        **{f"model.layers.1.mlp.{part}_proj": 0.75 for part in ("gate", "up", "down")},
    }
    one, each = (prune(program, allocation="rows", sparsity=sparsity) for sparsity in (0.5, {"*": 0.5}))
    assert all(torch.equal(a, b) for a, b in zip(weights(one).values(), weights(each).values(), strict=True))
    assert prune(program, sparsity={}) is program
    late = prune(program, sparsity={"mlp.*": 0.5}, schedule={"cubic": {"steps": 3}})
    assert all(torch.equal(w, weights(prune(program, sparsity={"mlp.*": 0.5}))[n]) for n, w in weights(late).items())


@pytest.mark.parametrize("repair", ["nothing", "swap", "obs_update"])
def test_two_of_four(repair: str) -> None:
    for weight in weights(prune(raised("llama"), score="wanda", granularity="2:4", repair=repair)).values():
        assert bool(((weight.reshape(-1, 4) != 0).sum(1) == 2).all())


def test_equal_scores_go_by_index() -> None:
    assert lowest(torch.tensor([[1.0, 0.0, 1.0, 1.0, 2.0]]), 3).tolist() == [[True, True, True, False, False]]
    assert lowest(torch.tensor([[1.0, float("nan"), 0.0]]), 1).tolist() == [[False, True, False]]


# ---- units ---------------------------------------------------------------------------------------------------------------------------


def test_the_nearest_budget_of_units() -> None:
    """Costs count, and the best unit of a group stays."""
    scores = [torch.tensor([1.0, 9.0]), torch.tensor([2.0, 3.0, 8.0, 4.0])]
    costs = [torch.tensor([10, 10]), torch.tensor([1, 1, 1, 1])]
    assert [g.tolist() for g in cheapest(scores, costs, 11 / 24)] == [[True, False], [True, False, False, False]]
    assert [g.tolist() for g in cheapest(scores, costs, 13.4 / 24)] == [[True, False], [True, True, False, True]]
    with pytest.raises(CompileError) as caught:
        cheapest(scores, costs, 0.9)
    assert caught.value.code == "prune-budget" and "0.5416" in (caught.value.fix or "")
    assert [g.tolist() for g in cheapest(scores, costs, 0.5416)][1] == [True, True, False, True]


def test_fluctuation_by_its_definition() -> None:
    """Paper 22: variance times squared column norm, standardised in the layer, heads by the mean of their channels."""
    program = raised("llama")
    group = find_groups(program).groups[0]
    (site,) = group.read
    node = site.reader
    assert node is not None
    moments = collect(program, {node.args[0]: {Moments}}, TEXT)[node.args[0], Moments]  # type: ignore[misc, index]
    channels = moments.variance * program.params[site.param].double().pow(2).sum(0)
    want = ((channels - channels.mean()) / channels.std(correction=0)).reshape(2, 16).mean(1)
    new = prune(program, score="fluctuation", granularity="heads", sparsity=0.5, repair="mean_bias")
    weight = weights(new)["model.layers.0.self_attn.o_proj"].reshape(32, 2, 16)
    assert [bool((weight[:, head] == 0).all()) for head in range(2)] == [bool(want[h] == want.min()) for h in range(2)]


@pytest.mark.parametrize("parts", UNIT_PARTS, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_units_become_smaller_matrices(family: str, parts: dict[str, Any]) -> None:
    masked = applied(Prune(granularity="units", sparsity=0.4, **parts), raised(family), CONTEXT)
    small = applied(Realise(), masked)
    close(probe(small, token_ids(2, 9))["logits"], probe(masked, token_ids(2, 9))["logits"], 1e-5)
    groups = find_groups(raised(family)).groups
    removed = sum(p.numel() for p in masked.params.values()) - sum(p.numel() for p in small.params.values())
    # a threshold ends within half a unit of its budget: once for all, or in every group
    slack = [int(g.costs.max()) / 2 for g in groups]
    assert abs(removed - 0.4 * sum(int(g.costs.sum()) for g in groups)) <= (max(slack) if "allocation" in parts else sum(slack))


def test_only_heads_or_only_channels_of_some_modules() -> None:
    heads = Realise().apply(prune(raised("llama"), granularity="heads", sparsity=0.5), CONTEXT)
    assert {v.shape[0] for n, v in heads.params.items() if "k_proj" in n} == {8}  # one of two heads of width 8
    assert [g.size for g in find_groups(heads).groups] == [48, 48]  # the last head cannot go
    some = Realise().apply(prune(raised("llama"), granularity="channels", sparsity=0.5, modules=("layers.1.mlp.*",)), CONTEXT)
    assert [g.size for g in find_groups(some).groups] == [2, 48, 2, 24]


def test_a_plan_gets_the_smaller_matrices_unless_it_says_no() -> None:
    def keys(**options: Any) -> list[str]:
        return [p.key for p in demanded(Plan.from_dict({"passes": [{"prune": {"sparsity": 0.2, **options}}]}))]

    assert "realise" in keys(granularity="units")
    assert "realise" not in keys(granularity="units", realise=False)
    assert "realise" not in keys(granularity="weights")


def test_propagation_sees_the_pruned_layers() -> None:
    """Layer by layer by hand: prune what comes first, calibrate the next on the program as it is by then."""
    program, options = raised("llama"), {"score": "wanda", "allocation": "rows", "sparsity": 0.5, "repair": "obs_update"}
    parts = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    by_hand = program
    for layer in range(2):
        for names in parts:
            by_hand = prune(by_hand, **options, modules=tuple(f"layers.{layer}.*.{name}" for name in names))
    at_once = applied(Prune(**options, propagate=True), program, CONTEXT)
    for name, weight in weights(by_hand).items():
        close(weights(at_once)[name], weight, 1e-4)
    dense = weights(prune(program, **options))
    assert any(not torch.equal(weight, dense[name]) for name, weight in weights(at_once).items())


def test_propagation_without_calibration_is_the_same() -> None:
    one, two = (prune(raised("gpt2"), sparsity=0.5, propagate=propagate) for propagate in (False, True))
    assert all(torch.equal(one.params[name], value) for name, value in two.params.items())


# ---- repairs -------------------------------------------------------------------------------------------------------------------------


def outputs(program: Program, name: str, x: Tensor) -> Tensor:
    """What one product gives for the rows x [T, K]."""
    node = products(program)[name]
    args = [program.params[str(a.target)].double() if isinstance(a, Node) else None for a in node.args[1:]]
    return torch.nn.functional.linear(x, *args)


def inputs(program: Program, name: str) -> Tensor:
    """Rows [T, K] that the product reads on the calibration text."""
    edit = program.edit("test")
    edit.outputs(seen=edit[products(program)[name]].args[0])  # type: ignore[arg-type]
    return probe(edit.done(1, 1), TEXT)["seen"].double().flatten(0, -2)


@pytest.mark.parametrize("granularity", ["units", "weights"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_mean_bias_keeps_the_mean_of_every_output(family: str, granularity: str) -> None:
    program = raised(family)
    new = prune(program, score="fluctuation", granularity=granularity, sparsity=0.5, repair="mean_bias")
    bare = prune(program, score="fluctuation", granularity=granularity, sparsity=0.5)
    for name in [n for n in products(program) if n.endswith(("down_proj", "o_proj", "c_proj"))]:
        x = inputs(program, name)
        want, have, worse = (outputs(p, name, x).mean(0) for p in (program, new, bare))
        assert float((have - want).abs().max()) < 1e-3 * float(want.abs().max())
        assert float((worse - want).abs().max()) > 1e-2 * float(want.abs().max())


def error(old: Program, new: Program, name: str) -> float:
    x = inputs(old, name)
    return float((outputs(old, name, x) - outputs(new, name, x)).pow(2).mean())


def test_each_repair_lowers_the_error_that_it_is_for() -> None:
    program, name = raised("llama"), "model.layers.0.mlp.down_proj"
    columns = {"score": "fluctuation", "granularity": "channels", "sparsity": 0.5}
    errors = [error(program, prune(program, **columns, repair=r), name) for r in ("nothing", "mean_bias", "least_squares")]
    assert errors[0] > errors[1] > errors[2]
    single = {"score": "wanda", "allocation": "rows", "sparsity": 0.5}
    assert error(program, prune(program, **single, repair="obs_update"), name) < error(program, prune(program, **single), name)


def test_obs_update_is_the_least_squares_fit_of_a_suffix() -> None:
    """With the first columns pruned, every later weight takes part: the result is the regression on them (Frantar and Alistarh, eq. 2)."""
    program, name = raised("llama"), "model.layers.0.mlp.down_proj"
    node, weight = products(program)[name], weights(program)[name]
    loud = program.replace(params={**program.params, f"{name}.weight": torch.cat((weight[:, :20] * 1e-4, weight[:, 20:]), 1)})
    new = prune(loud, sparsity=20 / 48, repair={"obs_update": {"damp": 1e-6, "columns": 7}}, modules=(name,))
    gram = collect(program, {node.args[0]: {Gram}}, TEXT)[node.args[0], Gram].matrix  # type: ignore[misc, index]
    gram = gram + 1e-6 * gram.diagonal().mean() * torch.eye(48)
    old, have = weights(loud)[name].double(), weights(new)[name].double()
    assert bool((have[:, :20] == 0).all())
    want = old[:, 20:] + old[:, :20] @ torch.linalg.solve(gram[20:, 20:], gram[20:, :20]).t()
    close(have[:, 20:], want, 1e-5)


@pytest.mark.parametrize("granularity", ["weights", "2:4"])
@pytest.mark.parametrize("keep_sign", [True, False])
def test_swap_moves_the_mean_and_no_value(granularity: str, keep_sign: bool) -> None:
    """Paper 40: as many weights in every row, kept ones bit for bit, and a mean of outputs nearer to that of the dense layer."""
    program = raised("llama")
    options: dict[str, Any] = {"score": "wanda", "granularity": granularity, "allocation": "rows"}
    options |= {"sparsity": 0.6} if granularity == "weights" else {}
    before, after = prune(program, **options), prune(program, **options, repair={"swap": {"keep_sign": keep_sign}})
    moved = 0
    for name, old in weights(program).items():
        was, now = weights(before)[name], weights(after)[name]
        block = 4 if granularity == "2:4" else now.shape[1]
        assert torch.equal(*((w != 0).reshape(-1, block).sum(1) for w in (was, now)))
        assert torch.equal(now[now != 0], old[now != 0])
        mean = inputs(program, name).mean(0)
        lost = [((old - w).double() @ mean).abs() for w in (was, now)]
        if keep_sign or granularity == "2:4":  # else the last exchange of a row may overshoot
            assert bool((lost[1] <= lost[0] + 1e-6).all())
            assert float(lost[1].sum()) <= float(lost[0].sum())
        moved += int((was != now).sum())
    assert moved > 100


def test_swap_of_no_cycles_is_nothing() -> None:
    options: dict[str, Any] = {"score": "wanda", "allocation": "rows", "sparsity": 0.5}
    one, two = prune(raised("llama"), **options), prune(raised("llama"), **options, repair={"swap": {"cycles": 0}})
    assert all(torch.equal(a, b) for a, b in zip(weights(one).values(), weights(two).values(), strict=True))


# ---- schedules and training ------------------------------------------------------------------------------------------------------------


def test_a_cubic_schedule() -> None:
    """From the first share to the last, and level at the end."""
    shares = Cubic(steps=100, initial=0.2).shares(0.8)
    assert shares[0] == pytest.approx(0.2) and shares[-1] == 0.8 and len(shares) == 101
    steps = np.diff(shares)
    assert (steps > 0).all() and (np.diff(steps) < 0).all() and steps[-1] < 1e-6
    assert Cubic(steps=1).shares(0.5) == [0.0, 0.5]


@pytest.mark.parametrize("options", [{"granularity": "weights"}, {"granularity": "units"}], ids=str)
def test_a_schedule_without_training_changes_nothing(options: dict[str, Any]) -> None:
    """Magnitudes stay what they are, so the steps end where one step does."""
    program = raised("llama")
    one, many = (prune(program, sparsity=0.5, schedule=schedule, **options) for schedule in ("at_once", {"cubic": {"steps": 3}}))
    assert one.params.keys() == many.params.keys()
    for name, value in many.params.items():
        assert torch.equal(value, one.params[name])


def divergence(dense: Program, other: Program, samples: Tensor) -> float:
    want, have = (probe(p, samples)["logits"].log_softmax(-1) for p in (dense, other))
    return float((want.exp() * (want - have)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "gpt2", "cnn"])
def test_training_makes_up_for_zeros_and_leaves_them(family: str) -> None:
    program = apply(tiny_program(), FoldBatchNorm()) if family == "cnn" else raised(family)
    samples = images(8, 20, 18) if family == "cnn" else TEXT
    options: dict[str, Any] = {"sparsity": 0.6, "schedule": {"cubic": {"steps": 2}}}
    tune = {"every": 3, "last": 12, "rate": 3e-3, "batch": 4}
    before = {name: value.clone() for name, value in program.params.items()}
    bare, trained = (applied(Prune(**options, tune=t), program, Context(samples)) for t in (None, tune))
    assert divergence(program, trained, samples) < 0.8 * divergence(program, bare, samples)
    zeros = {n: int((v == 0).sum()) for n, v in trained.params.items() if n.endswith("*m")}
    assert zeros and all(count == round(0.6 * trained.params[n].numel()) for n, count in zeros.items())
    assert all(torch.equal(program.params[n], v) for n, v in before.items())
    assert any(n.endswith("*t") for n in trained.params)  # all weights are trained, not the pruned ones alone


def test_training_of_no_steps_is_none() -> None:
    one, two = (prune(raised("llama"), sparsity=0.5, tune=tune) for tune in (None, {"every": 0, "last": 0}))
    assert all(torch.equal(one.params[name], value) for name, value in two.params.items())


def test_refuses_training_that_diverges() -> None:
    with pytest.raises(CompileError) as caught:
        prune(raised("llama"), sparsity=0.5, tune={"last": 8, "rate": 1e30})
    assert caught.value.code == "pass-refused" and "rate" in (caught.value.fix or "")


# ---- refusals ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, "sparsity"),
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": 0.5, "granularity": "2:4"}, "N:M"),
        ({"granularity": "4:4"}, "removes nothing"),
        ({"granularity": "units", "sparsity": 0.5, "propagate": True}, "every matrix"),
        ({"granularity": "units", "sparsity": {"*": 0.5}}, "share one"),
        ({"sparsity": {"*": 1.5}}, "less than 1"),
        ({"granularity": "2:4", "schedule": "cubic"}, "schedule"),
        ({"granularity": "blocks", "sparsity": 0.5}, "granularity"),
        ({"granularity": "units", "sparsity": 0.5, "repair": "swap"}, "single weights"),
        ({"score": "taste", "sparsity": 0.5}, "taste"),
    ],
)
def test_refuses_plans(options: dict[str, Any], word: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_dict({"passes": [{"prune": options}]})
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        ({"granularity": "2:5"}, "prune-pattern", "M"),
        ({"granularity": "units", "sparsity": 0.99}, "prune-budget", "0."),
        ({"granularity": "heads", "sparsity": 0.5, "modules": ("q_proj",)}, "prune-frozen", "weights"),
        ({"sparsity": 0.5, "modules": ("experts",)}, "pass-no-match", "q_proj"),
        ({"sparsity": {"experts": 0.5}}, "pass-no-match", "q_proj"),
        ({"sparsity": 0.5, "score": "wanda"}, "pass-refused", "calibration"),
        ({"sparsity": 0.5, "score": "wanda", "repair": "least_squares"}, "pass-refused", "channels"),
    ],
)
def test_refuses_models(options: dict[str, Any], code: str, word: str) -> None:
    context = Context() if word == "calibration" else CONTEXT
    with pytest.raises(CompileError) as caught:
        Prune(**options).apply(raised("llama"), context)
    assert caught.value.code == code and word in (caught.value.fix or "")


def test_refuses_weights_that_are_not_numbers() -> None:
    program = raised("llama")
    broken = {n: v * torch.nan if n.endswith("layers.1.mlp.up_proj.weight") else v for n, v in program.params.items()}
    with pytest.raises(CompileError) as caught:
        Prune(sparsity=0.5).apply(program.replace(params=broken), CONTEXT)
    assert caught.value.code == "pass-refused" and "mlp" in (caught.value.node or "")


# ---- properties ----------------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.tuples(st.floats(-9, 9), st.integers(1, 50)), min_size=1, max_size=9), min_size=1, max_size=6), st.floats(0, 1))
def test_property_budget(groups: list[list[tuple[float, int]]], share: float) -> None:
    """Nearest to the budget that a threshold can come, one unit of each group left; or a refusal that names what can be met."""
    scores, costs = ([torch.tensor([float(u[i]) for u in g]) for g in groups] for i in (0, 1))
    costs = [c.long() for c in costs]
    total = int(sum(c.sum() for c in costs))
    try:
        gone = cheapest(scores, costs, share)
    except CompileError as refused:
        most = float((refused.fix or "").rsplit(" ", 1)[1])
        assert most < share
        gone = cheapest(scores, costs, most)
        share = most
    assert all(not bool(g.all()) for g in gone)
    removed = sum(int(c[g].sum()) for c, g in zip(costs, gone, strict=True))
    assert abs(removed - share * total) <= max(int(c.max()) for c in costs) / 2 + 1e-6
    free = [
        (s, g) for ss, gs in zip(scores, gone, strict=True) for i, (s, g) in enumerate(zip(ss, gs, strict=True)) if i != int(ss.argmax())
    ]
    assert max((float(s) for s, g in free if g), default=-np.inf) <= min((float(s) for s, g in free if not g), default=np.inf)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(POOL),
    st.sampled_from(UNIT_PARTS),
    st.sampled_from(["heads", "channels", "units"]),
    st.floats(0.05, 0.6),
    st.integers(0, 9),
)
def test_property(name: str, parts: dict[str, Any], granularity: str, sparsity: float, seed: int) -> None:
    """Whatever the tuple: masked and smaller program agree, and a second run finds nothing to do."""
    program, context = pooled(name)[1], Context(token_ids(3, 48, seed=seed))
    part = Prune(granularity=granularity, sparsity=sparsity, **parts)
    try:
        masked = part.apply(program, context)
    except CompileError as refused:
        assume(refused.code not in ("prune-budget", "prune-frozen"))  # too much, or a single head
        raise
    assert part.apply(masked, context) is masked
    small, ids = Realise().apply(masked, context), token_ids(1, 5, seed=seed)
    close(probe(small, ids)["logits"], probe(masked, ids)["logits"], 1e-5)
