"""The view of an artifact for onnxruntime-genai: same logits as our engine's, counts from the graph, refusals with a reason, and the real thing."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from models_tiny import MAX_LENGTH, VOCAB, apply, decoding, make, raised, token_ids
from torch import nn

import planc
from planc.backends.onnx.genai import GENAI_CONFIG, GENAI_MODEL, Shape, adapt, shape_of
from planc.backends.onnx.lower import lower
from planc.compiler.peers import peer_python
from planc.compiler.program import Program
from planc.passes.argmax import Argmax
from planc.passes.tap import Tap
from planc.runtime.artifact import read_artifact
from planc.runtime.engine import Step
from planc.runtime.executable import Generation

LAYERS, HEADS, KV_HEADS, WIDTH, HIDDEN = 2, 4, 2, 16, 64
PLANS: dict[str, dict[str, Any]] = {
    "plain": {},
    "int8": {"passes": [{"quantize_weights": {"format": "int8"}}]},
    "chains": {"decode": {"speculative": {"drafter": "token_recycling", "tree": {"shape": "chain"}}}},  # its top-k output is dropped
}

Compiled = Callable[[str], Path]


@cache
def tiny() -> nn.Module:
    module: nn.Module = make("llama", num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, hidden_size=HIDDEN)
    return module


def compiled_to(directory: Path, plan: dict[str, Any]) -> Path:
    planc.compile(tiny(), plan, out=directory, measure=False)
    return directory


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """`compiled(name)` is the artifact of a plan of PLANS, made once."""
    root = tmp_path_factory.mktemp("genai")
    return cache(lambda name: compiled_to(root / name, PLANS[name]))


class Genai:
    """Feeds `model_genai.onnx` as onnxruntime-genai does: one mask over everything, past and present in one buffer."""

    def __init__(self, directory: Path, batch: int, capacity: int) -> None:
        self.session = ort.InferenceSession(str(directory / GENAI_MODEL), providers=["CPUExecutionProvider"])
        shape = (batch, KV_HEADS, capacity, WIDTH)
        self.buffers = {f"{i}.{part}": np.zeros(shape, np.float32) for i in range(LAYERS) for part in ("key", "value")}
        self.length = 0

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        batch, rows = ids.shape
        positions = np.ascontiguousarray(np.broadcast_to(np.arange(self.length, self.length + rows), ids.shape))
        self.length += rows
        feeds = {"input_ids": ids, "attention_mask": np.ones((batch, self.length), np.int64), "position_ids": positions}
        binding = self.session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name, array in self.buffers.items():
            for bind, prefix in ((binding.bind_input, "past_key_values"), (binding.bind_output, "present")):
                bind(f"{prefix}.{name}", "cpu", 0, np.float32, array.shape, array.ctypes.data)
        binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(binding)
        logits: np.ndarray = binding.get_outputs()[-1].numpy()
        return logits


@pytest.mark.parametrize("plan", PLANS)
def test_interface(compiled: Compiled, plan: str) -> None:
    directory = compiled(plan)
    model = onnx.load(str(directory / GENAI_MODEL))
    for node in model.graph.node:
        if node.op_type == "SimplifiedLayerNormalization":  # ONNX Runtime keeps it in the standard domain, where the checker misses it
            node.domain = "com.microsoft"
    onnx.checker.check_model(model)
    session = ort.InferenceSession(str(directory / GENAI_MODEL), providers=["CPUExecutionProvider"])
    cache_names = [f"{i}.{part}" for i in range(LAYERS) for part in ("key", "value")]
    inputs = {i.name: (i.type, i.shape) for i in session.get_inputs()}
    assert set(inputs) == {"input_ids", "attention_mask", "position_ids", *(f"past_key_values.{n}" for n in cache_names)}
    assert {inputs[n][0] for n in ("input_ids", "attention_mask", "position_ids")} == {"tensor(int64)"}
    assert inputs["input_ids"][1] == inputs["position_ids"][1] != inputs["attention_mask"][1]
    outputs = {o.name: o.shape for o in session.get_outputs()}
    assert set(outputs) == {"logits", *(f"present.{n}" for n in cache_names)}
    assert outputs["logits"] == [*inputs["input_ids"][1], VOCAB]
    manifest = read_artifact(directory)
    assert manifest.extra["genai"] is True and "genai_reason" not in manifest.extra
    assert {GENAI_MODEL, GENAI_CONFIG} <= set(manifest.files)


@pytest.mark.parametrize("plan", PLANS)
def test_shares_the_weights(compiled: Compiled, plan: str) -> None:
    def places(file: str) -> set[tuple[tuple[str, str], ...]]:
        graph = onnx.load(str(compiled(plan) / file), load_external_data=False).graph
        return {tuple((e.key, e.value) for e in t.external_data) for t in graph.initializer if t.external_data}

    assert places(GENAI_MODEL) == places("model.onnx") and places(GENAI_MODEL)


@pytest.mark.parametrize("plan", PLANS)
def test_logits_are_those_of_our_engine(compiled: Compiled, plan: str) -> None:
    """A prompt, single rows and several rows behind a past."""
    engine: Any = planc.load(compiled(plan)).engine
    ours, theirs = engine.new_cache(1, 40), Genai(compiled(plan), 1, 40)
    ids, done = token_ids(1, 30).numpy(), 0
    for rows in (11, 1, 1, 7, 2):
        part = np.ascontiguousarray(ids[:, done : done + rows])
        want = engine.forward(ours, Step(part), logits=True).logits
        assert np.array_equal(theirs(part), want), f"{rows} rows behind {done}"
        ours.keep(0, np.arange(rows))
        done += rows


def test_config_describes_the_graph(tmp_path: Path) -> None:
    plan = {
        "passes": [{"skip_layers": {"layers": [1]}}],
        "decode": {"sampling": {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "repetition_penalty": 1.2}},
        "target": {"threads": 1, "capacity": 128},
    }
    config = json.loads((compiled_to(tmp_path / "a", plan) / GENAI_CONFIG).read_text())
    model, decoder, search = config["model"], config["model"]["decoder"], config["search"]
    counted = {
        name: decoder[name] for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_size", "hidden_size")
    }
    assert list(counted.values()) == [LAYERS - 1, HEADS, KV_HEADS, WIDTH, HIDDEN]
    assert (model["vocab_size"], model["context_length"], search["max_length"]) == (VOCAB, 128, 128)
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, [2], 0)
    assert decoder["filename"] == GENAI_MODEL and decoder["session_options"]["intra_op_num_threads"] == 1
    assert (search["do_sample"], search["temperature"], search["top_k"], search["top_p"]) == (True, 0.7, 9, 0.8)
    assert search["repetition_penalty"] == 1.2 and search["past_present_share_buffer"] is True


def test_greedy_plan_asks_for_greedy(compiled: Compiled) -> None:
    config = json.loads((compiled("plain") / GENAI_CONFIG).read_text())
    assert config["search"]["do_sample"] is False and config["search"]["temperature"] == 1.0
    assert config["model"]["context_length"] == MAX_LENGTH and "intra_op_num_threads" not in config["model"]["decoder"]["session_options"]


def test_refusal_leaves_no_files(tmp_path: Path) -> None:
    directory = compiled_to(tmp_path / "a", {"target": {"ops": "standard"}})
    manifest = read_artifact(directory)
    assert manifest.extra["genai"] is False and "standard operators" in manifest.extra["genai_reason"]
    assert not (directory / GENAI_MODEL).exists() and not (directory / GENAI_CONFIG).exists()


def separate(program: Program) -> Program:
    """The program with attention lowered to separate products."""
    return program.replace(states=tuple(dataclasses.replace(state, split=True) for state in program.states))


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (lambda: decoding(raised("llama"), "fused"), "the input 'bias'"),
        (lambda: apply(decoding(raised("llama")), Tap(layers=(1,))), "reads 'tap.1'"),
        (lambda: separate(decoding(raised("llama"))), "2 of 2 attentions"),
        (lambda: apply(raised("llama"), Argmax()), "no cache"),
    ],
)
def test_refuses_with_a_reason(tmp_path: Path, program: Callable[[], Program], reason: str) -> None:
    made = program()
    graph = onnx.load(str(lower(made, tmp_path, positions=MAX_LENGTH)), load_external_data=False) if made.states else onnx.ModelProto()
    assert reason in str(shape_of(made, graph))


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma3", "gpt_neox"])
def test_other_families(tmp_path: Path, family: str) -> None:
    program = decoding(raised(family))
    graph = onnx.load(str(lower(program, tmp_path, positions=MAX_LENGTH)), load_external_data=False)
    layers, kv_heads = len(program.states), 2 if family == "gemma3" else 4
    assert shape_of(program, graph) == Shape(layers, 4, kv_heads, 16 if family == "gemma3" else 8, 32)
    (tmp_path / GENAI_MODEL).write_bytes(adapt(program, graph).SerializeToString())
    session = ort.InferenceSession(str(tmp_path / GENAI_MODEL), providers=["CPUExecutionProvider"])
    assert {"input_ids", "attention_mask"} < {i.name for i in session.get_inputs()}


@pytest.mark.parametrize("change", [{"heads": 1}, {"dtype": torch.float16}, {"key_width": 4, "value_width": 4}])
def test_refuses_layers_that_differ(compiled: Compiled, change: dict[str, Any]) -> None:
    graph = onnx.load(str(compiled("plain") / "model.onnx"), load_external_data=False)
    program = decoding(raised("llama"))
    assert not isinstance(shape_of(program, graph), str)
    other = program.replace(states=(program.states[0], dataclasses.replace(program.states[1], **change)))
    assert "layers differ" in str(shape_of(other, graph))
    attention = next(n for n in graph.graph.node if n.op_type == "GroupQueryAttention")
    next(a for a in attention.attribute if a.name == "num_heads").i = 2
    assert "layers differ" in str(shape_of(program, graph))


# ---- onnxruntime-genai itself ----------------------------------------------------------------------------------------------------------

_RUN = """
import json, sys
import numpy as np
import onnxruntime_genai as og
request = json.loads(sys.stdin.read())
model = og.Model(request["directory"])
def tokens(parts, count, batch=1):
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=sum(np.shape(p)[-1] for p in parts) + count, batch_size=batch)
    generator = og.Generator(model, params)
    for part in parts:
        generator.append_tokens(np.array(part, dtype=np.int32))
    made = [[] for _ in range(batch)]
    for _ in range(count):
        if generator.is_done():
            break
        generator.generate_next_token()
        for row, token in zip(made, generator.get_next_tokens()):
            row.append(int(token))
    return made
