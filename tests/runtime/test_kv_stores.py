"""Formats of stored rows, what selects among them and what evicts: each against its definition (papers/10, 34, 67, 76, 87; A4 sections 4 to 6)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from planc.runtime.kv import Rope
from planc.runtime.kv.attend import attend, grouped, merge
from planc.runtime.kv.evictions import AttentionWindow, Lookahead, Recent
from planc.runtime.kv.evictions.base import window_attention
from planc.runtime.kv.selections import Landmarks, Pages
from planc.runtime.kv.stores import PARTS, Bitmap, Dense, Gear, Int8, LowRank, Quantized, Store, pick
from planc.runtime.kv.stores.bitmap import magnitude

WIDTHS = (16, 64, 128)


def rows(width: int = 16, blocks: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((blocks, 2, 64, width)).astype(np.float32)


def restored(store: Store, x: np.ndarray, part: str) -> np.ndarray:
    fitted = store.fit(x, part)  # type: ignore[arg-type]
    return store.decode(store.encode(x, part, fitted), part, fitted)  # type: ignore[arg-type]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("store", "bound"),
    [
        (Dense(), 0.0),
        (Dense(dtype="float16"), 5e-4),
        (Dense(dtype="bfloat16"), 4e-3),
        (Int8(), 0.5 / 127 + 1e-3),
        (Quantized(bits=8, group=16), 1 / 255),
        (Quantized(bits=4, group=16), 1.1 / 15),
        (Gear(bits=2, group=16, rank=64), 4e-3),
        (Gear(bits=4, group=16, rank=4, factors="int8", outliers=0.05), 1.1 / 15),
        (Bitmap(keep=16, dtype="int8"), 1.0),
        (LowRank(rank=2 * max(WIDTHS)), 1e-3),
    ],
)
def test_error_is_bounded(store: Store, bound: float, part: str, width: int) -> None:
    x = rows(width)
    assert np.abs(restored(store, x, part) - x).max() <= bound * np.abs(x).max()


@pytest.mark.parametrize("part", PARTS)
def test_everything_kept_is_exact(part: str) -> None:
    x = rows(64)
    assert np.array_equal(restored(Bitmap(keep=64, dtype="float32"), x, part), x)
    assert np.array_equal(restored(Dense(), x, part), x)


@pytest.mark.parametrize("part", PARTS)
def test_a_constant_block_is_exact(part: str) -> None:
    x = np.full((1, 2, 64, 16), 1.5, np.float32)
    for store in (Int8(), Quantized(bits=2, group=16), Gear(bits=2, group=16, outliers=0.05)):
        assert np.allclose(restored(store, x, part), x, atol=1e-2)
    assert np.array_equal(restored(Int8(), 0 * x, part), 0 * x)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, (1, 1, 5, 16), elements=st.sampled_from([-2.0, -1.0, 0.0, 1.0, 1.5])), st.integers(1, 16))
def test_bitmap_is_the_masked_row(x: np.ndarray, keep: int) -> None:
    """Ties and zeros included: exactly `keep` numbers, the largest, the lower channel of equal ones."""
    mask = magnitude(x, keep)
    assert (mask.sum(-1) == keep).all()
    for row, kept in zip(x.reshape(-1, 16), mask.reshape(-1, 16), strict=True):
        order = sorted(range(16), key=lambda c: (-abs(row[c]), c))
        assert sorted(np.flatnonzero(kept)) == sorted(order[:keep])
    assert np.array_equal(restored(Bitmap(keep=keep, dtype="float32"), x, "key"), x * mask)


def test_bitmap_takes_what_the_layout_says() -> None:
    payload = Bitmap(keep=20).encode(rows(64), "key", {})
    assert sum(array[0, 0, 0].nbytes for array in payload.values()) == 48  # of 128 bytes in float16


def test_gear_removes_error_with_rank_and_outliers() -> None:
    x = rows(64)
    for part in PARTS:
        errors = [float(np.linalg.norm(restored(Gear(bits=2, group=64, rank=r), x, part) - x)) for r in (0, 2, 4, 8, 16)]
        assert errors == sorted(errors, reverse=True) and len(set(errors)) == 5
        errors = [float(np.linalg.norm(restored(Gear(bits=2, group=64, rank=2, outliers=s), x, part) - x)) for s in (0.0, 0.04, 0.1, 0.2)]
        assert errors == sorted(errors, reverse=True) and len(set(errors)) == 4


def test_scores_through_the_low_rank_form() -> None:
    """(q right) left.T is what the decoded form gives."""
    x, q = rows(64), np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    payload = Gear(bits=4, group=64, rank=4).encode(x, "key", {})
    left, right = (payload[name].astype(np.float32) for name in ("left", "right"))
    base = Quantized(bits=4, group=64).decode(payload, "key", {})
    apart = q @ base.swapaxes(-1, -2) + (q @ right) @ left.swapaxes(-1, -2)
    assert np.allclose(apart, q @ Gear(bits=4, group=64, rank=4).decode(payload, "key", {}).swapaxes(-1, -2), atol=1e-3)


@pytest.mark.parametrize("store", [Dense(dtype="float16"), Int8(), Bitmap(keep=7), LowRank(rank=8)])
def test_single_rows_can_be_picked(store: Store) -> None:
    x = rows(16, blocks=3)
    wanted = np.array([[0, 5, 64, 191], [3, 2, 100, 128]])
    for part in PARTS:
        fitted = store.fit(x, part)
        payload = store.encode(x, part, fitted)
        whole = store.decode(payload, part, fitted).swapaxes(0, 1).reshape(2, 192, 16)
        some = store.decode(pick(payload, wanted), part, fitted)[0]
        assert np.allclose(some, np.stack([whole[head, wanted[head]] for head in range(2)]), atol=1e-6)


def test_low_rank_form_can_be_continued() -> None:
    """Later keys are expressed in the prompt's basis: what lies in its span is kept."""
    random = np.random.default_rng(0)
    basis = random.standard_normal((4, 2 * 16)).astype(np.float32)
    flat = random.standard_normal((3 * 64, 4)).astype(np.float32) @ basis
    x = flat.reshape(3, 64, 2, 16).swapaxes(1, 2)
    store = LowRank(rank=4, values="float32")
    fitted = store.fit(x[:2], "key")
    later = store.decode(store.encode(x[2:], "key", fitted), "key", fitted)
    assert np.abs(later - x[2:]).max() < 1e-2


