"""The counts of `planc explain` against numbers worked out from the configuration."""

from __future__ import annotations

import json
from pathlib import Path

import models_tiny
import pytest
import vision_tiny
from typer.testing import CliRunner

from planc.compiler import explain
from planc.compiler.cli import app
from planc.compiler.explain import PAST, Step, measure, table, write_html
from planc.compiler.page import _tick, page
from planc.compiler.plan import Plan
from planc.compiler.told import Piece, Told
from planc.passes.fuse_projections import FuseProjections
from planc.passes.quantize_weights import QuantizeWeights
from planc.passes.skip_layers import SkipLayers
from planc.runtime.contract import Contract, CostTable
from planc.runtime.errors import InputError

HIDDEN, MIDDLE, LAYERS, HEADS, KV_HEADS = 32, 48, 2, 4, 2
WIDTH = HIDDEN // HEADS
LAYER_WEIGHTS = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV_HEADS * WIDTH + 3 * HIDDEN * MIDDLE
HEAD = HIDDEN * models_tiny.VOCAB


def test_counts_of_a_llama() -> None:
    program = models_tiny.raised("llama")
    step = measure("raise", program)
    attention = 4 * HEADS * WIDTH * PAST
    assert step.flops == LAYERS * (2 * LAYER_WEIGHTS + attention) + 2 * HEAD
    stored = sum(value.numel() for value in program.params.values())
    assert step.parameters == stored
    assert step.bytes == program.bytes()
    assert step.nodes == len(program.main.nodes) > step.calls > 0
    assert (step.matched, step.rewritten) == (None, None)


def test_raising_changes_no_flops_of_products() -> None:
    before, after = measure("trace", models_tiny.traced("llama")), measure("raise", models_tiny.raised("llama"))
    assert before.flops == after.flops
    assert before.nodes > after.nodes


def test_a_skipped_layer_is_gone_from_every_column() -> None:
    program = models_tiny.raised("gemma3")
    before = measure("raise", program)
    after = measure("skip_layers", models_tiny.apply(program, SkipLayers(layers=(2,))), changed=True)
    assert (after.matched, after.rewritten) == (1, 1)
    assert after.nodes < before.nodes
    assert after.bytes < before.bytes
    assert after.flops < before.flops


