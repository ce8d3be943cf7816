"""The probe tells engines whose rows are independent from engines whose rows are not, and says how."""

from __future__ import annotations

import time

import numpy as np
import pytest
from toy_engine import ToyCache, ToyEngine

from planc.runtime.contract import Exactness
from planc.runtime.engine import Outputs, Step
from planc.runtime.errors import InputError
from planc.runtime.exactness import probe

TEXT = np.random.default_rng(1).integers(0, 23, 120).tolist()
PAST = (5, 60, 33)


class Perturbed(ToyEngine):
    """Adds `noise` to the logits of a pass wherever `when(past, step)` says so."""

    def __init__(self, noise: float, when: object, **options: bool) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.noise, self.when = noise, when

    def forward(self, cache: ToyCache, step: Step, *, logits: bool = False, top_k: bool = False) -> Outputs:
        outputs = super().forward(cache, step, logits=logits, top_k=top_k)
        if outputs.logits is not None and self.when(int(cache.lengths[0]), step):  # type: ignore[operator]
            outputs.logits[..., ::2] += self.noise
        return outputs


def run(engine: ToyEngine, **options: object) -> Exactness:
    return probe(engine, TEXT, past=PAST, chains=(2, 3, 5, 8, 9, 16, 30), seconds=60, **options)  # type: ignore[arg-type]


def one_row(past: int, step: Step) -> bool:
    return step.tokens.shape[1] == 1


def siblings(past: int, step: Step) -> bool:
    return step.parents is not None


def test_independent_rows_are_bitwise() -> None:
    found = run(ToyEngine())
    assert (found.level, found.chains, found.trees, found.batch) == ("bitwise", "bitwise", "bitwise", "bitwise")
    assert found.min_rows == 1 and found.flips == 0 and found.largest_difference == 0 and found.note == ""
    assert found.probes > 300 and found.smallest_gap == 0.0, "the toy engine makes ties"


def test_one_row_passes_that_differ_raise_the_minimum() -> None:
    found = run(Perturbed(0.25, one_row))
    assert (found.chains, found.trees, found.min_rows) == ("bitwise", "bitwise", 2)
    assert "1 row against longer ones" in found.note
    assert run(Perturbed(0.25, lambda past, step: step.tokens.shape[1] < 4)).min_rows == 4


def test_a_difference_below_every_gap_keeps_the_tokens() -> None:
    found = run(Perturbed(-1e-4, siblings))  # lowers even ids: ties break to another id only where an even id was first
    assert found.chains == "bitwise" and found.trees in ("tokens", "lossy")
    assert found.level == found.trees
    assert found.largest_difference == pytest.approx(1e-4, rel=0.1)
    assert run(Perturbed(-1e-4, siblings), uses_trees=False).level == "bitwise", "a plan without trees does not care"


def test_flips_are_counted() -> None:
    found = run(Perturbed(50.0, siblings))
    assert found.trees == found.level == "lossy"
    assert 0 < found.flips < found.probes and found.largest_difference == 50.0
    assert f"{found.flips} argmax flips" in found.note


def test_rows_that_see_the_pass_are_never_bitwise() -> None:
    found = run(Perturbed(1.0, lambda past, step: step.tokens.shape[1] % 2 == 1))  # odd row counts differ
    assert found.chains == "lossy" and found.min_rows == 2 and found.flips > 0


def test_a_difference_that_only_committed_tokens_show() -> None:
    """Plain decoding is part of the comparison: here every chain agrees with every other chain, and with no committed token."""
    starts = set(PAST)
    found = run(Perturbed(1.0, lambda past, step: past not in starts))
    assert found.chains == "lossy"


def test_trees_within_a_block() -> None:
    def crosses(past: int, step: Step) -> bool:
        return step.parents is not None and past // 16 != (past + step.tokens.shape[1] - 1) // 16

    assert run(Perturbed(1.0, crosses)).trees == "lossy"
    found = run(Perturbed(1.0, crosses), tree_block=16)
    assert (found.trees, found.tree_block) == ("bitwise", 16)


def test_engines_without_trees_or_batches() -> None:
    assert run(ToyEngine(trees=False)).trees is None
    assert run(ToyEngine(trees=False)).level == "bitwise"

    class Single(ToyEngine):
        def new_cache(self, batch: int, capacity: int) -> ToyCache:
            if batch > 1:
                raise InputError("input-invalid", "one sequence only")
            return super().new_cache(batch, capacity)

    assert run(Single()).batch is None


def test_batches_that_mix() -> None:
    found = run(Perturbed(1.0, lambda past, step: len(step.tokens) > 1))
    assert (found.level, found.batch) == ("bitwise", "lossy")


def test_infinities_do_not_break_the_manifest() -> None:
    found = run(Perturbed(float("inf"), siblings))
    assert found.trees == "lossy"
    assert Exactness.model_validate_json(found.model_dump_json()) == found


def test_short_text_and_small_caches() -> None:
    assert probe(ToyEngine(), TEXT[:12]).level == "bitwise"
    assert probe(ToyEngine(max_length=40), TEXT).level == "bitwise"
    assert probe(ToyEngine(), TEXT, capacity=50).level == "bitwise"
    with pytest.raises(InputError):
        probe(ToyEngine(), TEXT[:5])


def test_time_is_kept() -> None:
    class Slow(ToyEngine):
        def forward(self, cache: ToyCache, step: Step, *, logits: bool = False, top_k: bool = False) -> Outputs:
            time.sleep(0.002)
            return super().forward(cache, step, logits=logits, top_k=top_k)

    shown = list[int]()
    start = time.perf_counter()
    found = probe(Slow(), TEXT, past=PAST, seconds=0.3, progress=lambda done, total: shown.append(done))
    assert time.perf_counter() - start < 3
    assert found.probes > 0 and shown[-1] == 100 and shown == sorted(shown)
