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
from models_tiny import MAX_LENGTH, VOCAB, apply, make, raised, token_ids
from torch import nn

import planc
from planc.backends.onnx.genai import GENAI_CONFIG, GENAI_MODEL, shape_of
from planc.compiler.peers import peer_python
from planc.passes.argmax import Argmax
from planc.passes.kv_cache import KvCache
from planc.runtime.artifact import read_artifact
from planc.runtime.engine import Step
from planc.runtime.executable import Generation

LAYERS, HEADS, KV_HEADS, WIDTH, HIDDEN = 3, 4, 2, 16, 64
PLANS: dict[str, dict[str, Any]] = {
    "plain": {},
    "int8": {"passes": [{"quantize_weights": {"format": "int8"}}]},
    "chains": {"decode": {"speculative": {"drafter": "token_recycling", "tree": {"shape": "chain"}}}},  # its top-k output is dropped
}

Compiled = Callable[[str], Path]


@cache
def tiny(**changes: Any) -> nn.Module:
    shape = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "hidden_size": HIDDEN}
    return make("llama", **{**shape, **changes})


def compiled_to(directory: Path, plan: dict[str, Any], **changes: Any) -> Path:
    planc.compile(tiny(**changes), plan, out=directory, measure=False)
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


@pytest.mark.parametrize(
    ("plan", "changes", "reason"),
    [
        ({"target": {"ops": "standard"}}, {}, "standard operators"),
        ({"passes": [{"kv_cache": {"trees": "fused"}}]}, {}, "'bias'"),
        ({"passes": [{"tap": {"layers": [1]}}]}, {}, "'tap."),
        ({}, {"head_dim": 4}, "3 of 3 attentions"),
    ],
)
def test_refuses_with_a_reason(tmp_path: Path, plan: dict[str, Any], changes: dict[str, Any], reason: str) -> None:
    directory = compiled_to(tmp_path / "a", plan, **changes)
    manifest = read_artifact(directory)
    assert manifest.extra["genai"] is False and reason in manifest.extra["genai_reason"]
    assert not (directory / GENAI_MODEL).exists() and not (directory / GENAI_CONFIG).exists()


@pytest.mark.parametrize("change", [{"heads": 1}, {"dtype": torch.float16}, {"key_width": 4, "value_width": 4}])
def test_refuses_layers_that_differ(compiled: Compiled, change: dict[str, Any]) -> None:
    graph = onnx.load(str(compiled("plain") / "model.onnx"), load_external_data=False)
    program = apply(raised("llama"), KvCache(trees="none"), Argmax())
    states = (*program.states, program.states[-1])  # as many as the graph has attentions
    assert not isinstance(shape_of(program.replace(states=states), graph), str)
    other = program.replace(states=(*states[:-1], dataclasses.replace(states[-1], **change)))
    assert "layers differ" in str(shape_of(other, graph))
    graph.graph.node.remove(next(n for n in graph.graph.node if n.op_type == "GroupQueryAttention"))
    assert "1 of 3 attentions" in str(shape_of(program.replace(states=states), graph))


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
