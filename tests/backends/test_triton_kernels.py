"""Triton kernels against their references: on the GPU where there is one, else in Triton's interpreter; and compiled ahead of time for two GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

GPU = torch.cuda.is_available()
triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret == GPU:
    pytest.skip("set TRITON_INTERPRET=1 where there is no CUDA device, and nowhere else", allow_module_level=True)

KERNELS = "planc.backends.triton.kernels"
kernels = import_module(KERNELS)
bitmaps, entropies, int8s, blocks, pages_of, norms, dense, segments, tops, launching = (
    import_module(f"{KERNELS}.{name}")
    for name in (
        "bitmap_attention", "entropy_decode", "int8_matmul", "block_matmul", "page_attention", "rms_quantize", "segment_attention", "segments",
        "top_k", "launch",
    )
)  # fmt: skip

from planc.runtime import entropy  # noqa: E402
from planc.runtime.errors import InputError  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
#: The interpreter multiplies the bit patterns of bfloat16 instead of its values, so products in it are left to the GPU.
DOTS = FLOATS if GPU else FLOATS[:2]
SEEDS = st.integers(0, 999)
few = settings(max_examples=8, deadline=None, derandomize=True)


def some(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def whole(low: int, high: int, *shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def strided(x: Tensor) -> Tensor:
    """The same numbers in rows that are apart in memory."""
    return torch.nn.functional.pad(x, (0, 3))[..., : x.shape[-1]]


def near(have: Tensor, want: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Equal up to sums in another order and, in half precision, rounded weights and probabilities."""
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    assert have.shape == want.shape
    assert float((have.float() - want.float()).abs().max()) <= tolerance * max(1.0, float(want.float().abs().max()))


@few
@given(st.sampled_from(FLOATS), st.integers(1, 5), st.integers(1, 300), st.booleans(), SEEDS)
def test_rms_quantize(dtype: torch.dtype, rows: int, width: int, norm: bool, seed: int) -> None:
    x, weight = strided(some(rows, width, seed=seed, dtype=dtype)), some(width, seed=seed + 1, dtype=dtype) if norm else None
    x[0] = 0
    values, scale = kernels.rms_quantize(x, weight)
    wanted, wanted_scale = norms.reference(x, weight)
    near(scale, wanted_scale)
    difference = (values.int() - wanted.int()).abs()
    assert int(difference.max()) <= (1 if norm else 0)  # a sum in another order may move a value across the middle between two steps
    assert float(difference.float().mean()) <= 0.02


@few
@given(st.sampled_from(FLOATS), st.integers(1, 40), st.integers(1, 40), st.integers(1, 600), st.booleans(), st.booleans(), SEEDS)
def test_int8_matmul(dtype: torch.dtype, rows: int, outputs: int, inputs: int, bias: bool, residual: bool, seed: int) -> None:
    x, weight = (strided(whole(-127, 128, n, inputs, seed=seed + n, dtype=torch.int8)) for n in (rows, outputs))
    row_scale, scale = some(rows, seed=seed).abs() / 127, some(outputs, seed=seed + 1).abs() / 127
    more = (some(outputs, seed=seed) if bias else None, strided(some(rows, outputs, seed=seed)) if residual else None, dtype)
    near(kernels.int8_matmul(x, row_scale, weight, scale, *more), int8s.reference(x, row_scale, weight, scale, *more), dtype)


