"""What the target knows behind every token of a text: its states, as a draft head will be fed them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from planc.compiler.heads.texts import Texts
from planc.runtime.drafters.draft_head import STATE
from planc.runtime.engine import Engine, Ints, Step

_CHUNK = 128  # rows of a pass


def states_of_texts(engine: Engine, texts: Texts, progress: Callable[[int, int], None]) -> list[NDArray[np.float16]]:
    """The states [tokens, K] of every text, teacher-forced through the engine that the head will draft for."""
    cache = engine.new_cache(1, max(map(len, texts.tokens)) + _CHUNK)
    found = []
    for index, ids in enumerate(texts.tokens):
        cache.rollback(0, 0)
        found.append(np.concatenate([_chunk(engine, cache, ids[start : start + _CHUNK]) for start in range(0, len(ids), _CHUNK)]))
        progress(index + 1, len(texts.tokens))
    return found


def _chunk(engine: Engine, cache: object, ids: Ints) -> NDArray[np.float16]:
    rows = ids if len(ids) > 1 else np.repeat(ids, 2)  # never one row: it would be rounded differently
    outputs = engine.forward(cache, Step(rows[None], logits_from=len(rows) - 1))  # type: ignore[arg-type]
    cache.keep(0, np.arange(len(ids)))  # type: ignore[attr-defined]
    state: NDArray[np.float16] = outputs.taps[STATE][0, : len(ids)].astype(np.float16)
    return state
