"""What the loops share: texts, prefill, passes, commits and statistics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from planc.runtime.acceptance import Choose, Rule, Target, Transferred, Walk, rule_of
from planc.runtime.decode import Decode
from planc.runtime.drafters import Context, Drafter, Verified
from planc.runtime.drafters.base import Draw, likeliest
from planc.runtime.engine import CHAIN, Cache, Engine, Ints, Outputs, Step
from planc.runtime.errors import InputError
from planc.runtime.sampling import Drawing, Sampler
from planc.runtime.trees import Draft, pack

CHUNK = 256  # prompt rows per prefill pass: large enough for full speed, small enough that no activation dominates the memory
MIN_ROWS = 2  # a one-row pass takes other kernels, whose rounding differs from that of all wider passes


@dataclass(frozen=True, slots=True)
class Piece:
    """Newly committed tokens of one sequence. `finish` is set on its last piece: `eos`, `stop` or `length`.

    `draft` is what the pass verified, if it verified anything, and `rows` are those of its rows that were committed, the root first.
    """

    sequence: int
    tokens: list[int]
    finish: str | None = None
    draft: Draft | None = None
    rows: Sequence[int] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """The drafters whose guesses were accepted."""
        return () if self.draft is None else tuple(dict.fromkeys(name for row in self.rows[1:] for name in self.draft.sources(row)))


Stop = Callable[["Text"], bool]  # asked after every committed token


@dataclass(slots=True)
class Text:
    """One sequence: the committed tokens, prompt included. The last one is pending."""

    id: int
    tokens: list[int]
    prompt: int  # prompt tokens
    longest: int  # most tokens that may be committed
    sampler: Sampler
    stop: Stop | None = None
    finish: str | None = None
    _seen: set[int] = field(default_factory=set)
    _counted: int = 0  # tokens that are in `_seen`

    @property
    def seen(self) -> set[int]:
        """The tokens that occur in it. Kept, so that a round costs its own tokens and not the whole text."""
        self._seen.update(self.tokens[self._counted :])
        self._counted = len(self.tokens)
        return self._seen

    @property
    def left(self) -> int:
        """Tokens that may still be committed."""
        return self.longest - len(self.tokens)


@dataclass(slots=True)
class Stats:
    """What one call of a loop did. Seconds are wall time; a consumer's time between two pieces is not counted."""

    passes: int = 0  # decoding passes
    rows: int = 0  # rows of the decoding passes, per sequence
    # passes by purpose: prefill, plain (no guesses), verify, draft (of the drafters' own models); `passes` is plain and verify
    purposes: Counter[str] = field(default_factory=Counter)
    widths: Counter[int] = field(default_factory=Counter)  # rows of a decoding pass, per sequence -> how often
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
        self.eos = frozenset(eos)
        self.stats = stats if stats is not None else Stats()
        self.acceptance = decode.speculative.acceptance if decode.speculative is not None else "coupled"
        transfer = decode.speculative.transfer if decode.speculative is not None else None
        self._transferred = Transferred(transfer.strength, transfer.floor) if transfer is not None else None
        self.limit = min(cache.capacity, engine.spec.max_length)
        self.rows, self.pass_ms = 0, 0.0  # of the last decoding pass; rows of a sequence, on average where they differ
        # of the drafts for that pass; the first drafts of a text, before which a drafter may read the prompt, count as 0
        self.draft_ms = 0.0
        keys = range(len(prompts)) if ids is None else ids
        self.texts = [
            self.text(prompt, decode, key, stop, f"prompt {b}") for b, (key, prompt) in enumerate(zip(keys, prompts, strict=True))
        ]
        if not prompts:  # all sequences are free: a scheduler puts texts in and takes them out
            self.texts = [Text(0, [0], 0, 0, Sampler(decode.sampling), finish="free") for _ in cache.lengths]
        self._place: dict[int, int] = {}  # sequence -> its place in the outputs of the last pass
        self._rider: int | None = None  # sequence whose prompt the next decoding pass takes along
        self._aboard: tuple[int, list[int], int, Outputs] | None = None  # of the last pass: rider, rows, first with outputs, outputs
        self._top_k = bool(engine.spec.top_k) and any(drafter.top_k for drafter in drafters)
        if len(self.texts) != len(self.cache.lengths):
            raise InputError("input-invalid", f"{len(self.texts)} prompts for a cache of {len(self.cache.lengths)} sequences")
        if any(drafter.top_k for drafter in self.drafters) and not self.engine.spec.top_k:
            message = "a drafter needs top-k ids, and the graph does not return them"
            raise InputError("output-missing", message, fix="compile again with this drafter in the plan")

    def text(self, prompt: Sequence[int], decode: Decode, key: int = 0, stop: Stop | None = None, name: str = "the prompt") -> Text:
        """A text that begins with `prompt`, checked; `key` keys its sampling noise."""
        # a sequence always has room for a pass of `min_rows` rows, so all loops stop at the same token when the cache is full
        longest = self.limit - self.min_rows + 1
        if not prompt:
            raise InputError("prompt-empty", f"{name} has no tokens", fix="start it with the model's begin-of-text token")
        if min(prompt) < 0 or max(prompt) >= self.engine.spec.vocab_size:
            raise InputError("input-invalid", f"{name} has a token outside the vocabulary of {self.engine.spec.vocab_size}")
        if len(prompt) >= longest:
            fix = "shorten the prompt or make the cache larger"
            raise InputError("prompt-too-long", f"{name} has {len(prompt)} tokens, at most {longest - 1} fit", fix=fix)
        most = min(len(prompt) + decode.max_new_tokens, longest)
        return Text(key, list(prompt), len(prompt), most, Sampler(decode.sampling), stop)

    def require_trees(self, wanted: bool) -> None:
        """Refuse a plan that insists on trees when the engine can only run chains, or the rule verify nothing else."""
        if wanted and any(self.rule(b).chains for b in self.live):
            message = "the plan asks for draft trees, and its acceptance rule verifies chains only"
            raise InputError("input-invalid", message, fix="use tree: {shape: chain} or acceptance: recursive")
        if wanted and not self.engine.spec.trees:
            message = "the plan asks for draft trees, and this engine runs chains only"
            raise InputError("input-invalid", message, fix="use tree: {shape: auto}")

    def rule(self, b: int) -> Rule:
        """How drafts of sequence b are accepted; at temperature 0 every lossless rule is greedy matching."""
        if self._transferred is not None:
            return self._transferred
        return rule_of(self.acceptance, self.texts[b].sampler.sampling.temperature)

    @property
    def live(self) -> list[int]:
        """Sequences that are not finished."""
        return [b for b, text in enumerate(self.texts) if text.finish is None]

    def room(self, live: Sequence[int]) -> int:
        """Rows that the next pass of these sequences may have: what fits, and no more than what sees the same as if tokens came one by one."""
        return min(self.limit - int(self.cache.lengths[live].max()), *(self.cache.horizon(b) for b in live))

    def prefill(self) -> Iterator[Piece]:
        """Feed the prompts in chunks of rows and commit the first token of each; every later pass finds it pending."""
        for b in self.live:
            self.begin(b)
        while waiting := [b for b in self.live if self.cache.lengths[b] < self.texts[b].prompt]:
            yield from self.feed(waiting)

    def begin(self, b: int) -> None:
        """Text b is new; what the cache holds of it already is used."""
        self.cache.rollback(b, min(int(self.cache.lengths[b]), self.texts[b].prompt - 1))  # at least one row has to give the first logits
        for drafter in self.drafters:
            drafter.start(b)

    def feed(self, waiting: Sequence[int]) -> Iterator[Piece]:
        """One pass over prompt rows of the sequences `waiting`.

        Right padding: a shorter prompt's spare rows are repeated tokens that are never kept, so no length counts them.
        """
        starts = [int(self.cache.lengths[b]) for b in waiting]
        texts = [self.texts[b] for b in waiting]
        # a pass ends where a prompt ends, so that outputs are needed for its last rows only
        rest = min(text.prompt - start for text, start in zip(texts, starts, strict=True))
        rows = max(self.min_rows, min(self.chunk, self.limit - max(starts), rest))
        parts = [text.tokens[start : min(start + rows, text.prompt)] for text, start in zip(texts, starts, strict=True)]
        tokens = np.array([part + part[-1:] * (rows - len(part)) for part in parts], dtype=np.int64)
        first = self._first_output(parts, starts, texts, rows)
        step = Step(tokens, logits_from=first, sequences=self._sequences(waiting), least=self.min_rows)
        outputs = self.forward(step, prefill=True)
        for b, part in zip(waiting, parts, strict=True):
            yield from self._fed(b, part, outputs, first)
        for b in waiting:
            self._seal(b)

    def carry(self, b: int | None) -> None:
        """The next decoding pass takes up to `chunk` prompt rows of sequence b along, which costs less than a pass of their own.

        Only for ragged engines; `arrive` accounts for the rows. None: nobody rides.
        """
        assert b is None or self.engine.spec.ragged
        self._rider, self._aboard = b, None

    @property
    def shared(self) -> bool:
        """Whether prompt rows rode along with the last pass."""
        return self._aboard is not None

    def arrive(self) -> Iterator[Piece]:
        """What the prompt rows that rode along with the last pass have brought."""
        if self._aboard is not None:
            b, part, first, outputs = self._aboard
            self._aboard = None
            yield from self._fed(b, part, outputs, first)
            self._seal(b)

    def _board(self, step: Step, b: int) -> tuple[Step, list[int], int]:
        """The step with prompt rows of sequence b in it, those rows, and the first of them whose outputs are needed."""
        text, start = self.texts[b], int(self.cache.lengths[b])
        part = text.tokens[start : min(start + self.chunk, text.prompt)]
        first = self._first_output([part], [start], [text], len(part))
        assert step.counts is not None and b not in self._place
        riding, decoding = list(self._place), step.tokens.shape[1]
        width = max(decoding, len(part))
        at = sum(other < b for other in riding)  # sequences of a step ascend
        tokens = np.pad(step.tokens, ((0, 0), (0, width - decoding)), mode="edge")  # [B, R]; padding is left out of the pass
        tokens = np.insert(tokens, at, part + part[-1:] * (width - len(part)), axis=0)
        parents = CHAIN
        if step.parents is not None:
            below = np.arange(decoding - 1, width - 1)
            parents = np.hstack([step.parents, np.broadcast_to(below, (len(riding), width - decoding))])
            parents = np.insert(parents, at, np.arange(-1, width - 1), axis=0)
        counts, firsts = np.insert(step.counts, at, len(part)), np.zeros(len(riding) + 1, dtype=np.int64)
        firsts[at] = first
        return Step(tokens, parents, 0, self._sequences(sorted([*riding, b])), counts, step.least, firsts), part, first

    def _first_output(self, parts: Sequence[Sequence[int]], starts: Sequence[int], texts: Sequence[Text], rows: int) -> int:
        """First row of a prompt pass whose outputs anybody needs; at least two rows' worth, for the reason of `MIN_ROWS`."""
        first = rows - max(MIN_ROWS, self.min_rows)
        wanted = max(self.cache.prompt_rows, *(drafter.prompt_rows for drafter in self.drafters), 0)
        for part, start, text in zip(parts, starts, texts, strict=True):
            if start + len(part) == text.prompt:
                first = min(first, len(part) - 1)
            if wanted:
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
            self._update(b, Verified(b, part[first:], rows, rows, following[first:], past=start, before=first), outputs)
        return pieces

    def _seal(self, b: int) -> None:
        """Tell the cache when prompt b is complete. Where it wants to know what follows, drafts go through the model once and are dropped."""
        text = self.texts[b]
        if text.finish is not None or len(text.tokens) != text.prompt + 1:
            return
        guessed, most = 0, min(self.engine.spec.guesses, self.limit - text.prompt - self.min_rows)
        if most > 0:
            draft = Draft(text.tokens[-1])
            self.propose({b: draft}, most, most, siblings=False)
            chain = draft.take(draft.best_path(draft.reach())[:most])
            self.forward(self.pack({b: chain}), prefill=True)
            guessed = len(chain)
        self.cache.seal(b, guessed)

    def propose(
        self, drafts: Mapping[int, Draft], budget: int, depth: int, *, siblings: bool = True, paused: bool = False, in_turn: bool = False
    ) -> None:
        """Every drafter adds its guesses to the one tree of each sequence; `in_turn` they share the budget, first come first served. Timed."""
        begin, first, passes = perf_counter(), False, self._own_passes()
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
        if passes := self._own_passes() - passes:
            self.stats.purposes["draft"] += passes
        self.draft_ms = 0.0 if first else seconds * 1e3

    def _own_passes(self) -> int:
        """Passes that the drafters have run so far."""
        return sum(getattr(drafter, "passes", 0) for drafter in self.drafters)

    def _draw(self, text: Text) -> Draw:
        """How plain decoding would choose behind guesses, from somebody else's logits."""
        sampler, place = text.sampler, len(text.tokens)
        if not sampler.needs_logits:
            return likeliest
        seen = text.seen if sampler.tracks_text else set[int]()
        return lambda logits, path: sampler.choose(logits, text.id, place + len(path), seen.union(path) if seen else ())

    def pack(self, drafts: Mapping[int, Draft]) -> Step:
        """The step of a decoding pass: the drafts by sequence."""
        return pack(list(drafts.values()), self.min_rows, self._sequences(list(drafts)))

    def pending(self, live: Sequence[int]) -> dict[int, Draft]:
        """Empty drafts: the pending token of each sequence as the only row."""
        return {b: Draft(self.texts[b].tokens[-1]) for b in live}

    def _sequences(self, which: Sequence[int]) -> Ints | None:
        """`Step.sequences`; a pass of all sequences need not name them."""
        self._place = {b: place for place, b in enumerate(which)}
        return None if len(which) == len(self.texts) else np.array(which, dtype=np.int64)

    def forward(self, step: Step, *, prefill: bool = False) -> Outputs:
        """One pass, timed and counted."""
        width, rider, counts = step.tokens.shape[1], None if prefill else self._rider, step.counts
        if rider is not None:
            self._rider = None
            step, part, first = self._board(step, rider)
        logits = any(self.texts[b].sampler.needs_logits or self.rule(b).tested for b in self._place)
        begin = perf_counter()
        outputs = self.engine.forward(self.cache, step, logits=logits, top_k=self._top_k)
        seconds = perf_counter() - begin
        if prefill:
            self.stats.purposes["prefill"] += 1
            self.stats.prefill_seconds += seconds
        else:
            ragged = counts is not None and len(counts) > 1 and self.engine.spec.ragged
            self.rows = -(-int(counts.sum()) // len(counts)) if ragged and counts is not None else width
            self.pass_ms = seconds * 1e3
            self.stats.passes += 1
            self.stats.rows += width
            self.stats.widths[width] += 1
            self.stats.purposes["verify" if counts is not None and counts.max() > 1 else "plain"] += 1
            self.stats.engine_seconds += seconds
        if rider is not None:
            self._aboard = rider, part, first, outputs
        return outputs

    def context(self, b: int, budget: int, depth: int, siblings: bool, paused: bool = False) -> Context:
        """What a drafter may know about sequence b."""
        text, sampling = self.texts[b], self.texts[b].sampler.sampling
        return Context(
            b,
            text.tokens,
            budget,
            min(depth, text.left - 1),
            drawing=Drawing(sampling, text.id, len(text.tokens), self.rule(b).tested),
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
        text, place = self.texts[b], self._place[b]
        sampler = text.sampler
        if not sampler.needs_logits and not (draft is not None and self.rule(b).tested):
            assert outputs.argmax is not None
            argmax = outputs.argmax[place].tolist()  # host sync: the loop needs the ids
            return lambda row, path: int(argmax[row - first])
        assert outputs.logits is not None
        start = len(text.tokens) if position is None else position
        seen = text.seen if sampler.tracks_text else frozenset[int]()
        target = Target(outputs.logits[place], sampler, text.id, start, seen, first)
        return target.choose if draft is None else self.rule(b).choices(draft, target)

    def commit(self, b: int, rows: Sequence[int], tokens: Sequence[int], draft: Draft | None = None, *, fed: bool = False) -> list[Piece]:
        """Append `tokens` to text b up to the first that ends it, and keep the rows they came from. One piece."""
        text, new = self.texts[b], list[int]()
        for token in tokens:
            text.tokens.append(token)
            new.append(token)
            if token in self.eos:
                text.finish = "eos"
            elif text.stop is not None and text.stop(text):
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
            self.cache.rollback(b, 0)  # the batch goes on without this sequence; it shall not limit the room
        return [Piece(b, new, text.finish, draft, kept)]

    def _count(self, draft: Draft, kept: Sequence[int]) -> None:
        for counter, counted in ((self.stats.drafted_by, range(1, len(draft))), (self.stats.accepted_by, kept[1:])):
            for row in counted:
                counter.update(draft.sources(row))

    def teach(self, b: int, draft: Draft, path: Walk, outputs: Outputs, past: int) -> None:
        """Show the pass to the drafters: all rows of sequence b, `past` tokens before them, and which were accepted."""
        self._update(b, Verified(b, draft.tokens, draft.depths, path.rows, path.tokens, past=past), outputs)

    def _update(self, b: int, verified: Verified, outputs: Outputs) -> None:
        count, place = len(verified.tokens), self._place[b]
        if outputs.top_ids is not None:
            verified.top_ids = outputs.top_ids[place, :count]
        if outputs.top_logits is not None:
            verified.top_logits = outputs.top_logits[place, :count]
        verified.taps = {name: tap[place, : verified.before + count] for name, tap in outputs.taps.items()}
        for drafter in self.drafters:
            drafter.update(verified)
