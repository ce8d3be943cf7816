"""`planc search` on tiny models: candidates against compiled plans, fitness, budgets, state, workers, the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import eager, make, token_ids
from typer.testing import CliRunner

import planc
from planc.backends.reference import probe
from planc.compiler.cli import app
from planc.compiler.compile import Planned, calibration_blocks, demanded, rewrite
from planc.compiler.explain import explain
from planc.compiler.passbase import Context
from planc.compiler.pipeline import run_passes
from planc.compiler.plan import Plan
from planc.compiler.search.candidates import Candidates
from planc.compiler.search.fitness import Evaluator, Recipe, started
from planc.compiler.search.run import Result, search
from planc.compiler.search.workers import Processes, RayWorkers, scorer
from planc.runtime.errors import InputError, PlancError

SEARCH = """
planc: 1
passes: [smooth, quantize_weights: {block: 16, modules: {lm_head: none}}]
search:
  budget: 70% bytes
  generations: 4
  offspring: 5
  starts: 3
  length: 24
  selection: [{tokens: 48, survivors: 2}, {tokens: 96, survivors: 1}]
  space:
    - drop: {}
    - choose: {option: quantize_weights.modules, levels: [none, int8, int4_blocks], modules: "layers.*"}
"""
DROP = SEARCH.replace("smooth, quantize_weights: {block: 16, modules: {lm_head: none}}", "").rsplit("\n", 2)[0]


@cache
def tiny() -> Any:
    return make("llama", num_hidden_layers=4)


@cache
def beginning(family: str = "llama") -> Planned:
    return started(tiny() if family == "llama" else make(family))  # type: ignore[no-any-return]


@cache
def candidates(text: str = SEARCH) -> Candidates:
    return Candidates(beginning(), Plan.from_yaml(text))


@settings(max_examples=5, deadline=None)
@given(st.data())
def test_a_candidate_is_what_compiling_its_plan_gives(data: st.DataObject) -> None:
    made = candidates(SEARCH.replace("smooth, ", ""))  # smooth would calibrate on the shortened model
    point = tuple(data.draw(st.integers(0, len(unit.levels) - 1)) for unit in made.units)
    if all(point[u] for u in made.attentions):
        point = (0, *point[1:])
    plan = made.resolved(point)
    assert Plan.from_yaml(plan.to_yaml()) == plan and plan.search is None
    program, _ = run_passes(beginning().program, demanded(plan), Context(calibration_blocks(beginning().text_ids)))
    ids = token_ids(2, 11)
    assert torch.equal(probe(made.program(point), ids)["logits"], probe(program, ids)["logits"])


def test_units_of_the_search() -> None:
    made = candidates()
    assert [unit.kind for unit in made.units[:8]] == ["attention", "mlp"] * 4
    assert len(made.units) == 8 + 4 * 4  # q, k, v are one product, gate and up another
    assert made.units[8].name == "model.layers.0.self_attn.q_proj"
    assert made.attentions == [0, 2, 4, 6]
    some = Candidates(beginning(), Plan.from_yaml("planc: 1\nsearch: {space: [drop: {unit: layer, keep: [0, 3]}]}"))
    assert [(unit.name, unit.kind) for unit in some.units] == [("1", "layer"), ("2", "layer")]
    assert some.attentions == []
    assert some.resolved((1, 0)).to_dict()["passes"] == [{"skip_layers": {"layers": [1]}}]


def test_fitness_is_the_divergence_from_eager() -> None:
    made = candidates(DROP)
    ids, point = token_ids(1, 12), (0, 1, 1, 0, 0, 0, 0, 0)
    p = eager(tiny(), ids)[0, :-1].double().log_softmax(-1)
    q = probe(rewrite(tiny(), made.resolved(point), check=False).program, ids)["logits"][0, :-1].double().log_softmax(-1)
    want = float((p.exp() * (p - q)).sum())
    zero, found = Evaluator(made).divergence([made.top, point], ids[0].tolist())
    assert abs(zero) < 1e-5 and abs(found - want) < 1e-4 * want
    coarse = Evaluator(Candidates(beginning(), Plan.from_yaml(DROP + "\n  precision: bfloat16")))
    assert abs(coarse.divergence([point], ids[0].tolist())[0] - want) < 0.1 * want


def test_a_search_meets_its_budget_and_improves() -> None:
    result = search(beginning(), Plan.from_yaml(SEARCH), ["70% bytes", "50% bytes"])
    for found, share in zip(result.found, (0.7, 0.5), strict=True):
        program = rewrite(tiny(), found.plan, check=False).program
        assert program.bytes() <= share * beginning().program.bytes()
        assert abs(100 * program.bytes() / beginning().program.bytes() - found.cost) < 0.1
        assert len(found.history) == 4 and found.kl > 0
    assert result.found[0].kl < result.found[1].kl
    assert {cost for cost, _ in result.tried} >= {found.cost for found in result.found}


def test_milliseconds() -> None:
    result = search(beginning(), Plan.from_yaml(DROP), ["1000 ms"], generations=1)
    assert not any(result.found[0].point) and result.found[0].kl < 1e-6
    refused(lambda: search(beginning(), Plan.from_yaml(DROP), ["0.0001 ms"]), "search-infeasible", "ms")
    other = Plan.from_yaml(DROP + "\ntarget: {backend: reference}")
    refused(lambda: search(beginning(), other, ["1000 ms"]), "plan-conflict", "onnx")


def refused(act: Callable[[], Any], code: str, *words: str) -> None:
    with pytest.raises(PlancError) as caught:
        act()
    assert caught.value.code == code
    for word in words:
        assert word in str(caught.value)


def test_refusals(tmp_path: Path) -> None:
    plan = Plan.from_yaml(DROP)
    refused(lambda: search(beginning(), plan, ["0 attention, 4 mlp"]), "search-infeasible", "1 attention, 4 mlp")
    refused(lambda: search(beginning(), plan, ["10% params"]), "search-infeasible", "nearest that can be had", "% params")
    refused(lambda: search(beginning(), plan, ["3 layers"]), "search-infeasible", "drops no layers")
    refused(lambda: search(beginning(), plan, ["3 cows"]), "input-invalid", "--budget")
    refused(lambda: search(beginning(), plan, ["3 ms", "3 MB"]), "input-invalid", "same things")
    refused(lambda: search(beginning(), plan, workers=2), "input-invalid", "trace the model themselves")
    refused(lambda: search(beginning(), Plan()), "plan-requires", "search")
    refused(
        lambda: search(beginning(), plan.model_copy(update={"search": plan.search.model_copy(update={"budget": None})})), "input-invalid"
    )  # type: ignore[union-attr]
    refused(lambda: planc.compile(tiny(), plan), "search-open", "planc search")
    refused(lambda: explain("none", plan), "search-open", "planc search")


@pytest.mark.parametrize(
    ("search_", "code", "word"),
    [
        ("[choose: {option: prune_all.modules, levels: [1, 2]}]", "plan-requires", "prune_all"),
        ("[choose: {option: quantize_weights.shape, levels: [1, 2]}]", "plan-unknown-field", "shape"),
        ("[choose: {option: quantize_weights.modules, levels: [int8, int3]}]", "plan-bad-value", "int3"),
        ("[choose: {option: quantize_weights, levels: [int8, none]}]", "plan-bad-value", "option"),
        ("[{drop: {}}, {drop: {}}]", "plan-conflict", "only once"),
        ("[drops: {}]", "plan-unknown-name", "did you mean 'drop'"),
        ("[]", "plan-bad-value", "at least 1"),
    ],
)
def test_plans_that_cannot_be_searched(search_: str, code: str, word: str) -> None:
    text = f"planc: 1\npasses: [quantize_weights]\nsearch:\n  space: {search_}\n"
    refused(lambda: Plan.from_yaml(text), code, word, "<plan>:")


def test_schema_knows_the_search() -> None:
    schema = Plan.schema()
    jsonschema.validate(Plan.from_yaml(SEARCH).to_dict(), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"planc": 1, "search": {"space": [{"drop": {"unit": "head"}}]}}, schema)


class Killed(Exception):
    """Stands for a kill between two generations."""


def test_resuming_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    plan, state, budgets = Plan.from_yaml(SEARCH), tmp_path / "state.json", ["70% bytes", "60% bytes"]

    def run(kill: int = 0, **options: Any) -> Result:
        def progress(done: int, total: int) -> None:
            if done == kill:
                raise Killed

        return search(beginning(), plan, budgets, seed=3, progress=progress, **options)

    whole = run()
    for kill in (2, 6):
        with pytest.raises(Killed):
            run(kill, state=state, resume=kill == 6)
        assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
        assert max(entry["generation"] for entry in json.loads(state.read_text())["budgets"].values()) >= 2
    assert run(state=state, resume=True).found == whole.found
    refused(lambda: search(beginning(), plan, seed=4, state=state, resume=True), "input-invalid", "another search")
    state.write_text("{}")
    refused(lambda: run(state=state, resume=True), "input-invalid", "not the state of a search")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(path)
    return path


POINTS = [(0,) * 8, (0, 1, 0, 0, 0, 0, 0, 0), (1, 0, 0, 1, 0, 1, 0, 0), (0, 0, 1, 1, 1, 1, 0, 0)]
TEXT = [token_ids(1, 24, seed=seed)[0].tolist() for seed in range(3)]


def test_processes_score_as_one(directory: Path) -> None:
    plan = Plan.from_yaml(DROP)
    want = [sum(Evaluator(candidates(DROP)).divergence([point], piece)[0] for piece in TEXT) / 69 for point in POINTS]
    with Processes.started(Recipe(str(directory), plan, 1), 2) as workers:
        for pieces in (TEXT, TEXT[:1]):  # with one piece the points are shared out
            have = scorer(workers)(POINTS, pieces)
            assert len(have) == 4
        have = scorer(workers)(POINTS, TEXT)
    assert have == pytest.approx(want, rel=1e-4, abs=1e-7)


def test_ray_scores_as_one(directory: Path) -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed (planc[ray])")
    plan = Plan.from_yaml(DROP)
    want = [sum(Evaluator(candidates(DROP)).divergence([point], piece)[0] for piece in TEXT) / 69 for point in POINTS]
    with RayWorkers.started(Recipe(str(directory), plan, 1), 2) as workers:
        assert workers.count == 2
        have = scorer(workers)(POINTS, TEXT)
    assert not ray.is_initialized(), "the cluster that the search started is gone"
    assert have == pytest.approx(want, rel=1e-4, abs=1e-7)


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match="ray is not installed"), RayWorkers.started(Recipe(None, None), 2):
        pass


def test_command(directory: Path, tmp_path: Path) -> None:
    plan, out, png = tmp_path / "open.yaml", tmp_path / "best.yaml", tmp_path / "front.png"
    plan.write_text(DROP)
    command = ["search", str(plan), "--model", str(directory), "-o", str(out), "--png", str(png), "--seed", "1", "--json"]
    done = CliRunner().invoke(app, [*command, "--budget", "3 attention, 3 mlp", "--budget", "2 attention, 3 mlp"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout.splitlines()[-1])
    files = [Path(entry["file"]) for entry in said["plans"]]
    assert [file.name for file in files] == ["best-1.yaml", "best-2.yaml"]
    [skip] = Plan.from_yaml(files[1]).passes
    assert (len(skip.attention), len(skip.mlp)) == (2, 1)
    assert said["plans"][1]["reached"] == "2 attention, 3 mlp"
    assert png.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "best.search.json").is_file()
    again = CliRunner().invoke(app, [*command, "--budget", "3 attention, 3 mlp", "--budget", "2 attention, 3 mlp", "--resume"])
    assert json.loads(again.stdout.splitlines()[-1])["plans"] == said["plans"]
    assert CliRunner().invoke(app, ["search", str(plan), "--model", str(directory), "-o", str(out), "--budget", "9%"]).exit_code == 2
    checked = CliRunner().invoke(app, ["check", str(plan)])
    assert "search: drop" in checked.stdout