longest = max(map(len, request["prompts"]))
padded = [p + [0] * (longest - len(p)) for p in request["prompts"]]
print(json.dumps({
    "alone": [tokens([p], request["count"])[0] for p in request["prompts"]],
    "appended": [tokens([p[:4], p[4:]], request["count"])[0] for p in request["prompts"]],
    "batch": tokens([padded], request["count"], len(padded)),
}))
"""


@pytest.fixture(scope="session")
def genai_python() -> str:
    """An interpreter that has onnxruntime-genai: that of the peers, else this one."""
    candidates = dict.fromkeys((peer_python(), sys.executable))
    for python in candidates:
        if subprocess.run([python, "-c", "import onnxruntime_genai"], capture_output=True, check=False).returncode == 0:
            return python
    pytest.skip(f"onnxruntime-genai is not installed for {' or '.join(candidates)}")


@pytest.mark.parametrize("plan", ["plain", "int8"])
def test_genai_writes_the_same_text(compiled: Compiled, genai_python: str, plan: str) -> None:
    """Greedy tokens: alone and, for float32, with the prompt in two parts and in a batch of unequal lengths."""
    prompts, count = [token_ids(n, seed=n).tolist() for n in (9, 14, 6)], 24
    request = json.dumps({"directory": str(compiled(plan)), "prompts": prompts, "count": count})
    done = subprocess.run([genai_python, "-c", _RUN], input=request, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    run = planc.load(compiled(plan))
    want = [generation.ids for p in prompts if isinstance(generation := run.generate(p, max_new_tokens=count), Generation)]
    assert len(want) == 3 and len({tuple(ids) for ids in want}) == 3
    assert found["alone"] == want
    if plan == "plain":  # int8 rounds activations, so another cut of the prompt may give another text
        assert found["appended"] == want
        assert [made[: len(ids)] for made, ids in zip(found["batch"], want, strict=True)] == want  # a finished text is padded
