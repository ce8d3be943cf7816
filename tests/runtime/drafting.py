"""Adversarial drafters and a runner for the loop tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from toy_engine import ToyEngine

from planc.runtime.builders import BuilderPart
from planc.runtime.controller import Controller
from planc.runtime.decode import Decode, Tree
from planc.runtime.drafters import Context, Drafter, Verified
from planc.runtime.engine import Floats
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


class ToySource:
    """A draft model from a function of the text. Checks that it is used as its protocol says, and hands out an array that it overwrites."""

    def __init__(self, logits: Callable[[list[int]], NDArray[np.floating[Any]]]) -> None:
        self.logits, self.calls = logits, list[int]()  # rows of each draft pass
        self._handed_out = np.zeros(0)

    def begin(self, tokens: Sequence[int]) -> Floats:
        self.tokens, self.known = list(tokens), {0}
        self.calls.append(1)
        return self._give([self.tokens])[0]

    def expand(self, draft: Draft, rows: Sequence[int]) -> Floats:
        assert len(rows)
        for row in rows:
            assert row not in self.known
            assert draft.parents[row] in self.known
        self.known |= set(rows)
        self.calls.append(len(rows))
        return self._give([self.tokens + draft.path(row) for row in rows])

    def _give(self, texts: list[list[int]]) -> Floats:
        self._handed_out.fill(np.nan)
        self._handed_out = np.stack([self.logits(text) for text in texts]).astype(np.float32)
        return self._handed_out


class Drawn(Adversary):
    """A drafter with a distribution."""

    def __init__(self, builder: BuilderPart, logits: Callable[[list[int]], NDArray[np.floating[Any]]]) -> None:
        self.builder, self.source, self.budgets = builder, ToySource(logits), list[int]()

    def propose(self, context: Context, draft: Draft) -> None:
        self.budgets.append(context.budget)
        self.builder.grow(self.source, context, draft, "drawn")


def blurred(engine: ToyEngine, seed: int = 1, weight: float = 0.6) -> Callable[[list[int]], NDArray[np.float64]]:
    """Logits of a draft model that knows the engine's in part."""
    other = ToyEngine(engine.spec.vocab_size, seed=seed, predictable=0.0)

    def logits(text: list[int]) -> NDArray[np.float64]:
        visible = list(enumerate(text))
        return np.asarray(weight * engine.logits(visible) + (1 - weight) * other.logits(visible), dtype=np.float64)

    return logits


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
