"""Measure the cost table: milliseconds of a pass against rows, past length and batch, on this machine.

The cells are measured in turns (every cell once, then every cell again), so that a slow spell of the machine hits all of them alike; the
table holds medians.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from planc.runtime.contract import CostTable
from planc.runtime.engine import Cache, Engine, Step
from planc.runtime.errors import InputError

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
PAST = (16, 128, 512)

PREFILL_ROWS = 128  #: rows of a pass that fills a cache

Progressor = Callable[[int, int], None]  #: (done, total)


@dataclass
class _Cell:
    batch: int
    past: int
    rows: int
    cache: Cache
    step: Step
    times: list[float]


def measure_cost(
    engine: Engine,
    *,
    rows: Sequence[int] = ROWS,
    past: Sequence[int] = PAST,
    batch: Sequence[int] = (1,),
    capacity: int | None = None,
    seconds: float = 6.0,
    repeats: int = 15,
    logits: bool = False,
    seed: int = 0,
    progress: Progressor | None = None,
) -> CostTable:
    """Time passes of random tokens until `repeats` rounds or `seconds` are over, but at least three rounds.

    Args:
        engine: what to measure; nothing of it is changed.
        rows, past, batch: the grid; what does not fit into `capacity` or the model's longest sequence is left out.
        capacity: cache slots per sequence, as the artifact will use them (some engines pay for slots that are not filled).
        seconds: time for all rounds; the rounds after the third stop there.
        logits: also fetch the logits, as sampling does.
        progress: called as `progress(done, total)`.

    Returns:
        medians in milliseconds.
    """
    limit = min(capacity or engine.spec.max_length, engine.spec.max_length)
    rows = tuple(r for r in sorted(set(rows)) if r + 1 <= limit)
    pasts = tuple(p for p in sorted(set(past)) if p + max(rows, default=1) <= limit) or ((max(0, limit - max(rows)),) if rows else ())
    if not rows or not pasts or not batch or min(rows) < 1 or min(batch) < 1:
        raise InputError("input-invalid", f"no grid point of rows {tuple(rows)} x past {tuple(past)} fits into {limit} cache slots")
    rng = np.random.default_rng(seed)
    cells: list[_Cell] = []
    for size in sorted(set(batch)):
        for length in pasts:
            cache = engine.new_cache(size, capacity or min(limit, length + max(rows)))
            fill_cache(engine, cache, rng.integers(0, engine.spec.vocab_size, (size, length)))
            steps = [Step(rng.integers(0, engine.spec.vocab_size, (size, r))) for r in rows]
            cells += [_Cell(size, length, step.tokens.shape[1], cache, step, []) for step in steps]
    _time_in_turns(engine, cells, rng, seconds, repeats, logits, progress)
    median = {(c.batch, c.past, c.rows): float(np.median(c.times)) for c in cells}
    batches = tuple(sorted(set(batch)))
    measured = tuple(tuple(tuple(round(median[b, p, r], 4) or 1e-4 for r in rows) for p in pasts) for b in batches)
    return CostTable(rows=rows, past=pasts, batch=batches, measured=measured)


def _time_in_turns(
    engine: Engine, cells: list[_Cell], rng: np.random.Generator, seconds: float, repeats: int, logits: bool, progress: Progressor | None
) -> None:
    """One round to warm up (buffers of every shape are made there), then timed rounds in a fresh random order each."""
    start, rounds = time.perf_counter(), repeats + 1
    for turn in range(rounds):
        for number, index in enumerate(rng.permutation(len(cells))):
            cell = cells[index]
            before = time.perf_counter()
            engine.forward(cell.cache, cell.step, logits=logits)
            after = time.perf_counter()
            if turn:
                cell.times.append((after - before) * 1e3)
            if progress is not None:
                share = max((turn + (number + 1) / len(cells)) / rounds, min(1.0, (after - start) / seconds) if turn > 3 else 0.0)
                progress(int(100 * share), 100)
        if turn >= 3 and time.perf_counter() - start > seconds:
            break
    if progress is not None:
        progress(100, 100)


def fill_cache(engine: Engine, cache: Cache, tokens: np.ndarray) -> None:
    """Commit `tokens` [B, L] to an empty cache, in passes of at most `PREFILL_ROWS` rows."""
    size, length = tokens.shape
    for start in range(0, length, PREFILL_ROWS):
        part = np.ascontiguousarray(tokens[:, start : start + PREFILL_ROWS], dtype=np.int64)
        engine.forward(cache, Step(part, logits_from=part.shape[1] - 1))
        for sequence in range(size):
            cache.keep(sequence, np.arange(part.shape[1], dtype=np.int64))


@contextmanager
def progress_bar(title: str, console: Console | None = None) -> Iterator[Progressor]:
    """A bar on the terminal (nothing when the output is not one) as the `progress` argument of `measure_cost` and `probe`."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn())
    with Progress(*columns, console=console or Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=100)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield show


@contextmanager
def titled_bar(console: Console | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """The same for work in several stages: (what is being done, done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn())
    with Progress(*columns, console=console or Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=100)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def cost_rows(table: CostTable) -> Table:
    """The cost table for people: one line per past length (and batch, if there are several), a column per number of rows."""
    shown = Table(title="milliseconds of a pass, by rows per sequence", title_justify="left", box=box.SIMPLE, pad_edge=False)
    several = len(table.batch) > 1
    for header in (*(("batch",) if several else ()), "past", *map(str, table.rows)):
        shown.add_column(header, justify="right", no_wrap=True)
    for size, plane in zip(table.batch, table.measured, strict=True):
        for length, line in zip(table.past, plane, strict=True):
            shown.add_row(*((str(size),) if several else ()), str(length), *(f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}" for ms in line))
    return shown
