"""Find the sublayers that a target leaves out when it drafts for itself, on text of its own (papers/43)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from planc.backends.onnx.engine import Gates, OnnxEngine, OnnxSkipEngine
from planc.runtime.contract import Contract
from planc.runtime.decode import Decode
from planc.runtime.drafters.self_skip import SelfSkip, alternating, free_units, gates_of
from planc.runtime.drafters.skip_search import SkipSearch, chain_speed
from planc.runtime.engine import Cache, Ints, Step
from planc.runtime.loops import autoregressive

PLACES, PAST, WINDOW = 5, 96, 40  # the target continues the text at so many places, behind so many tokens, for so many tokens
ROUNDS = 9  # of timing


@dataclass(frozen=True)
class _Place:
    """A cache with a text, the target's own tokens at its end, and what follows each of them."""

    cache: Cache
    tokens: Ints  # [W]
    following: Ints  # [W]


def fit_skip(
    part: SelfSkip, engine: OnnxEngine, text: Sequence[int], contract: Contract, note: Callable[[str], None]
) -> tuple[SelfSkip, dict[str, Any]]:
    """The drafter with the lists filled in, and what the manifest keeps: milliseconds of the units, what was tried and found.

    Lists that the plan names are taken as they are. The last place is held out: its match rate is the one that is reported.
    """
    note("self_skip: the model's own text")
    skip = engine.skipping()
    places = [_continued(engine, list(ids)) for ids in _starts(text, engine.spec.max_length)]
    ms = _unit_ms(skip, places[0].cache)

    def match(gates: Gates, among: Sequence[_Place]) -> float:
        hits = [skip.replay(place.cache, 0, place.tokens, gates) == place.following for place in among]
        return float(np.concatenate(hits).mean())

    def speed(rate: float, gates: Gates) -> float:
        draft = ms["rest"] + sum(ms[kind] for (_, kind), runs in zip(skip.units, gates, strict=True) if runs)
        plain = ms["rest"] + sum(ms[kind] for _, kind in skip.units)
        cost = contract.cost
        return chain_speed(rate, draft, lambda rows: plain * (1 + 0.05 * (rows - 1)) if cost is None else cost.ms(max(rows, 2), PAST))

    if part.attention or part.mlp:
        gates, tried = gates_of(skip.units, part.attention, part.mlp), 0
    elif part.search is not None:
        gates, tried = alternating(skip.units, part.search.ratio), 0
    else:
        note("self_skip: searching")
        search = SkipSearch(free_units(skip.units), lambda gates: match(gates, places[:-1]), speed, part.most)
        gates, tried = search.run(part.steps).gates, search.tried
    rate = match(gates, places[-1:])
    closed = [unit for unit, runs in zip(skip.units, gates, strict=True) if not runs]
    lists = {kind: tuple(layer for layer, own in closed if own == kind) for kind in ("attention", "mlp")}
    found = {"tried": tried, "left_out": len(closed), "match": round(rate, 4), "speed": round(speed(rate, gates), 4)}
    return part.model_copy(update=lists), {"unit_ms": ms, "self_skip": found}


def _starts(text: Sequence[int], longest: int) -> list[Sequence[int]]:
    past = max(1, min(PAST, len(text) // PLACES, longest - WINDOW - 4))
    return [text[i * (len(text) - past) // (PLACES - 1) :][:past] for i in range(PLACES)]


def _continued(engine: OnnxEngine, ids: list[int]) -> _Place:
    cache = engine.new_cache(1, len(ids) + WINDOW + 4)
    tokens = [
        token for piece in autoregressive(engine, cache, [ids], Decode(max_new_tokens=WINDOW + 1, min_rows=2)) for token in piece.tokens
    ]
    return _Place(cache, np.array(tokens[:-1], dtype=np.int64), np.array(tokens[1:], dtype=np.int64))


def _unit_ms(skip: OnnxSkipEngine, cache: Cache) -> dict[str, float]:
    """Milliseconds of a one-row pass by what runs in it: an attention, an MLP, the rest. Medians of passes in turns."""
    kinds = np.array([kind for _, kind in skip.units])
    cases = {
        "all": kinds != "",
        "attention": kinds == "mlp",
        "mlp": kinds == "attention",
    }  # what is open: all, without attention, without mlp
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(ROUNDS + 1):
        for name, gates in cases.items():
            begin = time.perf_counter()
            skip.forward(cache, 0, Step(np.array([[1]])), gates, logits=True)
            if turn:
                times[name].append((time.perf_counter() - begin) * 1e3)
    whole = float(np.median(times["all"]))
    ms = {}
    for kind in ("attention", "mlp"):
        count = int((kinds == kind).sum())
        ms[kind] = round(max(0.0, whole - float(np.median(times[kind]))) / count, 5) if count else 0.0
    rest = whole - sum(ms[kind] for kind in kinds)
    return {**ms, "rest": round(max(0.01, rest), 5)}
