"""Continuous batching: sequences join and leave a running batch (papers/41, and A0 section 9).

Above the loops: a turn is one pass of the loop over the running sequences, and prompt rows of a new one in it or before it. Every sequence
has its own length in the cache, so nothing is ever moved or padded to align sequences; its text is the one that it has alone, because a row's
result does not depend on the others of its pass and noise belongs to the sequence's own key.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from time import perf_counter

from planc.runtime.decode import Batching
from planc.runtime.loops.run import CHUNK, Piece, Run, Stats, Text

Round = Callable[[Sequence[int]], Iterator[Piece]]  # one pass of a loop over some sequences of a run


@dataclass(eq=False, slots=True)
class Job:
    """One text on its way through the scheduler."""

    text: Text
    cancelled: bool = False
    waited: int = 0  # decoding passes in a row that left it out
    stats: Stats = field(default_factory=Stats)  # its own passes, rows and guesses; seconds are the scheduler's


@dataclass(frozen=True, slots=True)
class Event:
    """News of one job: new tokens, the end, or an error, which is an end too. `sources` are the drafters whose guesses were accepted."""

    job: Job
    tokens: list[int]
    finish: str | None = None  # eos, stop, length, cancelled or error
    error: Exception | None = None
    sources: tuple[str, ...] = ()


@dataclass(slots=True)
class BatchStats:
    """How full the decoding passes were."""

    passes: int = 0
    sequences: int = 0  # of all passes
    grouped: int = 0  # those of them that shared their pass

    @property
    def mean(self) -> float:
        """Sequences of a pass, on average."""
        return self.sequences / self.passes if self.passes else 0.0


class Scheduler:
    """Runs jobs in the places of one cache.

    `submit` and `cancel` may be called from any thread, `turn` from one. `run` was made without prompts; `decode` is one pass of its loop.
    While sequences run, a prompt is fed at most `chunk` rows at a time, so that they never wait longer than that for their next token: in the
    decoding passes themselves where the engine leaves padding out, else in passes between them.
    `alone`: no two share a pass, because that was measured to change results; they take turns.
    """

    def __init__(self, run: Run, decode: Round, batching: Batching, chunk: int = CHUNK, alone: bool = False) -> None:
        self.run, self.decode, self.batching, self.alone = run, decode, batching, alone
        self.chunk = max(chunk, run.min_rows)
        self.stats = BatchStats()
        self.places: list[Job | None] = [None] * len(run.texts)
        self._waiting = deque[Job]()
        self._unfed = list[int]()  # places whose prompt is not in the cache yet, oldest first
        self._lock = threading.Lock()

    def submit(self, job: Job) -> None:
        """Take a job in; it starts when a place is free, first come first served."""
        with self._lock:
            self._waiting.append(job)

    def cancel(self, job: Job) -> None:
        """End a job at the next turn, if it has not ended by then."""
        job.cancelled = True

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return not self._waiting and not any(self.places)

    def turn(self) -> list[Event]:
        """Let go of what was cancelled, admit, feed one prompt some rows, decode once; empty when there was nothing to do or to tell."""
        begin = perf_counter()
        events = self._release()
        self._admit()
        running = [b for b, job in enumerate(self.places) if job and len(job.text.tokens) > job.text.prompt]
        riding = self._riding(running)
        if self._unfed and riding is None:  # the oldest prompt first, so that its answer begins as early as it can
            self.run.chunk = self.chunk if running else max(CHUNK, self.run.min_rows)
            events += self._pass([self._unfed[0]], self.run.feed)
        if running:
            group = self._group(running)
            if riding is not None:
                self.run.chunk = self.chunk
                self.run.carry(riding)
            events += self._pass(group, self.decode, riding)
            self.stats.passes += 1
            self.stats.sequences += len(group)
            self.stats.grouped += len(group) if len(group) > 1 else 0
            for b in running:
                if (job := self.places[b]) is not None:
                    job.waited = 0 if b in group else job.waited + 1
        self._unfed = [b for b in self._unfed if (job := self.places[b]) and len(job.text.tokens) == job.text.prompt]
        self.run.stats.total_seconds += perf_counter() - begin
        return events

    def _riding(self, running: list[int]) -> int | None:
        """The sequence whose prompt rows share the decoding pass of those that run: the oldest, where sequences share passes at all."""
        shares = self.run.engine.spec.ragged and not self.alone and self.batching.policy == "lengths"
        return self._unfed[0] if self._unfed and running and shares else None

    def fail(self, error: Exception) -> list[Event]:
        """End everything with an error."""
        with self._lock:
            jobs, self._waiting = [*self._waiting], deque()
        return [Event(job, [], "error", error) for job in jobs] + [self._end(b, "error", error) for b, job in enumerate(self.places) if job]

    def _release(self) -> list[Event]:
        events = [self._end(b, "cancelled") for b, job in enumerate(self.places) if job and job.cancelled]
        with self._lock:
            gone = [job for job in self._waiting if job.cancelled]
            self._waiting = deque(job for job in self._waiting if not job.cancelled)
        return events + [Event(job, [], "cancelled") for job in gone]

    def _admit(self) -> None:
        for b, taken in enumerate(self.places):
            if taken is None:
                with self._lock:
                    job = self._waiting.popleft() if self._waiting else None
                if job is None:
                    return
                self.places[b] = job
                self.run.texts[b] = job.text
                self.run.cache.rollback(b, 0)
                self.run.begin(b)
                self._unfed.append(b)

    def _group(self, running: list[int]) -> list[int]:
        """The sequences of the next pass."""
        waited = {b: job.waited for b in running if (job := self.places[b])}
        if self.alone:
            return [max(running, key=lambda b: waited[b])]
        if self.batching.policy == "lengths":
            return running
        lengths = {b: int(self.run.cache.lengths[b]) for b in running}
        return regroup(lengths, waited, self.batching.sequences, self.batching.patience)

    def _pass(self, group: list[int], work: Round, riding: int | None = None) -> list[Event]:
        """One pass; an error in it ends the jobs that took part, and only those. The prompt of `riding` rides along."""
        stats, events = self.run.stats, list[Event]()
        passes, rows, jobs = stats.passes, stats.rows, [job for b in group if (job := self.places[b])]
        purposes, widths = stats.purposes.copy(), stats.widths.copy()
        before = stats.drafted_by.copy(), stats.accepted_by.copy()
        try:
            for piece in chain(work(group), self.run.arrive()):
                job = self.places[piece.sequence]
                assert job is not None
                drafted, accepted = stats.drafted_by - before[0], stats.accepted_by - before[1]
                before = stats.drafted_by.copy(), stats.accepted_by.copy()
                if piece.sequence == riding:  # prompt rows are no decoding pass of its own
                    self._count(job, piece, 0, 0, drafted, accepted)
                else:
                    self._count(job, piece, stats.passes - passes, stats.rows - rows, drafted, accepted)
                events.append(Event(job, piece.tokens, piece.finish, sources=tuple(accepted)))
                if piece.finish:
                    self._leave(piece.sequence)
        except Exception as error:  # whatever the engine raises
            self.run.carry(None)
            took_part = group if riding is None else [*group, riding]
            events += [self._end(b, "error", error) for b in took_part if self.places[b] is not None]
        for job in jobs:  # a pass counts for everyone in it
            job.stats.purposes.update(stats.purposes - purposes)
            job.stats.widths.update(stats.widths - widths)
        return events

    def _count(self, job: Job, piece: Piece, passes: int, rows: int, drafted: Counter[str], accepted: Counter[str]) -> None:
        own = job.stats
        own.passes += passes
        own.rows += rows
        own.tokens += len(piece.tokens)
        if passes:
            own.accepted[len(piece.tokens) - 1] += 1
        own.drafted_by.update(drafted)
        own.accepted_by.update(accepted)

    def _end(self, b: int, finish: str, error: Exception | None = None) -> Event:
        job = self.places[b]
        assert job is not None
        job.text.finish = finish
        self._leave(b)
        return Event(job, [], finish, error)

    def _leave(self, b: int) -> None:
        self.places[b] = None
        self._unfed = [place for place in self._unfed if place != b]
        self.run.cache.rollback(b, 0)


def regroup(lengths: dict[int, int], waited: dict[int, int], most: int, patience: int) -> list[int]:
    """Sequences of equal cached length for an engine with one past length: the schedule of EXSPEC without its realignment.

    The largest group goes first, of equal ones the shortest sequences, which can catch up with others; but a sequence that was left out
    `patience` times takes its group along.
    """
    groups = defaultdict[int, list[int]](list)
    for b, length in lengths.items():
        groups[length].append(b)
    hungry = max(lengths, key=lambda b: waited[b])
    if waited[hungry] >= patience:
        group = groups[lengths[hungry]]
    else:
        group = max(groups.values(), key=lambda group: (min(len(group), most), -lengths[group[0]]))
    return sorted(sorted(group, key=lambda b: -waited[b])[:most])
