"""Folders of `planc export`: the runner alone gives planc's labels and tokens, the report says what is in the graph, errors leave nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import models_tiny
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import vision_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from typer.testing import CliRunner

import planc
from planc.backends.onnx.edge import classify, export, generate
from planc.backends.onnx.edge.export import export_edge
from planc.compiler.cli import app
from planc.runtime.errors import ArtifactError
from planc.runtime.executable import Executable
from planc.runtime.vision import Classifier, ImageSpec

PROMPT, COUNT = [5, 9, 5, 9, 5, 9, 7], 12
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>{% endfor %}<assistant>"

#: run.py with whatever is not onnxruntime or numpy taken away
ALONE = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED:
            raise ImportError(f"{name} is not available here")
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
OTHERS = ("planc", "torch", "transformers", "onnx", "pydantic", "PIL", "tokenizers", "jinja2", "yaml")


def run_alone(folder: Path, *arguments: str, without: tuple[str, ...] = OTHERS) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ALONE.replace("REFUSED", repr(set(without))), str(folder / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def exported(tmp_path: Path, model: Any, plan: dict[str, Any], ort_format: bool = False, **options: Any) -> tuple[Any, Path]:
    """The compiled executable, and the folder exported from its artifact."""
    exe = planc.compile(model, plan, out=tmp_path / "artifact", measure=False, **options)
    export_edge(tmp_path / "artifact", tmp_path / "edge", ort_format=ort_format)
    return exe, tmp_path / "edge"


# ---- language models -----------------------------------------------------------------------------------------------------------------


def greedy(folder: Path, graph: str = "model.onnx", prompt: list[int] = PROMPT) -> list[int]:
    session = ort.InferenceSession(str(folder / graph), providers=["CPUExecutionProvider"])
    return list(generate.greedy(session, prompt, COUNT, [2]))


def plain_ids(exe: Executable, prompt: list[int] = PROMPT) -> list[int]:
    answer = exe.plain().generate(prompt, max_new_tokens=COUNT)
    assert not isinstance(answer, list)
    return answer.ids


@pytest.mark.parametrize(
    ("family", "plan"),
    [
        ("llama", {"passes": [{"quantize_weights": {"format": "int8"}}], "decode": {"speculative": {"drafter": "token_recycling"}}}),
        ("gemma3", {"decode": {"speculative": {"drafter": "prompt_lookup", "tree": {"shape": "tree"}}}}),  # masks with and without a window
        ("mistral", {"target": {"ops": "standard"}}),
        ("gpt2", {"passes": [{"quantize_weights": {"format": "int4_blocks"}}]}),
    ],
)
def test_runner_writes_the_tokens_of_planc(tmp_path: Path, family: str, plan: dict[str, Any]) -> None:
    exe, folder = exported(tmp_path, models_tiny.model(family), plan)
    want = plain_ids(exe)
    assert len(set(want)) > 1
    assert greedy(folder) == want
    again = planc.load(folder)
    assert isinstance(again, Executable)
    assert again.generate(PROMPT, max_new_tokens=COUNT).ids == want
    inputs = {value.name for value in onnx.load(str(folder / "model.onnx"), load_external_data=False).graph.input}
    assert {name for name in inputs if not name.startswith("past.")} <= {"input_ids", "position_ids", "lengths", "logits_from"}
    standard = plan.get("target", {}).get("ops") == "standard"
    assert bool(again.manifest.extra["edge"]["beyond_standard"]) != standard


def test_runner_needs_onnxruntime_and_numpy_alone(tmp_path: Path) -> None:
    exe, folder = exported(tmp_path, models_tiny.model("llama"), {})
    ids = [str(i) for i in PROMPT]
    done = run_alone(folder, "--count", str(COUNT), "--ids", *ids)
    assert done.returncode == 0, done.stderr
    assert [int(word) for word in done.stdout.split()] == plain_ids(exe)
    for arguments, said in (
        (("hello",), "tokenizers"),
        ((), "give a text"),
        (("--ids", "97"), "0 to 96"),
        (("--count", "300", "--ids", "5"), "256"),
    ):
        done = run_alone(folder, *arguments)
        assert done.returncode != 0 and said in done.stderr, done.stderr


def test_text_goes_through_the_chat_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(["why is the sky blue", "the sky"], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    text = tmp_path / "text"
    text.mkdir()
    tokenizer.save(str(text / "tokenizer.json"))
    (text / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}))
    module = models_tiny.make("llama", vocab_size=tokenizer.get_vocab_size())
    exe, folder = exported(tmp_path, module, {}, tokenizer=text)
    for raw in (False, True):
        want = exe.generate("the sky", max_new_tokens=COUNT, chat=not raw)
        done = run_alone(folder, "the sky", "--count", str(COUNT), *(["--raw"] if raw else []), without=("planc", "torch", "jinja2"))
        assert done.returncode == 0, done.stderr
        assert done.stdout == want.text + "\n"
    edge = planc.load(folder).manifest.extra["edge"]  # type: ignore[union-attr]
    assert edge["chat"] == ["<user>", "</user><assistant>"]
    assert edge["example"]["ids"] == exe.text.apply_chat([{"role": "user", "content": edge["example"]["text"]}])
    pieces = json.loads((folder / "web/pieces.json").read_text(encoding="utf-8"))
    ids = exe.text.encode("the sky is blue")
    assert "".join(pieces[i] for i in ids) == "the sky is blue"
    assert len(pieces) == exe.manifest.signature.vocab_size


# ---- classifiers -----------------------------------------------------------------------------------------------------------------------

SPEC = {"size": [20, 18], "resize": 24, "mean": [120.0, 110.0, 100.0], "std": [60.0, 50.0, 70.0]}
LABELS = [f"class {i}" for i in range(7)]


@pytest.mark.parametrize("plan", [{}, {"passes": [{"patchwise": {"grid": [2, 2]}}]}], ids=["plain", "patchwise"])
def test_classifier_runs_alone(tmp_path: Path, plan: dict[str, Any]) -> None:
    exe, folder = exported(tmp_path, vision_tiny.tiny(), plan, ort_format=True, image=SPEC, labels=LABELS)
    picture = np.random.default_rng(0).integers(0, 256, (31, 44, 3), np.uint8)
    np.save(tmp_path / "a.npy", picture)
    Image.fromarray(picture).save(tmp_path / "a.ppm")
    Image.fromarray(picture).save(tmp_path / "a.png")
    want = [f"{p.probability:7.1%}  {p.label}" for p in exe.classify(picture)]
    for graph in ("model.onnx", "model.ort"):
        done = run_alone(folder, str(tmp_path / "a.npy"), str(tmp_path / "a.ppm"), "--graph", graph)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [f"{tmp_path}/a.npy:", *want, f"{tmp_path}/a.ppm:", *want]
    assert "Pillow" in run_alone(folder, str(tmp_path / "a.png")).stderr
    done = run_alone(folder, str(tmp_path / "a.png"), without=("planc", "torch"))
    assert done.stdout.splitlines()[1:] == want
    again = planc.load(folder)
    assert isinstance(again, Classifier) and again.manifest is not None
    assert np.array_equal(again.logits([picture]), exe.logits([picture]))
    edge = again.manifest.extra["edge"]
    assert edge["beyond_standard"] == [] and edge["ort_format"] == ["model.ort", "model.required_operators.config"]
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    assert edge["operators"] == dict(Counter(node.op_type for node in graph.node))
    assert "Conv" in (folder / "model.required_operators.config").read_text()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(5, 60),
    st.integers(5, 60),
    st.integers(3, 30),
    st.integers(3, 30),
    st.integers(0, 20),
    st.sampled_from(["nearest", "bilinear", "bicubic"]),
    st.sampled_from(["NCHW", "NHWC"]),
)
def test_property_resizing_is_that_of_pillow(height: int, width: int, rows: int, columns: int, more: int, kind: Any, layout: Any) -> None:
    spec = ImageSpec(size=(rows, columns), resize=max(rows, columns) + more if more else None, interpolation=kind, layout=layout)
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    assert np.array_equal(classify.prepare(image, spec.model_dump(mode="json"))[0], spec.pixels(image))


# ---- reports and refusals ------------------------------------------------------------------------------------------------------------


def test_operators_in_the_standard_domain_that_are_not_standard() -> None:
    nodes = [
        onnx.helper.make_node("Relu", ["x"], ["y"]),
        onnx.helper.make_node("SimplifiedLayerNormalization", ["y", "w"], ["z"]),
        onnx.helper.make_node("QuickGelu", ["z"], ["o"], domain="com.microsoft"),
    ]
    graph = onnx.helper.make_graph(nodes, "g", [], [])
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    found = export._operators(onnx.helper.make_model(graph, opset_imports=opsets))
    assert found["beyond_standard"] == ["SimplifiedLayerNormalization", "com.microsoft.QuickGelu"]
    assert found["operators"] == {"Relu": 1, "SimplifiedLayerNormalization": 1, "com.microsoft.QuickGelu": 1}
    assert found["opsets"] == {"": 21, "com.microsoft": 1}


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"passes": [{"kv_cache": {"policy": {"store": "int8"}}}]}, "policy"),
        ({"passes": [{"entropy_code": {"round": True}}]}, "entropy"),
    ],
)
def test_what_needs_planc_is_refused(tmp_path: Path, plan: dict[str, Any], said: str) -> None:
    planc.compile(models_tiny.model("llama"), plan, out=tmp_path / "artifact", measure=False)
    with pytest.raises(ArtifactError, match=said) as caught:
        export_edge(tmp_path / "artifact", tmp_path / "edge")
    assert caught.value.code == "export-refused"
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planc.compile(vision_tiny.tiny(), {}, out=tmp_path / "artifact", image=SPEC)

    def fail(model: Path) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "to_ort_format", fail)
    with pytest.raises(KeyboardInterrupt):
        export_edge(tmp_path / "artifact", tmp_path / "edge", ort_format=True)
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
    (tmp_path / "edge").mkdir()
    (tmp_path / "edge" / "mine").touch()
    with pytest.raises(ArtifactError, match="other files"):
        export_edge(tmp_path / "artifact", tmp_path / "edge")


def test_a_graph_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planc.compile(models_tiny.model("llama"), {}, out=tmp_path / "artifact", measure=False)
    whole = export.plain

    def wrong(source: onnx.ModelProto) -> onnx.ModelProto:
        model = whole(source)
        scale = next(t for t in model.graph.initializer if "norm" in t.name)
        scale.CopyFrom(onnx.numpy_helper.from_array(np.full(scale.dims, 0.7, np.float32), scale.name))
        return model

    monkeypatch.setattr(export, "plain", wrong)
    with pytest.raises(ArtifactError, match="something else"):
        export_edge(tmp_path / "artifact", tmp_path / "edge")


def test_command(tmp_path: Path) -> None:
    planc.compile(vision_tiny.tiny(), {}, out=tmp_path / "artifact", image=SPEC, labels=LABELS)
    result = CliRunner().invoke(app, ["export", str(tmp_path / "artifact"), "--out", str(tmp_path / "edge"), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["task"] == "classification" and "run.py" in told["files"]
    assert set(told["mobile"]) == {"NNAPI", "CoreML NeuralNetwork", "CoreML MLProgram"}
    assert "all standard" in result.stdout and "run.py photo.jpg" in result.stdout
    refused = CliRunner().invoke(app, ["export", str(tmp_path / "artifact"), "--out", str(tmp_path / "x"), "--target", "moon"])
    assert (refused.exit_code, "moon" in refused.stderr) == (2, True)