def test_steps_follow_the_pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models_tiny.model("llama").save_pretrained(tmp_path / "model")
    steps = explain.explain(str(tmp_path / "model"), Plan(passes=[{"skip_layers": {"layers": [1]}}]))
    names = [step.name for step in steps]
    assert names[:3] == ["trace", "raise", "skip_layers"]
    assert {"kv_cache", "argmax"} < set(names)
    skip = steps[2]
    assert skip.rewritten == 1
    assert skip.flops < steps[1].flops
    assert skip.as_dict()["notes"] == list(skip.notes)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_zeros_that_nothing_skips_are_told(family: str) -> None:
    program = models_tiny.raised(family)
    assert explain.unused_zeros(program) is None
    name, weight = next((n, w) for n, w in program.params.items() if "mlp" in n and w.dim() == 2)
    half = weight.clone()
    half[: len(half) // 2] = 0.0
    masked = program.replace(params={**program.params, name: half})
    said = explain.unused_zeros(masked)
    assert said is not None and "in 1 of" in said and "no time is saved" in said
    steps = list(explain._measured([("raise", program), ("mask", masked), ("next", masked)]))
    assert [step.notes for step in steps] == [(), (said,), ()], "it is said once"


def test_rounding_to_8_bits_is_no_mask() -> None:
    small = models_tiny.apply(models_tiny.raised("llama"), FuseProjections())
    assert explain.unused_zeros(models_tiny.apply(small, QuantizeWeights(format="int8"))) is None


def test_table_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    steps = [
        Step("raise", 100, 90, 2_000_000, 8 << 20, 4_000_000),
        Step("quantize", 110, 95, 2_000_000, 2 << 20, 4_000_000, 3, 2, ("<kept> [one]",)),
    ]
    Console(width=200).print(table(steps, "plan on model"))
    shown = capsys.readouterr().out
    for piece in ("110 (+10.0%)", "2.0 (-75.0%)", "2/3", "<kept> [one]", "2.00 M"):
        assert piece in shown
    write_html(tmp_path / "deep" / "e.html", steps, "a <plan>")
    page = (tmp_path / "deep" / "e.html").read_text()
    assert "&lt;kept&gt; [one]" in page
    assert "a &lt;plan&gt;" in page
    assert "<kept>" not in page
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_html(tmp_path / "folder", steps, "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "folder"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_modules_add_up(family: str) -> None:
    program = models_tiny.decoding(models_tiny.raised(family))
    step = measure("all", program)
    assert sum(group.bytes for group in step.groups) == program.bytes() == step.bytes
    assert sum(group.flops for group in step.groups) == step.flops
    assert sum(part.calls for group in step.groups for part in group.parts) == step.calls == sum(count for _, count in step.kinds)
    layers = [group for group in step.groups if group.name.rpartition(".")[2].isdigit()]
    assert len(layers) == len(program.states)
    assert len({layer.bytes for layer in layers}) == 1
    assert all(
        {part.name for part in layer.parts if part.flops} == {part.name for part in layers[0].parts if part.flops} for layer in layers
    )


def test_a_removed_layer_is_a_gap_in_the_picture() -> None:
    program = models_tiny.raised("gemma3")
    before = measure("raise", program)
    after = measure("skip_layers", models_tiny.apply(program, SkipLayers(layers=(2,))), changed=True)
    missing = {group.name for group in before.groups} - {group.name for group in after.groups}
    assert [name.rpartition(".")[2] for name in missing] == ["2"]
    shown = page("t", [before, after], "about")
    assert shown.count('class="gone"') == 2, "once in the view of weights, once in that of work"
    assert "<summary>skip_layers" in shown


def test_page_of_everything_names_no_other_file() -> None:
    before = measure("trace", vision_tiny.tiny_program())
    table = CostTable(rows=(1, 8), past=(16, 512), measured=(((1.25, 2.5), (1.5, 4.75)),))
    told = Told("a <prompt>", (Piece("one ", (), 0), Piece("<two>", ("prompt_lookup", "token_recycling"), 1)), ((0, 0), (3, 1)), 2,
                ("prompt_lookup", "token_recycling"), {"prompt_lookup": 3, "token_recycling": 1}, {"prompt_lookup": 1})  # fmt: skip
    shown = page("t", [before, before], "about", Contract(cost=table), told)
    for piece in (
        "1.25",
        "4.75",
        "a &lt;prompt&gt;",
        "&lt;two&gt;",
        "prompt_lookup, token_recycling, in pass 1",
        "prompt_lookup: 1 of 3 guesses accepted",
    ):
        assert piece in shown
    assert "Memory over a pass" in shown and shown.count("<polygon") == 2
    for outside in ("http:", "https:", "src=", "@import", "url(", "<script"):
        assert outside not in shown
    assert "Cost of a pass" not in page("t", [before, before], "about", Contract())


@pytest.mark.parametrize("most", [0.003, 0.9, 1, 4.2, 60, 61, 12345])
def test_ticks_are_round_and_few(most: float) -> None:
    step = _tick(most)
    assert 2 < most / step <= 6
    assert f"{step:e}"[0] in "125"


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLANC_CACHE", str(tmp_path / "cache"))
    models_tiny.model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "p.yaml").write_text("planc: 1\ndecode: {speculative: {drafter: prompt_lookup}}\n")
    arguments = ["explain", str(tmp_path / "p.yaml"), "--model", str(tmp_path / "model"), "--json"]
    done = CliRunner().invoke(app, [*arguments, "--html", str(tmp_path / "e.html")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["steps"][0]["kinds"]["linear"] > 0
    assert "Cost of a pass" not in (tmp_path / "e.html").read_text(), "nothing was compiled"
    refused = CliRunner().invoke(app, [*arguments, "--prompt", "x"])
    assert (refused.exit_code, "--html" in refused.stderr) == (2, True)
