"""The entropy code of bf16 words: every bit pattern, every size, and what damage does."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from planc.runtime import entropy
from planc.runtime.errors import ArtifactError

BLOCK = entropy.LANES * entropy.STEPS


def gaussian(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def huffman_bits(counts: list[int]) -> int:
    """Bits of an unlimited Huffman code: the sum of all merged weights."""
    heap, total = [c for c in counts if c], 0
    heapq.heapify(heap)
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


def test_all_bit_patterns_come_back() -> None:
    words = np.random.default_rng(1).permutation(65536).astype(np.uint16).reshape(64, 1024)  # NaN, infinity, -0 and subnormals among them
    assert np.array_equal(entropy.decode(entropy.encode(words)), words)
    wide = entropy.widen(words)
    assert wide.dtype == np.float32
    assert np.array_equal(wide.view(np.uint32), words.astype(np.uint32) << 16)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 5), (1, BLOCK - 1), (2, BLOCK // 2), (1, BLOCK + 1), (9, 9000)])
def test_any_size_and_a_single_symbol(shape: tuple[int, int]) -> None:
    for words in (gaussian(*shape), np.full(shape, 0x3F80, np.uint16)):
        coded = entropy.encode(words)
        assert np.array_equal(entropy.decode(coded), words)
        assert np.array_equal(entropy.decode(entropy.transposed(coded)), words.T)


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(
        np.uint16, hnp.array_shapes(min_dims=2, max_dims=2, max_side=300), elements=st.integers(0, 65535), fill=st.integers(0, 65535)
    )
)
def test_property_any_words(words: np.ndarray) -> None:
    assert np.array_equal(entropy.decode(entropy.encode(words)), words)


def test_gaussian_weights_take_two_thirds() -> None:
    words = gaussian(576, 1536)
    assert 0.64 < entropy.encode(words).nbytes / words.nbytes < 0.68


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=256))
def test_lengths_are_an_optimal_prefix_code_under_the_limit(counts: list[int]) -> None:
    lengths = entropy.code_lengths(np.pad(np.array(counts), (0, 256 - len(counts))))
    used = lengths[: len(counts)].astype(int)
    assert used.min() >= 1 and used.max() <= entropy.LONGEST and not lengths[len(counts) :].any()
    assert sum(2.0**-bits for bits in used) == 1.0
    best = huffman_bits(counts)
    cost = int((used * np.array(counts)).sum())
    assert cost == best if max(_depths(counts)) <= entropy.LONGEST else cost > best


def _depths(counts: list[int]) -> list[int]:
    """Depth of each leaf of one Huffman tree, the flattest one."""
    heap: list[tuple[int, int, list[int]]] = [(c, 0, [0]) for c in counts]
    heapq.heapify(heap)
    while len(heap) > 1:
        a, b = heapq.heappop(heap), heapq.heappop(heap)
        leaves = [d + 1 for d in a[2] + b[2]]
        heapq.heappush(heap, (a[0] + b[0], max(leaves), leaves))
    return heap[0][2]


def test_one_block_alone_is_the_slice() -> None:
    words = gaussian(5, 30000)
    container = entropy.Container.parse(entropy.encode(words))
    flat = words.reshape(-1)
    assert np.array_equal(container.words(2, 4), flat[2 * BLOCK : 4 * BLOCK])
    assert np.array_equal(container.words(4), flat[4 * BLOCK :])


def test_a_damaged_byte_is_an_error_or_changes_nothing() -> None:
    words = gaussian(40, 1000)
    coded = entropy.encode(words)
    rng, silent = np.random.default_rng(2), 0
    for at in [*range(0, 330, 3), *rng.integers(0, len(coded), 150), len(coded) - 1]:
        damaged = coded.copy()
        damaged[at] ^= np.uint8(1 << rng.integers(8))
        found = attempt(damaged)
        silent += found is not None
        assert found is None or np.array_equal(found, words)  # the bits that fill up a lane's last byte
    assert silent < 20
    assert all(attempt(coded[:cut]) is None for cut in (0, 10, 280, 300, 700, len(coded) - 1))


def attempt(coded: np.ndarray) -> np.ndarray | None:
    """What comes out; None where the damage is reported."""
    try:
        return entropy.decode(coded)
    except ArtifactError as error:
        return None if error.code == "artifact-corrupt" else coded
