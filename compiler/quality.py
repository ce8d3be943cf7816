"""Quality of a compiled model: perplexity on a text, in windows, through the engine that also decodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from planc.backends.reference import run
from planc.compiler.program import Program
from planc.runtime.engine import Engine, Floats, Step
from planc.runtime.errors import InputError

WINDOW = 1024  #: tokens that are scored together; the first of a window is only read
TOKENS = 20_000  #: of the text, by default
BUNDLED = Path(__file__).with_name("calibration.txt")  #: about a thousand tokens; passes calibrate on it, so it flatters them
CHUNK = 128  #: rows per pass: the logits of a window at once would take hundreds of megabytes


def read_windows(
    file: Path, encode: Callable[[str], Sequence[int]], *, tokens: int = TOKENS, window: int = WINDOW, where: str = "--quality"
) -> list[list[int]]:
    """The first `tokens` tokens of a text in windows of `window`; a last window of fewer than two tokens is dropped."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("input-invalid", f"the text {file} cannot be read: {error}", where=where) from error
    # only as much text as can be needed is tokenised: no token is longer than 16 characters on average
    ids = list(encode(text[: tokens * 16]))[:tokens]
    windows = [ids[start : start + window] for start in range(0, len(ids), window)]
    windows = [part for part in windows if len(part) > 1]
    if not windows:
        raise InputError("input-invalid", f"the text {file} has fewer than two tokens", where=where)
    return windows


def nll_of(logits: Floats, targets: Sequence[int]) -> float:
    """Summed negative log-likelihood in nats of `targets` [R] under `logits` [R, V], in float64."""
    rows = logits.astype(np.float64)  # [R, V]
    peak = rows.max(axis=1)
    total = peak + np.log(np.exp(rows - peak[:, None]).sum(axis=1))
    return float((total - rows[np.arange(len(targets)), np.asarray(targets)]).sum())


def window_nll(engine: Engine, ids: Sequence[int], min_rows: int = 1, *, chunk: int = CHUNK) -> float:
    """Summed negative log-likelihood of `ids[1:]`, each given all ids before it; arguments as for `window_logits`."""
    total, start = 0.0, 1
    for rows in window_logits(engine, ids, min_rows, chunk=chunk):
        total += nll_of(rows, ids[start : start + len(rows)])
        start += len(rows)
    return total


def window_logits(engine: Engine, ids: Sequence[int], min_rows: int = 1, *, chunk: int = CHUNK) -> Iterator[Floats]:
    """Logits [R, V] after each of `ids[:-1]`, in passes of at most `chunk` rows and at least `min_rows`; each is a view until the next."""
    rows = len(ids) - 1
    starts = list(range(0, rows, chunk))
    if len(starts) > 1 and rows - starts[-1] < min_rows:
        starts.pop()  # the rest joins the pass before: kernels of narrow passes round differently
    cache = engine.new_cache(1, rows + min_rows)
    for start, end in zip(starts, [*starts[1:], rows], strict=True):
        part = list(ids[start:end])
        padded = part + part[-1:] * (min_rows - len(part))
        outputs = engine.forward(cache, Step(np.array([padded], dtype=np.int64)), logits=True)
        assert outputs.logits is not None
        yield outputs.logits[0, : len(part)]
        cache.keep(0, np.arange(len(part), dtype=np.int64))


def program_nll(program: Program, windows: Sequence[Sequence[int]]) -> float:
    """As `window_nll` over all windows, but of a program without cache on the reference backend: passes can be compared before lowering."""
    total = 0.0
    for ids in windows:
        inputs = {"input_ids": torch.tensor([list(ids)]), "position_ids": torch.arange(len(ids))[None]}
        total += nll_of(run(program, inputs)["logits"][0, :-1].numpy(), ids[1:])
    return total


def perplexity(nll: float, tokens: int) -> float:
    """exp of the mean negative log-likelihood."""
    return math.exp(nll / tokens)


def engine_perplexity(engine: Engine, windows: Sequence[Sequence[int]], min_rows: int = 1) -> float:
    """Perplexity over windows of ids, each scored from its second token on."""
    nll = sum(window_nll(engine, ids, min_rows) for ids in windows)
    return perplexity(nll, sum(len(ids) - 1 for ids in windows))
