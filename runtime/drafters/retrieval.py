"""Draft over a short context: the parts of a long prompt that its end asks for (papers/28).

Paper: "Long-Context Inference with Retrieval-Augmented Speculative Decoding" (RAPID). The target itself drafts, on a cache of its own that holds
the beginning of the prompt, the retrieved chunks in their order, and the end of the prompt with everything generated since; a pass over that
reads a fraction of the keys and values. Chunks are ranked by BM25 over token ids, where the paper embeds sentences, so nothing but the model
is needed. The target verifies over the whole prompt. Where a pass over the short context is not measured to be cheaper, nothing is drafted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import log
from typing import ClassVar, Literal

from pydantic import Field

from planc.runtime.builders import BuilderItem
from planc.runtime.drafters.base import Context, DrafterPart, Host, Loaded, Verified
from planc.runtime.drafters.draft_model import Economy, Floor, chain
from planc.runtime.drafters.model_source import ModelSource
from planc.runtime.engine import Floats
from planc.runtime.trees import Draft

_K1, _B = 1.5, 0.75  # BM25: how soon repetitions saturate, and how far long chunks are discounted


class Retrieval(DrafterPart):
    """Guesses with the target itself over the parts of a long prompt that its end asks for (papers/28)."""

    conflicts: ClassVar[tuple[str, ...]] = ("retrieval",)
    context: int = Field(512, ge=16, description="tokens of the prompt that the draft sees, its beginning and end included")
    chunk: int = Field(64, ge=4, description="tokens of a retrieved part")
    query: int = Field(64, ge=1, description="last tokens of the prompt, which are what is searched for; always seen")
    head: int = Field(16, ge=0, description="first tokens of the prompt; always seen")
    min_p: Floor = Field("auto", description="stop where the guesses so far are right with less probability; auto: by measured cost")
    builder: BuilderItem | None = Field(None, description="how guesses are drawn; left out: one chain that stops at `min_p`")

    @property
    def draws(self) -> Literal["nothing", "chain", "tree"]:
        """See `DrafterPart`."""
        return "nothing" if self.builder is None else self.builder.draws

    def build_for(self, host: Host) -> RetrievalDrafter:
        """See `DrafterPart`."""
        return RetrievalDrafter(host, self)


class RetrievalDrafter:
    """Runtime object of `Retrieval`: a short text and a cache for it per row of the batch."""

    prompt_rows = 0
    top_k = 0

    def __init__(self, host: Host, part: Retrieval) -> None:
        self._part = part
        self._model = Loaded(host.engine, host.engine.spec.max_length)
        self._economy = Economy(host, part.min_p, None if host.cost is None else host.cost.ms(1, part.context, 1))
        self._eos = frozenset(host.eos_ids)
        self._sources: dict[int, ShortSource] = {}

    def start(self, sequence: int) -> None:
        """A new text: what is retrieved for it is settled when its first draft is made. The cache stays, for what the texts share."""
        self._economy.forget(sequence)
        if sequence in self._sources:
            self._sources[sequence].skipped = None

    def propose(self, context: Context, draft: Draft) -> None:
        """Guesses from the root; none where the prompt is no longer than what the draft would see of it."""
        if context.sequence not in self._sources:
            self._sources[context.sequence] = ShortSource(self._model)
        source = self._sources[context.sequence]
        if source.skipped is None:  # the text is the prompt and its first new token
            source.skipped = self._skipped(context.tokens[:-1])
        most = min(context.budget, context.depth, source.room(context.tokens))
        if most <= 0 or context.paused or not source.skipped or not self._economy.worth(context):
            return
        if self._part.builder is not None:
            self._part.builder.grow(source, replace(context, depth=most), draft, Retrieval.key)
        else:
            chain(source, context, draft, most, self._economy, self._eos, Retrieval.key)

    def update(self, verified: Verified) -> None:
        """Nothing: what was committed is read from the text."""

    def _skipped(self, prompt: Sequence[int]) -> list[range]:
        """Places of a prompt that the draft does not see, ascending; none of a prompt that fits."""
        part = self._part
        start, end = min(part.head, len(prompt)), max(len(prompt) - part.query, 0)
        if len(prompt) <= part.context or end <= start:
            return []
        places = [range(at, min(at + part.chunk, end)) for at in range(start, end, part.chunk)]
        most = max(1, (part.context - part.head - part.query) // part.chunk)
        kept = set(retrieve([prompt[place.start : place.stop] for place in places], prompt[end:], most))
        return [place for i, place in enumerate(places) if i not in kept]


class ShortSource:
    """A draft model that does not see some places of the text; positions close up behind them."""

    def __init__(self, model: Loaded) -> None:
        self.skipped: list[range] | None = None  # of the prompt, ascending; None: not settled yet
        self._source = ModelSource(model)

    def short(self, tokens: Sequence[int]) -> list[int]:
        """The text without the places that are skipped."""
        kept, at = list[int](), 0
        for place in self.skipped or ():
            kept += tokens[at : place.start]
            at = place.stop
        return kept + list(tokens[at:])

    def room(self, tokens: Sequence[int]) -> int:
        """Guesses that fit behind a text."""
        return self._source.room(self.short(tokens))

    def begin(self, tokens: Sequence[int]) -> Floats:
        """See `Source`."""
        return self._source.begin(self.short(tokens))

    def expand(self, draft: Draft, rows: Sequence[int]) -> Floats:
        """See `Source`."""
        return self._source.expand(draft, rows)


def retrieve(chunks: Sequence[Sequence[int]], query: Sequence[int], most: int) -> list[int]:
    """Numbers of the at most `most` chunks that score highest for the query, ascending; copies of a chunk count once.

    Okapi BM25 over token ids. If no chunk shares a token with the query, the first and the last ones are taken.
    """
    counts = [Counter(chunk) for chunk in chunks]
    mean = sum(map(len, chunks)) / max(1, len(chunks))
    scores = [0.0] * len(chunks)
    for token in set(query):
        having = sum(token in count for count in counts)
        weight = log(1.0 + (len(chunks) - having + 0.5) / (having + 0.5))
        for i, (chunk, count) in enumerate(zip(chunks, counts, strict=True)):
            times = count[token]
            scores[i] += weight * times * (_K1 + 1.0) / (times + _K1 * (1.0 - _B + _B * len(chunk) / mean))
    found, seen = list[int](), set[tuple[int, ...]]()
    for i in sorted(range(len(chunks)), key=lambda i: -scores[i]):
        if len(found) < most and scores[i] > 0.0 and tuple(chunks[i]) not in seen:
            seen.add(tuple(chunks[i]))
            found.append(i)
    if not found:
        last = min(most // 2, len(chunks) - 1)
        found = [*range(min(most - last, len(chunks) - last)), *range(len(chunks) - last, len(chunks))]
    return sorted(found)
