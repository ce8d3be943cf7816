"""The ONNX engine against the reference: ten families, every form of attention, ragged batches and trees."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import FAMILIES, MAX_LENGTH, TOP_K, WINDOWED, apply, close, decoding, onnx_engine, pooled, raised, token_ids

from planc.backends.onnx.artifact import signature
from planc.backends.onnx.engine import OnnxCache, OnnxEngine
from planc.backends.reference import ReferenceEngine
from planc.passes.fuse_projections import FuseProjections
from planc.passes.quantize_weights import QuantizeWeights
from planc.passes.tap import Tap
from planc.runtime.artifact import Manifest
from planc.runtime.engine import Outputs, Step
from planc.runtime.errors import ArtifactError

Trees = Literal["none", "fused", "split"]
Ops = Literal["fast", "standard"]
FORMS: list[tuple[Trees, Ops]] = [("none", "fast"), ("fused", "fast"), ("split", "fast"), ("none", "standard"), ("fused", "standard")]
TOLERANCE = 1e-5  # float32 in another order of sums


def drive(engine: Any, ids: np.ndarray) -> list[Outputs]:
    """Prefill, commit a ragged batch, a tree (or chain), keep a branch, decode, roll back, decode: the outputs of every pass."""
    cache = engine.new_cache(2, 64)
    out = [snapshot(engine.forward(cache, Step(ids[:, :11]), logits=True))]
    cache.keep(0, np.arange(11))
    cache.keep(1, np.arange(9))
    parents = np.array([[-1, 0, 0, 1, 1, 3], [-1, 0, 1, 2, 0, 4]]) if engine.spec.trees else None
    out.append(snapshot(engine.forward(cache, Step(ids[:, 11:17], parents, logits_from=1), logits=True, top_k=True)))
    cache.keep(0, np.array([0, 2]) if engine.spec.trees else np.array([0, 1]))
    cache.keep(1, np.array([0, 4, 5]) if engine.spec.trees else np.array([0, 1, 2]))
    out.append(snapshot(engine.forward(cache, Step(ids[:, 17:20]), logits=True, top_k=True)))
    cache.keep(0, np.arange(3))
    cache.rollback(1, 4)
    out.append(snapshot(engine.forward(cache, Step(ids[:, 20:21]), logits=True)))  # one row
    assert cache.lengths.tolist() == [16, 4]
    return out


def snapshot(out: Outputs) -> Outputs:
    """A copy: the arrays are views until the next pass."""
    return Outputs(
        *(None if a is None else a.copy() for a in (out.argmax, out.logits, out.top_ids, out.top_logits)),
        {n: t.copy() for n, t in out.taps.items()},
    )


def agree(have: list[Outputs], want: list[Outputs], tolerance: float = TOLERANCE) -> None:
    for h, w in zip(have, want, strict=True):
        assert h.logits is not None and w.logits is not None
        close(h.logits, w.logits, tolerance)
        assert h.argmax is not None and h.argmax.dtype == np.int64
        assert np.array_equal(h.argmax, h.logits.argmax(-1))
        assert (h.top_ids is None) == (w.top_ids is None)
        if h.top_ids is not None:
            assert np.array_equal(h.top_ids, np.argsort(-h.logits, axis=-1, kind="stable")[..., :TOP_K])
            assert np.array_equal(h.top_logits, np.take_along_axis(h.logits, h.top_ids, -1))
        for name, tap in w.taps.items():
            close(h.taps[name], tap, tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    ids = token_ids(2, 21).numpy()
    wanted: dict[str, list[Outputs]] = {}
    for number, (trees, ops) in enumerate(FORMS):
        program = decoding(raised(family), trees)
        key = "none" if trees == "none" else "trees"
        wanted.setdefault(key, drive(ReferenceEngine(program), ids))
        (folder := tmp_path / str(number)).mkdir()
        agree(drive(onnx_engine(program, folder, ops), ids), wanted[key])


@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_longer_than_the_text_hides_nothing(family: str, tmp_path: Path) -> None:
    """The first window - 1 tokens are as in a model without window, whatever the form."""
    ids = token_ids(1, 7).numpy()
    plain = ReferenceEngine(decoding(raised(family)))
    want = plain.forward(plain.new_cache(1, 16), Step(ids), logits=True).logits
    for number, (trees, ops) in enumerate(FORMS):
        (folder := tmp_path / str(number)).mkdir()
        engine = onnx_engine(decoding(raised(family), trees), folder, ops)
        cache = engine.new_cache(1, 16)
        out = snapshot(engine.forward(cache, Step(ids[:, :4]), logits=True))
        cache.keep(0, np.arange(4))
        rest = engine.forward(cache, Step(ids[:, 4:]), logits=True)
        close(np.concatenate((out.logits, rest.logits), 1), want, TOLERANCE)  # type: ignore[arg-type]


@pytest.mark.parametrize("formats", [("int8", None), ("int8", "int8_blocks"), ("int4_blocks", None)])
@pytest.mark.parametrize("ops", ["fast", "standard"])
def test_quantised(formats: tuple[str, str | None], ops: Ops, tmp_path: Path) -> None:
    """Rounding of activations turns a difference in the last bit into one of a step now and then, so whole models agree only so far;
    tests/backends/test_onnx_lower.py compares the products alone."""
    modules = {"down_proj": formats[1]} if formats[1] else {}
    part = QuantizeWeights(format=formats[0], modules=modules, block=16)  # type: ignore[arg-type]
    program = decoding(apply(raised("llama"), FuseProjections(), part), "split")
    ids = token_ids(2, 21).numpy()
    # block formats round activations to int8 in ONNX Runtime only
    agree(
        drive(onnx_engine(program, tmp_path, ops), ids), drive(ReferenceEngine(program), ids), 1e-3 if formats == ("int8", None) else 0.05
    )


# ---- bits ----


def rows_of(engine: OnnxEngine, text: np.ndarray, tokens: list[int], parents: list[int] | None) -> np.ndarray:
    cache = engine.new_cache(1, 256)
    engine.forward(cache, Step(text[None, :-1]))
    cache.keep(0, np.arange(len(text) - 1))
    step = Step(np.array([[text[-1], *tokens]]), None if parents is None else np.array([[-1, *parents]]))
    out = engine.forward(cache, step, logits=True).logits
    assert out is not None
    return out[0].copy()


@pytest.mark.parametrize("form", ["none", "int8"])
@pytest.mark.parametrize(("family", "ops"), [("llama", "fast"), ("llama", "standard"), ("gemma3", "fast"), ("gpt2", "fast")])
def test_split_trees_are_chains_bit_for_bit(family: str, ops: Ops, form: str, tmp_path: Path) -> None:
    program = raised(family) if form == "none" else apply(raised(family), FuseProjections(), QuantizeWeights(format="int8"))
    engine = onnx_engine(decoding(program, "split"), tmp_path, ops)
    random = np.random.default_rng(0)
    for past in (5, 20, 100):
        text = token_ids(past, seed=past).numpy()
        tokens = [int(t) for t in random.integers(3, 97, 11)]
        parents = [int(random.integers(0, row + 1)) for row in range(11)]  # every row below the root, at random
        tree = rows_of(engine, text, tokens, parents)
        for row in range(1, 12):
            path = [row]
            while path[0]:
                path.insert(0, parents[path[0] - 1])
            chain = rows_of(engine, text, [tokens[r - 1] for r in path[1:]], None)
            assert np.array_equal(tree[path], chain), f"row {row} at {past} differs by {np.abs(tree[path] - chain).max()}"


@pytest.mark.parametrize("form", ["none", "int8"])
@pytest.mark.parametrize("trees", ["none", "split"])
def test_chains_do_not_depend_on_their_length(trees: Trees, form: str, tmp_path: Path) -> None:
    """A row's logits have the same bits whatever follows it; where float products set in, only from two rows on."""
    program = raised("llama") if form == "none" else apply(raised("llama"), FuseProjections(), QuantizeWeights(format="int8"))
    engine = onnx_engine(decoding(program, trees), tmp_path)
    text, draft = token_ids(30).numpy(), [int(t) for t in token_ids(9, seed=1)]
    longest = rows_of(engine, text, draft, None)
    for count in range(0 if form == "int8" and trees == "none" else 1, 9):
        assert np.array_equal(rows_of(engine, text, draft[:count], None), longest[: count + 1])


