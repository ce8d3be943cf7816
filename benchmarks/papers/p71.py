"""Paper 71, DFloat11: the five working conditions of its card, on SmolLM2-135M rounded to bf16."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from planc.backends.onnx.artifact import signature
from planc.backends.onnx.engine import OnnxEngine
from planc.backends.onnx.lower import lower
from planc.compiler.compile import rewrite
from planc.compiler.dialect import OPS
from planc.compiler.models import load_model
from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.plan import Plan
from planc.compiler.program import Program
from planc.runtime import entropy
from planc.runtime.artifact import Manifest
from planc.runtime.engine import Step
from planc.runtime.errors import ArtifactError

PLAN = ROOT / "examples/papers/71-dfloat11.yaml"
POSITIONS, TOKENS = 256, 200


@paper(71)
def dfloat11() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    loaded, plan = load_model("smollm2-135m"), Plan.from_yaml(PLAN)
    coded = rewrite(loaded, plan, check=False)
    plain = rewrite(loaded, plan, check=False, disable=["entropy_code"]).program
    rounded = plain.replace(params={name: value.bfloat16().float() if value.dim() == 2 else value for name, value in plain.params.items()})
    containers = {name: value.numpy() for name, value in coded.program.params.items() if name.endswith(".coded")}
    yield _round_trip(containers, rounded)
    yield _ratio(containers)
    yield _identical(coded.program, rounded, coded.text_ids[:16])
    yield _resident(coded.program, containers)
    yield _damage(min(containers.values(), key=len))


def _round_trip(containers: dict[str, np.ndarray], rounded: Program) -> Item:
    same, words, seconds = 0, 0, 0.0
    for name, container in containers.items():
        start = perf_counter()
        found = entropy.decode(container)
        seconds += perf_counter() - start
        wanted = rounded.params[name.removesuffix(".coded")].bfloat16().view(torch.int16).numpy().view(np.uint16)
        same += np.array_equal(found, wanted)
        words += found.size
    figures = {"matrices": len(containers), "equal": same, "decoded_mb_per_s": round(2 * words / seconds / 1e6)}
    return Item(1, "decoding gives every matrix bit for bit", same == len(containers) > 0, figures)


def _ratio(containers: dict[str, np.ndarray]) -> Item:
    ratios = [len(container) / (2 * int(np.prod(entropy.Container.parse(container).shape))) for container in containers.values()]
    total = sum(map(len, containers.values()))
    figures = {"least": round(min(ratios), 4), "most": round(max(ratios), 4), "megabytes": round(total / 1e6, 1)}
    return Item(2, "0.64 to 0.72 of the bytes of bf16", min(ratios) >= 0.64 and max(ratios) <= 0.72, figures)


def _engine(program: Program, folder: Path) -> tuple[OnnxEngine, float]:
    folder.mkdir()
    lower(program, folder, positions=POSITIONS)
    start = perf_counter()
    return OnnxEngine(folder, Manifest(planc="0", signature=signature(program, POSITIONS))), perf_counter() - start


def _identical(coded: Program, rounded: Program, prompt: tuple[int, ...]) -> Item:
    texts, logits, seconds, sizes = list[list[int]](), list[np.ndarray](), list[float](), list[int]()
    with tempfile.TemporaryDirectory() as home:
        for name, program in (("coded", coded), ("rounded", rounded)):
            engine, took = _engine(program, Path(home, name))
            cache = engine.new_cache(1, POSITIONS)
            outputs = engine.forward(cache, Step(np.array([prompt])), logits=True)
            assert outputs.logits is not None and outputs.argmax is not None
            logits.append(outputs.logits.copy())
            cache.keep(0, np.arange(len(prompt)))
            text = [int(outputs.argmax[0, -1])]
            while len(text) < TOKENS:
                again = engine.forward(cache, Step(np.array([text[-1:]])))
                assert again.argmax is not None
                cache.keep(0, np.arange(1))
                text.append(int(again.argmax[0, -1]))
            texts.append(text)
            seconds.append(round(took, 2))
            sizes.append(sum(file.stat().st_size for file in Path(home, name).iterdir()))
    equal = np.array_equal(*logits)
    figures = {"logits_equal": equal, "tokens": TOKENS, "load_s": seconds, "artifact_mb": [round(size / 1e6, 1) for size in sizes]}
    return Item(3, "logits and greedy text are those of the bf16 weights", equal and texts[0] == texts[1], figures)


def _resident(program: Program, containers: dict[str, np.ndarray]) -> Item:
    """ONNX Runtime has no operator that decodes, so an engine holds all matrices in float32; the reference backend holds one at a time."""
    nodes = [node for node in program.main.nodes if node.target is OPS.decode_bf16.default]
    matrices = [4 * int(node.args[1]) * int(node.args[2]) for node in nodes]  # type: ignore[call-overload]
    packed = sum(map(len, containers.values()))
    figures = {
        "packed_mb": round(packed / 1e6, 1),
        "onnx_mb": round(sum(matrices) / 1e6, 1),
        "reference_mb": round((packed + max(matrices)) / 1e6, 1),
        "why": "decoded when the graph is opened: saves bytes on disk, not memory, until a backend decodes inside the pass",
    }
    return Item(4, "weights in memory are packed plus one block", False, figures)


def _damage(container: np.ndarray) -> Item:
    found, rng = dict.fromkeys(("error", "same", "silent"), 0), np.random.default_rng(0)
    words = entropy.decode(container)
    for at in rng.integers(0, len(container), 200):
        damaged = container.copy()
        damaged[at] ^= np.uint8(rng.integers(1, 256))
        try:
            found["same" if np.array_equal(entropy.decode(damaged), words) else "silent"] += 1  # the same: bits that only fill a byte up
        except ArtifactError:
            found["error"] += 1
    return Item(5, "a damaged byte is an error", found["silent"] == 0 and found["error"] > 150, found)
