"""The pass chunk_attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import applied, before_and_after, raised
from vision_tiny import images, program_of, randomised, vit

from planc.backends.onnx.lower import lower
from planc.backends.reference import probe
from planc.compiler.dialect import OPS
from planc.compiler.image_models import _Logits
from planc.compiler.memory import plan_memory, run_counted
from planc.compiler.passbase import Context
from planc.compiler.patches import network_macs
from planc.compiler.program import Program
from planc.compiler.vit import Config, ViT
from planc.passes.chunk_attention import ChunkAttention


def program(image: int, patch: int = 2, heads: int = 2) -> Program:
    return program_of(randomised(ViT(Config(image, patch, 8, 2, heads, 3, ratio=2.0))), image, image)


def test_golden(golden: Callable[[str, str], None]) -> None:
    small = randomised(ViT(Config(image=4, patch=2, width=4, depth=1, heads=2, classes=3, ratio=1)))
    golden(before_and_after(ChunkAttention(queries=3), program_of(small, 4, 4)), "chunk_attention.txt")


@pytest.mark.parametrize("queries", [2, 100])
def test_equals_eager(queries: int, tmp_path: Path) -> None:
    for whole in (program(6), program_of(_Logits(vit()), 16, 16)):
        side = int(whole.inputs["images"].meta["val"].shape[-1])
        new, x = applied(ChunkAttention(queries=queries), whole), images(2, side, side)
        want = probe(whole, x)["logits"]
        assert torch.allclose(probe(new, x)["logits"], want, rtol=1e-5, atol=1e-5)
        made = ort.InferenceSession(lower(new, tmp_path, ops="standard", positions=1)).run(["logits"], {"images": x.numpy()})[0]
        assert torch.allclose(torch.from_numpy(made), want, rtol=1e-4, atol=1e-4)


def test_memory_grows_with_the_tokens_and_not_with_their_square() -> None:
    peaks = {
        queries: [plan_memory(ChunkAttention(queries=queries).apply(program(s), Context())).peak for s in (16, 32)]
        for queries in (16, 9999)
    }
    assert 3.9 < peaks[16][1] / peaks[16][0] < 4.1  # four times the tokens
    assert peaks[9999][1] / peaks[9999][0] > 10
    new = ChunkAttention(queries=16).apply(program(16), Context())
    assert run_counted(new, {"images": images(1, 16, 16)})[1].live == plan_memory(new).live


def test_refuses() -> None:
    """Attention that hides keys, or of any number of rows, stays."""
    whole = raised("llama")
    assert ChunkAttention().apply(whole, Context()) is whole
    assert any(n.target is OPS.attention.default for n in whole.main.nodes)


@settings(max_examples=6, deadline=None)
@given(st.integers(2, 5), st.integers(1, 30), st.sampled_from([1, 2, 4]))
def test_property(grid: int, queries: int, heads: int) -> None:
    whole, x = program(2 * grid, heads=heads), images(1, 2 * grid, 2 * grid)
    new = applied(ChunkAttention(queries=queries), whole)
    assert network_macs(new) == network_macs(whole)
    assert torch.allclose(probe(new, x)["logits"], probe(whole, x)["logits"], rtol=1e-5, atol=1e-5)