def test_a_spare_row_at_the_end_of_the_cache(tmp_path: Path) -> None:
    """The last slot can be filled by a one-row pass, and by then nothing but the lengths has been lost."""
    program = apply(raised("llama"), FuseProjections(), QuantizeWeights(format="int8"))
    engine, ids = onnx_engine(decoding(program), tmp_path), token_ids(1, 12).numpy()
    short, long = engine.new_cache(1, 12), engine.new_cache(1, 40)
    for cache in (short, long):
        engine.forward(cache, Step(ids[:, :11]))
        cache.keep(0, np.arange(11))
    have, want = (engine.forward(cache, Step(ids[:, 11:]), logits=True).logits for cache in (short, long))
    assert have is not None and want is not None and np.array_equal(have, want)


# ---- contract ----


def test_contract(tmp_path: Path) -> None:
    engine = onnx_engine(decoding(apply(raised("llama"), Tap(layers=(1,))), "fused"), tmp_path)
    ids = token_ids(1, 12).numpy()
    assert engine.spec == signature(decoding(apply(raised("llama"), Tap(layers=(1,))), "fused"), MAX_LENGTH).spec()
    cache = engine.new_cache(1, 40)
    assert cache.bytes() == 2 * 2 * 2 * 41 * 8 * 4  # one slot to spare
    buffers = {name: t.ctypes.data for name, t in cache.state.items()}
    out = engine.forward(cache, Step(ids[:, :8]))
    assert out.logits is None and out.top_ids is None and out.taps["tap.1"].shape == (1, 8, 32)
    assert cache.lengths.tolist() == [0]
    for count in (2, 8, 3):  # buffers of outputs grow and are used again
        out = engine.forward(cache, Step(ids[:, :count], logits_from=1), logits=True, top_k=True)
        assert out.logits is not None and out.logits.shape == (1, count - 1, 97)
        assert out.top_ids is not None and out.top_ids.shape == (1, count - 1, TOP_K)
    assert {name: t.ctypes.data for name, t in cache.state.items()} == buffers  # written in place
    with pytest.raises(AssertionError):
        cache.rollback(0, 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 5), st.data())
