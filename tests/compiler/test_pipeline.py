"""The pipeline: order, verification, effects, and what it shows."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import close, decoding, one_layer, raised, token_ids

from planc.backends.reference import probe
from planc.compiler.passbase import CHANGES, EXACT, Context, Effect, Pass, Stage
from planc.compiler.pipeline import bisect, dump_level, ordered, run_passes
from planc.compiler.program import Program
from planc.passes.argmax import Argmax
from planc.passes.fuse_projections import FuseProjections
from planc.passes.kv_cache import KvCache
from planc.passes.logits_rows import LogitsRows
from planc.passes.quantize_weights import QuantizeWeights
from planc.passes.skip_layers import SkipLayers
from planc.passes.smooth import Smooth
from planc.passes.tap import Tap
from planc.passes.top_k import TopK
from planc.runtime import registry
from planc.runtime.errors import CompileError, PlanError

aten = torch.ops.aten
SAMPLE = token_ids(2, 12)
TEXT = Context(token_ids(2, 24))


@contextmanager
def unregistered() -> Iterator[None]:
    """What is defined inside does not stay in the registry."""
    before = dict(registry._PARTS["pass"])
    try:
        yield
    finally:
        registry._PARTS["pass"].clear()
        registry._PARTS["pass"].update(before)


with unregistered():

    class Scaled(Pass):
        """Multiplies the logits by a number and says of itself what it is told to say."""

        stage: ClassVar[Stage] = Stage.STRUCTURE
        by: float = 1.0
        says: str = "exact"

        @property
        def effect(self) -> Effect:
            return EXACT if self.says == "exact" else CHANGES

        def apply(self, program: Program, context: Context) -> Program:
            edit = program.edit(self.key)
            logits = edit[program.outputs["logits"]]
            with edit.after(logits):
                edit.replace(logits, edit.call(aten.mul.Tensor, logits, self.by))
            return edit.done(1, 1)

    class Refusing(Pass):
        """Refuses every program."""

        stage: ClassVar[Stage] = Stage.OUTPUTS

        def apply(self, program: Program, context: Context) -> Program:
            raise CompileError("pass-refused", "not with me")

    class Breaking(Pass):
        """Drops the logits."""

        stage: ClassVar[Stage] = Stage.OUTPUTS

        def apply(self, program: Program, context: Context) -> Program:
            edit = program.edit(self.key)
            edit.outputs(logits=None, other=edit[program.outputs["logits"]])
            return edit.done(1, 1)

    class Egg(Pass):
        """Waits for the hen."""

        stage: ClassVar[Stage] = Stage.OUTPUTS
        after: ClassVar[tuple[str, ...]] = ("hen",)

    class Hen(Pass):
        """Waits for the egg."""

        stage: ClassVar[Stage] = Stage.OUTPUTS
        after: ClassVar[tuple[str, ...]] = ("egg",)


ALL = [
    TopK(k=2),
    Argmax(),
    LogitsRows(),
    KvCache(),
    QuantizeWeights(),
    Smooth(),
    FuseProjections(),
    SkipLayers(layers=(0,)),
    Tap(layers=(0,)),
]


@settings(max_examples=30, deadline=None)
@given(st.permutations(ALL))
def test_order(passes: list[Pass]) -> None:
    done = ordered(passes)
    assert sorted(p.key for p in done) == sorted(p.key for p in passes)
    assert [p.stage for p in done] == sorted(p.stage for p in done)
    keys = [p.key for p in done]
    assert keys.index("smooth") < keys.index("quantize_weights")  # `after`, against the order given
    for stage in Stage:  # what nothing is declared about keeps its order
        free = [p.key for p in passes if p.stage == stage and p.key not in ("smooth", "quantize_weights")]
        assert [k for k in keys if k in free] == free


def test_passes_that_wait_for_each_other() -> None:
    with pytest.raises(PlanError) as caught:
        ordered([Argmax(), Egg(), Hen()])
    assert caught.value.code == "plan-conflict"
    assert "egg, hen" in caught.value.message
    assert [p.key for p in ordered([Egg(), Argmax()])] == ["egg", "argmax"]  # it waits only for what is there


def test_effects_are_reported() -> None:
    told: list[str] = []
    passes = [Argmax(), QuantizeWeights(), FuseProjections(), SkipLayers(layers=()), KvCache(trees="none")]
    program, effects = run_passes(raised("llama"), passes, TEXT, sample=SAMPLE, note=told.append)
    names = ["fuse_projections", "skip_layers", "quantize_weights", "kv_cache", "argmax"]
    assert [e.name for e in effects] == told == names
    assert [c.pass_name for c in program.history[4:]] == [n for n in names if n != "skip_layers"]
    by_name = {e.name: e for e in effects}
    assert by_name["skip_layers"].notes == ("nothing to do",)
    assert by_name["skip_layers"].largest_difference is None
    assert by_name["quantize_weights"].declared == "changes"
    assert by_name["quantize_weights"].params_bytes_after < by_name["quantize_weights"].params_bytes_before / 3
    assert by_name["fuse_projections"].counts == {"matched": 4, "rewritten": 4}
    float_logits, int8_logits = probe(raised("llama"), SAMPLE)["logits"], probe(program, SAMPLE)["logits"]
    assert (by_name["quantize_weights"].largest_difference or 0) == pytest.approx(float((float_logits - int8_logits).abs().max()), rel=0.01)
    assert (by_name["fuse_projections"].largest_difference or 0) < 1e-5
    for before, after in zip(effects, effects[1:], strict=False):
        assert (before.nodes_after, before.params_bytes_after) == (after.nodes_before, after.params_bytes_before)


def test_a_pass_that_lies_is_refused() -> None:
    with pytest.raises(CompileError) as caught:
        run_passes(one_layer(), [Scaled(by=1.001)], TEXT, sample=SAMPLE)
    assert caught.value.code == "equality-failed"
    assert caught.value.where == "pass scaled"
    assert "--disable scaled" in (caught.value.fix or "")
    run_passes(one_layer(), [Scaled(by=1.0)], TEXT, sample=SAMPLE)
    run_passes(one_layer(), [Scaled(by=1.001, says="changes")], TEXT, sample=SAMPLE)
    run_passes(one_layer(), [Scaled(by=1.001)], TEXT)  # nothing to compare on


def test_not_a_number_is_not_equal() -> None:
    broken = Scaled(by=float("nan"))
    with pytest.raises(CompileError) as caught:
        run_passes(one_layer(), [broken], TEXT, sample=SAMPLE)
    assert caught.value.code == "equality-failed"
    assert bisect(one_layer(), [Argmax(), broken], TEXT, SAMPLE) == "scaled"


def test_a_pass_that_breaks_the_program_is_caught() -> None:
    with pytest.raises(CompileError) as caught:
        run_passes(one_layer(), [Breaking()], TEXT)
    assert caught.value.code == "verify-failed"
    program, _ = run_passes(one_layer(), [Breaking()], TEXT, check=False)
    assert list(program.outputs) == ["other"]


def test_an_error_says_what_ran_before() -> None:
    with pytest.raises(CompileError) as caught:
        run_passes(one_layer(), [Refusing(), FuseProjections(), KvCache(trees="none")], TEXT)
    where = caught.value.where or ""
    assert where.startswith("pass refusing, after: ")
    assert where.endswith("fuse_projections, kv_cache")


def test_bisect_finds_the_pass() -> None:
    passes = [Argmax(), KvCache(trees="none"), Scaled(by=1.5), FuseProjections()]
    assert bisect(one_layer(), passes, TEXT, SAMPLE) == "scaled"
    assert bisect(one_layer(), [p for p in passes if p.key != "scaled"], TEXT, SAMPLE) is None
    assert bisect(one_layer(), [Scaled(by=1.0001)], TEXT, SAMPLE) is None
    assert bisect(one_layer(), [Scaled(by=1.0001)], TEXT, SAMPLE, tolerance=1e-6) == "scaled"


def test_provenance() -> None:
    program, _ = run_passes(
        raised("llama"), [FuseProjections(), Smooth(), QuantizeWeights(), KvCache(trees="fused"), TopK(k=3), Argmax()], TEXT
    )
    traced = {n.name for n in raised("llama").main.nodes if "pass" not in n.meta}
    made: dict[str, int] = {}
    for node in program.main.nodes:
        if "pass" in node.meta:
            made[node.meta["pass"]] = made.get(node.meta["pass"], 0) + 1
            assert "origin" in node.meta or node.op == "placeholder" or "rope_table" in node.name
        else:
            assert node.name in traced or node.op == "output"
    assert set(made) == {
        "raise_rms_norm",
        "raise_rope",
        "raise_glu",
        "fuse_projections",
        "smooth",
        "quantize_weights",
        "kv_cache",
        "top_k",
        "argmax",
    }
    product = next(n for n in program.main.nodes if "linear_int8" in str(n.target))
    assert "model.layers.0.self_attn" in str(product.meta["nn_module_stack"])


def test_dump(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def shown(level: str) -> str:
        monkeypatch.setenv("DUMP", level)
        run_passes(one_layer(), [Argmax()], TEXT)
        return capfd.readouterr().err

    assert shown("0") == shown("") == shown("loud") == ""
    assert dump_level() == 0
    first = shown("1").splitlines()
    assert first[0] == "passes: argmax"
    assert first[1].startswith("  argmax: ") and len(first) == 2
    second = shown("2")
    assert "graph main:" in second and "made by" not in second
    third = shown("3")
    assert "  made by argmax:\n    argmax_default = aten.argmax.default  from linear_7" in third
    assert "graph main:" in third


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6))
def test_exact_passes_in_any_order(seed: int) -> None:
    """Passes that declare themselves exact give the same logits, whatever the order in the plan."""
    passes: list[Pass] = [FuseProjections(), Smooth(), KvCache(trees="fused"), LogitsRows(), Argmax(), TopK(k=3), Tap(layers=(0,))]
    random.Random(seed).shuffle(passes)
    program, effects = run_passes(one_layer(), passes, TEXT, sample=SAMPLE)
    assert {e.declared for e in effects} == {"exact"}
    close(probe(program, SAMPLE)["logits"], probe(one_layer(), SAMPLE)["logits"], 2e-4)
    assert set(program.outputs) >= {"logits", "argmax", "top_ids", "tap.0", "present.0.key"}
    assert set(program.outputs) == {*decoding(one_layer(), "fused").outputs, "tap.0"}
