"""An executable: an engine, its text side and a decode plan, ready to generate.

It holds no text between calls. What it keeps is what makes the next call faster: the cache's memory, what the drafters have learned and what
the controller knows about acceptance; none of that can change a token (drafts are verified).
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from planc.runtime.artifact import Manifest, sha256, write_artifact
from planc.runtime.contract import LEVELS, Contract, Exactness
from planc.runtime.controller import Controller, linear_cost
from planc.runtime.decode import Batching, Decode, Tree
from planc.runtime.drafters import Drafter, Host, Loaded
from planc.runtime.engine import Cache, Engine
from planc.runtime.errors import ArtifactError, InputError
from planc.runtime.loops import Piece, Stats, autoregressive, speculative
from planc.runtime.loops import Text as Sequence_
from planc.runtime.loops.autoregressive import one_token
from planc.runtime.loops.run import CHUNK, Run
from planc.runtime.loops.speculative import one_round
from planc.runtime.prompts import Prompt, read_prompts
from planc.runtime.scheduler import Round, Scheduler
from planc.runtime.text import StreamDecoder, Text
from planc.runtime.trees import Draft

if TYPE_CHECKING:
    from planc.runtime.server import Server

DRAFT_SLOTS = 64  #: cache slots beyond prompt and answer, for rows that are drafted and rejected
CACHE_STEP = 256  #: caches are made in multiples of this many slots, so that the next call can use the last one's memory
BATCH = 8  #: prompts that go through one pass together
SERVED = (
    1024  #: tokens of a sequence of a server, unless told: where memory comes in large pages, all of a cache is taken when it is first used
)
SHARED_CHUNK = 64  #: prompt rows between two tokens of the other answers of a server

FINISH = {"eos": "stop", "stop": "stop_string", "length": "length", "cancelled": "cancelled"}  #: of a loop -> finish_reason


@dataclass(frozen=True)
class GenerationStats:
    """What a generation took. Of prompts that ran as one batch, passes and host time are those of the batch."""

    tokens: int  # new tokens
    seconds: float  # from the first pass to the last token
    ttft_ms: float  # until the first token
    passes: int  # decoding passes
    rows: int  # rows of those passes
    tokens_per_pass: float
    host_ms_per_pass: float  # time outside the engine
    draft_ms_per_pass: float = 0.0  # of it in the drafters, passes of their own included
    purposes: dict[str, int] = field(
        default_factory=dict
    )  # passes by purpose: prefill, plain (no guesses), verify, draft (a drafter's own)
    widths: dict[int, int] = field(default_factory=dict)  # rows of a decoding pass, per sequence -> passes
    accepted: dict[int, int] = field(default_factory=dict)  # accepted guesses in a pass -> passes
    drafted_by: dict[str, int] = field(default_factory=dict)  # drafter -> guesses verified
    accepted_by: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, own: Stats, run: Stats, ttft: float, *, tokens: int | None = None, seconds: float | None = None) -> GenerationStats:
        """Of what the loop counted for an answer (`own`) and for the run it was part of, with the seconds until its first token."""
        return cls(
            tokens=own.tokens if tokens is None else tokens,
            seconds=own.total_seconds if seconds is None else seconds,
            ttft_ms=ttft * 1e3,
            passes=own.passes,
            rows=own.rows,
            tokens_per_pass=own.tokens_per_pass,
            host_ms_per_pass=run.host_seconds * 1e3 / max(1, run.passes),
            draft_ms_per_pass=run.draft_seconds * 1e3 / max(1, run.passes),
            purposes=dict(own.purposes),
            widths=dict(sorted(own.widths.items())),
            accepted=dict(sorted(own.accepted.items())),
            drafted_by=dict(own.drafted_by),
            accepted_by=dict(own.accepted_by),
        )

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed: tokens after the first, by the time after the first."""
        return (self.tokens - 1) / rest if self.tokens > 1 and (rest := self.seconds - self.ttft_ms / 1e3) > 0 else 0.0

    @property
    def end_to_end_tokens_per_s(self) -> float:
        """All new tokens by all the time, prompt included."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Generation:
    """An answer. `text` is without special tokens, the end token and the stop string; `ids` are all new tokens."""

    text: str
    ids: list[int]
    prompt_tokens: int
    finish_reason: str  # stop (an end token), stop_string, length or, of a server, cancelled
    stats: GenerationStats


@dataclass(frozen=True)
class Chunk:
    """What one pass added to one answer."""

    text: str  # what is certain by now; may be empty while a character or stop string is incomplete
    ids: list[int]
    index: int = 0  # prompt of the batch
    accepted: int = 0  # how many of `ids` had been drafted
    sources: tuple[str, ...] = ()  # drafters that guessed them
    finish_reason: str | None = None  # on the last chunk of the answer
    generation: Generation | None = None  # the whole answer, on its last chunk
    pieces: tuple[str, ...] = ()  # `text` by the token of `ids` that made it certain
    draft: Draft | None = None  # the guesses that the pass verified, if any; not of a server
    rows: tuple[int, ...] = ()  # its rows that were committed: the root, then the guesses that are the first of `ids`


@dataclass
class _Lane:
    """What one running call uses alone and hands back for the next one."""

    drafters: list[Drafter]
    controller: Controller
    cache: Cache | None = None


@dataclass
class _Answer:
    """One answer in the making."""

    index: int
    prompt: list[int]
    decoder: StreamDecoder
    ids: list[int] = field(default_factory=list)
    text: str = ""
    fresh: list[str] = field(default_factory=list)  # decoded since the last chunk, by token
    ttft: float = 0.0


def pieces_of(fresh: Sequence[str], count: int, rest: str = "") -> tuple[str, ...]:
    """Text of `count` tokens from what they gave when they were decoded; an end token gave nothing, and `rest` came at the end."""
    pieces = [*fresh, *[""] * (count - len(fresh))]
    return (*pieces[:-1], pieces[-1] + rest) if pieces else (rest,)


class Executable:
    """Generates text; made by `planc.load` and `planc.compile`.

    Args:
        engine: runs passes.
        text: tokenizer and chat template; may hold neither.
        decode: the plan's decode section.
        contract: what was measured; decides the minimum of rows, whether trees are safe, and how much is drafted.
        manifest, directory: the artifact that this came from, if any.
        models: draft models by their folder in the artifact.
    """

    def __init__(
        self,
        engine: Engine,
        text: Text,
        decode: Decode,
        contract: Contract | None = None,
        manifest: Manifest | None = None,
        directory: Path | None = None,
        models: Mapping[str, Loaded] | None = None,
    ) -> None:
        self.engine, self.text, self.decode = engine, text, decode
        self.models = dict(models or {})
        self.contract = contract if contract is not None else manifest.contract if manifest is not None else Contract()
        self.manifest, self.directory = manifest, directory
        self.eos_ids = manifest.eos_ids if manifest is not None and manifest.eos_ids else text.eos_ids
        self.capacity = min(engine.spec.max_length, manifest.signature.capacity if manifest is not None else engine.spec.max_length)
        self._idle: list[_Lane] = []
        self._lock = threading.Lock()

    @property
    def min_rows(self) -> int:
        """Rows that every pass has at least: the plan's number, else what exactness needs, else 1 where nothing is verified."""
        if self.decode.min_rows != "auto":
            return self.decode.min_rows
        return 1 if self.decode.speculative is None and self.decode.batching is None else self.shared_rows

    @property
    def shared_rows(self) -> int:
        """Rows that a pass needs at least for its rows not to depend on each other; the plan's number, if it names more."""
        exactness, planned = self.contract.exactness, self.decode.min_rows
        return max(exactness.min_rows if exactness is not None else 2, 1 if planned == "auto" else planned)

    @property
    def trees_allowed(self) -> bool:
        """Was it measured that siblings in a draft promise no less than chains?"""
        exactness = self.contract.exactness
        return exactness is not None and exactness.trees is not None and LEVELS.index(exactness.trees) <= LEVELS.index(exactness.chains)

    @property
    def batches_allowed(self) -> bool:
        """May prompts share a pass? Not where rows then differ from those of each prompt alone: as was measured, or with too few rows."""
        exactness = self.contract.exactness
        return self.batches_agree and (exactness is None or self.min_rows >= exactness.min_rows)

    @property
    def batches_agree(self) -> bool:
        """Was it measured that sharing a pass of enough rows promises no less than each prompt alone?"""
        exactness = self.contract.exactness
        return exactness is None or (exactness.batch is not None and LEVELS.index(exactness.batch) <= LEVELS.index(exactness.chains))

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        chat: bool | None = None,
    ) -> Generation | list[Generation]:
        """Generate an answer, or a list of them for a list of prompts; what is not given is the plan's.

        A prompt is a string (a user message where the model has a chat template, unless `chat=False`), a list of messages
        `{"role": ..., "content": ...}`, or a list of token ids. In a batch, sampling noise belongs to the prompt's place in the list.
        """
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        sampling |= {"repetition_penalty": repetition_penalty, "seed": seed}
        prompts, single = read_prompts(self.text, prompt, chat)
        chunks = self._stream(prompts, self._settings(max_new_tokens, stop, sampling))
        answers = {chunk.index: chunk.generation for chunk in chunks if chunk.generation is not None}
        return answers[0] if single else [answers[i] for i in range(len(prompts))]

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        chat: bool | None = None,
    ) -> Iterator[Chunk]:
        """The same as `generate`, in chunks as they come. Arguments are checked at once; the work is done while iterating."""
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        sampling |= {"repetition_penalty": repetition_penalty, "seed": seed}
        prompts, _ = read_prompts(self.text, prompt, chat)
        return self._stream(prompts, self._settings(max_new_tokens, stop, sampling))

    def serve(self, max_batch: int | None = None, *, capacity: int | None = None) -> Server:
        """A server that answers many prompts at once: they join and leave the batch while others run.

        `max_batch` sequences share a pass (default: the plan's `batching`, else 4), each with room for `capacity` tokens, prompt included
        (default 1024; at most what the artifact was compiled for). Every answer equals its single run at the same minimum of rows: that of
        `generate`, if the plan drafts or has `batching`.
        """
        from planc.runtime.server import Server

        if self.decode.context is not None:
            raise InputError(
                "input-invalid", "a server does not shorten prompts, as `context` asks", fix="use generate, or remove `context`"
            )
        for name, value in (("max_batch", max_batch), ("capacity", capacity)):
            if value is not None and value < 1:
                raise InputError("input-invalid", f"{name} must be at least 1, not {value}")
        batching = self.decode.batching or Batching()
        if max_batch is not None:
            batching = batching.model_copy(update={"sequences": max_batch, "window": None})
        lane = self._take_lane()
        try:
            scheduler = self._scheduler(lane, batching, min(self.capacity, (capacity or SERVED) + DRAFT_SLOTS))
            return Server(scheduler, self.text, self._settings, lambda: self._return_lane(lane))
        except BaseException:
            self._return_lane(lane)
            raise

    def plain(self) -> Executable:
        """The same without speculation and with the same minimum of rows: the reference for speed and for equal tokens."""
        speculative = None
        if self.engine.spec.guesses and self.decode.speculative is not None:  # the drafters still say what follows a prompt
            speculative = self.decode.speculative.model_copy(update={"tree": Tree(budget=0)})
        decode = self.decode.model_copy(update={"speculative": speculative, "min_rows": self.min_rows})
        return Executable(self.engine, self.text, decode, self.contract, self.manifest, self.directory, self.models)

    def save(self, directory: str | Path) -> Path:
        """Copy the artifact to `directory` in one step; an artifact that is already there is replaced."""
        manifest, source = self.manifest, self.directory
        if manifest is None or source is None:
            raise ArtifactError(
                "artifact-not-found", "this executable was not made from an artifact", fix="save what planc.compile returns"
            )

        def build(target: Path) -> Manifest:
            for name, entry in manifest.files.items():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                try:
                    shutil.copyfile(source / name, target / name)
                except FileNotFoundError as error:
                    raise ArtifactError("artifact-corrupt", f"{name} is missing", where=str(source)) from error
                if sha256(target / name) != entry.sha256:
                    raise ArtifactError("artifact-corrupt", f"{name} has changed since it was loaded", where=str(source))
            return manifest.model_copy(update={"contract": self.contract})

        write_artifact(Path(directory), build)
        return Path(directory)

    def exactness(self, temperature: float | None = None) -> Exactness | None:
        """What was measured of the passes, and what answers at this temperature (default: the plan's) keep of it; None: not measured."""
        exactness = self.contract.exactness
        return exactness if exactness is None or self.decode.same_text(temperature) else exactness.sampled()

    def report(self, temperature: float | None = None) -> dict[str, Any]:
        """What this executable is and promises, as plain data; `exactness` is that of answers at `temperature` (default: the plan's)."""
        exactness = self.exactness(temperature)
        report: dict[str, Any] = {
            "decode": self.decode.model_dump(mode="json"),
            "min_rows": self.min_rows,
            "trees": self.trees_allowed,
            "batches": self.batches_allowed,
            "capacity": self.capacity,
            "exactness": exactness.level if exactness is not None else None,
            "exactness_line": exactness.line() if exactness is not None else "not measured",
            "contract": self.contract.model_dump(mode="json"),
            "draft_models": {
                name: {"same_vocabulary": model.vocabulary is None, "pass_ms": model.pass_ms, "fuzzy": model.fuzzy is not None}
                for name, model in self.models.items()
            },
        }
        if self.manifest is not None:
            files = {name: entry.bytes for name, entry in self.manifest.files.items()}
            report |= {
                "model": self.manifest.model,
                "plan": self.manifest.plan,
                "backend": self.manifest.backend,
                "target": self.manifest.target,
                "fuzzy": self.manifest.extra.get("fuzzy"),  # what a pass of the draft model's fuzzy form costs, and whether it was kept
                "self_skip": self.manifest.extra.get("self_skip"),  # what the search found: sublayers left out, match rate, speed
            }
            report |= {"files": files, "bytes": sum(files.values())}
        with self._lock:
            report["cache_bytes"] = sum(lane.cache.bytes() for lane in self._idle if lane.cache is not None)
        return report

    # ---- one call ----

    def _settings(self, max_new_tokens: int | None, stop: str | Sequence[str] | None, sampling: dict[str, Any]) -> Decode:
        """The plan's decode section with this call's values, checked."""
        given = {name: value for name, value in sampling.items() if value is not None}
        changes: dict[str, Any] = {"sampling": {**self.decode.sampling.model_dump(), **given}}
        if max_new_tokens is not None:
            changes["max_new_tokens"] = max_new_tokens
        if stop is not None:
            changes["stop"] = stop
        plain = {"max_new_tokens": self.decode.max_new_tokens, "stop": self.decode.stop, "min_rows": self.decode.min_rows}
        try:
            checked = Decode.model_validate({**plain, **changes})
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"] if part != "sampling")
            raise InputError("input-invalid", f"{name}: {first['msg']} (got {first['input']!r})") from error
        if checked.stop and self.text.tokenizer is None:
            raise InputError("tokenizer-missing", "stop strings need a tokenizer", fix="leave `stop` out, or compile with a tokenizer")
        return checked.model_copy(update={"speculative": self.decode.speculative, "context": self.decode.context})

    def _stream(self, prompts: list[list[int]], decode: Decode) -> Iterator[Chunk]:
        """Check that every prompt fits, then run them in groups."""
        if decode.context is not None:
            (draft,) = self.models.values()
            prompts = [decode.context.shortened(draft.engine, prompt) for prompt in prompts]
        for prompt in prompts:
            if len(prompt) > self.capacity - self.min_rows:
                raise InputError(
                    "prompt-too-long",
                    f"the prompt has {len(prompt)} tokens, the cache has room for {self.capacity - self.min_rows}",
                    fix="shorten the prompt, or compile with a larger capacity",
                )
        most = self.decode.batching.sequences if self.decode.batching else BATCH
        together = most if self.batches_allowed else 1
        groups = [range(start, min(start + together, len(prompts))) for start in range(0, len(prompts), together)]
        answers = [_Answer(i, prompt, StreamDecoder(self.text, decode.stop)) for i, prompt in enumerate(prompts)]
        return (chunk for group in groups for chunk in self._run([answers[i] for i in group], decode))

    def _run(self, answers: list[_Answer], decode: Decode) -> Iterator[Chunk]:
        """One loop over a group of prompts."""
        by_key = {answer.index: answer for answer in answers}

        def stop(sequence: Sequence_) -> bool:
            answer = by_key[sequence.id]
            answer.fresh.append(answer.decoder.push(sequence.tokens[-1]))
            return answer.decoder.stop is not None

        lane, stats = self._take_lane(), Stats()
        try:
            cache = self._cache(lane, answers, decode)
            for piece in self._loop(lane, cache, answers, decode, stop, stats):
                answer = answers[piece.sequence]
                answer.ttft = answer.ttft or stats.total_seconds
                yield self._chunk(answer, piece, stats)
        finally:
            self._return_lane(lane)

    def _loop(self, lane: _Lane, cache: Cache, answers: list[_Answer], decode: Decode, stop: Any, stats: Stats) -> Iterator[Piece]:
        prompts = [answer.prompt for answer in answers]
        common: dict[str, Any] = {
            "eos": self.eos_ids,
            "min_rows": self.min_rows,
            "ids": [a.index for a in answers],
            "stop": stop,
            "stats": stats,
        }
        if decode.speculative is None:
            return autoregressive(self.engine, cache, prompts, decode, **common)
        exactness = self.contract.exactness
        return speculative(
            self.engine,
            cache,
            prompts,
            lane.drafters,
            lane.controller,
            decode,
            trees_allowed=self.trees_allowed,
            block=exactness.tree_block if exactness is not None else None,
            **common,
        )

    def _chunk(self, answer: _Answer, piece: Piece, stats: Stats) -> Chunk:
        first = not answer.ids
        answer.ids += piece.tokens
        generation = None
        pieces = pieces_of(answer.fresh, len(piece.tokens), answer.decoder.finish() if piece.finish is not None else "")
        text, answer.fresh = "".join(pieces), []
        answer.text += text
        if piece.finish is not None:
            generation = Generation(
                answer.text, answer.ids, len(answer.prompt), FINISH[piece.finish], GenerationStats.of(stats, stats, answer.ttft)
            )
        accepted = 0 if first else len(piece.tokens) - 1
        reason = generation.finish_reason if generation else None
        rows = tuple(piece.rows) if piece.draft is not None else ()
        return Chunk(text, list(piece.tokens), answer.index, accepted, piece.sources, reason, generation, pieces, piece.draft, rows)

    def _scheduler(self, lane: _Lane, batching: Batching, slots: int) -> Scheduler:
        """The plan's loop over a cache of its own, whose sequences come and go."""
        exactness, speculative = self.contract.exactness, self.decode.speculative
        places = batching.sequences if batching.policy == "lengths" else batching.window or 4 * batching.sequences
        cache = self.engine.new_cache(places, slots)
        run = Run(self.engine, cache, [], self.decode, lane.drafters, eos=self.eos_ids, min_rows=self.shared_rows)
        if speculative is None:
            turn: Round = partial(one_token, run)
        else:
            run.require_trees(speculative.tree.shape == "tree")
            trees, block = self.trees_allowed and self.engine.spec.trees, exactness.tree_block if exactness is not None else None
            turn = partial(one_round, run, controller=lane.controller, trees=trees, block=block)
        # a prompt in other pieces than alone: only where passes of any length were seen to agree
        chunk = SHARED_CHUNK if exactness is not None and exactness.chains == "bitwise" else CHUNK
        return Scheduler(run, turn, batching, chunk, alone=not self.batches_agree)

    # ---- what is kept between calls ----

    def _take_lane(self) -> _Lane:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        part = self.decode.speculative
        if part is None:
            return _Lane([], Controller())
        host = Host(self.engine, tuple(self.eos_ids), self.contract.cost, self.min_rows, self.models, self.directory)
        drafters = [drafter.build_for(host) for drafter in part.drafter]
        controller = Controller(part.tree, self.contract.cost or linear_cost, part.controller)
        return _Lane(drafters, controller)

    def _return_lane(self, lane: _Lane) -> None:
        with self._lock:
            self._idle.append(lane)

    def _cache(self, lane: _Lane, answers: list[_Answer], decode: Decode) -> Cache:
        """The lane's empty cache if it has the right shape, else a new one. Sized for the call: memory that is not used is not taken."""
        slots = max(len(answer.prompt) for answer in answers) + decode.max_new_tokens + self.min_rows + DRAFT_SLOTS
        slots = min(self.capacity, -(-slots // CACHE_STEP) * CACHE_STEP)
        cache = lane.cache
        if cache is None or len(cache.lengths) != len(answers) or cache.capacity < slots:
            lane.cache = None  # free the old one before the new one is made
            lane.cache = cache = self.engine.new_cache(len(answers), slots)
        for sequence in range(len(answers)):
            cache.rollback(sequence, 0)
        return cache