def test_keep_moves_rows_to_the_end_of_the_text(length: int, data: st.DataObject) -> None:
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, 5)))), dtype=np.int64)
    cache = OnnxCache.__new__(OnnxCache)
    before = np.arange(2 * 3 * 11 * 2, dtype=np.float32).reshape(2, 3, 11, 2)
    cache.state, cache.lengths, cache.capacity = {"past.0.key": before.copy()}, np.array([length, 1]), 11
    cache.keep(0, rows)
    after = cache.state["past.0.key"]
    assert cache.lengths.tolist() == [length + len(rows), 1]
    assert np.array_equal(after[0, :, length : length + len(rows)], before[0][:, length + rows])
    assert np.array_equal(after[0, :, :length], before[0, :, :length])
    assert np.array_equal(after[1], before[1])


def test_a_batch_in_one_pass_is_the_batch_one_by_one(tmp_path: Path) -> None:
    ids = token_ids(3, 9).numpy()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    joint, single = (
        onnx_engine(decoding(raised("qwen3"), "split"), tmp_path / "a"),
        onnx_engine(decoding(raised("qwen3"), "fused"), tmp_path / "b"),
    )
    assert joint.batches and not single.batches
    results = []
    for engine in (joint, single):
        cache = engine.new_cache(3, 32)
        first = snapshot(engine.forward(cache, Step(ids[:, :5]), logits=True, top_k=True))
        for b, count in enumerate((5, 2, 4)):
            cache.keep(b, np.arange(count))
        parents = np.array([[-1, 0, 0], [-1, 0, 1], [-1, -1, 0]])
        results.append([first, snapshot(engine.forward(cache, Step(ids[:, 5:8], parents), logits=True))])
    agree(results[0], results[1])


def test_a_file_that_cannot_be_loaded(tmp_path: Path) -> None:
    program = decoding(raised("llama"))
    onnx_engine(program, tmp_path)
    whole = (tmp_path / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError) as caught:
        OnnxEngine(tmp_path, Manifest(planc="0", signature=signature(program, MAX_LENGTH)))
    assert caught.value.code == "artifact-corrupt"
    assert caught.value.fix


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([f"variant {i}" for i in range(4)]), st.sampled_from(FORMS), st.booleans(), st.integers(0, 99))
def test_other_shapes(tmp_path_factory: pytest.TempPathFactory, name: str, form: tuple[Trees, Ops], joined: bool, seed: int) -> None:
    """One head, one key/value head, widths that are no multiple of 16, biases, other activations."""
    _, program = pooled(name)
    program = decoding(apply(program, FuseProjections()) if joined else program, form[0])
    ids = token_ids(2, 21, seed=seed).numpy()
    agree(drive(onnx_engine(program, tmp_path_factory.mktemp("engine"), form[1]), ids), drive(ReferenceEngine(program), ids))
