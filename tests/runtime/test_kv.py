"""Caches with policies, on made-up rows: blocks, horizons, rollback, bytes (papers/A4 section 12)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planc.runtime.engine import NEVER
from planc.runtime.errors import PlanError
from planc.runtime.kv import KvPolicy, LayerSpec, PolicyCache, Rope
from planc.runtime.kv.stores import BLOCK

HEADS, QUERIES, WIDTH = 2, 4, 16
ROPE = Rope(inv_freq=tuple(10000.0 ** (-np.arange(WIDTH // 2) / (WIDTH // 2))))
CAPACITY = 700

POLICIES: dict[str, dict[str, Any]] = {
    "recent": {"evict": {"recent": {"capacity": 90, "window": 8}}},
    "attention_window": {"evict": {"attention_window": {"capacity": 90, "window": 8}}, "sinks": 4},
    "lookahead": {"evict": {"lookahead": {"capacity": 90, "window": 8, "tokens": 5}}},
    "streaming": {"streaming": {"share": 1.0, "sink": 4, "local": 16}},
    "int8": {"store": "int8", "window": 8, "sinks": 4},
    "quantized": {"store": {"quantized": {"bits": 2, "group": 16}}, "window": 0},
    "gear": {"store": {"gear": {"bits": 4, "group": 16, "rank": 2, "outliers": 0.04}}, "window": 8},
    "bitmap": {"store": {"bitmap": {"keep": 5}}, "window": 8},
    "pages": {"select": {"pages": {"budget": 128}}, "window": 8, "sinks": 4},
    "int8 pages": {"store": "int8", "select": {"pages": {"budget": 64, "interval": 3}}, "window": 40},
    "low_rank": {"store": {"low_rank": {"rank": 8}}, "select": {"landmarks": {"budget": 64, "outliers": 2}}, "window": 8},
    "evict and store": {"evict": {"attention_window": {"capacity": 150, "window": 8}}, "store": "int8", "window": 8},
}


def policy(name: str) -> KvPolicy:
    return KvPolicy.model_validate(POLICIES[name])


def spec(chosen: KvPolicy, name: str = "past.0") -> LayerSpec:
    group = 2 if chosen.streaming else 1
    return LayerSpec(name=name, group=group, heads=HEADS, key_width=WIDTH, value_width=WIDTH, query_heads=QUERIES, scale=0.25, rope=ROPE)


def new(chosen: KvPolicy, batch: int = 1) -> PolicyCache:
    return PolicyCache(chosen, [spec(chosen)], batch, CAPACITY)


def text(seed: int = 0, length: int = CAPACITY) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys and values [G,T,D] and queries [T,H,D] of a text."""
    random = np.random.default_rng(seed)
    shapes = (HEADS, length, WIDTH), (HEADS, length, WIDTH), (length, QUERIES, WIDTH)
    key, value, query = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
    return key, value, query


Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


def write(cache: PolicyCache, rows: Rows, span: slice, sequence: int = 0) -> None:
    """A pass over these rows of a text: what an engine does to a cache."""
    key, value, query = rows
    count = span.stop - span.start
    cache.reserve(sequence, count)
    layer = cache.layers(sequence)["past.0"]
    layer.key[0, :, layer.rows : layer.rows + count] = key[:, span]
    layer.value[0, :, layer.rows : layer.rows + count] = value[:, span]
    cache.observe(sequence, 0, {"past.0": query[span]})


def commit(cache: PolicyCache, rows: Rows, until: int, step: int, sequence: int = 0) -> None:
    """Commit the text up to a length, `step` tokens a pass but never across the horizon."""
    while (length := int(cache.lengths[sequence])) < until:
        count = min(step, until - length, cache.horizon(sequence))
        write(cache, rows, slice(length, length + count), sequence)
        cache.keep(sequence, np.arange(count))


