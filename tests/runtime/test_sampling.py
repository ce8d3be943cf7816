"""Logit processing against a slow reading of its definition, and the sampler against the distribution that it claims."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planc.runtime.decode import Sampling
from planc.runtime.sampling import Sampler, noise, probabilities, process

# 0.999 quantiles of chi-square by degrees of freedom
_CHI2 = {5: 20.52, 7: 24.32, 63: 103.44}


def by_definition(logits: list[float], s: Sampling, seen: set[int]) -> list[float]:
    """The processed distribution, one token at a time."""
    z = list(logits)
    for i in seen:
        z[i] = z[i] * s.repetition_penalty if z[i] < 0 else z[i] / s.repetition_penalty
    z = [value / s.temperature for value in z]
    order = sorted(range(len(z)), key=lambda i: (-z[i], i))
    if s.top_k:
        order = order[: s.top_k]
    e = {i: math.exp(z[i] - z[order[0]]) for i in order}
    total, mass, kept = sum(e.values()), 0.0, []
    for i in order:
        kept.append(i)
        mass += e[i]
        if s.top_p < 1.0 and mass >= s.top_p * total:
            break
    kept = [i for i in kept if z[i] - z[order[0]] >= (math.log(s.min_p) if s.min_p else -math.inf)]
    total = sum(e[i] for i in kept)
    return [e[i] / total if i in kept else 0.0 for i in range(len(z))]


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.integers(-12, 12).map(lambda v: v / 4), min_size=1, max_size=12),  # a coarse grid makes ties common
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.05, 0.31, 0.5, 0.83, 0.97, 1.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.2, 1.0]),
    penalty=st.sampled_from([0.7, 1.0, 1.3]),
    data=st.data(),
)
def test_process_is_its_definition(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, data: st.DataObject
) -> None:
    seen = data.draw(st.sets(st.integers(0, len(logits) - 1)))
    s = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    p = probabilities(process(np.array(logits, dtype=np.float32), s, seen))
    np.testing.assert_allclose(p, by_definition([float(np.float32(v)) for v in logits], s, seen), atol=1e-12)


def test_process_leaves_the_logits_alone() -> None:
    logits = np.array([1.0, -2.0, 0.5], dtype=np.float32)
    process(logits, Sampling(temperature=0.5, top_k=1, repetition_penalty=2.0), {0})
    assert logits.tolist() == [1.0, -2.0, 0.5]


def test_top_p_over_more_candidates_than_the_first_sort() -> None:
    flat = np.zeros(5000, dtype=np.float32)
    assert int((probabilities(process(flat, Sampling(temperature=1.0, top_p=0.5))) > 0).sum()) == 2500


def test_penalty_tells_apart_signs_and_counts_a_token_once() -> None:
    s = Sampling(repetition_penalty=2.0)
    assert process(np.array([4.0, -4.0, 1.0], dtype=np.float32), s, [0, 0, 1]).tolist() == [2.0, -8.0, 1.0]


def test_greedy_takes_the_lowest_id_on_ties() -> None:
    sampler = Sampler(Sampling(repetition_penalty=1.5))
    assert sampler.needs_logits
    assert sampler.choose(np.array([0.0, 3.0, 3.0], dtype=np.float32), 0, 5) == 1
    assert not Sampler(Sampling(top_k=3, top_p=0.5)).needs_logits  # temperature 0: the argmax is enough


@pytest.mark.parametrize(("seed", "sequence"), [(0, 0), (2**64 - 1, 3)])
def test_noise_belongs_to_seed_sequence_and_position(seed: int, sequence: int) -> None:
    g = noise(seed, sequence, 17, 64)
    assert np.isfinite(g).all()
    assert (g == noise(seed, sequence, 17, 64)).all()
    assert (g[:20] == noise(seed, sequence, 17, 20)).all()
    for other in (noise(seed, sequence + 1, 17, 64), noise(seed, sequence, 18, 64), noise(seed - 1 if seed else 1, sequence, 17, 64)):
        assert len(np.intersect1d(g, other)) == 0


def test_choose_is_the_argmax_of_log_p_plus_noise() -> None:
    rng = np.random.default_rng(3)
    sampler = Sampler(Sampling(temperature=0.8, top_k=9, top_p=0.9, seed=5))
    for position in range(200):
        logits = rng.normal(size=17).astype(np.float32) * 2
        with np.errstate(divide="ignore"):
            log_p = np.log(probabilities(process(logits, sampler.sampling)))
        assert sampler.choose(logits, 2, position) == int(np.argmax(log_p + noise(5, 2, position, 17)))


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    expected = counts.sum() * p
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.6, seed=9),
        Sampling(temperature=1.0, top_k=6),
        Sampling(temperature=1.0, top_p=0.95),
    ],
)
def test_samples_follow_the_softmax(sampling: Sampling) -> None:
    logits = np.array([2.0, 1.5, 0.3, 0.0, -0.4, -0.5, -1.0, -1.7], dtype=np.float32)
    sampler, counts = Sampler(sampling), np.zeros(8)
    for position in range(12000):
        counts[sampler.choose(logits, 1, position)] += 1
    p = probabilities(process(logits, sampling))
    assert counts[p == 0].sum() == 0
    assert chi_square(counts[p > 0], p[p > 0]) < _CHI2.get(int((p > 0).sum()) - 1, 24.32)


def test_neighbouring_positions_are_independent() -> None:
    logits = np.array([1.0, 0.5, 0.2, 0.0, -0.2, -0.5, -0.6, -1.0], dtype=np.float32)
    sampler, joint = Sampler(Sampling(temperature=1.0, seed=4)), np.zeros((8, 8))
    for position in range(0, 24000, 2):
        joint[sampler.choose(logits, 0, position), sampler.choose(logits, 0, position + 1)] += 1
    p = probabilities(logits.astype(np.float64))
    assert chi_square(joint.ravel(), np.outer(p, p).ravel()) < _CHI2[63]