@pytest.mark.parametrize("scaling", [1.0, 1.3])
def test_rope_turns_back(scaling: float) -> None:
    rope = Rope(inv_freq=(1.0, 0.1, 0.01), scaling=scaling)
    x, positions = rows(8)[0, 0], np.arange(100, 164)
    assert np.allclose(rope.turn(rope.turn(x, positions), positions, back=True), x, atol=1e-5)
    assert np.array_equal(rope.turn(x, positions)[:, 6:], x[:, 6:])  # only the first channels turn


# ---- attention over segments ----


@pytest.mark.parametrize("count", [1, 5, 33])
@pytest.mark.parametrize("group", [1, 3, 4])
def test_segments_merge_to_one_softmax(count: int, group: int) -> None:
    random = np.random.default_rng(count)
    heads, width = 2, 16
    q = random.standard_normal((count, heads * group, width)).astype(np.float32)
    sizes = (7, 64, 0, count)
    keys, values = ([random.standard_normal((heads, n, width)).astype(np.float32) for n in sizes] for _ in range(2))
    tree = np.tri(count, dtype=bool) & (random.random((count, count)) < 0.6) | np.eye(count, dtype=bool)
    hidden = np.repeat(~tree, group, axis=0)
    m = grouped(q, heads)
    parts = [attend(m @ k.swapaxes(1, 2) * 0.3, v, hidden if i == 3 else None) for i, (k, v) in enumerate(zip(keys, values, strict=True))]
    scores = m @ np.concatenate(keys, 1).swapaxes(1, 2) * 0.3
    scores[:, :, sum(sizes[:3]) :][:, hidden] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = weights / weights.sum(-1, keepdims=True) @ np.concatenate(values, 1)
    assert np.allclose(merge(parts), wanted, atol=1e-5)


# ---- selections ----


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 8, 16, 64]), st.floats(0.01, 100.0))
def test_page_bounds_hold(seed: int, sub: int, scale: float) -> None:
    keys, random = rows(16, 3, seed) * np.float32(scale), np.random.default_rng(seed)
    q = random.standard_normal((4, 16)).astype(np.float32)
    pages = Pages(budget=64, sub=sub)
    stats = pages.stats(keys)
    bounds = pages.bounds(stats, q)  # [H, parts]
    products = np.einsum("hd,htd->ht", q, keys.swapaxes(0, 1).reshape(2, 192, 16).repeat(2, axis=0))
    best = products.reshape(4, -1, sub).max(-1)
    assert (bounds >= best - 1e-4 * np.abs(products).max()).all()
    scores = pages.scores(stats, q, 1.0)
    assert np.allclose(scores, bounds.reshape(2, 2, 3, -1).max((1, 3)))


