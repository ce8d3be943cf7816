"""What the loops share: texts, prefill, passes, commits and statistics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from planc.runtime.acceptance import Choose, Target, Walk, rule_of
from planc.runtime.decode import Decode
from planc.runtime.drafters import Context, Drafter, Verified
from planc.runtime.drafters.base import Draw, likeliest
from planc.runtime.engine import Cache, Engine, Outputs, Step
from planc.runtime.errors import InputError
from planc.runtime.sampling import Drawing, Sampler
from planc.runtime.trees import Draft, pack

CHUNK = 256  # prompt rows per prefill pass: large enough for full speed, small enough that no activation dominates the memory
MIN_ROWS = 2  # a one-row pass takes other kernels, whose rounding differs from that of all wider passes


@dataclass(frozen=True, slots=True)
class Piece:
    """Newly committed tokens of one sequence. `finish` is set on its last piece: `eos`, `stop` or `length`."""

    sequence: int
    tokens: list[int]
    finish: str | None = None


@dataclass(slots=True)
class Text:
    """One sequence: the committed tokens, prompt included. The last one is pending."""

    id: int
    tokens: list[int]
    prompt: int  # prompt tokens
    longest: int  # most tokens that may be committed
    finish: str | None = None

    @property
    def left(self) -> int:
        """Tokens that may still be committed."""
        return self.longest - len(self.tokens)


Stop = Callable[[Text], bool]  # asked after every committed token


@dataclass(slots=True)
class Stats:
    """What one call of a loop did. Seconds are wall time; a consumer's time between two pieces is not counted."""

    passes: int = 0  # decoding passes
    rows: int = 0  # rows of the decoding passes, per sequence
    prefill_passes: int = 0
    tokens: int = 0  # committed, of all sequences
    accepted: Counter[int] = field(default_factory=Counter)  # accepted guesses of a sequence in a round -> how often
    drafted_by: Counter[str] = field(default_factory=Counter)  # drafter -> verified guesses that it made
    accepted_by: Counter[str] = field(default_factory=Counter)
    prefill_seconds: float = 0.0  # in the engine
    engine_seconds: float = 0.0  # in the engine, prefill excluded
    draft_seconds: float = 0.0  # in the drafters, passes of their own included
    total_seconds: float = 0.0
    first_token_seconds: float = 0.0

    @property
    def host_seconds(self) -> float:
        """Time outside the engine."""
        return self.total_seconds - self.engine_seconds - self.prefill_seconds

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that one decoding pass committed on average, per sequence in it; the prompt pass's own token is not counted."""
        rounds = sum(self.accepted.values())
        return (rounds + sum(count * times for count, times in self.accepted.items())) / rounds if rounds else 0.0

    def timed(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """The same pieces; accounts for the time that making them takes."""
        while True:
            begin = perf_counter()
            piece = next(pieces, None)
            self.total_seconds += perf_counter() - begin
            if piece is None:
                return
            if not self.tokens:
                self.first_token_seconds = self.total_seconds
            self.tokens += len(piece.tokens)
            yield piece


class Run:
    """One call of a loop over a batch."""

    def __init__(
        self,
        engine: Engine,
        cache: Cache,
        prompts: Sequence[Sequence[int]],
        decode: Decode,
        drafters: Sequence[Drafter] = (),
        *,
        eos: Collection[int] = (),
        min_rows: int | None = None,
        chunk: int = CHUNK,
        ids: Sequence[int] | None = None,
        stop: Stop | None = None,
        stats: Stats | None = None,
    ) -> None:
        planned = MIN_ROWS if decode.min_rows == "auto" else decode.min_rows
        self.engine, self.cache, self.drafters = engine, cache, drafters
        self.min_rows = planned if min_rows is None else min_rows
        self.chunk = max(chunk, self.min_rows)
        self.eos, self.stop = frozenset(eos), stop
        self.stats = stats if stats is not None else Stats()
        self.sampler = Sampler(decode.sampling)
        acceptance = decode.speculative.acceptance if decode.speculative is not None else "coupled"
        self.rule = rule_of(acceptance, decode.sampling.temperature)
        self.limit = min(cache.capacity, engine.spec.max_length)
        self.rows, self.pass_ms = 0, 0.0  # of the last decoding pass
        # of the drafts for that pass; the first drafts of a text, before which a drafter may read the prompt, count as 0
        self.draft_ms = 0.0
        # a sequence always has room for a pass of `min_rows` rows, so both loops stop at the same token when the cache is full
        longest = self.limit - self.min_rows + 1
        keys = range(len(prompts)) if ids is None else ids
        self.texts = [
            Text(key, list(prompt), len(prompt), min(len(prompt) + decode.max_new_tokens, longest))
            for key, prompt in zip(keys, prompts, strict=True)
        ]
        self._check(longest)
        self._top_k = bool(engine.spec.top_k) and any(drafter.top_k for drafter in drafters)

    def _check(self, longest: int) -> None:
        if len(self.texts) != len(self.cache.lengths):
            raise InputError("input-invalid", f"{len(self.texts)} prompts for a cache of {len(self.cache.lengths)} sequences")
        for b, text in enumerate(self.texts):
            if not text.tokens:
                raise InputError("prompt-empty", f"prompt {b} has no tokens", fix="start it with the model's begin-of-text token")
            if min(text.tokens) < 0 or max(text.tokens) >= self.engine.spec.vocab_size:
                raise InputError("input-invalid", f"prompt {b} has a token outside the vocabulary of {self.engine.spec.vocab_size}")
            if text.prompt >= longest:
                fix = "shorten the prompt or make the cache larger"
                raise InputError("prompt-too-long", f"prompt {b} has {text.prompt} tokens, at most {longest - 1} fit", fix=fix)
        if any(drafter.top_k for drafter in self.drafters) and not self.engine.spec.top_k:
            message = "a drafter needs top-k ids, and the graph does not return them"
            raise InputError("output-missing", message, fix="compile again with this drafter in the plan")

    def require_trees(self, wanted: bool) -> None:
        """Refuse a plan that insists on trees when the engine can only run chains, or the rule verify nothing else."""
        if wanted and self.rule.chains:
            message = "the plan asks for draft trees, and its acceptance rule verifies chains only"
            raise InputError("input-invalid", message, fix="use tree: {shape: chain} or acceptance: recursive")
        if wanted and not self.engine.spec.trees:
            message = "the plan asks for draft trees, and this engine runs chains only"
            raise InputError("input-invalid", message, fix="use tree: {shape: auto}")

    @property
    def live(self) -> list[int]:
        """Sequences that are not finished."""
        return [b for b, text in enumerate(self.texts) if text.finish is None]

    @property
    def batch(self) -> int:
        """Sequences of the cache, finished ones included."""
        return len(self.texts)

    @property
    def room(self) -> int:
        """Rows that the next pass may have."""
        return self.limit - int(self.cache.lengths.max())

    def prefill(self) -> Iterator[Piece]:
        """Feed the prompts in chunks of rows and commit the first token of each; every later pass finds it pending.

        Right padding: a shorter prompt's spare rows are repeated tokens that are never kept, so no length counts them.
        """
        for b, text in enumerate(self.texts):
            self.cache.rollback(b, min(int(self.cache.lengths[b]), text.prompt - 1))  # at least one row has to give the first logits
            for drafter in self.drafters:
                drafter.start(b)
        while waiting := [b for b in self.live if self.cache.lengths[b] < self.texts[b].prompt]:
            starts = self.cache.lengths.tolist()
            # a pass ends where a prompt ends, so that outputs are needed for its last rows only
            rest = min(self.texts[b].prompt - starts[b] for b in waiting)
            rows = max(self.min_rows, min(self.chunk, self.room, rest))
            parts = [list[int]() for _ in self.texts]
            for b in waiting:
                parts[b] = self.texts[b].tokens[starts[b] : min(starts[b] + rows, self.texts[b].prompt)]
            tokens = [part + (part or text.tokens)[-1:] * (rows - len(part)) for part, text in zip(parts, self.texts, strict=True)]
            first = self._first_output(parts, starts, rows)
            outputs = self.forward(Step(np.array(tokens, dtype=np.int64), logits_from=first), prefill=True)
            for b in waiting:
                yield from self._fed(b, parts[b], outputs, first)

    def _first_output(self, parts: Sequence[Sequence[int]], starts: Sequence[int], rows: int) -> int:
        """First row of a prompt pass whose outputs anybody needs; at least two rows' worth, for the reason of `MIN_ROWS`."""
        first = rows - max(MIN_ROWS, self.min_rows)
        wanted = max((drafter.prompt_rows for drafter in self.drafters), default=0)
        for part, start, text in zip(parts, starts, self.texts, strict=True):
            if part and start + len(part) == text.prompt:
                first = min(first, len(part) - 1)
            if part and wanted:
                first = min(first, max(0, text.prompt - wanted - start))
        return max(0, first)

    def _fed(self, b: int, part: list[int], outputs: Outputs, first: int) -> list[Piece]:
        """Account for `part` of prompt b, whose rows from `first` on have outputs; at the end of the prompt commit the first token."""
        text, start = self.texts[b], int(self.cache.lengths[b])
        end = start + len(part)
        following = text.tokens[start + 1 : end + 1]
        pieces = list[Piece]()
        if end == text.prompt:
            y = self.chooser(b, outputs, position=end, first=first)(len(part) - 1, [])
            following.append(y)
            pieces = self.commit(b, list(range(len(part))), [y], fed=True)
        else:
            self.cache.keep(b, np.arange(len(part)))
        if len(part) > first:
            count = len(part) - first
            rows = list(range(count))
            self._update(b, Verified(b, part[first:], rows, rows, following[first:]), outputs)
        return pieces

    def propose(
        self, drafts: Mapping[int, Draft], budget: int, depth: int, *, siblings: bool = True, paused: bool = False, in_turn: bool = False
    ) -> None:
        """Every drafter adds its guesses to the one tree of each sequence; `in_turn` they share the budget, first come first served. Timed."""
        begin, first = perf_counter(), False
        for b, draft in drafts.items():
            text = self.texts[b]
            first = first or len(text.tokens) == text.prompt + 1
            context = self.context(b, budget, depth, siblings, paused)
            for drafter in self.drafters:
                if in_turn:
                    context.budget = budget + 1 - len(draft)
                if context.budget > 0 and context.depth > 0:
                    drafter.propose(context, draft)
        seconds = perf_counter() - begin
        self.stats.draft_seconds += seconds
        self.draft_ms = 0.0 if first else seconds * 1e3

    def _draw(self, text: Text) -> Draw:
        """How plain decoding would choose behind guesses, from somebody else's logits."""
        sampler, place = self.sampler, len(text.tokens)
        if not sampler.needs_logits:
            return likeliest
        seen = set(text.tokens) if sampler.tracks_text else set[int]()
        return lambda logits, path: sampler.choose(logits, text.id, place + len(path), seen.union(path) if seen else ())

    def pack(self, drafts: Mapping[int, Draft]) -> Step:
        """The step of a pass; a sequence without a draft has its last token as the only row."""
        return pack([drafts.get(b) or Draft(text.tokens[-1]) for b, text in enumerate(self.texts)], self.min_rows)

    def forward(self, step: Step, *, prefill: bool = False) -> Outputs:
        """One pass, timed and counted."""
        begin = perf_counter()
        outputs = self.engine.forward(self.cache, step, logits=self.sampler.needs_logits, top_k=self._top_k)
        seconds = perf_counter() - begin
        if prefill:
            self.stats.prefill_passes += 1
            self.stats.prefill_seconds += seconds
        else:
            self.rows, self.pass_ms = step.tokens.shape[1], seconds * 1e3
            self.stats.passes += 1
            self.stats.rows += self.rows
            self.stats.engine_seconds += seconds
        return outputs

    def context(self, b: int, budget: int, depth: int, siblings: bool, paused: bool = False) -> Context:
        """What a drafter may know about sequence b."""
        text, sampling = self.texts[b], self.sampler.sampling
        return Context(
            b,
            text.tokens,
            budget,
            min(depth, text.left - 1),
            drawing=Drawing(sampling, text.id, len(text.tokens), self.rule.tested),
            eos=self.eos,
            siblings=siblings,
            paused=paused,
            longest=text.longest,
            draw=self._draw(text),
            sampled=sampling.temperature > 0.0,
            cache=self.cache,
        )

    def chooser(self, b: int, outputs: Outputs, draft: Draft | None = None, *, position: int | None = None, first: int = 0) -> Choose:
        """How the token after a row of the last pass is chosen; without a `draft` as in plain decoding. `first` is the row of the first output.

        `position` is the absolute position of the token that follows the root: noise and penalties belong to the place in the text.
        """
        text, sampler = self.texts[b], self.sampler
        if not sampler.needs_logits:
            assert outputs.argmax is not None
            argmax = outputs.argmax[b].tolist()  # host sync: the loop needs the ids
            return lambda row, path: int(argmax[row - first])
        assert outputs.logits is not None
        place = len(text.tokens) if position is None else position
        seen = frozenset(text.tokens) if sampler.tracks_text else frozenset[int]()
        target = Target(outputs.logits[b], sampler, text.id, place, seen, first)
        return target.choose if draft is None else self.rule.choices(draft, target)

    def commit(self, b: int, rows: Sequence[int], tokens: Sequence[int], draft: Draft | None = None, *, fed: bool = False) -> list[Piece]:
        """Append `tokens` to text b up to the first that ends it, and keep the rows they came from. One piece."""
        text, new = self.texts[b], list[int]()
        for token in tokens:
            text.tokens.append(token)
            new.append(token)
            if token in self.eos:
                text.finish = "eos"
            elif self.stop is not None and self.stop(text):
                text.finish = "stop"
            elif not text.left:
                text.finish = "length"
            if text.finish:
                break
        kept = rows if fed else rows[: len(new)]
        self.cache.keep(b, np.array(kept, dtype=np.int64))
        if not fed:
            self.stats.accepted[len(new) - 1] += 1
        if draft is not None:
            self._count(draft, kept)
        if text.finish and len(self.texts) > 1:
            self.cache.rollback(b, 0)  # the batch goes on with this row as padding; it shall neither cost attention nor limit the room
        return [Piece(b, new, text.finish)]

    def _count(self, draft: Draft, kept: Sequence[int]) -> None:
        for counter, counted in ((self.stats.drafted_by, range(1, len(draft))), (self.stats.accepted_by, kept[1:])):
            for row in counted:
                for cell in draft.cells[row]:
                    counter[str(cell[0])] += 1

    def teach(self, b: int, draft: Draft, path: Walk, outputs: Outputs) -> None:
        """Show the pass to the drafters: all rows of sequence b, and which were accepted."""
        self._update(b, Verified(b, draft.tokens, draft.depths, path.rows, path.tokens), outputs)

    def _update(self, b: int, verified: Verified, outputs: Outputs) -> None:
        count = len(verified.tokens)
        if outputs.top_ids is not None:
            verified.top_ids = outputs.top_ids[b, :count]
        verified.taps = {name: tap[b, :count] for name, tap in outputs.taps.items()}
        for drafter in self.drafters:
            drafter.update(verified)
