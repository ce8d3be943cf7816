"""What the target knows behind every token of a text: its states, as a draft head will be fed them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from planc.compiler.files import write
from planc.compiler.heads.texts import Texts
from planc.runtime.drafters.head_source import STATE
from planc.runtime.engine import Cache, Engine, Ints, Step

_CHUNK = 128  # rows of a pass
_BLOCK = 64  # texts whose states are a file
_APART = 0.05  # states of one target may differ so much from run to run, as a share of their mean size

States = NDArray[np.float16]


def states_of_texts(engine: Engine, texts: Texts, folder: Path, progress: Callable[[int, int], None]) -> list[States]:
    """The states [tokens, K] of every text, teacher-forced through the engine that the head will draft for.

    They are kept in `folder`, a file for every few texts, so that an interrupted run goes on. What lies there is used if the first text shows that
    it comes from this target.
    """
    cache = engine.new_cache(1, max(map(len, texts.tokens)) + _CHUNK)
    trusted, found = True, list[States]()
    for start in range(0, len(texts.tokens), _BLOCK):
        block = texts.tokens[start : start + _BLOCK]
        path = folder / f"states-{_digest(block)}.npy"
        made = _read(path, block) if trusted else None
        if made is not None and not start:
            trusted = _alike(_states(engine, cache, block[0]), made[0])
        if made is None or not trusted:
            made = [_states(engine, cache, ids) for ids in block]
            packed = io.BytesIO()
            np.save(packed, np.concatenate(made))
            write(path, packed.getvalue())
        found += made
        progress(len(found), len(texts.tokens))
    return found


def _states(engine: Engine, cache: Cache, ids: Ints) -> States:
    cache.rollback(0, 0)
    return np.concatenate([_chunk(engine, cache, ids[start : start + _CHUNK]) for start in range(0, len(ids), _CHUNK)])


def _chunk(engine: Engine, cache: Cache, ids: Ints) -> States:
    rows = ids if len(ids) > 1 else np.repeat(ids, 2)  # never one row: it would be rounded differently
    outputs = engine.forward(cache, Step(rows[None], logits_from=len(rows) - 1))
    cache.keep(0, np.arange(len(ids)))
    state: States = outputs.taps[STATE][0, : len(ids)].astype(np.float16)
    return state


def _digest(block: Sequence[Ints]) -> str:
    digest = hashlib.sha256()
    for ids in block:
        digest.update(len(ids).to_bytes(8, "little") + np.ascontiguousarray(ids, dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]


def _read(path: Path, block: Sequence[Ints]) -> list[States] | None:
    """The states of a block of texts, where a file has as many of them."""
    try:
        whole = np.load(path, allow_pickle=False)
    except (OSError, ValueError):
        return None
    ends = np.cumsum([len(ids) for ids in block])
    return np.split(whole, ends[:-1]) if whole.ndim == 2 and len(whole) == ends[-1] else None


def _alike(one: States, other: States) -> bool:
    if one.shape != other.shape:
        return False
    first, second = one.astype(np.float32), other.astype(np.float32)
    return bool(np.abs(first - second).mean() <= _APART * np.abs(first).mean())
