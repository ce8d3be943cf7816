"""Adversarial drafters and a runner for the loop tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from toy_engine import ToyEngine

from planc.runtime.controller import Controller
from planc.runtime.decode import Decode, Tree
from planc.runtime.drafters import Context, Drafter, Verified
from planc.runtime.loops import Stats, autoregressive, speculative
from planc.runtime.trees import Draft


class Adversary:
    """Base of the test drafters: no state, no demands."""

    prompt_rows = 0
    top_k = 0

    def start(self, sequence: int) -> None: ...

    def propose(self, context: Context, draft: Draft) -> None: ...

    def update(self, verified: Verified) -> None: ...


class Oracle(Adversary):
    """Knows the plain text; goes wrong after `right` guesses."""

    def __init__(self, texts: Sequence[Sequence[int]], vocab: int, right: int = 10**6) -> None:
        self.texts, self.vocab, self.right = texts, vocab, right

    def propose(self, context: Context, draft: Draft) -> None:
        row, at = 0, len(context.tokens)
        for step, token in enumerate(self.texts[context.sequence][at : at + context.depth]):
            row = draft.add(row, token if step < self.right else (token + 1) % self.vocab, ("oracle", min(step, self.right)), 0.9)


class Bush(Adversary):
    """A random tree with many siblings, some proposed twice, some equal to their parent."""

    def __init__(self, vocab: int, seed: int, size: int = 12) -> None:
        self.vocab, self.size, self.rng = vocab, size, np.random.default_rng(seed)

    def propose(self, context: Context, draft: Draft) -> None:
        for _ in range(self.size):
            parent = int(self.rng.integers(len(draft)))
            if draft.depths[parent] >= context.depth:
                continue
            token = int(self.rng.integers(self.vocab))
            for name in ("bush", "bush", "twin"):
                draft.add(parent, token, (name, 0), float(self.rng.random()))


class Helped(Bush):
    """A random tree around the true path, so that acceptance passes through rows in the midst of wrong siblings."""

    def __init__(self, texts: Sequence[Sequence[int]], vocab: int, seed: int, size: int = 8) -> None:
        super().__init__(vocab, seed, size)
        self.texts = texts

    def propose(self, context: Context, draft: Draft) -> None:
        super().propose(context, draft)
        row, at = 0, len(context.tokens)
        for token in self.texts[context.sequence][at : at + int(self.rng.integers(0, context.depth + 1))]:
            row = draft.add(row, token, ("helped", 0), float(self.rng.random()))
        super().propose(context, draft)


def generate(
    engine: ToyEngine,
    prompts: Sequence[Sequence[int]],
    decode: Decode | None = None,
    drafters: Sequence[Drafter] | None = None,
    tree: Tree | None = None,
    *,
    controller: Controller | None = None,
    capacity: int = 160,
    stats: Stats | None = None,
    **options: Any,
) -> tuple[list[list[int]], list[str | None]]:
    """Texts (prompt included) and finish reasons; plain decoding without `drafters`. Checks the cache after every piece."""
    cache = engine.new_cache(len(prompts), capacity)
    decode = decode if decode is not None else Decode(max_new_tokens=24)
    texts, finish = [list(prompt) for prompt in prompts], [None] * len(prompts)
    if drafters is None:
        pieces = autoregressive(engine, cache, prompts, decode, stats=stats, **options)
    else:
        controller = controller if controller is not None else Controller(tree if tree is not None else Tree(budget=8))
        pieces = speculative(engine, cache, prompts, drafters, controller, decode, stats=stats, **options)
    for piece in pieces:
        assert piece.tokens
        assert finish[piece.sequence] is None
        texts[piece.sequence] += piece.tokens
        finish[piece.sequence] = piece.finish
        if piece.finish is None or len(prompts) == 1:
            cache.check(piece.sequence, texts[piece.sequence])
            assert cache.lengths[piece.sequence] == len(texts[piece.sequence]) - 1
    return texts, finish
