"""EMOv2: window layouts, published sizes, and what becomes of its operations."""

from __future__ import annotations

from functools import cache
from typing import Any

import onnxruntime as ort
import pytest
import torch
from vision_tiny import images, program_of, randomised

from planc.backends.onnx.lower import lower
from planc.backends.reference import probe
from planc.compiler.emov2 import CONFIGS, Config, EMOv2, window_attention
from planc.compiler.passbase import Context
from planc.compiler.patches import macs, network_macs
from planc.compiler.program import Program
from planc.passes.fold_batch_norm import FoldBatchNorm
from planc.passes.patchwise import Patchwise

TINY = Config((2, 1, 2, 2), (8, 12, 16, 20), (2, 2, 2, 2), (4, 4, 4, 5), window=3)
aten = torch.ops.aten


@cache
def tiny() -> EMOv2:
    return randomised(EMOv2(TINY, 5))  # type: ignore[return-value]


@cache
def tiny_program() -> Program:
    """On 36 x 40: stage 2 has maps of 3 x 3, stage 3 of 2 x 2, so that some windows are filled up with zeros."""
    return program_of(tiny(), 36, 40)


def test_windows_by_hand() -> None:
    q, k, v = (torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(i)) for i in range(3))
    for layout, start, step in (("near", (2, 4), 1), ("far", (1, 2), 2)):
        made = window_attention(q, k, v, 2, 2, layout)  # type: ignore[arg-type]
        # the second window of rows, the third of columns: neighbours, or places 4/2 rows and 6/2 columns apart
        rows, columns = ([start[0], start[0] + 1], [start[1], start[1] + 1]) if step == 1 else ([1, 3], [2, 5])
        places = [(r, c) for r in rows for c in columns]
        for head in range(2):
            channels = slice(2 * head, 2 * head + 2)
            a, b, c = (torch.stack([x[0, channels, i, j] for i, j in places]) for x in (q, k, v))
            want = torch.softmax(a @ b.T / 2**0.5, -1) @ c
            have = torch.stack([made[0, channels, i, j] for i, j in places])
            assert torch.allclose(have, want, atol=1e-6)


def test_one_window_is_near_and_far() -> None:
    q, k, v = (torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    assert torch.equal(window_attention(q, k, v, 3, 4, "near"), window_attention(q, k, v, 3, 4, "far"))


@pytest.mark.parametrize(("name", "millions"), [("1M", 1.4), ("2M", 2.3), ("5M", 5.1)])
def test_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in EMOv2(CONFIGS[name]).parameters())
    assert count // 10**5 / 10 == millions  # the published figures are cut off, not rounded


def test_equals_eager_and_onnx(tmp_path: Any) -> None:
    x = images(2, 36, 40)
    want = tiny()(x).detach()
    assert torch.allclose(probe(tiny_program(), x)["logits"], want, rtol=1e-4, atol=1e-4)
    made = ort.InferenceSession(lower(tiny_program(), tmp_path, ops="standard", positions=1)).run(["logits"], {"images": x.numpy()})[0]
    assert torch.allclose(torch.from_numpy(made), want, rtol=1e-4, atol=1e-4)


def test_norms_and_layer_scales_fold() -> None:
    new, x = FoldBatchNorm().apply(tiny_program(), Context()), images(2, 36, 40)
    left = [n.target for n in new.main.nodes if n.target in (aten.batch_norm.default, aten.mul.Tensor)]
    assert not left
    want = tiny()(x).detach()
    assert float((probe(new, x)["logits"] - want).abs().max() / want.abs().max()) < 1e-5


def test_parts_of_the_first_stages() -> None:
    program, x = FoldBatchNorm().apply(tiny_program(), Context()), images(1, 36, 40)
    part = Patchwise(split="stages.1", grid=(2, 2))
    new = part.apply(program, Context())
    assert len(new.main.nodes) > len(program.main.nodes) + 3 * 20
    assert torch.allclose(probe(new, x)["logits"], probe(program, x)["logits"], rtol=1e-5, atol=1e-5)


def test_multiplications_of_attention() -> None:
    """One block of 2x2 windows on 4 x 4: 16 rows of 4 keys, widths 8 and 16, for two layouts."""
    module = randomised(EMOv2(Config((1, 1, 1, 2), (8, 8, 8, 8), (2, 2, 2, 2), (4, 4, 4, 4), window=2), 5))
    program = program_of(module, 128, 128)
    found = [macs(n) for n in program.main.nodes if n.target is aten.scaled_dot_product_attention.default]
    assert found == [16 * 4 * (8 + 16)] * 2
    assert network_macs(program) > sum(found)
