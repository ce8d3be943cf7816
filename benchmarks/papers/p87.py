"""Paper 87, SpecKV and SpecPC: the five working conditions of its card, on SmolLM2-135M, with layers left out as its draft."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from planc.compiler.papers import ROOT, Item, paper
from planc.runtime.context import DraftAttention
from planc.runtime.engine import Step
from planc.runtime.kv import KvPolicy, PolicyCache
from planc.runtime.kv.evictions import AttentionWindow, Lookahead
from planc.runtime.kv.evictions.base import window_attention
from planc_paper_checks.caches import Lab, Prompt, policy_in

PLAN = ROOT / "examples/papers/87-draft-approx.yaml"
KEPT, WINDOW, GUESSED = 256, 32, 16
NEEDLES = ((1500, 0.1, 73914), (1500, 0.5, 28463), (1500, 0.8, 51907), (2048, 0.3, 60285), (4096, 0.5, 40731), (8000, 0.5, 92518))
WIDE = 1024  # rows and tokens that stay of longer prompts, in the table


@paper(87)
def speculative_kv() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    lookahead = {"capacity": KEPT, "window": WINDOW, "tokens": GUESSED, "kernel": 7}
    assert KvPolicy.model_validate(policy_in(PLAN)) == KvPolicy.model_validate({"evict": {"lookahead": lookahead}}), (
        "the plan is not what is checked"
    )
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        words = lab.words(1536)
        prompt = lab.read(words[:512])
        yield _neutral(lab, prompt)
        yield _shuffled(lab, prompt)
        yield _needles(lab)
        text = lab.read(words)
        yield _overlap(lab, text)
        yield _smaller(lab, text)


def _evict(kind: str, capacity: int = KEPT, **options: Any) -> dict[str, Any]:
    return {"evict": {kind: {"capacity": capacity, "window": WINDOW, **options}}}


def _neutral(lab: Lab, prompt: Prompt) -> Item:
    """Room for all: the tokens of a plain cache. Without guesses, means and averages: SnapKV's rows, found by hand."""
    want = lab.greedy(None, lab.dense(prompt), prompt.first, 48)
    options = _evict("lookahead", 4096, tokens=GUESSED)
    have = lab.greedy(options, lab.sealed(options, prompt, want[: GUESSED + 1]), prompt.first, 48)
    lab.close(options)
    same, eviction = True, AttentionWindow(capacity=128, window=WINDOW)
    for queries, keys in list(zip(prompt.queries, prompt.keys, strict=True))[::7]:
        judges, (heads, tokens, width) = queries[-WINDOW:], keys.shape
        kept = eviction.keep(judges, keys, tokens, width**-0.5, 0.0)
        for head in range(heads):
            mean = np.zeros(tokens)
            for row in range(WINDOW):
                seen = tokens - WINDOW + row + 1
                for query in judges[row].reshape(heads, -1, width)[head]:
                    score = keys[head, :seen].astype(np.float64) @ query * width**-0.5
                    mean[:seen] += np.exp(score - score.max()) / np.exp(score - score.max()).sum()
            padded = np.pad(mean[: tokens - WINDOW], 2)
            smooth = sum(padded[i : i + tokens - WINDOW] for i in range(5))
            cut = np.sort(smooth)[-(128 - WINDOW)]
            same = same and bool((smooth[kept[head, : 128 - WINDOW]] >= cut * (1 - 1e-4)).all())
    measured = {"same_tokens": have == want, "snap_rows": same}
    return Item(1, "room for all rows: the tokens of greedy decoding; without guesses the rows of SnapKV", have == want and same, measured)


def _shuffled(lab: Lab, prompt: Prompt) -> Item:
    """All rows kept, in any order of slots: positions travel with the keys. In float32: int8 rows make much of the order of sums."""
    options, answers = _evict("attention_window", 4096), []
    for shuffle in (False, True):
        cache = lab.sealed(options, prompt, int8=False)
        assert isinstance(cache, PolicyCache)
        for i, layer in enumerate(cache.layers(0).values()):
            for head in range(layer.spec.heads):
                order = np.random.default_rng(100 * i + head).permutation(layer.rows) if shuffle else np.arange(layer.rows)
                for buffer in (layer.key, layer.value):
                    buffer[0, head, : layer.rows] = buffer[0, head, order]
        answers.append(lab.greedy(options, cache, prompt.first, 48, int8=False))
    same = next((i for i, (a, b) in enumerate(zip(*answers, strict=True)) if a != b), 48)
    lab.close(options, int8=False)
    return Item(2, "the same tokens whatever the order of slots", same == 48, {"tokens": 48, "same": same})


def _needles(lab: Lab) -> Item:
    """Codes in long texts, and which policies find them: 1500 tokens with 256 rows decide, longer ones are a table."""
    table: dict[str, dict[str, str]] = {}
    short: dict[str, int] = {}
    for length, depth, code in NEEDLES:
        prompt = lab.read(lab.needle(length, depth, code))
        guesses = lab.guess(prompt, GUESSED)
        rows = KEPT if length <= 1500 else WIDE
        row = {}
        for name, options in _ways(rows).items():
            row[name] = lab.found(options, prompt, code, guesses if name == "lookahead" else ())
            if length <= 1500:
                short[name] = short.get(name, 0) + row[name]
        table[f"{length} at {depth}"] = {name: "found" if hit else "lost" for name, hit in row.items()}
    passed = short["lookahead"] > short["recent"] and short["lookahead"] >= short["attention_window"]
    passed = passed and short["lookahead"] >= 0.8 * short["dense"] > 0
    what = "codes found in 1500 tokens with 256 rows: more than by the last rows alone, no fewer than SnapKV, at least 0.8 of dense"
    return Item(3, what, passed, {**short, "table": table})


