"""`planc.compile`: what a plan demands, what is refused, and that nothing is left behind by a failure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import MAX_LENGTH, VOCAB, eager, make, model, token_ids
from torch import nn

import planc
import planc.backends.onnx.artifact
import planc.compiler.compile
from planc.backends.reference import probe
from planc.compiler.compile import context_of, demanded, rewrite, text_of, tree_form
from planc.compiler.models import LoadedModel
from planc.compiler.plan import Plan
from planc.runtime.artifact import read_artifact
from planc.runtime.errors import CompileError, InputError, ModelError, PlanError

LOOKUP: dict[str, Any] = {"decode": {"speculative": {"drafter": [{"prompt_lookup": {}}]}}}


def keys(plan: dict[str, Any], *disable: str) -> list[str]:
    return [p.key for p in demanded(Plan.from_dict(plan), disable)]


def test_demands() -> None:
    assert keys({}) == ["kv_cache", "logits_rows", "argmax"]
    assert keys({"passes": [{"quantize_weights": {}}]}) == ["quantize_weights", "fuse_projections", "kv_cache", "logits_rows", "argmax"]
    assert keys({"passes": [{"quantize_weights": {}}, {"fuse_projections": {}}]}).count("fuse_projections") == 1
    assert keys({"passes": [{"kv_cache": {"capacity": 64}}]}) == ["kv_cache", "logits_rows", "argmax"]
    assert keys(LOOKUP) == ["kv_cache", "logits_rows", "argmax"]
    recycling = {"decode": {"speculative": {"drafter": [{"token_recycling": {}}]}}}
    passes = demanded(Plan.from_dict(recycling))
    assert [p.key for p in passes] == ["kv_cache", "logits_rows", "argmax", "top_k"]
    assert passes[-1].k == Plan.from_dict(recycling).decode.speculative.drafter[0].needs_top_k  # type: ignore[attr-defined, union-attr]
    assert keys({**recycling, "passes": [{"top_k": {"k": 3}}]}).count("top_k") == 1
    assert keys({"passes": [{"quantize_weights": {}}]}, "fuse_projections", "quantize_weights") == ["kv_cache", "logits_rows", "argmax"]
    with pytest.raises(PlanError) as caught:
        keys({}, "no_such_pass")
    assert caught.value.code == "plan-unknown-name"


@pytest.mark.parametrize(
    ("shape", "exactness", "form"),
    [
        ("chain", "bitwise", "none"),
        ("chain", "tokens", "none"),
        ("tree", "bitwise", "split"),
        ("tree", "tokens", "fused"),
        ("auto", "tokens", "fused"),
        ("auto", "bitwise", "none"),
    ],
)
def test_form_of_attention(shape: str, exactness: str, form: str) -> None:
    data = {"exactness": exactness, "decode": {"speculative": {**LOOKUP["decode"]["speculative"], "tree": {"shape": shape}}}}
    plan = Plan.from_dict(data)
    assert tree_form(plan) == form
    cache = next(p for p in demanded(plan) if p.key == "kv_cache")
    assert cache.trees == form  # type: ignore[attr-defined]
    own = Plan.from_dict({**data, "passes": [{"kv_cache": {"trees": "fused"}}]})
    assert next(p for p in demanded(own) if p.key == "kv_cache").trees == "fused"  # type: ignore[attr-defined]
    assert tree_form(Plan()) == "none"


def test_rewrite_keeps_the_function() -> None:
    planned = rewrite(model("llama"), {"passes": [{"smooth": {}}, {"tap": {"layers": [1]}}]})
    ids = token_ids(2, 13)
    out = probe(planned.program, ids)
    want = eager(model("llama"), ids)
    assert float((out["logits"] - want).abs().max()) < 2e-4 * float(want.abs().max())
    assert [e.name for e in planned.effects] == ["smooth", "kv_cache", "tap", "logits_rows", "argmax"]
    assert all(e.declared == "exact" for e in planned.effects)
    assert planned.program.info.vocab_size == VOCAB and planned.program.info.max_length == MAX_LENGTH
    assert len(planned.text_ids) == 768 and max(planned.text_ids) < VOCAB


def test_calibration_is_used() -> None:
    text = token_ids(2, 16, seed=5)
    mine = rewrite(model("llama"), {"passes": ["smooth"]}, calibration=text).program
    again = rewrite(model("llama"), {"passes": ["smooth"]}, calibration=text).program
    other = rewrite(model("llama"), {"passes": ["smooth"]}).program
    name = next(n for n in mine.params if n.endswith("*s"))
    assert torch.equal(mine.params[name], again.params[name])
    assert not torch.equal(mine.params[name], other.params[name])


def test_a_plan_names_its_calibration_text(smollm2: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("One two three four five six seven eight nine ten. " * 20)
    (tmp_path / "plan.yaml").write_text("calibration: {text: text.txt, tokens: 70, length: 32}\n")
    plan = Plan.from_yaml(tmp_path / "plan.yaml")
    context = context_of(plan, smollm2, ())
    want = text_of(smollm2).encode("One two three four five six seven eight nine ten. " * 20)[:64]
    assert context.calibration is not None and context.calibration.shape == (2, 32) and context.calibration.flatten().tolist() == want
    assert context.folder == tmp_path
    mine = token_ids(2, 8)
    assert context_of(plan, smollm2, (), mine).calibration is mine  # what the caller gives comes first
    short = Plan.from_dict({"calibration": {"text": str(tmp_path / "text.txt"), "tokens": 20, "length": 32}})
    assert context_of(short, smollm2, ()).calibration.shape == (1, 20)  # type: ignore[union-attr]
    (tmp_path / "text.txt").unlink()
    with pytest.raises(InputError) as caught:
        context_of(plan, smollm2, ())
    assert caught.value.code == "input-invalid" and "plan.yaml:1" in (caught.value.where or "")
    with pytest.raises(PlanError):
        Plan.from_dict({"calibration": {"text": "text.txt", "length": 1}})


def test_an_artifact_at_out(tmp_path: Path) -> None:
    executable = planc.compile(model("llama"), {"target": {"capacity": 96}, **LOOKUP}, out=tmp_path / "made", measure=False)
    manifest = read_artifact(tmp_path / "made")
    names = {p.name for p in (tmp_path / "made").iterdir()}
    assert names == {"manifest.json", *manifest.files} and names >= {"model.onnx", "model.weights"}
    assert [p.name for p in tmp_path.iterdir()] == ["made"]  # no temporary directory is left
    assert manifest.signature.capacity == executable.capacity == 96
    assert (manifest.model, manifest.backend, manifest.eos_ids) == ("LlamaForCausalLM", "onnx", (2,))
    assert manifest.plan["decode"]["speculative"]["drafter"] == [{"prompt_lookup": {}}]
    assert [e.name for e in manifest.contract.effects] == ["kv_cache", "logits_rows", "argmax"]
    assert manifest.contract.exactness is None
    answer = planc.load(tmp_path / "made").generate([5, 6, 7, 8], max_new_tokens=9)
    assert answer.ids == executable.generate([5, 6, 7, 8], max_new_tokens=9).ids  # type: ignore[union-attr]
    planc.compile(model("llama"), out=tmp_path / "made", measure=False)  # an artifact may be replaced
    assert read_artifact(tmp_path / "made").signature.capacity == MAX_LENGTH
    with pytest.raises(InputError):
        executable.generate(list(range(3, 97)) * 2)


def test_without_out_the_artifact_is_temporary() -> None:
    executable = planc.compile(model("llama"), measure=False)
    assert executable.directory is not None and executable.directory.is_dir()
    assert "planc-" in str(executable.directory)


def test_measured(tmp_path: Path) -> None:
    executable = planc.compile(make("llama", num_hidden_layers=1), {"target": {"capacity": 64}}, out=tmp_path / "made")
    contract = read_artifact(tmp_path / "made").contract
    assert contract.exactness is not None and contract.exactness.chains in ("bitwise", "tokens")
    assert contract.cost is not None and contract.cost.ms(rows=2, past=20) > 0
    assert executable.report()["exactness"] == contract.exactness.level


def test_disable() -> None:
    executable = planc.compile(model("llama"), {"passes": [{"skip_layers": {"layers": [0]}}]}, disable=["skip_layers"], measure=False)
    assert (
        executable.generate([5, 6, 7], max_new_tokens=12).ids
        == planc.compile(model("llama"), measure=False).generate([5, 6, 7], max_new_tokens=12).ids
    )  # type: ignore[union-attr]


# ---- failures ----


def test_errors(tmp_path: Path) -> None:
    def code(*args: Any, **options: Any) -> str:
        with pytest.raises((PlanError, ModelError, CompileError)) as caught:
            planc.compile(*args, out=tmp_path / "made", measure=False, **options)
        assert not list(tmp_path.iterdir())
        return caught.value.code

    assert code(model("llama"), {"passes": [{"skip_layers": {"layers": [9]}}]}) == "skip-out-of-range"
    assert code(model("llama"), {"passes": [{"skip_layer": {}}]}) == "plan-unknown-name"
    assert code(model("llama"), {"target": {"backend": "triton"}}) == "backend-missing"
    assert code(model("llama"), {}, disable=["nothing"]) == "plan-unknown-name"
    assert code(tmp_path / "no-such-model") == "model-not-found"
    assert code(nn.Linear(3, 3)) == "model-unsupported"
    assert code(model("llama"), tmp_path / "no-such-plan.yaml") == "plan-not-found"


def test_what_stands_at_out_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "letter.txt").write_text("mine")
    with pytest.raises(planc.PlancError) as caught:
        planc.compile(model("llama"), out=tmp_path / "made", measure=False)
    assert caught.value.code == "artifact-exists"
    assert (tmp_path / "made" / "letter.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), MemoryError(), CompileError("lower-unsupported", "no")], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("stage", ["run_passes", "lower", "OnnxEngine"])
def test_nothing_is_left_by_a_failure(stage: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home: Any = planc.compiler.compile if stage == "run_passes" else planc.backends.onnx.artifact
    whole = getattr(home, stage)

    def failing(*args: Any, **options: Any) -> Any:
        if stage != "run_passes":
            whole(*args, **options)  # late: files are there already
        raise error

    monkeypatch.setattr(home, stage, failing)
    with pytest.raises(type(error)):
        planc.compile(make_once(), out=tmp_path / "made", measure=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=lambda e: type(e).__name__)
def test_an_old_artifact_survives_a_failure(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planc.compile(make_once(), out=tmp_path / "made", measure=False)
    before = (tmp_path / "made" / "manifest.json").read_bytes()

    def failing(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(planc.compiler.compile, "measured", failing, raising=False)
    monkeypatch.setattr("planc.compiler.measure.exactness.probe", failing)
    with pytest.raises(type(error)):
        planc.compile(make_once(), out=tmp_path / "made")
    assert (tmp_path / "made" / "manifest.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["made"]
    read_artifact(tmp_path / "made")


_ONCE: list[nn.Module] = []


def make_once() -> nn.Module:
    """A model of one layer."""
    if not _ONCE:
        _ONCE.append(make("llama", num_hidden_layers=1))
    return _ONCE[0]


@pytest.mark.parametrize("ops", ["fast", "standard"])
def test_batching_compiles_a_graph_for_batches(ops: str, tmp_path: Path) -> None:
    plan = {
        "passes": [{"quantize_weights": {}}],
        "decode": {"batching": {"sequences": 3}, "max_new_tokens": 12, **LOOKUP["decode"]},
        "target": {"ops": ops},
    }
    exe = planc.compile(make("llama"), plan, out=tmp_path / "a")
    assert (tmp_path / "a" / "model_batch.onnx").exists() == (ops == "fast")
    assert read_artifact(tmp_path / "a").extra["lanes"] == (3 if ops == "fast" else 0)
    assert exe.contract.exactness is not None
    assert exe.contract.exactness.batch == "bitwise"
    assert exe.contract.cost is not None
    assert exe.contract.cost.batch == (1, 3)
    prompts = [token_ids(1, 3 + 7 * i, seed=i)[0].tolist() for i in range(5)]
    alone = [exe.generate(prompt) for prompt in prompts]
    assert [answer.ids for answer in exe.generate(prompts)] == [answer.ids for answer in alone]  # type: ignore[union-attr]
    with planc.load(tmp_path / "a").serve() as server:
        handles = [server.submit(prompt) for prompt in prompts]
        assert [handle.result(60).ids for handle in handles] == [answer.ids for answer in alone]  # type: ignore[union-attr]
    assert server.stats.mean > 1
