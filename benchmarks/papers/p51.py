"""Paper 51, Elastic-Cache: the five working conditions of its card, on the tiny model of list tasks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from planc.compiler.papers import Item, paper
from planc.runtime.filler import Filler
from planc.runtime.masked.engine import Query
from planc_paper_checks.lists import DETERMINISTIC, LEARNED, POINT, filler, held_out, judge, passes, same, started

COUNT = 12


@paper(51)
def elastic_cache() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    exe = filler(51)
    assert exe.plan.cache.key == "elastic" and exe.plan.cache.gamma == 0.9, "the plan is not the method that is checked"
    examples = held_out(COUNT, DETERMINISTIC)
    plain = judge(exe.with_plan(cache="uncached"), examples)
    always, never = (judge(exe.with_plan(cache={"elastic": {"gamma": gamma}}), examples) for gamma in (2.0, -2.0))
    figures: dict[str, Any] = {"passes": passes(always), "accuracy_never": never.share(), "accuracy": plain.share()}
    yield Item(1, "refreshing always is no cache, token by token", same(always, plain), figures)
    yield _plumbing(exe)
    yield _premise(exe)
    elastic = judge(exe, examples)
    share = round(elastic.cost.token_layers / plain.cost.token_layers, 4)
    inflation = round(passes(elastic) / passes(plain), 4)
    figures = {"token_layers": share, "passes_ratio": inflation, "accuracy": elastic.share(), "accuracy_plain": plain.share()}
    for name, options in (
        ("dual", {"cache": "dual", "window": {"blocks": {"size": 8}}}),
        ("prefix", {"cache": "prefix", "window": {"blocks": {"size": 8}}}),
    ):
        other = judge(exe.with_plan(**options), examples)
        figures |= {f"token_layers_{name}": round(other.cost.token_layers / plain.cost.token_layers, 4), f"accuracy_{name}": other.share()}
    held = share <= 0.35 and elastic.share() >= plain.share() - POINT and inflation <= 1.1 and plain.share() >= LEARNED
    yield Item(4, "<= 0.35 times the slots through layers, accuracy within a point, passes <= 1.1 times", held, figures)
    yield _refreshes(exe)


def _plumbing(exe: Filler) -> Item:
    """All slots in the query and nothing refreshed."""
    engine, (example, *_) = exe.engine, held_out(1, ("reverse",))
    canvas = started(exe, example).rows[0].canvas
    slots = np.arange(len(canvas.tokens))
    query, everything = (Query(np.array([0]), canvas.tokens[None], slots[None], canvas.visible[None]) for _ in range(2))
    whole = engine.forward(
        engine.new_cache(1, len(slots)), Query(np.array([0]), canvas.tokens[None], slots[None], canvas.visible[None], cached=False)
    )
    window = np.ones(len(slots), dtype=bool)
    reply, refreshed, _ = engine.forward_by_layer(
        engine.new_cache(1, len(slots)), query, everything, np.zeros(engine.spec.layers, np.int64), window, lambda layer, probe: False
    )
    difference = max(float(np.abs(getattr(reply, name) - getattr(whole, name)).max()) for name in ("top", "second", "total"))
    return Item(
        2,
        "with all slots in the query it is the full model (1e-4)",
        difference < 1e-4 and refreshed == 0,
        {"largest_difference": float(f"{difference:.2g}")},
    )


def _premise(exe: Filler) -> Item:
    """1 - cosine of keys and values of slots that were decided already, from pass to pass: by layer, and of the slot that is attended to most."""
    plan, engine = exe.with_plan(cache="uncached"), exe.engine
    drift: list[list[float]] = [[] for _ in range(engine.spec.layers)]
    most: list[float] = []
    for key, example in enumerate(held_out(1, ("reverse", "sum"))):
        filling = started(plan, example, key)
        [row] = filling.rows
        canvas, before = row.canvas, None
        decided = ~canvas.masked
        for _ in filling:
            cache, slots, sums = engine.new_cache(1, len(canvas.tokens)), np.arange(len(canvas.tokens)), list[np.ndarray]()
            query, everything = (Query(np.array([0]), canvas.tokens[None], slots[None], canvas.visible[None]) for _ in range(2))

            def look(layer: int, probe: Any, sums: list[np.ndarray] = sums) -> bool:
                sums.append(probe.column_sums)
                return False

            engine.forward_by_layer(cache, query, everything, np.zeros(engine.spec.layers, np.int64), canvas.masked | ~decided, look)
            state = [
                np.concatenate([cache.state[f"past.{layer}.{part}"][0, :, :-1] for part in ("key", "value")], -1)
                for layer in range(engine.spec.layers)
            ]
            flat = [s.transpose(1, 0, 2).reshape(len(slots), -1) for s in state]
            if before is not None:
                for layer, (a, b) in enumerate(zip(before, flat, strict=True)):
                    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
                    drift[layer].append(float(1 - cosine[decided].mean()))
                    if layer:
                        most.append(float(1 - cosine[int(np.argmax(np.where(decided, sums[layer], -1)))]))
            before, decided = flat, ~canvas.masked
    by_layer = [round(float(np.mean(values)), 5) for values in drift]
    average = float(np.mean([v for values in drift[1:] for v in values]))
    rising = np.polyfit(range(len(by_layer)), by_layer, 1)[0] > 0
    watched = round(float(np.mean(most)), 5)
    return Item(
        3,
        "keys and values drift more in deeper layers, and less at the slot that is attended to most",
        bool(rising and watched < average),
        {"drift_by_layer": by_layer, "watched": watched, "average": round(average, 5)},
    )


def _refreshes(exe: Filler) -> Item:
    """Layers that ran for all slots, of all layers of all passes but the first."""
    layers, total, tests, low = 0, 0, 0, 0
    for key, example in enumerate(held_out(6, DETERMINISTIC)):
        filling = started(exe, example, key)
        [row] = filling.rows
        for _ in filling:
            pass
        layers += row.canvas.cost.refreshed_layers
        total += exe.engine.spec.layers * (row.canvas.cost.passes - 1)
        cosines = [cosine for _, cosine in row.cache.cosines]  # type: ignore[attr-defined]
        tests, low = tests + len(cosines), low + sum(c < 0.9 for c in cosines)
    share = round(layers / max(1, total), 4)
    return Item(
        5,
        "a share of 0.05 to 0.3 of the layers is refreshed",
        0.05 <= share <= 0.3,
        {"refreshed": share, "tests": tests, "below_gamma": low},
    )
