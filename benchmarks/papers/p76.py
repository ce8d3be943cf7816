"""Paper 76, ShadowKV: the five working conditions of its card, on SmolLM2-135M, without a second tier of memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from planc.compiler.papers import ROOT, Item, paper
from planc.runtime.engine import Floats, Step
from planc.runtime.kv import KvPolicy, PolicyCache
from planc.runtime.kv.evictions.base import window_attention
from planc.runtime.kv.layer import Body
from planc.runtime.kv.selections import Landmarks
from planc.runtime.kv.selections.landmarks import CHUNK
from planc.runtime.kv.stores import BLOCK
from planc_paper_checks.caches import Lab, Prompt, policy_in

PLAN = ROOT / "examples/papers/76-shadowkv.yaml"
ALL, QUARTER, LEAST = 192, 48, 32  # numbers of a token's keys, of 3 heads with 64 each
PROMPT, ANSWER, LONG = 2048, 192, 4096
TOP, SHARE = 64, 0.12


@paper(76)
def shadow_kv() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    assert KvPolicy.model_validate(policy_in(PLAN)) == KvPolicy.model_validate(_policy(QUARTER, 256)), "the plan is not what is checked"
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        words = lab.words(LONG)
        prompt = lab.read(words[:PROMPT])
        yield _exact(lab, prompt, words[:320])
        yield _rank(lab, prompt)
        yield _recall(prompt)
        yield _smaller(lab, words)
        yield _quality(lab, prompt, words[PROMPT : PROMPT + ANSWER])


def _policy(rank: int, budget: int, values: str = "float16") -> dict[str, Any]:
    store = {"rank": rank} if values == "float16" else {"rank": rank, "values": values}
    return {"store": {"low_rank": store}, "select": {"landmarks": {"budget": budget, "outliers": 8, "interval": 1}}, "window": 32}


def _exact(lab: Lab, prompt: Prompt, ids: list[int]) -> Item:
    logits = []
    for options in (None, _policy(ALL, 512, "float32")):
        engine = lab.engine(options, int8=False)
        cache = engine.new_cache(1, 400)
        engine.forward(cache, Step(np.array([ids[:256]])))
        cache.keep(0, np.arange(256))
        cache.seal(0)
        logits.append(np.concatenate([rows.copy() for rows in lab.follow(options, cache, ids[256:288], 1, int8=False)]))
        layers = engine.layers
        lab.close(options, int8=False)
    difference, largest = float(np.abs(logits[0] - logits[1]).max()), float(np.abs(logits[1]).max())
    policy, rebuilt = KvPolicy.model_validate(_policy(ALL, 512, "float32")), 0.0
    for spec, keys, values in zip(layers, prompt.keys, prompt.values, strict=True):
        assert policy.kept is not None
        body = Body(spec, policy.kept, policy)
        body.append({"key": keys, "value": values}, np.broadcast_to(np.arange(keys.shape[1]), keys.shape[:2]))
        rebuilt = max(rebuilt, float(np.abs(body.decoded("key") - keys).max() / np.abs(keys).max()))
    passed = difference < 1e-3 and rebuilt < 1e-3
    measured = {"largest_difference": difference, "largest_logit": round(largest, 2), "rebuilt_keys": rebuilt}
    return Item(1, "full rank and a budget for all: the logits of dense (1e-3), and the keys that were turned", passed, measured)


def _rank(lab: Lab, prompt: Prompt) -> Item:
    """Relative error of a quarter of the numbers, for keys before and after they are turned."""
    ropes = [layer.rope for layer in lab.engine(_policy(QUARTER, 256)).layers]
    before, after = [], []
    for keys, rope in zip(prompt.keys, ropes, strict=True):
        assert rope is not None
        flat = rope.turn(keys, np.arange(keys.shape[1]), back=True).swapaxes(0, 1).reshape(keys.shape[1], -1)
        before.append(_lost(flat))
        after.append(_lost(keys.swapaxes(0, 1).reshape(keys.shape[1], -1)))
    better = sum(b < 0.8 * a for b, a in zip(before, after, strict=True))
    measured = {"before": [round(x, 4) for x in before], "after": [round(x, 4) for x in after], "clearly_lower_in": better}
    return Item(
        2,
        "a quarter of the numbers loses clearly less (0.8 times) of keys that are not turned, in most layers",
        better > len(before) / 2,
        measured,
    )


def _lost(rows: Floats) -> float:
    """Share of the norm of rows [T,N] that their best form of rank N/4 leaves out."""
    values = np.linalg.eigvalsh(rows.T.astype(np.float64) @ rows)[::-1]
    return float(np.sqrt(values[len(values) // 4 :].sum() / values.sum()))


def _recall(prompt: Prompt) -> Item:
    """Attention mass of the tokens that get most of it, which lies in the chunks that are read; the window aside."""
    select, shares, outliers = Landmarks(budget=int(SHARE * PROMPT) // CHUNK * CHUNK, outliers=0), [], []
    for keys, queries in zip(prompt.keys, prompt.queries, strict=True):
        heads, tokens, width = keys.shape
        stats = select.stats(keys.reshape(heads, -1, BLOCK, width).swapaxes(0, 1))
        resident = Landmarks(budget=64, outliers=8).resident(keys.reshape(heads, -1, BLOCK, width).swapaxes(0, 1))
        attention = window_attention(queries[-1:], keys, width**-0.5, 0.0)  # [G,H/G,T]
        units = select.choose(stats, queries[-1], width**-0.5, np.empty((heads, 0), np.int64))
        read = np.zeros((heads, tokens // CHUNK), bool)
        np.put_along_axis(read, units, True, 1)
        np.put_along_axis(read, resident, True, 1)
        outliers.append(bool(np.take_along_axis(read, resident, 1).all()))
        shown = np.repeat(read, CHUNK, axis=1)
        shown[:, -BLOCK:] = True
        for head in range(heads):
            for row in attention[head]:
                top = np.argsort(-row)[:TOP]
                shares.append(float(row[top][shown[head, top]].sum() / row[top].sum()))
    recall = float(np.mean(shares))
    measured = {"recall": round(recall, 4), "budget": select.budget, "outliers_read": all(outliers)}
    return Item(
        3,
        "chunks at 12 % hold at least 70 % of the attention of the top 64 tokens; outliers are always read",
        recall >= 0.7 and all(outliers),
        measured,
    )


def _smaller(lab: Lab, words: list[int]) -> Item:
    prompt = lab.read(words)
    dense = sum(k.nbytes + v.nbytes for k, v in zip(prompt.keys, prompt.values, strict=True)) / 2  # float16
    found: dict[str, Any] = {}
    for rank in (LEAST, QUARTER):
        options = _policy(rank, 256)
        cache = lab.sealed(options, prompt)
        assert isinstance(cache, PolicyCache)
        bodies = [layer.body for layer in cache.layers(0).values()]
        host = sum(array.nbytes for body in bodies if body is not None for array in body.payload("value").values())
        found[f"rank_{rank}"] = round((sum(cache.usage().values()) - host) / dense, 4)
        found["values_on_host"] = round(host / dense, 4)
    hits, before = [], [layer.selected for layer in cache.layers(0).values()]
    for _ in lab.follow(options, cache, words[:12], 1):
        now = [layer.selected for layer in cache.layers(0).values()]
        if now is not before:
            for old, new in zip(before, now, strict=True):
                assert old is not None and new is not None
                hits += [len(np.intersect1d(a, b)) / len(b) for a, b in zip(old, new, strict=True)]
        before = now
    found["hit_rate"] = round(float(np.mean(hits)), 4)
    passed = found[f"rank_{LEAST}"] <= 0.35 and found["hit_rate"] > 0.5
    return Item(
        4,
        "at 4096 tokens at most 0.35 of float16, values aside (rank 32); more than half of the chunks stay from step to step",
        passed,
        found,
    )


def _quality(lab: Lab, prompt: Prompt, following: Sequence[int]) -> Item:
    dense = lab.perplexity(None, prompt, following)
    rise = lab.perplexity(_policy(QUARTER, PROMPT // 4), prompt, following) / dense - 1.0
    measured = {"dense": round(dense, 4), "rise": round(rise, 4), "tokens": len(following) - 1}
    return Item(5, "perplexity at rank and budget of a quarter: at most +3 %", rise <= 0.03, measured)