@few
@given(
    st.sampled_from(DOTS), st.integers(1, 20), st.integers(1, 40), st.sampled_from([16, 32, 128]), st.integers(1, 5), st.booleans(), SEEDS
)
def test_block_matmul(dtype: torch.dtype, rows: int, outputs: int, block: int, count: int, extra: bool, seed: int) -> None:
    x, packed = (
        strided(some(rows, block * count, seed=seed, dtype=dtype)),
        whole(0, 256, outputs, count, block // 2, seed=seed, dtype=torch.uint8),
    )
    scales = some(outputs, count, seed=seed + 1, dtype=dtype) / (block * count) ** 0.5
    more = (some(outputs, count, seed=seed) + 7, some(outputs, seed=seed)) if extra else ()
    near(kernels.block_matmul(x, packed, scales, *more), blocks.reference(x, packed, scales, *more), dtype)


@few
@given(
    st.sampled_from(DOTS), st.integers(1, 7), st.sampled_from([1, 3]), st.sampled_from([20, 64]), st.integers(1, 150), st.booleans(), SEEDS
)
def test_segments_merge_to_attention(dtype: torch.dtype, rows: int, group: int, width: int, keys: int, masked: bool, seed: int) -> None:
    """A long segment in parts and a tail with an ancestor mask against one softmax over all keys; the second sequence is empty in both."""
    q = some(2, rows, 2 * group, width, seed=seed, dtype=dtype)
    k, v = (some(2, 2, keys, width, seed=seed + i, dtype=dtype).transpose(1, 2) for i in (1, 2))
    tail_k, tail_v = (some(2, rows, 2, width, seed=seed + i, dtype=dtype) for i in (3, 4))
    lengths, ends = torch.tensor([keys, 0], device=DEVICE), torch.tensor([rows, 0], device=DEVICE)
    mask = whole(0, 2, 2, rows, keys, seed=seed, dtype=torch.bool) if masked else None
    ancestors = torch.eye(rows, dtype=torch.bool, device=DEVICE) | whole(0, 2, rows, rows, seed=seed, dtype=torch.bool)
    ancestors = ancestors.expand(2, -1, -1)
    scale = width**-0.5
    body = kernels.segment_attention(q, k, v, lengths, scale, mask, 2)
    tail = kernels.segment_attention(q, tail_k, tail_v, ends, scale, ancestors)
    near(segments.merge_reference(body)[0], segments.merge_reference(dense.reference(q, k, v, lengths, scale, mask))[0], dtype)
    out, total = kernels.merge(body + tail, dtype)

    every_k, every_v = (torch.cat(pair, 1).float().repeat_interleave(group, 2) for pair in ((k, tail_k), (v, tail_v)))
    seen = torch.cat((torch.ones_like(ancestors[:, :, :1]).expand(-1, -1, keys) if mask is None else mask, ancestors), 2)[0]
    scores = torch.einsum("rhd,thd->hrt", q[0].float(), every_k[0]).mul(scale).masked_fill(~seen, -torch.inf)
    near(out[0], torch.einsum("hrt,thd->rhd", scores.softmax(2), every_v[0]), dtype)
    near(total[0], scores.logsumexp(2).t(), dtype)
    assert bool((out[1] == 0).all()) and bool((total[1] == -torch.inf).all())


@few
@given(st.sampled_from(DOTS), st.integers(1, 3), st.sampled_from([16, 32]), st.sampled_from([32, 48]), st.integers(1, 4), SEEDS)
def test_page_attention(dtype: torch.dtype, rows: int, size: int, width: int, selected: int, seed: int) -> None:
    q, k, v = some(2, rows, 4, width, seed=seed, dtype=dtype), *(some(7, size, 2, width, seed=seed + i, dtype=dtype) for i in (1, 2))
    pages = torch.stack([torch.randperm(7, generator=torch.Generator().manual_seed(seed + i))[:selected] for i in range(4)])
    pages = torch.where(torch.rand(pages.shape) < 0.2, -1, pages).reshape(2, 2, selected).to(torch.int32).to(DEVICE)
    lengths = whole(0, size + 1, 7, seed=seed, dtype=torch.int32)
    have, want = kernels.page_attention(q, k, v, pages, lengths, 0.2, 2), pages_of.reference(q, k, v, pages, lengths, 0.2)
    near(kernels.merge(have)[0], segments.merge_reference(want)[0], dtype)


def test_all_pages_are_dense_attention_and_bounds_hold() -> None:
    q, k, v = some(1, 2, 6, 32, seed=1), some(4, 16, 3, 32, seed=2), some(4, 16, 3, 32, seed=3)
    lengths, pages = torch.tensor([16, 16, 16, 5], device=DEVICE, dtype=torch.int32), torch.arange(4, dtype=torch.int32, device=DEVICE)
    out, _ = kernels.merge(kernels.page_attention(q, k, v, pages.expand(1, 3, -1).contiguous(), lengths, 0.3))
    flat = (x.reshape(1, 64, 3, 32) for x in (k, v))
    near(out, segments.merge_reference(dense.reference(q, *flat, torch.tensor([53], device=DEVICE), 0.3))[0])
    bounds = kernels.page_bounds(q, k.amin(1)[None], k.amax(1)[None])  # [1, 3, 4]
    scores = torch.einsum("bgjrd,ntgd->bgjrnt", q.reshape(1, 2, 3, 2, 32).permute(0, 2, 3, 1, 4), k)
    assert bool((scores.amax((2, 3, 5)) <= bounds + 1e-5).all())


@few
@given(st.sampled_from(FLOATS), st.sampled_from([32, 64]), st.integers(1, 70), SEEDS, st.data())
def test_bitmap_encode(dtype: torch.dtype, width: int, keys: int, seed: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, width))
    x = some(1, keys, 2, width, seed=seed, dtype=dtype)
    x[0, 0] = x[0, 0].sign()  # all magnitudes equal: the lower channels stay
    x[0, -1, 0] = 0
    have, want = kernels.bitmap_encode(x, keep), bitmaps.encode_reference(x, keep)
    assert torch.equal(have.bits, want.bits) and torch.equal(have.values, want.values)
    kept = bitmaps.decode_reference(have)
    assert bool(((kept == x) | (kept == 0)).all())
    assert have.bytes() == keys * 2 * (keep * x.element_size() + width // 8)
    if keep == width:
        assert torch.equal(kept, x)


@few
@given(st.sampled_from(DOTS), st.integers(1, 3), st.sampled_from([32, 64]), st.integers(1, 140), st.sampled_from([4, 20, 32]), SEEDS)
def test_bitmap_attention(dtype: torch.dtype, rows: int, width: int, keys: int, keep: int, seed: int) -> None:
    q, k, v = some(2, rows, 4, width, seed=seed, dtype=dtype), *(some(2, keys, 2, width, seed=seed + i, dtype=dtype) for i in (1, 2))
    k, v = kernels.bitmap_encode(k, keep), kernels.bitmap_encode(v, 32)
    lengths = torch.tensor([keys, keys // 2], device=DEVICE)
    have, want = kernels.bitmap_attention(q, k, v, lengths, 0.2, 2), bitmaps.reference(q, k, v, lengths, 0.2)
    near(kernels.merge(have)[0], segments.merge_reference(want)[0], dtype)


@few
@given(st.sampled_from(FLOATS), st.integers(1, 3), st.integers(1, 9000), SEEDS, st.data())
def test_top_k(dtype: torch.dtype, rows: int, width: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, min(9, width)))
    x = strided(some(rows, width, seed=seed, dtype=dtype).round(decimals=1))  # many ties
    x[0, : width // 2] = -torch.inf
    x[-1, width // 2 :] = torch.tensor([0.0, -0.0], device=DEVICE).repeat(width)[: width - width // 2]
    values, ids = kernels.top_k(x, k)
    wanted, places = tops.reference(x, k)
    assert torch.equal(ids, places) and torch.equal(values, wanted)


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (70, 577), (257, 256)])
def test_entropy_decode(shape: tuple[int, int]) -> None:
    words = (some(*shape, seed=1) * 0.02).bfloat16().cpu().view(torch.int16)
    words.view(-1)[: min(9, words.numel())] = torch.tensor([0, -32768, 1, 16256, 32640, -128, 32704, 5, 9], dtype=torch.int16)[
        : words.numel()
    ]
    coded = entropy.encode(words.numpy().view(np.uint16))
    loaded = kernels.Coded.load(coded, DEVICE)
    assert torch.equal(kernels.entropy_decode(loaded).cpu().view(torch.int16), words)
    assert torch.equal(kernels.entropy_decode(loaded).cpu().view(torch.int16), entropies.reference(coded).view(torch.int16))
    turned = kernels.Coded.load(entropy.transposed(coded), DEVICE)
    assert torch.equal(kernels.entropy_decode(turned).cpu().view(torch.int16), words.t())


def test_entropy_decode_of_some_blocks_and_of_damaged_bytes() -> None:
    words = (some(3, 32768, seed=4) * 0.02).bfloat16().cpu().view(torch.int16)
    coded = entropy.encode(words.numpy().view(np.uint16))
    loaded = kernels.Coded.load(coded, DEVICE)
    assert torch.equal(entropies.decode_blocks(loaded, 1, 2).cpu(), words[1])
    assert entropies.decode_blocks(loaded, 2, 2).numel() == 0
    loaded.words.random_(generator=torch.Generator(DEVICE).manual_seed(0))
    assert kernels.entropy_decode(loaded).shape == (3, 32768)  # other numbers, but no reading beyond the stream


def wrong() -> dict[str, tuple[Callable[..., Any], dict[str, Any], str]]:
    """Calls that are refused, each with a word of the message."""
    q, cache, lengths = some(1, 2, 4, 16, seed=0), some(1, 9, 2, 16, seed=1), torch.tensor([9], device=DEVICE)
    byte, ones = whole(0, 9, 2, 32, seed=0, dtype=torch.int8), torch.ones(2, device=DEVICE)
    packed = whole(0, 9, 2, 1, 16, seed=0, dtype=torch.uint8)
    attend = {"q": q, "k": cache, "v": cache, "lengths": lengths, "scale": 1.0}
    wide = some(1, 9, 2, 512, seed=1)
    return {
        "norm of integers": (kernels.rms_quantize, {"x": byte}, "convert"),
        "norm of columns": (kernels.rms_quantize, {"x": q[0, 0].t()}, "contiguous"),
        "long rows": (kernels.rms_quantize, {"x": torch.zeros(1, 40000, device=DEVICE)}, "reference"),
        "int8 of floats": (kernels.int8_matmul, {"x": ones[None], "row_scale": ones, "weight": byte, "scale": ones}, "int8"),
        "other inputs": (kernels.int8_matmul, {"x": byte[:, :9], "row_scale": ones, "weight": byte, "scale": ones}, "matching"),
        "many rows": (
            kernels.int8_matmul,
            {"x": byte.repeat(99, 1), "row_scale": ones.repeat(99), "weight": byte, "scale": ones},
            "_int_mm",
        ),
        "blocks of 24": (kernels.block_matmul, {"x": some(1, 24, seed=0), "packed": packed[:, :, :12].contiguous(), "scales": ones[:, None]}, "pack"),
        "scales": (kernels.block_matmul, {"x": some(1, 32, seed=0), "packed": packed, "scales": ones}, "block"),
        "wide heads": (kernels.segment_attention, {**attend, "q": some(1, 2, 4, 512, seed=0), "k": wide, "v": wide}, "scaled_dot_product"),
        "heads that do not share": (kernels.segment_attention, {**attend, "q": q[:, :, :3]}, "multiple"),
        "types": (kernels.segment_attention, {**attend, "q": q.half()}, "convert"),
        "prompt": (kernels.segment_attention, {**attend, "q": q.repeat(1, 99, 1, 1)}, "fewer rows"),
        "mask": (kernels.segment_attention, {**attend, "mask": torch.ones(1, 2, 8, dtype=torch.bool, device=DEVICE)}, "contiguous"),
        "pages of 9": (
            kernels.page_attention,
            {**attend, "pages": torch.zeros(1, 2, 1, dtype=torch.int32, device=DEVICE), "lengths": lengths.int()},
            "16, 32",
        ),
        "48 channels": (kernels.bitmap_encode, {"x": some(1, 2, 2, 48, seed=0), "keep": 3}, "32, 64"),
        "keep": (kernels.bitmap_encode, {"x": some(1, 2, 2, 32, seed=0), "keep": 33}, "keep 1"),
        "too many": (kernels.top_k, {"x": q[0, 0], "k": 17}, "topk"),
    }  # fmt: skip


@pytest.mark.parametrize("case", list(wrong()))
def test_refuses(case: str) -> None:
    call, options, fix = wrong()[case]
    with pytest.raises(InputError) as caught:
        call(**options)
    assert caught.value.code == "kernel-unsupported" and fix in (caught.value.fix or "")


def test_names_the_alternative_off_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(InputError, match="runs on a CUDA device") as caught:
        kernels.top_k(torch.zeros(1, 4), 1)
    assert "torch.topk" in (caught.value.fix or "")
    if GPU:
        with pytest.raises(InputError, match="lie on cpu, cuda"):
            kernels.rms_quantize(torch.zeros(1, 4, device="cuda"), torch.zeros(4))


def test_every_kernel_compiles_ahead_of_time(tmp_path: Path) -> None:
    """For compute capabilities 8.0 and 9.0, in a process without the interpreter."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    script = Path(__file__).with_name("ahead_of_time.py")
    done = subprocess.run(
        [sys.executable, str(script), "80", "90"], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    sources = "".join(path.read_text() for path in Path(kernels.__file__).parent.glob("*.py"))
    launched = sources.count("    launch(")
    assert [sum(row[0] == capability for row in found) for capability in (80, 90)] == [launched, launched]
    assert all(size > 1000 and shared <= 163 * 1024 for _, _, size, shared in found)  # 163 KiB is what a block has on 8.0


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name",
    ["int8_matmul", "block_matmul", "segment_attention", "entropy_decode", "rms_quantize", "top_k", "bitmap_attention", "page_attention"],
)
def test_timings_run(name: str) -> None:
    timing = import_module(f"{KERNELS}.{name}").timing()
    timing.run()
    timing.baseline()
    assert timing.bytes > 0