def sealed(chosen: KvPolicy, rows: Rows, prompt: int, step: int = 64) -> PolicyCache:
    cache = new(chosen)
    commit(cache, rows, prompt, step)
    guessed = chosen.guesses
    if guessed:
        write(cache, rows, slice(prompt, prompt + guessed))
    cache.seal(0, guessed)
    return cache


def contents(cache: PolicyCache, sequence: int = 0) -> dict[str, bytes]:
    """All that a pass may read, bit for bit."""
    layer = cache.layers(sequence)["past.0"]
    found = {"key": layer.key[:, :, : layer.rows], "value": layer.value[:, :, : layer.rows], "positions": layer.positions[:, : layer.rows]}
    if layer.body is not None:
        found |= {f"{part}.{name}": array for part in ("key", "value", "stats") for name, array in layer.body.payload(part).items()}
    return {name: array.tobytes() for name, array in found.items()}


@pytest.mark.parametrize("name", POLICIES)
def test_blocks_do_not_depend_on_how_tokens_come(name: str) -> None:
    rows, chosen = text(), policy(name)
    for prompt in (1, 31, 63, 64, 65, 288, 289):
        ways = []
        for step in (1, 3, 64):
            cache = sealed(chosen, rows, prompt, step)
            commit(cache, rows, prompt + 150, step)
            ways.append(contents(cache))
        assert ways[0] == ways[1] == ways[2]


@pytest.mark.parametrize("name", POLICIES)
def test_what_was_drafted_and_rejected_leaves_no_trace(name: str) -> None:
    rows, other, chosen = text(), text(1), policy(name)
    plain, drafted = sealed(chosen, rows, 200), sealed(chosen, rows, 200)
    commit(plain, rows, 330, 1)
    while (length := int(drafted.lengths[0])) < 330:
        count = min(8, drafted.horizon(0), CAPACITY - length)
        wrong = tuple(array.copy() for array in other)
        for mine, theirs in zip(wrong[:2], rows[:2], strict=True):
            mine[:, length] = theirs[:, length]
        wrong[2][length] = rows[2][length]
        write(drafted, (wrong[0], wrong[1], wrong[2]), slice(length, length + count))  # the pending token, then guesses, all rejected
        drafted.keep(0, np.arange(1))
    assert contents(plain) == contents(drafted)


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_changes_before_the_horizon(name: str) -> None:
    """A row sees what was committed before it and nothing moves, up to the horizon; at the horizon something does."""
    rows = text()
    cache = sealed(policy(name), rows, 200)
    for _ in range(3):
        horizon, layer = cache.horizon(0), cache.layers(0)["past.0"]
        before, seen = layer.key[0, :, : layer.rows].copy(), layer.rows
        steps = min(horizon, 70) - 1
        commit(cache, rows, int(cache.lengths[0]) + steps, 1)
        assert layer.rows == seen + steps and np.array_equal(layer.key[0, :, :seen], before)
        if horizon == NEVER:
            return
        assert cache.horizon(0) == 1
        commit(cache, rows, int(cache.lengths[0]) + 1, 1)
        assert cache.horizon(0) > 1 or cache.policy.longest_pass == 1


@pytest.mark.parametrize("name", [n for n, p in POLICIES.items() if "store" in p or "streaming" in p])
def test_the_dense_part_stays_small(name: str) -> None:
    rows, chosen = text(), policy(name)
    cache = sealed(chosen, rows, 100)
    commit(cache, rows, 600, 1)
    layer = cache.layers(0)["past.0"]
    least = chosen.streaming.local if chosen.streaming else chosen.window
    assert layer.window < least + BLOCK
    assert layer.slots <= layer.rows + 2 * BLOCK + layer.rows // 4