def test_pages_finds_the_block_with_the_key() -> None:
    keys = rows(16, 6) * 0.1
    q = np.random.default_rng(5).standard_normal((4, 16)).astype(np.float32)
    keys[4, 0, 17], keys[1, 1, 60] = q[0] * 2, q[3] * 2
    chosen = Pages(budget=64).choose(Pages(budget=64).stats(keys), q, 1.0, np.empty((2, 0), np.int64))
    assert chosen.tolist() == [[4], [1]]


def test_landmarks_leave_outliers_to_themselves() -> None:
    keys = np.abs(rows(16, 3)) + 1.0
    keys[1, 0, 20], keys[2, 1, 3] = -keys[1, 0, 20], -keys[2, 1, 3]  # one key of its chunk points the other way
    select = Landmarks(budget=64, outliers=1)
    resident = select.resident(keys)
    assert resident.tolist() == [[8 + 2], [16 + 0]]
    chosen = select.choose(select.stats(keys), np.ones((4, 16), np.float32), 1.0, resident)
    assert chosen.shape == (2, 8) and not (chosen == resident).any()
    everything = Landmarks(budget=640, outliers=1).choose(select.stats(keys), np.ones((4, 16), np.float32), 1.0, resident)
    assert everything.shape == (2, 23)


# ---- evictions ----


def window_by_hand(q: np.ndarray, k: np.ndarray, scale: float) -> np.ndarray:
    """[H, W, T] of queries [W,H,D] of the last rows of keys [G,T,D]."""
    count, heads, _ = q.shape
    total = k.shape[1]
    out = np.zeros((heads, count, total))
    for h in range(heads):
        for w in range(count):
            seen = total - count + w + 1
            score = k[h // (heads // len(k)), :seen].astype(np.float64) @ q[w, h] * scale
            out[h, w, :seen] = np.exp(score - score.max()) / np.exp(score - score.max()).sum()
    return out


def test_attention_window_is_snap() -> None:
    random = np.random.default_rng(3)
    q, k = random.standard_normal((8, 4, 16)).astype(np.float32), random.standard_normal((2, 60, 16)).astype(np.float32)
    by_hand = window_by_hand(q, k, 0.25)
    found = window_attention(q, k, 0.25, 0.0)  # [G, W*2, T]
    assert np.allclose(found.reshape(2, 8, 2, 60), by_hand.reshape(2, 2, 8, 60).swapaxes(1, 2), atol=1e-6)
    mean = by_hand.reshape(2, 16, 60)[:, :, :52].mean(1)
    padded = np.pad(mean, ((0, 0), (2, 2)))
    smooth = np.stack([padded[:, i : i + 52] for i in range(5)]).mean(0)
    kept = AttentionWindow(capacity=20, window=8).keep(q, k, 60, 0.25, 0.0)
    for head in range(2):
        assert set(kept[head, :12]) == set(np.argsort(-smooth[head], kind="stable")[:12])
        assert kept[head, 12:].tolist() == list(range(52, 60))


def test_lookahead_sees_what_the_guesses_attend_to() -> None:
    random = np.random.default_rng(4)
    k = 0.1 * random.standard_normal((2, 63, 16)).astype(np.float32)
    q = 0.1 * random.standard_normal((8 + 3, 4, 16)).astype(np.float32)
    k[:, 7] = 4 * q[-1, 0] / np.linalg.norm(q[-1, 0])  # nobody but the last guess looks there
    q[-1] = 40 * q[-1, 0]
    options = {"capacity": 16, "window": 8}
    assert 7 in Lookahead(**options, tokens=3).keep(q, k, 60, 1.0, 0.0)[0]
    assert 7 not in Recent(**options).keep(q, k, 60, 1.0, 0.0)[0]


@pytest.mark.parametrize("eviction", [Recent(capacity=60), AttentionWindow(capacity=60), Lookahead(capacity=60)])
def test_room_for_all_keeps_all(eviction: Recent | AttentionWindow | Lookahead) -> None:
    q, k = np.ones((32, 4, 16), np.float32), np.ones((2, 60, 16), np.float32)
    assert eviction.keep(q, k, 60, 1.0, 0.0).tolist() == [list(range(60))] * 2
