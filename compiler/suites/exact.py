"""A model of `shuffle` and `replace_random` that is exact: its marginals are the tasks' own, so that what a loop loses is the loop's doing alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planc.compiler.suites.parallelbench import TASKS, Example, marginals
from planc.runtime.decode import Decode
from planc.runtime.loops.masked import Filling
from planc.runtime.masked import Canvas
from planc.runtime.masked.engine import MaskedSpec, Query, Reply, SlotCache, reply_of

MASK = 0


class ExactEngine:
    """The engine of one example; no network, no cache. Token 0 is the mask, the others are the example's words."""

    def __init__(self, example: Example) -> None:
        self.example = example
        self.words = list(dict.fromkeys([*example.items, *example.arguments]))
        self.spec = MaskedSpec(len(self.words) + 1, 64, MASK, 1)
        self._known: dict[bytes, np.ndarray] = {}

    def new_cache(self, rows: int, slots: int) -> SlotCache:
        """Nothing to keep."""
        return SlotCache({}, slots)

    def forward(self, cache: SlotCache, query: Query, *, logits: bool = False) -> Reply:
        """See `MaskedEngine`: logarithms of the exact marginals of every slot; the first slot is the prompt."""
        found = np.stack([self._row(tokens) for tokens in query.tokens])
        return reply_of(found)

    def _row(self, tokens: np.ndarray) -> np.ndarray:
        key = tokens.tobytes()
        if key not in self._known:
            known = [None if token == MASK else self.words[token - 1] for token in tokens[1:]]
            table = np.full((len(tokens), self.spec.vocab_size), -np.inf, dtype=np.float32)
            table[0, 1] = 0.0
            for slot, shares in enumerate(marginals(self.example, known), 1):
                for word, share in shares.items():
                    table[slot, self.words.index(word) + 1] = np.log(share)
            self._known[key] = table
        return self._known[key]


def valid_share(task: str, n: int, per_pass: int, runs: int, *, temperature: float = 1.0, seed: int = 0, batch: int = 64) -> float:
    """Share of valid answers when `per_pass` slots are committed in a random order, drawn at `temperature`."""
    example = TASKS[task].example(np.random.default_rng(seed), n)
    engine = ExactEngine(example)
    decode = Decode.model_validate(
        {"masked": {"select": {"top_k": {"tokens": per_pass}}, "score": "random"}, "sampling": {"temperature": temperature}}
    )
    assert decode.masked is not None
    valid = 0
    for start in range(0, runs, batch):
        canvases = [Canvas([1], n, MASK, seed=seed, key=key) for key in range(start, min(runs, start + batch))]
        for _ in Filling(engine, canvases, decode.masked, decode.sampling):  # type: ignore[arg-type]
            pass
        valid += sum(_is_valid(task, example, [engine.words[t - 1] for t in canvas.tokens[1:]]) for canvas in canvases)
    return valid / runs


def _is_valid(task: str, example: Example, words: Sequence[str]) -> bool:
    """Of a shuffle a permutation is enough here: the closed forms for groups count the list itself as one."""
    return sorted(words) == sorted(example.items) if task == "shuffle" else TASKS[task].valid(example, words)