@pytest.mark.parametrize("name", POLICIES)
def test_bytes_are_those_of_the_arrays(name: str) -> None:
    cache = sealed(policy(name), text(), 300)
    found: dict[int, int] = {}

    def walk(value: Any, depth: int = 0) -> None:
        if isinstance(value, np.ndarray):
            base = value if value.base is None else value.base
            found[base.ctypes.data] = base.nbytes
        elif isinstance(value, dict):
            for item in value.values():
                walk(item, depth + 1)
        elif type(value).__module__.startswith("planc.runtime.kv.layer") and depth < 6:
            walk(vars(value), depth + 1)

    walk(cache.layers(0))
    walk({})
    own = sum(found.values())
    layer = cache.layers(0)["past.0"]
    assert abs(cache.bytes() - own) <= layer.resident.nbytes + (0 if layer.selected is None else layer.selected.nbytes) + 8
    assert sum(cache.usage().values()) <= cache.bytes()


def test_sequences_do_not_mix() -> None:
    chosen = policy("int8")
    one, two = text(0), text(1)
    cache = new(chosen, 2)
    commit(cache, one, 200, 50, 0)
    cache.seal(0)
    commit(cache, two, 90, 30, 1)
    cache.seal(1)
    commit(cache, one, 300, 1, 0)
    commit(cache, two, 300, 7, 1)
    for sequence, rows in enumerate((one, two)):
        alone = sealed(chosen, rows, (200, 90)[sequence])
        commit(alone, rows, 300, 5)
        assert contents(alone) == contents(cache, sequence)
    cache.rollback(0, 0)
    assert cache.lengths.tolist() == [0, 300] and cache.horizon(0) == NEVER


def test_eviction_keeps_positions() -> None:
    rows = text()
    cache = sealed(policy("attention_window"), rows, 300)
    layer = cache.layers(0)["past.0"]
    assert layer.rows == 90
    for head in range(HEADS):
        kept = layer.positions[head, :90]
        assert np.all(np.diff(kept) > 0) and list(kept[:4]) == [0, 1, 2, 3] and list(kept[-8:]) == list(range(292, 300))
        assert np.array_equal(layer.key[0, head, :90], rows[0][head, kept])
    commit(cache, rows, 310, 1)
    assert layer.positions[0, 90:100].tolist() == list(range(300, 310))  # of the text, not of the slots


def test_rollback_of_a_sealed_text() -> None:
    rows = text()
    cache = sealed(policy("int8"), rows, 200)
    start = int(cache.lengths[0])
    commit(cache, rows, start + 5, 1)
    before = contents(cache)
    commit(cache, rows, start + 9, 2)
    cache.rollback(0, start + 5)
    assert contents(cache) == before
    commit(cache, rows, start + 120, 1)
    with pytest.raises(AssertionError, match="does not come back"):
        cache.rollback(0, start + 5)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(list(POLICIES)), st.integers(1, 400), st.integers(0, 150), st.integers(1, 40))
def test_all_rows_of_the_window_are_the_last_of_the_text(name: str, prompt: int, answer: int, step: int) -> None:
    rows = text()
    cache = sealed(policy(name), rows, prompt)
    commit(cache, rows, prompt + answer, step)
    layer = cache.layers(0)["past.0"]
    last = slice(prompt + answer - min(layer.window, answer), prompt + answer)
    shown = slice(layer.rows - (last.stop - last.start), layer.rows)
    assert np.array_equal(layer.key[0, :, shown], rows[0][:, last])
    assert np.array_equal(layer.value[0, :, shown], rows[1][:, last])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "does nothing"),
        ({"window": 8}, "does nothing"),
        ({"store": "dense"}, "does nothing"),
        ({"store": {"low_rank": {"rank": 8}}}, "would have to be read"),
        ({"store": {"gear": {}}, "select": {"landmarks": {"budget": 64}}}, "as a whole"),
        ({"evict": {"recent": {"capacity": 32, "window": 32}}}, "leaves nothing to choose"),
        ({"evict": {"recent": {"capacity": 40, "window": 32}}, "sinks": 9}, "do not fit"),
        ({"streaming": {}}, "one of share and heads"),
        ({"streaming": {"share": 0.5, "heads": [[0]]}}, "one of share and heads"),
    ],
)
def test_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words) as caught:
        KvPolicy.model_validate(options)
    assert caught.value.fix
