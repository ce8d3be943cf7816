"""The pass patch_size: embeddings of enlarged patches, positions, and shapes behind them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import applied, before_and_after
from torch import Tensor, nn
from vision_tiny import images, program_of, randomised, vit

from planc.backends.onnx.lower import lower
from planc.backends.reference import probe
from planc.compiler.image_models import _Logits
from planc.compiler.passbase import Context
from planc.compiler.patch_embedding import resample_patches, resample_positions
from planc.compiler.program import Program
from planc.compiler.vit import Config, ViT
from planc.passes.patch_size import PatchSize, reshaped
from planc.runtime.errors import CompileError


def config(**changes: Any) -> Config:
    return Config(**{"image": 16, "patch": 4, "width": 12, "depth": 2, "heads": 3, "classes": 5, **changes})


@cache
def model(class_token: Any = "first") -> ViT:
    return randomised(ViT(config(class_token=class_token)))  # type: ignore[return-value]


@cache
def program(class_token: Any = "first") -> Program:
    return program_of(model(class_token), 16, 16)


def test_golden(golden: Callable[[str, str], None]) -> None:
    small = randomised(ViT(Config(image=8, patch=4, width=4, depth=1, heads=2, classes=3, ratio=1)))
    golden(before_and_after(PatchSize(size=2), program_of(small, 8, 8)), "patch_size.txt")


@pytest.mark.parametrize("class_token", ["first", "last", "none"])
@pytest.mark.parametrize("size", [8, 2, 1])
def test_equals_eager(class_token: str, size: int) -> None:
    """The model that resamples its weights by itself."""
    new, x = applied(PatchSize(size=size), program(class_token)), images(2, 16, 16)
    assert torch.allclose(probe(new, x)["logits"], model(class_token)(x, size), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(probe(new, x)["logits"], probe(program(class_token), x)["logits"], atol=1e-3)


def test_enlarged_patches_are_embedded_as_before() -> None:
    conv, x = nn.Conv2d(3, 7, 8, 8), images(2, 32, 32)
    with torch.no_grad():
        large = torch.cat(
            [F.interpolate(x[:, :, i : i + 8, j : j + 8], (16, 16), mode="bilinear") for i in range(0, 32, 8) for j in range(0, 32, 8)]
        )
        want = torch.cat([conv(x[:, :, i : i + 8, j : j + 8]) for i in range(0, 32, 8) for j in range(0, 32, 8)])
        have = F.conv2d(large, resample_patches(conv.weight, (16, 16)), conv.bias, 16)
    assert torch.allclose(have, want, rtol=1e-4, atol=1e-5)


def test_other_tokens_keep_their_positions() -> None:
    table = torch.arange(12.0).reshape(1, 6, 2)
    assert torch.equal(resample_positions(table, (2, 2), (4, 4), 1)[:, [0, -1]], table[:, [0, -1]])
    assert resample_positions(table, (2, 2), (4, 6), 2).shape == (1, 26, 2)
    ramp = torch.arange(4.0).repeat(4, 1).reshape(1, 16, 1)  # a table that grows along the columns grows along the columns
    finer = resample_positions(ramp, (4, 4), (8, 8)).reshape(8, 8)
    assert torch.allclose(finer, finer[:1].expand(8, 8)) and bool((finer[0].diff() > 0).all())


def test_models_of_transformers(tmp_path: Path) -> None:
    """Attention through the hook, and the class token in front; at half the patch they equal their own interpolated positions."""
    whole, x = program_of(_Logits(vit()), 16, 16), images(2, 16, 16)
    new = applied(PatchSize(size=4), whole)
    made = ort.InferenceSession(lower(new, tmp_path, ops="standard", positions=1)).run(["logits"], {"images": x.numpy()})[0]
    want = probe(new, x)["logits"]
    assert torch.allclose(torch.from_numpy(made), want, rtol=1e-4, atol=1e-4)
    small = vit().state_dict()
    name = "vit.embeddings.position_embeddings"
    other = type(vit())(type(vit().config)(**{**vit().config.to_dict(), "patch_size": 4})).eval()
    small[name] = resample_positions(small[name], (2, 2), (4, 4), 1)
    kernel = "vit.embeddings.patch_embeddings.projection.weight"
    small[kernel] = resample_patches(small[kernel], (4, 4))
    other.load_state_dict(small)
    assert torch.allclose(want, other(pixel_values=x).logits, rtol=1e-4, atol=1e-4)


def test_projections_that_are_unbound(tmp_path: Path) -> None:
    """As timm writes its attention."""

    class Unbound(nn.Module):
        """Three maps of one product."""

        def __init__(self) -> None:
            super().__init__()
            self.cut, self.qkv = nn.Conv2d(3, 4, 4, 4), nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            x = self.cut(x).flatten(2).transpose(1, 2)
            q, k, v = self.qkv(x).reshape(x.shape[0], -1, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
            return (q * k + v).mean((1, 2))

    new, x = applied(PatchSize(size=2), program_of(randomised(Unbound()), 8, 8)), images(2, 8, 8)
    made = ort.InferenceSession(lower(new, tmp_path, ops="standard", positions=1)).run(["logits"], {"images": x.numpy()})[0]
    assert torch.allclose(torch.from_numpy(made), probe(new, x)["logits"], rtol=1e-4, atol=1e-5)


def test_reshapes() -> None:
    assert reshaped([2, 5, 12], [2, 9, 12], [2, 5, 3, 4]) == [2, 9, 3, 4]
    assert reshaped([2, 5, 12], [2, 9, 12], [10, 12]) == [18, 12]
    assert reshaped([2, 5, 3, 4], [2, 9, 3, 4], [2, 5, 12]) == [2, 9, 12]
    assert reshaped([2, 4, 4], [2, 6, 6], [2, 16]) == [2, 36]
    assert reshaped([2, 6, 5], [2, 10, 5], [2, 2, 3, 5]) is None
    assert reshaped([2, 5, 12], [2, 9, 12], [2, 20, 3]) is None


def test_refuses() -> None:
    def refused(part: PatchSize, whole: Program) -> str:
        with pytest.raises(CompileError) as caught:
            part.apply(whole, Context())
        assert caught.value.code == "pass-refused"
        return caught.value.message

    assert "no patches" in refused(PatchSize(size=2), program_of(randomised(nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Flatten())), 8, 8))
    assert "larger than the image" in refused(PatchSize(size=17), program())
    assert PatchSize(size=4).apply(program(), Context()) is program()

    class Mixed(nn.Module):
        """A dense layer over all tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.cut, self.head = nn.Conv2d(3, 4, 4, 4), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cut(x).flatten(1))

    assert "cannot change here" in refused(PatchSize(size=2), program_of(randomised(Mixed()), 8, 8))


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 6), st.integers(0, 6), st.integers(1, 4), st.integers(0, 99))
def test_property_larger_patches_are_exact(old: int, more: int, channels: int, seed: int) -> None:
    new, random = old + more, torch.Generator().manual_seed(seed)
    weight, x = (torch.randn(2, channels, old, old, generator=random, dtype=torch.float64) for _ in range(2))
    enlarged = F.interpolate(x, (new, new), mode="bilinear", align_corners=False)
    have = torch.einsum("nchw,bchw->bn", resample_patches(weight, (new, new)), enlarged)
    assert torch.allclose(have, torch.einsum("nchw,bchw->bn", weight, x), rtol=1e-8, atol=1e-8)
