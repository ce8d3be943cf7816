"""Paper 3, Patch Scaling: the five working conditions of its card, on small vision transformers that read handwritten digits.

The weights are those of `examples/vision/train_flexible.py`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from planc.backends.reference import probe
from planc.compiler.memory import plan_memory
from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.passbase import Context
from planc.compiler.patches import macs
from planc.compiler.plan import Plan
from planc.compiler.program import ModelInfo, Program
from planc.compiler.raising import raise_program
from planc.compiler.trace import trace_classifier
from planc.compiler.vit import Config, ViT
from planc.passes.chunk_attention import ChunkAttention
from planc.passes.patch_size import PatchSize

PLAN = ROOT / "examples/papers/03-patch-scaling.yaml"
FOLDER = ROOT / "examples/vision"
aten = torch.ops.aten


def _training() -> Any:
    """The script, which says what the models look like and what they are measured on."""
    spec = importlib.util.spec_from_file_location("planc_train_flexible", FOLDER / "train_flexible.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _program(model: ViT) -> Program:
    side, info = model.config.image, ModelInfo("vit", vocab_size=0, max_length=1, task="classification")
    return raise_program(trace_classifier(model.eval(), (model.config.channels, side, side), info))


@paper(3)
def patch_scaling() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    yield _embeddings()
    yield _costs()
    script = _training()
    trained = {p: _accuracy(script, f"patch{p}", p, p) for p in script.SIZES}
    order = [trained[p] for p in sorted(script.SIZES, reverse=True)]
    figures = {f"patch {p}": share for p, share in trained.items()}
    yield Item(3, "accuracy grows from patch 8 to 4 to 2, models of equal training", order == sorted(set(order)), figures)
    flexible = {p: _accuracy(script, "flexible", script.BASE, p) for p in script.SIZES}
    gaps = {f"patch {p}": round(trained[p] - flexible[p], 4) for p in script.SIZES}
    figures = {f"patch {p}": share for p, share in flexible.items()} | {"below its own model": gaps}
    yield Item(4, "one set of weights is within 2 points of the model of each size", max(gaps.values()) <= 0.02, figures)
    yield _memory()


def _embeddings() -> Item:
    """What the traced programs embed: patches of 8, and the same enlarged to 16 with the weights resampled by the pass."""
    torch.manual_seed(0)
    old = ViT(Config(image=32, patch=8, width=64, depth=1, heads=4, classes=10))
    x = torch.randn(4, 3, 32, 32)
    parts = F.unfold(x, 8, stride=8).transpose(1, 2).reshape(-1, 3, 8, 8)
    large = F.interpolate(parts, (16, 16), mode="bilinear").reshape(4, 4, 4, 3, 16, 16).permute(0, 3, 1, 4, 2, 5).reshape(4, 3, 64, 64)
    whole = _program(old)
    changed = PatchSize(size=16).apply(whole, Context())
    weights = [next(p.params[str(n.args[1].target)] for n in p.main.nodes if "conv2d" in str(n.target)) for p in (whole, changed)]  # type: ignore[union-attr]
    want, have = F.conv2d(x, weights[0], stride=8), F.conv2d(large, weights[1], stride=16)
    relative = float((have - want).abs().max() / want.abs().max())
    return Item(1, "patches of 8 enlarged to 16 are embedded alike, to 1e-4", relative <= 1e-4, {"relative": relative})


def _costs() -> Item:
    """Multiplications counted in the graphs at patches of 8, 4 and 2, without class token."""
    torch.manual_seed(0)
    whole = _program(ViT(Config(image=64, patch=8, width=32, depth=2, heads=4, classes=10, class_token="none")))
    found = [_kinds(PatchSize(size=p).apply(whole, Context())) for p in (8, 4, 2)]
    ratios = [tuple(b[i] / a[i] for i in range(3)) for a, b in zip(found, found[1:], strict=False)]
    passed = all(ratio == (4.0, 4.0, 16.0) for ratio in ratios)
    return Item(2, "half the patch: 4 times the tokens and linear products, 16 times the attention", passed, {"ratios": ratios})


def _kinds(program: Program) -> tuple[int, int, int]:
    """Tokens, multiplications of dense layers on tokens, and of attention."""
    attention = [n for n in program.main.nodes if n.target is aten.scaled_dot_product_attention.default]
    dense = [n for n in program.main.nodes if n.target is aten.linear.default and n.meta["val"].dim() == 3]
    return int(attention[0].meta["val"].shape[-2]), sum(map(macs, dense)), sum(map(macs, attention))


def _accuracy(script: Any, name: str, base: int, patch: int) -> float:
    """Of a stored model, traced at the patch of its weights and moved by the pass to another."""
    model = ViT(script.config(base))
    model.load_state_dict(load_file(FOLDER / f"{name}.safetensors"))
    images, classes = script.test_set()
    program = PatchSize(size=patch).apply(_program(model), Context())
    logits = torch.cat([probe(program, part)["logits"] for part in images.split(250)])
    return round(float((logits.argmax(1) == classes).float().mean()), 4)


def _memory() -> Item:
    """Planned peaks of the plan's chunks at patch 1 on larger and larger images, and of whole attention."""
    chunk = next(p for p in Plan.from_yaml(PLAN).passes if isinstance(p, ChunkAttention))
    figures: dict[str, Any] = {"queries": chunk.queries}
    peaks = {"chunks": [], "whole": []}  # type: dict[str, list[float]]
    tokens = []
    for side in (32, 64, 128):
        torch.manual_seed(0)
        whole = PatchSize(size=1).apply(
            _program(ViT(Config(image=side, patch=2, width=32, depth=1, heads=2, classes=10, class_token="none"))), Context()
        )
        tokens.append(side * side)
        for name, part in (("chunks", chunk), ("whole", ChunkAttention(queries=side * side))):
            peaks[name].append(plan_memory(part.apply(whole, Context())).peak / 2**20)
    figures |= {"tokens": tokens} | {f"mib {name}": [round(v, 1) for v in values] for name, values in peaks.items()}
    growth = [b / a for a, b in zip(peaks["chunks"], peaks["chunks"][1:], strict=False)]
    figures["growth for 4 times the tokens"] = [round(g, 3) for g in growth]
    passed = all(abs(g - 4) < 0.1 for g in growth)
    return Item(5, "peak bytes grow linearly with the tokens at fixed chunks", passed, figures)
