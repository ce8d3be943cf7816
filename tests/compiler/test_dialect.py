"""The dialect: fake kernels agree with the real ones, and the reference means what its documentation says."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import close
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from planc.compiler.codebooks import lookup
from planc.compiler.dialect import ACTIVATIONS, OPS, quantize_rows, unpack_blocks
from planc.compiler.weight_forms import int_blocks
from planc.runtime import entropy
from planc.runtime.kv.stores import BLOCK, PARTS, Bitmap, Gear, Int8, Part, Quantized, Store

Draw = Callable[[int, int], int]


def _attention(n: Draw) -> tuple[Any, ...]:
    batch, rows, groups, queries, width = n(1, 2), n(1, 5), n(1, 3), n(1, 3), n(1, 9)
    q, k, v = (torch.randn(batch, rows, heads, w) for heads, w in ((groups * queries, width), (groups, width), (groups, width + n(0, 2))))
    bias = torch.randn(1, 1, rows, rows) if n(0, 1) else None
    return (q, k, v, bias, 0.5, bool(n(0, 1)), n(0, 3), n(0, 1) * 5.0)


def _cached_attention(n: Draw) -> tuple[Any, ...]:
    q, k, v, _, scale, _, window, softcap = _attention(n)
    batch, rows, groups, width = k.shape
    capacity = rows + n(0, 6)
    past = [torch.randn(batch, groups, capacity, w) for w in (width, v.shape[3])]
    lengths = torch.tensor([n(0, capacity - rows) for _ in range(batch)])
    bias = torch.zeros(batch, 1, rows, int(lengths.max()) + rows) if n(0, 1) else None
    return (q, k, v, *past, lengths, bias, scale, window, softcap)


def _segment_bias(n: Draw) -> tuple[Any, ...]:
    batch = n(1, 3)
    return torch.randint(0, 4, (batch, n(1, 6))), torch.randint(0, 4, (batch, n(1, 6)))


def _slot_write(n: Draw) -> tuple[Any, ...]:
    batch, heads, slots, width = n(1, 3), n(1, 3), n(2, 6), n(1, 4)
    rows = n(1, slots)
    where = torch.stack([torch.randperm(slots)[:rows] for _ in range(batch)])
    return torch.randn(batch, heads, slots, width), torch.randn(batch, rows, heads, width), where


def _attention_probe(n: Draw) -> tuple[Any, ...]:
    batch, rows, keys, group, heads, width = n(1, 3), n(1, 4), n(1, 5), n(1, 3), n(1, 2), n(1, 4)
    q, k = torch.randn(batch, rows, group * heads, width), torch.randn(batch, keys, heads, width)
    watched = torch.randint(0, rows, (batch,))
    return q, k, torch.randn(batch, 1, rows, keys), watched, torch.rand(batch, rows), width**-0.5, (0.0, 5.0)[n(0, 1)]


def _stored_attention(n: Draw) -> tuple[Any, ...]:
    q, k, v, past_k, past_v, lengths, bias, *rest = _cached_attention(n)
    stored = [torch.randn(k.shape[0], k.shape[2], count, w) for count in (n(0, 5),) for w in (k.shape[3], v.shape[3])]
    return (q, k, v, past_k, past_v, lengths, *stored, bias, *rest)


def _encoded(store: Store, part: Part, n: Draw, width: int = 16) -> dict[str, Tensor]:
    rows = torch.randn(n(1, 3), n(1, 3), BLOCK, width).numpy()
    return {name: torch.from_numpy(array) for name, array in store.encode(rows, part, {}).items()}


def _stored_int8(n: Draw) -> tuple[Any, ...]:
    return tuple(_encoded(Int8(), "key", n).values())


def _stored_bitmap(n: Draw) -> tuple[Any, ...]:
    return tuple(_encoded(Bitmap(keep=n(1, 16)), "key", n).values())


def _stored_quantized(n: Draw) -> tuple[Any, ...]:
    bits, part = (2, 4, 8)[n(0, 2)], PARTS[n(0, 1)]
    return (*_encoded(Quantized(bits=bits, group=8), part, n).values(), bits, 8, part == "key")


def _stored_corrected(n: Draw) -> tuple[Any, ...]:
    part = PARTS[n(0, 1)]
    found = _encoded(Gear(group=8, rank=n(0, 3), outliers=(0.0, 0.3)[n(0, 1)]), part, n)
    rows = torch.randn(*found["codes"].shape[:3], 16)
    return (rows, *(found.get(name) for name in ("left", "right", "places", "deltas")), 2 if part == "key" else 3)


def _rms_norm(n: Draw) -> tuple[Any, ...]:
    width = n(1, 9)
    return (torch.randn(n(1, 3), n(1, 4), width), torch.randn(width), 1e-6)


def _rope_table(n: Draw) -> tuple[Any, ...]:
    return (torch.randint(0, 99, (n(1, 3), n(1, 5))), torch.rand(n(1, 5)), 1.0 + n(0, 1))


def _rope(n: Draw) -> tuple[Any, ...]:
    batch, rows, half = n(1, 3), n(1, 4), n(1, 4)
    return (torch.randn(batch, rows, n(1, 3), 2 * half + n(0, 3)), torch.randn(batch, rows, half), torch.randn(batch, rows, half))


def _glu(n: Draw) -> tuple[Any, ...]:
    shape = (n(1, 3), n(1, 3), n(1, 9))
    return (torch.randn(shape), torch.randn(shape), list(ACTIVATIONS)[n(0, len(ACTIVATIONS) - 1)])


def _linear_int8(n: Draw) -> tuple[Any, ...]:
    inputs, outputs = n(1, 9), n(1, 9)
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    return (torch.randn(n(1, 3), n(1, 3), inputs), weight, torch.rand(outputs), torch.randn(outputs) if n(0, 1) else None)


def _linear_blocks(n: Draw) -> tuple[Any, ...]:
    bits, block, blocks, outputs = (4, 8)[n(0, 1)], (16, 32)[n(0, 1)], n(1, 3), n(1, 5)
    packed = torch.randint(0, 256, (outputs, blocks, block * bits // 8), dtype=torch.uint8)
    zeros = torch.rand(outputs, blocks) if n(0, 1) else None
    bias = torch.randn(outputs) if n(0, 1) else None
    return (torch.randn(n(1, 2), n(1, 3), blocks * block), packed, torch.rand(outputs, blocks), zeros, bias, bits, block)


def _linear_lookup(n: Draw) -> tuple[Any, ...]:
    bits, block = n(2, 4), (16, 32)[n(0, 1)]
    inputs, outputs = n(1, 3) * block, n(1, 5)
    form = lookup(torch.randn(outputs, inputs), bits, block)
    return (torch.randn(n(1, 2), n(1, 3), inputs), *form.arguments(), torch.randn(outputs) if n(0, 1) else None, bits, block)


def _decode_bf16(n: Draw) -> tuple[Any, ...]:
    rows, columns = n(1, 4), n(1, 9)
    words = torch.randn(rows, columns).bfloat16().view(torch.int16).numpy().view("uint16")
    return (torch.from_numpy(entropy.encode(words).copy()), rows, columns)


def _embedding_int8(n: Draw) -> tuple[Any, ...]:
    rows = n(1, 9)
    return (torch.randint(-127, 128, (rows, n(1, 5)), dtype=torch.int8), torch.rand(rows), torch.randint(0, rows, (n(1, 3), n(1, 4))))


def _rows_from(n: Draw) -> tuple[Any, ...]:
    rows = n(1, 6)
    return (torch.randn(n(1, 2), rows, n(1, 3)), torch.tensor([n(0, rows - 1)]))


def _map(n: Draw) -> Tensor:
    return torch.randn(n(1, 2), n(1, 3), n(4, 7), n(4, 7))


def _pads(n: Draw) -> list[int]:
    return [n(0, 1), n(0, 1), n(0, 1), n(0, 1)]


def _conv2d(n: Draw) -> tuple[Any, ...]:
    x, outputs = _map(n), n(1, 3)
    weight, bias = torch.randn(outputs, x.shape[1], n(1, 2), n(1, 3)), torch.randn(outputs) if n(0, 1) else None
    return (x, weight, bias, [n(1, 2), n(1, 3)], [n(0, 2), n(0, 3), n(0, 2), n(0, 1)], [n(1, 2), 1], 1)


def _codes(n: Draw) -> Tensor:
    return torch.randint(0, 256, _map(n).shape, dtype=torch.uint8)


def _quantize(n: Draw) -> tuple[Any, ...]:
    return (_map(n), 0.02, 7, 0, (15, 255)[n(0, 1)])


def _dequantize(n: Draw) -> tuple[Any, ...]:
    return (_codes(n), 0.02, 7)


def _conv2d_int8(n: Draw) -> tuple[Any, ...]:
    _, weight, bias, *places = _conv2d(n)
    x = torch.randint(0, 256, (n(1, 2), weight.shape[1], n(4, 7), n(4, 7)), dtype=torch.uint8)
    codes = torch.randint(-127, 128, weight.shape, dtype=torch.int8)
    whole = torch.randint(-99, 99, bias.shape, dtype=torch.int32) if bias is not None else None
    return (x, codes, whole, *places, torch.rand(weight.shape[0]) * 0.01, 0.02, 7, 0.5, 3, 0, 255)


def _add_int8(n: Draw) -> tuple[Any, ...]:
    a = _codes(n)
    return (a, torch.randint(0, 256, a.shape, dtype=torch.uint8), 0.02, 7, 0.03, 5, 0.04, 6, 0, 255)


def _max_pool2d(n: Draw) -> tuple[Any, ...]:
    return (_map(n), [n(2, 3), 2], [n(1, 2), n(1, 3)], _pads(n), [1, n(1, 2)])


def _avg_pool2d(n: Draw) -> tuple[Any, ...]:
    return (_map(n), [n(2, 3), 2], [n(1, 2), n(1, 3)], _pads(n), bool(n(0, 1)))


def _upsample2d(n: Draw) -> tuple[Any, ...]:
    return (_map(n), [n(1, 3), n(1, 3)])


def _block_diagonal(n: Draw) -> tuple[Any, ...]:
    count, inputs, outputs = n(1, 3), n(1, 5), n(1, 5)
    return (torch.randn(*(n(1, 3) for _ in range(n(1, 2))), count * inputs), torch.randn(count, outputs, inputs))


INPUTS = {
    "block_diagonal": _block_diagonal,
    "conv2d": _conv2d,
    "quantize": _quantize,
    "dequantize": _dequantize,
    "conv2d_int8": _conv2d_int8,
    "add_int8": _add_int8,
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d,
    "upsample2d": _upsample2d,
    "attention": _attention,
    "cached_attention": _cached_attention,
    "segment_bias": _segment_bias,
    "slot_write": _slot_write,
    "attention_probe": _attention_probe,
    "stored_attention": _stored_attention,
    "stored_int8": _stored_int8,
    "stored_bitmap": _stored_bitmap,
    "stored_quantized": _stored_quantized,
    "stored_corrected": _stored_corrected,
    "rms_norm": _rms_norm,
    "rope_table": _rope_table,
    "rope": _rope,
    "glu": _glu,
    "linear_int8": _linear_int8,
    "linear_blocks": _linear_blocks,
    "linear_lookup": _linear_lookup,
    "embedding_int8": _embedding_int8,
    "decode_bf16": _decode_bf16,
    "rows_from": _rows_from,
}


def test_every_op_is_here() -> None:
    ops = torch._C._dispatch_get_all_op_names()
    assert {name.removeprefix("planc::") for name in ops if name.startswith("planc::")} == set(INPUTS)


@pytest.mark.parametrize("name", INPUTS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_fake_agrees_with_real(name: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    args = INPUTS[name](lambda low, high: data.draw(st.integers(low, high)))
    op = getattr(OPS, name).default
    copies = [a.clone() if isinstance(a, Tensor) else a for a in args]
    real = op(*args)
    assert all(torch.equal(a, c) for a, c in zip(args, copies, strict=True) if isinstance(a, Tensor))  # pure
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = op(*(mode.from_tensor(a, static_shapes=True) if isinstance(a, Tensor) else a for a in args))
    for have, want in zip(*((v,) if isinstance(v, Tensor) else v for v in (fake, real)), strict=True):
        sizes = [s if isinstance(s, int) else None for s in have.shape]  # a size that depends on data is unknown
        assert all(s in (None, w) for s, w in zip(sizes, want.shape, strict=True))
        assert sizes.count(None) <= (name == "rows_from")
        assert have.dtype == want.dtype


@pytest.mark.parametrize("name", INPUTS)
def test_opcheck(name: str) -> None:
    torch.manual_seed(0)
    args = INPUTS[name](lambda low, high: high)
    tests = ("test_schema", "test_faketensor") if name == "rows_from" else ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(OPS, name).default, args, test_utils=tests)


# ---- meaning, against loops over single numbers ----


def test_attention_means_what_it_says() -> None:
    torch.manual_seed(0)
    for causal, window, softcap, biased in itertools.product((False, True), (0, 2), (0.0, 1.5), (False, True)):
        q, k, v = torch.randn(1, 5, 4, 3), torch.randn(1, 5, 2, 3), torch.randn(1, 5, 2, 6)
        bias = torch.randn(1, 4, 5, 5) if biased else None
        have = OPS.attention.default(q, k, v, bias, 0.7, causal, window, softcap)
        for row, head in itertools.product(range(5), range(4)):
            scores = 0.7 * k[0, :, head // 2] @ q[0, row, head]
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            scores = scores + bias[0, head, row] if bias is not None else scores
            seen = [t for t in range(5) if not (causal and t > row) and not (window and t <= row - window)]
            weights = torch.softmax(scores[seen], 0)
            close(have[0, row, head], weights @ v[0, seen, head // 2])


def test_cached_attention_is_attention_over_what_was_kept() -> None:
    torch.manual_seed(1)
    for window, softcap in itertools.product((0, 3), (0.0, 2.0)):
        q, k, v = torch.randn(2, 9, 4, 4), torch.randn(2, 9, 2, 4), torch.randn(2, 9, 2, 4)
        want = OPS.attention.default(q, k, v, None, 0.5, True, window, softcap)
        lengths = torch.tensor([6, 4])  # ragged: the first sequence has 6 committed slots, the second 4
        past = [torch.full((2, 2, 11, 4), torch.nan) for _ in range(2)]  # what is not committed is never read
        for b, length in enumerate(lengths.tolist()):
            for state, new in zip(past, (k, v), strict=True):
                state[b, :, :length] = new[b, :length].transpose(0, 1)
                state[b, :, length:] = torch.randn(2, 11 - length, 4) * 100
        rows = [slice(n, n + 3) for n in lengths.tolist()]
        q3, k3, v3 = (torch.stack([x[b, r] for b, r in enumerate(rows)]) for x in (q, k, v))
        out, new_k, _ = OPS.cached_attention.default(q3, k3, v3, *past, lengths, None, 0.5, window, softcap)
        for b, r in enumerate(rows):
            close(out[b], want[b, r])
            assert torch.equal(new_k[b, :, r], k3[b].transpose(0, 1))
            assert torch.equal(new_k[b, :, : r.start], past[0][b, :, : r.start])


def test_stored_rows_come_before_the_others() -> None:
    torch.manual_seed(3)
    q, k, v = torch.randn(1, 9, 4, 4), torch.randn(1, 9, 2, 4), torch.randn(1, 9, 2, 4)
    want = OPS.attention.default(q, k, v, None, 0.5, True, 0, 2.0)
    turned = [x.transpose(1, 2) for x in (k, v)]
    past = [F.pad(x[:, :, 4:6], (0, 0, 0, 5), value=9.0) for x in turned]  # rows 4 and 5 lie in the window, what is behind is rubbish
    out, new_k, _ = OPS.stored_attention.default(
        q[:, 6:], k[:, 6:], v[:, 6:], *past, torch.tensor([2]), *(x[:, :, :4] for x in turned), None, 0.5, 0, 2.0
    )
    close(out, want[:, 6:])
    assert torch.equal(new_k[:, :, :5], turned[0][:, :, 4:])


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("store", [Int8(), Quantized(bits=2, group=16), Gear(bits=4, group=8, rank=3, outliers=0.2), Bitmap(keep=5)])
def test_stores_are_decoded_as_the_runtime_does(store: Store, part: Part) -> None:
    torch.manual_seed(4)
    found = _encoded(store, part, lambda low, high: high)
    if isinstance(store, Quantized):
        have = OPS.stored_quantized.default(found["codes"], found["scale"], found["zero"], store.bits, store.group, part == "key")
        if isinstance(store, Gear):
            extra = (found[name] for name in ("left", "right", "places", "deltas"))
            have = OPS.stored_corrected.default(have, *extra, 2 if part == "key" else 3)
    else:
        have = (OPS.stored_int8 if isinstance(store, Int8) else OPS.stored_bitmap).default(*found.values())
    close(have, store.decode({name: array.numpy() for name, array in found.items()}, part, {}))


def test_rms_norm_and_rope() -> None:
    x, w = torch.randn(2, 3, 8), torch.randn(8)
    close(OPS.rms_norm.default(x, w, 1e-5), torch.nn.functional.rms_norm(x, (8,), w, 1e-5))
    half = torch.bfloat16
    assert OPS.rms_norm.default(x.to(half), w.to(half), 1e-5).dtype == half
    x, positions, frequencies = torch.randn(1, 4, 2, 6), torch.tensor([[0, 1, 2, 9]]), torch.tensor([1.0, 0.1])
    cos, sin = OPS.rope_table.default(positions, frequencies, 2.0)
    have = OPS.rope.default(x, cos, sin)
    for row, position in enumerate(positions[0].tolist()):
        for i, frequency in enumerate(frequencies.tolist()):  # channels i and i + 2 turn as a complex number; 4 and 5 stay
            turned = (
                2 * torch.complex(x[0, row, :, i], x[0, row, :, i + 2]) * torch.polar(torch.tensor(1.0), torch.tensor(position * frequency))
            )
            close(have[0, row, :, i], turned.real)
            close(have[0, row, :, i + 2], turned.imag)
    assert torch.equal(have[..., 4:], x[..., 4:])


def test_quantised_rows() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 0.5], [1e-30, 0.0, -1e-30]])
    values, scale = quantize_rows(x)
    assert values[0].tolist() == [0, 0, 0]
    assert values[1].tolist() == [64, -127, 32]
    assert float(values.abs().max()) <= 127
    close(values[1] * scale[1], x[1], 2 / 127 / 2)
    weight, bias = torch.full((2, 3), 100, dtype=torch.int8), torch.tensor([1.0, -1.0])
    out = OPS.linear_int8.default(x[:1], weight, torch.ones(2), bias)
    assert torch.equal(out, bias[None])  # a row of zeros gives the bias


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([4, 8]), st.sampled_from([16, 32]), st.integers(1, 4), st.integers(1, 5), st.floats(1e-6, 1e6), st.integers(0, 99))
def test_rounded_blocks(bits: int, block: int, blocks: int, outputs: int, size: float, seed: int) -> None:
    weight = torch.randn(outputs, blocks * block, generator=torch.Generator().manual_seed(seed)) * size
    weight[0] = 0.0
    packed, scales, zeros = int_blocks(weight, bits, block).parts.values()
    assert packed is not None and scales is not None
    assert packed.shape == (outputs, blocks, block * bits // 8) and packed.dtype == torch.uint8 and zeros is None
    error = (unpack_blocks(packed, scales, zeros, bits, block, blocks * block) - weight).abs().reshape(outputs, blocks, block)
    # half a step, but a whole one at the end of the range that has one step less
    assert bool((error <= scales.abs()[..., None] * (1 + 1e-4)).all())
    assert float((error > scales.abs()[..., None] * 0.5001).float().mean()) < 0.1
    assert float(error[0].max()) == 0.0
    assert bool(torch.isfinite(scales).all())


@pytest.mark.parametrize("rows", [1, 3])
def test_int8_of_one_column(rows: int) -> None:
    """A single column is the case in which torch's own integer product reads past its input."""
    weight = torch.tensor([[127], [-5], [64]], dtype=torch.int8)
    x = torch.tensor([[2.0], [0.0], [-3.0]])[:rows]
    out = OPS.linear_int8.default(x, weight, torch.ones(3), None)
    torch.testing.assert_close(out, x @ weight.t().float())


