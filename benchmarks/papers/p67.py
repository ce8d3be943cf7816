"""Paper 67, GEAR: the five working conditions of its card, on SmolLM2-135M."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from planc.compiler.papers import ROOT, Item, paper
from planc.runtime.engine import Floats, Step
from planc.runtime.kv import KvPolicy, PolicyCache
from planc.runtime.kv.stores import BLOCK, PARTS, Gear, Part, Quantized, Store
from planc_paper_checks.caches import Lab, Prompt, policy_in

PLAN = ROOT / "examples/papers/67-gear.yaml"
FULL: dict[str, Any] = {"bits": 2, "group": 64, "rank": 4, "factors": "int8", "outliers": 0.02}
LIGHT: dict[str, Any] = {"bits": 4, "group": 64, "rank": 2}
PROMPT, ANSWER, LONG, FORCED = 1024, 512, 2048, 200


@paper(67)
def gear() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    assert KvPolicy.model_validate(policy_in(PLAN)) == KvPolicy.model_validate(_policy(FULL)), "the plan is not what is checked"
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        words = lab.words(LONG)
        prompt = lab.read(words[:PROMPT])
        yield _exact(lab, prompt, words[: 256 + FORCED])
        yield _monotone(prompt)
        yield _scores(prompt)
        yield _smaller(lab, words)
        yield _quality(lab, prompt, words[PROMPT : PROMPT + ANSWER])


def _exact(lab: Lab, prompt: Prompt, ids: list[int]) -> Item:
    """Eight bits alone in float32 products; and, number by number, any bits with as many directions as there are."""
    tops = []
    for options in (None, {"store": {"quantized": {"bits": 8}}, "window": 0}):
        engine = lab.engine(options, int8=False)
        cache = engine.new_cache(1, 512)
        engine.forward(cache, Step(np.array([ids[:256]])))
        cache.keep(0, np.arange(256))
        cache.seal(0)
        rows = [rows.copy() for rows in lab.follow(options, cache, ids[256:], int8=False)]
        tops.append(np.concatenate(rows).argmax(-1))
        lab.close(options, int8=False)
    changed = int((tops[0] != tops[1]).sum())
    worst = 0.0
    for part, layers in zip(PARTS, (prompt.keys, prompt.values), strict=True):
        for rows in layers[::10]:
            store, x = Gear(bits=2, rank=64), _blocks(rows)
            worst = max(worst, float(np.abs(_restored(store, x, part) - x).max() / np.abs(x).max()))
    passed = changed == 0 and worst < 1e-3
    return Item(
        1,
        f"8 bits change no argmax of {len(tops[0])} tokens; rank 64 is exact (1e-3 of the largest)",
        passed,
        {"changed": changed, "worst": worst},
    )


def _monotone(prompt: Prompt) -> Item:
    """Error left of keys and of values, all layers together, by rank, by outliers, and for the bytes of smaller groups."""
    figures: dict[str, Any] = {}
    falling = True
    for part, layers in zip(PARTS, (prompt.keys, prompt.values), strict=True):
        x = np.concatenate([_blocks(rows) for rows in layers[::3]])
        by_rank = [_error(Gear(bits=2, rank=rank), x, part) for rank in (0, 2, 4, 8)]
        by_outliers = [_error(Gear(bits=2, rank=4, outliers=share), x, part) for share in (0.0, 0.04, 0.1)]
        falling = falling and by_rank == sorted(by_rank, reverse=True) and by_outliers == sorted(by_outliers, reverse=True)
        # as many bytes: 3 directions in float16 take 768 of a block and head, groups of 16 instead of 64 as well
        figures[part] = {"by_rank": by_rank, "by_outliers": by_outliers, "rank_3": _error(Gear(bits=2, rank=3), x, part)}
        figures[part]["groups_of_16"] = _error(Quantized(bits=2, group=16), x, part)
    passed = falling and figures["key"]["rank_3"] < figures["key"]["groups_of_16"]
    return Item(
        2, "error falls with rank and outliers; for keys 3 directions remove more than groups of 16, for the same bytes", passed, figures
    )


def _scores(prompt: Prompt) -> Item:
    worst, store = 0.0, Gear(**LIGHT)
    for keys, queries in zip(prompt.keys, prompt.queries, strict=True):
        x = _blocks(keys)
        payload = store.encode(x, "key", {})
        base = Quantized(bits=store.bits).decode(payload, "key", {})
        q = queries[-1].reshape(x.shape[1], -1, x.shape[3])
        left, right = (payload[name].astype(np.float32) for name in ("left", "right"))
        apart = q @ base.swapaxes(-1, -2) + (q @ right) @ left.swapaxes(-1, -2)
        whole = q @ store.decode(payload, "key", {}).swapaxes(-1, -2)
        worst = max(worst, float(np.abs(apart - whole).max() / np.abs(whole).max()))
    return Item(3, "(q P) Q^T is what the decoded keys give (1e-3)", worst < 1e-3, {"worst": worst})


def _smaller(lab: Lab, words: list[int]) -> Item:
    prompt = lab.read(words)
    dense = sum(k.nbytes + v.nbytes for k, v in zip(prompt.keys, prompt.values, strict=True)) / 2  # float16
    found = {}
    for name, options in (("four_bits", LIGHT), ("two_bits", FULL), ("two_bits_float16_factors", {**FULL, "factors": "float16"})):
        cache = lab.sealed(_policy(options), prompt)
        assert isinstance(cache, PolicyCache)
        found[name] = round(sum(cache.usage().values()) / dense, 4)
    passed = found["four_bits"] <= 0.36 and found["two_bits"] <= 0.31
    return Item(
        4, "bytes in use at 2048 tokens: 4 bits, rank 2 at most 0.36 of float16; 2 bits, rank 4, 2 % outliers at most 0.31", passed, found
    )


def _quality(lab: Lab, prompt: Prompt, following: Sequence[int]) -> Item:
    dense = lab.perplexity(None, prompt, following)
    plain = {"store": {"quantized": {"bits": 2}}, "window": 0}
    found = {"dense": round(dense, 4)}
    for name, options in (("four_bits", _policy(LIGHT)), ("two_bits", _policy(FULL)), ("two_bits_alone", plain)):
        found[name] = round(lab.perplexity(options, prompt, following) / dense - 1.0, 4)
        lab.close(options)
    passed = found["four_bits"] <= 0.01 and found["two_bits"] <= 0.5 * found["two_bits_alone"]
    return Item(5, "perplexity: 4 bits, rank 2 at most +1 %; at 2 bits at most half the rise of quantisation alone", passed, found)


def _policy(options: dict[str, Any]) -> dict[str, Any]:
    return {"store": {"gear": options}, "window": 0}


def _blocks(rows: Floats) -> Floats:
    """[G,T,D] -> [N,G,64,D]."""
    return rows.reshape(len(rows), -1, BLOCK, rows.shape[2]).swapaxes(0, 1)


def _restored(store: Store, x: Floats, part: Part) -> Floats:
    return store.decode(store.encode(x, part, {}), part, {})


def _error(store: Store, x: Floats, part: Part) -> float:
    """What is left of the rows' norm."""
    return round(float(np.linalg.norm(_restored(store, x, part) - x) / np.linalg.norm(x)), 5)
