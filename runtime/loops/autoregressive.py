"""Plain decoding: one token per pass. The reference that every other loop is compared with."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from planc.runtime.decode import Decode
from planc.runtime.engine import Cache, Engine
from planc.runtime.loops.run import CHUNK, Piece, Run, Stats, Stop


def autoregressive(
    engine: Engine,
    cache: Cache,
    prompts: Sequence[Sequence[int]],
    decode: Decode,
    *,
    eos: Collection[int] = (),
    min_rows: int | None = None,
    chunk: int = CHUNK,
    ids: Sequence[int] | None = None,
    stop: Stop | None = None,
    stats: Stats | None = None,
) -> Iterator[Piece]:
    """Generate from every prompt; arguments as for `speculative`."""
    run = Run(engine, cache, prompts, decode, eos=eos, min_rows=min_rows, chunk=chunk, ids=ids, stop=stop, stats=stats)
    return run.stats.timed(_rounds(run))


def _rounds(run: Run) -> Iterator[Piece]:
    yield from run.prefill()
    while live := run.live:
        yield from one_token(run, live)


def one_token(run: Run, live: Sequence[int]) -> Iterator[Piece]:
    """One pass: the next token of each of these sequences."""
    outputs = run.forward(run.pack(run.pending(live)))  # [B, R] the pending tokens, padded to R rows
    for b in live:
        y = run.chooser(b, outputs)(0, [])
        yield from run.commit(b, [0], [y])
