"""Paper 34, LServe: the four working conditions of its card, on SmolLM2-135M. Heads are classed by calibration, not by training."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from planc.compiler.papers import ROOT, Item, paper
from planc.runtime.kv import KvPolicy, PolicyCache
from planc.runtime.kv.evictions.base import window_attention
from planc.runtime.kv.selections import Pages
from planc.runtime.kv.stores import BLOCK
from planc_paper_checks.caches import Lab, Prompt, policy_in

PLAN = ROOT / "examples/papers/34-lserve.yaml"
SINK, LOCAL, BUDGET = 64, 128, 512
SHORT, LONG = 2048, 4096
CODES = {SHORT: ((0.2, 73914), (0.5, 28463), (0.8, 51907)), LONG: ((0.3, 60285),)}


@paper(34)
def lserve() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    assert KvPolicy.model_validate(policy_in(PLAN)) == KvPolicy.model_validate(_policy(_pages(BUDGET, 16), "int8")), (
        "the plan is not what is checked"
    )
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        words = lab.words(LONG)
        short = lab.read(words[:SHORT])
        yield _same(lab, lab.read(words[:512]), words[512:576])
        yield _bounds(short)
        prompts = {(length, code): lab.read(lab.needle(length, depth, code)) for length, codes in CODES.items() for depth, code in codes}
        yield _fewer(lab, short, next(prompt for (length, _), prompt in prompts.items() if length == LONG))
        yield _found(lab, prompts, short)


def _pages(budget: int, sub: int) -> dict[str, Any]:
    return {"pages": {"budget": budget, "sub": sub, "interval": 4}}


def _policy(select: dict[str, Any] | None, store: str | None = None, **streaming: Any) -> dict[str, Any]:
    parts: dict[str, Any] = {"streaming": {"share": 0.5, "sink": SINK, "local": LOCAL} | streaming}
    if "heads" in streaming:
        del parts["streaming"]["share"]
    return parts | ({"select": select} if select else {}) | ({"store": store} if store else {})


def _same(lab: Lab, prompt: Prompt, following: list[int]) -> Item:
    """Bit for bit, because it is the same attention over the same rows."""
    neutral = {"all pages": {"select": _pages(4096, 16)}, "all in the window": {"streaming": {"share": 0.5, "sink": 4, "local": 4096}}}
    dense = np.concatenate([rows.copy() for rows in lab.follow(None, lab.dense(prompt), following, 4)])
    found = {}
    for name, options in neutral.items():
        have = np.concatenate([rows.copy() for rows in lab.follow(options, lab.sealed(options, prompt), following, 4)])
        found[name] = float(np.abs(have - dense).max())
        lab.close(options)
    return Item(1, "a budget for all pages, or a window for all tokens: the logits of dense, bit for bit", not any(found.values()), found)


def _bounds(prompt: Prompt) -> Item:
    """Products of real queries with all keys against the bounds of their parts and pages."""
    select, worst, count = Pages(budget=BUDGET), -np.inf, 0
    for keys, queries in zip(prompt.keys, prompt.queries, strict=True):
        heads, _, width = keys.shape
        stats = select.stats(keys.reshape(heads, -1, BLOCK, width).swapaxes(0, 1))
        for query in queries[-4:]:
            bounds, scores = select.bounds(stats, query), select.scores(stats, query, 1.0)
            products = np.einsum("gjd,gtd->gjt", query.reshape(heads, -1, width), keys).reshape(len(query), -1, select.sub).max(-1)
            worst = max(worst, float((products - bounds).max() / np.abs(products).max()))
            parts = bounds.reshape(heads, -1, scores.shape[1], BLOCK // select.sub).max((1, 3))
            assert np.array_equal(parts, scores)
            count += bounds.size
    return Item(
        2, "no product is above the bound of its part, no part above its page", worst <= 1e-5, {"bounds": count, "largest_excess": worst}
    )


def _fewer(lab: Lab, short: Prompt, long: Prompt) -> Item:
    options, streamed = _policy(_pages(BUDGET, 16), "int8"), []
    for prompt in (short, long):
        cache = lab.sealed(options, prompt)
        assert isinstance(cache, PolicyCache)
        layers = cache.layers(0).values()
        read = sum(layer.rows * layer.spec.heads for layer in layers)
        dense = len(prompt.ids) * sum(k.shape[0] for k in prompt.keys)
        streamed.append(sum(layer.nbytes() for layer in layers if layer.streams))
    measured = {"keys_read": round(read / dense, 4), "streaming_bytes": streamed, "tokens": [len(short.ids), len(long.ids)]}
    passed = read / dense <= 0.12 and streamed[0] == streamed[1]
    return Item(3, "at 4096 tokens at most 0.12 of the keys are read; streaming heads take the same memory at any length", passed, measured)


def _found(lab: Lab, prompts: dict[tuple[int, int], Prompt], text: Prompt) -> Item:
    planned = _policy(_pages(BUDGET, 16), "int8")
    counts = [len(keys) for keys in text.keys]
    streaming = {int(layer.name.partition(".")[2].rstrip("s")): layer.heads for layer in lab.engine(planned).layers if layer.group == 2}
    places = np.random.default_rng(0).permutation([(i, head) for i, count in enumerate(counts) for head in range(count)])
    drawn = places[: sum(streaming.values())]
    heads = [[int(h) for i, h in drawn if i == layer] for layer in range(len(counts))]
    ways = {"dense": None, "classed heads": planned, "random heads": _policy(_pages(BUDGET, 16), "int8", heads=heads)}
    found: dict[str, Any] = {}
    for name, options in ways.items():
        found[name] = sum(lab.found(options, prompt, code) for (_, code), prompt in prompts.items())
        if options not in (None, planned):
            lab.close(options)
    found["recall_sub_16"], found["recall_sub_64"] = (_recall(text, sub) for sub in (16, 64))
    passed = found["classed heads"] >= 0.8 * found["dense"] > 0 and found["random heads"] < found["classed heads"]
    passed = passed and found["recall_sub_16"] >= found["recall_sub_64"]
    what = (
        f"codes in 2k and 4k tokens found, of {len(prompts)}: at least 0.8 of dense, random heads fewer; bounds of 16 no worse than of 64"
    )
    return Item(4, what, passed, found)


def _recall(prompt: Prompt, sub: int) -> float:
    """Share of the 64 likeliest tokens of every head that lie in the pages that are read."""
    select, shares = Pages(budget=BUDGET, sub=sub), []
    for keys, queries in zip(prompt.keys, prompt.queries, strict=True):
        heads, _, width = keys.shape
        stats = select.stats(keys.reshape(heads, -1, BLOCK, width).swapaxes(0, 1))
        chosen = select.choose(stats, queries[-1], width**-0.5, np.empty((heads, 0), np.int64))
        top = np.argsort(-window_attention(queries[-1:], keys, width**-0.5, 0.0), axis=-1)[..., :64] // BLOCK
        shares += [np.isin(top[head], chosen[head]).mean() for head in range(heads)]
    return round(float(np.mean(shares)), 4)
