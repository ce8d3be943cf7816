"""Paper 10, Mustafar: the five working conditions of its card, on SmolLM2-135M."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from planc.compiler.papers import ROOT, Item, paper
from planc.runtime.engine import Floats, Step
from planc.runtime.kv import PolicyCache
from planc.runtime.kv.attend import attend, grouped, merge
from planc.runtime.kv.stores import BLOCK, Bitmap
from planc.runtime.kv.stores.bitmap import magnitude
from planc_paper_checks.caches import Lab, Prompt, policy_in

PLAN = ROOT / "examples/papers/10-mustafar.yaml"
HALF, MOST = 32, 20  # of 64 numbers that stay: 50 % and 31 %
PROMPT, ANSWER, LONG = 1024, 512, 2048


@paper(10)
def mustafar() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    assert policy_in(PLAN) == {"store": {"bitmap": {"keep": MOST, "dtype": "int8"}}, "window": 32}, "the plan is not what is checked"
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        words = lab.words(LONG)
        prompt = lab.read(words[:PROMPT])
        yield _exact(lab, words[:320])
        yield _packed(prompt)
        yield _smaller(lab, words)
        yield _quality(lab, prompt, words[PROMPT : PROMPT + ANSWER])
    seen = {"cuda": torch.cuda.is_available(), "measured": False}
    yield Item(5, "attention over packed rows beats dense attention at 16k tokens, batch 8 (needs a CUDA device)", False, seen)


def _exact(lab: Lab, ids: list[int]) -> Item:
    """All numbers kept, in float32: the logits of a dense cache, in the same form of attention; and the bitmap is the masked row."""
    logits = []
    for options in (_policy(64, dtype="float32", window=0), _policy(64, dtype="float32", window=512)):  # nothing is packed under the second
        engine = lab.engine(options, int8=False)
        cache = engine.new_cache(1, 400)
        engine.forward(cache, Step(np.array([ids[:256]])))
        cache.keep(0, np.arange(256))
        cache.seal(0)
        logits.append(np.concatenate([rows.copy() for rows in lab.follow(options, cache, ids[256:], int8=False)]))
        lab.close(options, int8=False)
    difference, largest = float(np.abs(logits[0] - logits[1]).max()), float(np.abs(logits[1]).max())
    random = np.random.default_rng(0)
    rows = [random.standard_normal((2, 3, BLOCK, 64)).astype(np.float32), np.ones((1, 3, BLOCK, 64), np.float32)]
    store = Bitmap(keep=MOST, dtype="float32")
    same = all(np.array_equal(store.decode(store.encode(x, "key", {}), "key", {}), x * magnitude(x, MOST)) for x in rows)
    measured = {"largest_difference": difference, "largest_logit": round(largest, 2), "round_trip": same}
    return Item(
        1,
        "all kept: the logits of dense (1e-5 of the largest); packing is masking, bit for bit",
        same and difference <= 1e-5 * largest,
        measured,
    )


def _packed(prompt: Prompt) -> Item:
    """Packed blocks and a dense window, merged, against one softmax over the pruned rows."""
    worst, store = 0.0, Bitmap(keep=MOST)
    for keys, values, queries in zip(prompt.keys, prompt.values, prompt.queries, strict=True):
        heads, tokens, width = keys.shape
        split = tokens - BLOCK
        pruned = [_restored(store, x[:, :split]) for x in (keys, values)]
        for count in (1, 8):
            rows = grouped(queries[-count:], heads)
            hidden = np.arange(BLOCK) > np.repeat(np.arange(BLOCK - count, BLOCK), queries.shape[1] // heads)[:, None]
            scores = [rows @ k.swapaxes(1, 2) * width**-0.5 for k in (pruned[0], keys[:, split:])]
            have = merge([attend(scores[0], pruned[1]), attend(scores[1], values[:, split:], hidden)])
            scores[1] = np.where(hidden, -np.inf, scores[1])
            whole = np.concatenate(scores, 2).astype(np.float64)
            weights = np.exp(whole - whole.max(-1, keepdims=True))
            want = weights / weights.sum(-1, keepdims=True) @ np.concatenate([pruned[1], values[:, split:]], 1)
            worst = max(worst, float(np.abs(have - want).max()))
    return Item(2, "attention over packed rows and a window is dense attention on the pruned rows (1e-4)", worst < 1e-4, {"worst": worst})


def _smaller(lab: Lab, words: list[int]) -> Item:
    prompt = lab.read(words)
    dense = sum(k.nbytes + v.nbytes for k, v in zip(prompt.keys, prompt.values, strict=True)) / 2  # float16
    found: dict[str, Any] = {}
    for dtype in ("int8", "float16"):
        cache = lab.sealed(_policy(MOST, dtype=dtype), prompt)
        assert isinstance(cache, PolicyCache)
        found[dtype] = round(sum(cache.usage().values()) / dense, 4)
        found[f"{dtype}_kinds"] = {kind: round(count / dense, 4) for kind, count in cache.usage().items() if count}
    return Item(3, "bytes in use at 2048 tokens, window included: at most 0.42 of float16", found["int8"] <= 0.42, found)


def _quality(lab: Lab, prompt: Prompt, following: list[int]) -> Item:
    def rise(options: dict[str, Any]) -> float:
        found = round(lab.perplexity(options, prompt, following) / dense - 1.0, 4)
        lab.close(options)
        return found

    dense = lab.perplexity(None, prompt, following)
    found = {
        "dense": round(dense, 4),
        "half": rise(_policy(HALF)),
        "most": rise(_policy(MOST)),
        "random_half": rise(_policy(HALF, mask="random")),
    }
    found |= {"channels_half": rise(_policy(HALF, mask="channels"))}
    passed = found["half"] <= 0.03 and found["most"] <= 0.15 and found["random_half"] > 5 * max(found["half"], 0.01)
    passed = passed and found["channels_half"] > found["half"]
    return Item(4, "perplexity: 50 % at most +3 %, 69 % at most +15 %; random and whole channels far worse at 50 %", passed, found)


def _policy(keep: int, *, window: int = 32, **options: Any) -> dict[str, Any]:
    return {"store": {"bitmap": {"keep": keep, "dtype": "int8", **options}}, "window": window}


def _restored(store: Bitmap, rows: Floats) -> Floats:
    """Rows [G,T,D] through the packed form."""
    return store.decode(store.encode(rows[None], "key", {}), "key", {})[0]
