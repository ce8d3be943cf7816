"""The cost table is measured in turns, sized to what fits, and leaves the engine as it was."""

from __future__ import annotations

import numpy as np
import pytest
from toy_engine import ToyCache, ToyEngine

from planc.runtime import profile
from planc.runtime.engine import Outputs, Step
from planc.runtime.errors import InputError
from planc.runtime.profile import cost_rows, fill_cache, measure_cost, progress_bar


class TimedEngine(ToyEngine):
    """Costs 1 ms + 0.5 ms per row + 1 ms per 16 tokens of past, per sequence, on its own clock, and records what was asked.

    Every seventh pass is ten times slower, as on a machine that others use too.
    """

    def __init__(self) -> None:
        super().__init__(7)
        self.asked: list[tuple[int, int, int]] = []  # batch, past, rows
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def forward(self, cache: ToyCache, step: Step, *, logits: bool = False, top_k: bool = False) -> Outputs:
        batch, rows = step.tokens.shape
        past = int(cache.lengths.max())
        cache.last_rows = rows
        self.asked.append((batch, past, rows))
        self.now += (1.0 + 0.5 * rows + past / 16) * batch / 1e3 * (10 if len(self.asked) % 7 == 0 else 1)
        return Outputs(argmax=np.zeros((batch, rows - step.logits_from), np.int64))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> TimedEngine:
    engine = TimedEngine()
    monkeypatch.setattr(profile, "time", engine)
    return engine


def test_measures_what_a_pass_costs(engine: TimedEngine) -> None:
    table = measure_cost(engine, rows=(1, 2, 4), past=(16, 32), batch=(1, 2), repeats=9, seconds=10)
    assert (table.rows, table.past, table.batch) == ((1, 2, 4), (16, 32), (1, 2))
    assert table.ms(4, 32) == pytest.approx(5.0)
    assert table.ms(1, 16, batch=2) == pytest.approx(5.0)
    assert table.ms(1, 16) < table.ms(4, 16) < table.ms(4, 32) < table.ms(4, 32, batch=2)


def test_first_round_only_warms_up(engine: TimedEngine) -> None:
    forward, seen = engine.forward, set[tuple[int, int]]()

    def cold(cache: ToyCache, step: Step, *, logits: bool = False, top_k: bool = False) -> Outputs:
        shape = int(cache.lengths.max()), step.tokens.shape[1]
        engine.now += 0.0 if shape in seen else 1.0  # buffers of a new shape are made
        seen.add(shape)
        return forward(cache, step, logits=logits, top_k=top_k)

    engine.forward = cold  # type: ignore[method-assign]
    assert measure_cost(engine, rows=(2,), past=(16,), repeats=1).ms(2, 16) == pytest.approx(3.0)


def test_rounds_are_interleaved_and_limited(engine: TimedEngine) -> None:
    shown = list[int]()
    measure_cost(
        engine, rows=(1, 2), past=(16, 48), seconds=0.0, repeats=50, progress=lambda done, total: shown.append(done * 100 // total)
    )
    timed = [asked for asked in engine.asked if asked[1]]  # without the passes that fill the caches
    cells = {(1, past, rows) for past in (16, 48) for rows in (1, 2)}
    rounds = [timed[i : i + 4] for i in range(0, len(timed), 4)]
    assert all(set(turn) == cells for turn in rounds), "every cell has its turn before any has the next"
    assert len(rounds) == 4, "one round to warm up and three that count, though no time was given"
    assert shown == sorted(shown) and shown[-1] == 100


def test_grid_is_cut_to_the_cache() -> None:
    table = measure_cost(ToyEngine(max_length=40), repeats=1)
    assert max(table.rows) + max(table.past) <= 40
    assert measure_cost(ToyEngine(max_length=4096), capacity=60, rows=(1, 2, 99), repeats=1).rows == (1, 2)
    with pytest.raises(InputError):
        measure_cost(ToyEngine(), rows=())
    with pytest.raises(InputError):
        measure_cost(ToyEngine(), rows=(0, 1))


def test_fill_cache_commits_everything() -> None:
    engine = ToyEngine()
    tokens = np.random.default_rng(0).integers(0, 23, (2, 300))
    cache = engine.new_cache(2, 310)
    fill_cache(engine, cache, tokens)
    assert cache.lengths.tolist() == [300, 300]
    cache.check(1, tokens[1].tolist())


def test_shown_to_people() -> None:
    with progress_bar("measuring") as progress:
        table = measure_cost(ToyEngine(), rows=(1, 2), past=(4,), repeats=1, progress=progress)
    shown = cost_rows(table)
    assert shown.row_count == 1 and [str(c.header) for c in shown.columns] == ["past", "1", "2"]