def _ways(rows: int) -> dict[str, dict[str, Any] | None]:
    """The policies of the table, by name."""
    return {
        "dense": None,
        "recent": _evict("recent", rows),
        "attention_window": _evict("attention_window", rows),
        "lookahead": _evict("lookahead", rows, tokens=GUESSED),
        "streaming": {"streaming": {"share": 1.0, "sink": 64, "local": rows - 64}},
        "pages": {"store": "int8", "select": {"pages": {"budget": rows}}},
        "landmarks": {"store": {"low_rank": {"rank": 48}}, "select": {"landmarks": {"budget": rows, "interval": 4}}, "window": 32},
        "bitmap": {"store": {"bitmap": {"keep": 32}}, "window": 32},
        "gear": {"store": {"gear": {"bits": 2, "rank": 4, "outliers": 0.02}}, "window": 0},
    }


def _overlap(lab: Lab, prompt: Prompt) -> Item:
    """Rows chosen with the target's own next 32 tokens, against the rows that get the largest share of attention of any of those tokens.

    Pooling keeps rows for their neighbours' sake, which such a count takes for misses, so both rules are compared without it.
    """
    answer, options = lab.greedy(None, lab.dense(prompt), prompt.first, 33), _evict("lookahead", 8192, tokens=32)
    cache, engine = lab.sealed(options, prompt), lab.engine(options)  # nothing is dropped: its queries and keys are wanted
    assert isinstance(cache, PolicyCache)
    queries: list[list[np.ndarray]] = [[] for _ in prompt.keys]
    for at in range(0, 33, 11):
        engine.forward(cache, _step(answer[at : at + 11]))
        for layer, found in zip(queries, cache.seen(0).values(), strict=True):
            layer.append(found.copy())
        cache.keep(0, np.arange(11))
    recalls: dict[str, list[float]] = {}
    for i, layer in enumerate(cache.layers(0).values()):
        keys, own, length = layer.key[0, :, : layer.rows], np.concatenate(queries[i]), len(prompt.ids)
        judges, scale = prompt.queries[i][-WINDOW:], layer.spec.scale
        top = np.argsort(-window_attention(own, keys, scale, 0.0)[:, :, :length].max(1), axis=1)[:, :KEPT]
        kept = {}
        for pooled, kernels in (("", (1, 1)), (" pooled", (7, 5))):
            lookahead = Lookahead(capacity=KEPT, window=WINDOW, tokens=32, kernel=kernels[0])
            snap = AttentionWindow(capacity=KEPT, window=WINDOW, kernel=kernels[1])
            kept[f"lookahead{pooled}"] = lookahead.keep(np.concatenate([judges, own]), keys, length, scale, 0.0)
            kept[f"attention_window{pooled}"] = snap.keep(judges, keys[:, :length], length, scale, 0.0)
        for name, rows in kept.items():
            shares = [len(np.intersect1d(a, b)) / KEPT for a, b in zip(rows, top, strict=True)]
            recalls.setdefault(name, []).extend(shares)
    lab.close(options)
    figures = {name: round(float(np.mean(values)), 4) for name, values in recalls.items()}
    passed = figures["lookahead"] >= 0.7 and figures["lookahead"] > figures["attention_window"]
    return Item(4, "of the 256 rows that the answer looks at most at least 0.7 are kept, more than by SnapKV", passed, figures)


def _smaller(lab: Lab, prompt: Prompt) -> Item:
    """Bytes in use behind the prompt; and the seconds of a shorter prompt, its draft included."""
    length, options = len(prompt.ids), _evict("lookahead", tokens=GUESSED)
    cache = lab.sealed(options, prompt, lab.guess(prompt, GUESSED))
    assert isinstance(cache, PolicyCache)
    rows = sum(count for kind, count in cache.usage().items() if kind in ("window", "front"))
    dense = sum(k.nbytes + v.nbytes for k, v in zip(prompt.keys, prompt.values, strict=True))
    bytes_ratio = rows / dense
    context = DraftAttention(capacity=KEPT, window=64)

    def chosen() -> list[int]:
        drafted = lab.read(prompt.ids, draft=True)
        judging = list(zip(drafted.queries, drafted.keys, strict=True))[int(context.first * len(drafted.keys)) :]
        return [prompt.ids[i] for i in context.kept(context.scores(((q, k, k.shape[2] ** -0.5) for q, k in judging), length))]

    kept = chosen()
    ways: dict[str, Callable[[], object]] = {"whole": lambda: lab.read(prompt.ids), "draft": chosen, "short": lambda: lab.read(kept)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3):  # in turns, so that a slow spell of the machine hits all alike
        for name, way in ways.items():
            begin = perf_counter()
            way()
            times[name].append(perf_counter() - begin)
    whole, draft, short = (min(times[name]) for name in ("whole", "draft", "short"))
    limit = (KEPT + WINDOW) / length * 1.02
    share = lab.draft_share
    measured = {
        "bytes": round(bytes_ratio, 4),
        "allowed": round(limit, 4),
        "prompt": len(kept) / length,
        "prefill": round(short / whole, 4),
        "with_draft": round((short + draft) / whole, 4),
        "draft_layers": round(share, 4),
    }
    pays = share >= 1 - KEPT / length or short + draft < whole
    passed = bytes_ratio <= limit and short / whole <= 1.3 * KEPT / length and pays
    return Item(5, "bytes at most (256 + 32) / L; the shorter prompt costs its share, draft included less than dense", passed, measured)


def _step(tokens: Sequence[int]) -> Step:
    return Step(np.array([tokens]))
