"""`planc fit`: a filter from oracle rollouts, in the artifact and out of it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1]))

from masked_tiny import home
from safetensors.numpy import save_file
from typer.testing import CliRunner

import planc
from planc.compiler.cli import app
from planc.compiler.fit import fit
from planc.compiler.plan import Plan
from planc.runtime.errors import ArtifactError, InputError, PlanError
from planc.runtime.filler import Filled, Filler
from planc.runtime.masked.learned_filter import accepts, read_filter

TEXT = """
planc: 1
decode:
  max_new_tokens: 16
  masked: {window: {blocks: {size: 8}}, select: {learned_filter: {file: f.safetensors, theta: 0.8}}}
"""


def test_fit_writes_what_the_plan_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line; then the plan runs, and its artifact without the plan's folder."""
    monkeypatch.setenv("PLANC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "plan.yaml").write_text(TEXT)
    (tmp_path / "prompts.txt").write_text("".join(f"w{i} w{i + 1} w{3 * i + 4}\n" for i in range(5, 17)))
    with pytest.raises(InputError, match="there is no filter") as caught:
        planc.compile(home("llada"), tmp_path / "plan.yaml")
    assert "planc fit" in str(caught.value.fix)
    arguments = ["fit", str(tmp_path / "plan.yaml"), "--model", str(home("llada")), "--prompts", str(tmp_path / "prompts.txt"), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    weights = read_filter(tmp_path / "f.safetensors")
    assert [w.shape for w in weights] == [(8, 8), (8,), (8, 8), (8,)]
    sure = accepts(weights, np.ones(8, np.float32))
    assert sure.shape == (8,) and ((sure >= 0) & (sure <= 1)).all() and sure.std() > 0
    exe = planc.compile(home("llada"), tmp_path / "plan.yaml", out=tmp_path / "made")
    (tmp_path / "f.safetensors").unlink()
    shutil.copytree(tmp_path / "made", tmp_path / "moved")
    loaded = planc.load(tmp_path / "moved")
    assert isinstance(exe, Filler) and isinstance(loaded, Filler)
    made, again = exe.generate([5, 6, 7]), loaded.generate([5, 6, 7])
    assert isinstance(made, Filled) and isinstance(again, Filled)
    assert made.canvas == again.canvas
    with pytest.raises(PlanError, match="the filter is for blocks of 8"):
        loaded.with_plan(window={"blocks": {"size": 4}}).generate([5, 6, 7])


def test_plans_without_anything_to_learn_are_refused() -> None:
    with pytest.raises(PlanError, match="nothing in the plan is learned") as caught:
        fit(Plan(), home("llada"), ["w5"])
    assert caught.value.code == "plan-requires"
    plan = Plan.from_dict({"decode": {"masked": {"select": {"learned_filter": {"file": "f.safetensors"}}}}})
    with pytest.raises(PlanError, match="blocks of one size"):
        fit(plan, home("llada"), ["w5"])


def test_files_that_are_no_filters_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no filter")
    save_file({"first.weight": np.zeros((3, 3), np.float32)}, tmp_path / "half")
    save_file(
        {name: np.zeros((2, 3), np.float32) for name in ("first.weight", "first.bias", "second.weight", "second.bias")}, tmp_path / "odd"
    )
    for name in ("text", "half", "odd"):
        with pytest.raises(ArtifactError, match="is not a filter"):
            read_filter(tmp_path / name)