def test_images_mean_what_torch_says() -> None:
    torch.manual_seed(2)
    x, weight = torch.randn(2, 4, 7, 6), torch.randn(6, 2, 3, 3)
    want = F.conv2d(F.pad(x, (0, 2, 1, 3)), weight, None, (2, 1), 0, (1, 2), 2)
    assert torch.equal(OPS.conv2d.default(x, weight, None, [2, 1], [1, 0, 3, 2], [1, 2], 2), want)
    assert torch.equal(OPS.max_pool2d.default(x, [3, 3], [2, 2], [1, 1, 1, 1], [1, 1]), F.max_pool2d(x, 3, 2, 1))
    for counted in (False, True):
        have = OPS.avg_pool2d.default(x, [3, 3], [2, 2], [1, 1, 1, 1], counted)
        close(have, F.avg_pool2d(x, 3, 2, 1, count_include_pad=counted))
    assert torch.equal(OPS.upsample2d.default(x, [3, 2]), F.interpolate(x, scale_factor=(3.0, 2.0), mode="nearest"))


def test_a_window_in_the_padding_alone_sees_nothing_of_the_image() -> None:
    x, weight, bias = torch.randn(1, 1, 1, 5), torch.ones(1, 1, 2, 1), torch.tensor([0.5])
    assert torch.equal(OPS.conv2d.default(x, weight, bias, [1, 1], [3, 0, -2, 0], [1, 1], 1), torch.full((1, 1, 1, 5), 0.5))
    assert torch.equal(OPS.conv2d.default(x, weight, bias, [1, 1], [-2, 0, 3, 0], [1, 1], 1), torch.full((1, 1, 1, 5), 0.5))
