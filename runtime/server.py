"""Many prompts at once: a scheduler in a thread of its own, behind handles that give the answers as they come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from types import TracebackType
from typing import Any, Self

from planc.runtime.decode import Decode
from planc.runtime.errors import InputError
from planc.runtime.executable import FINISH, Chunk, Generation, GenerationStats, pieces_of
from planc.runtime.loops import Stats
from planc.runtime.loops import Text as Sequence_
from planc.runtime.prompts import Prompt, read_prompts
from planc.runtime.scheduler import BatchStats, Event, Job, Scheduler
from planc.runtime.text import StreamDecoder, Text

Settings = Callable[[int | None, str | Sequence[str] | None, dict[str, Any]], Decode]  # max_new_tokens, stop, sampling


class Handle:
    """An answer that a server is making. Iterating gives its chunks, from the first one, as they come; may be used from any thread."""

    def __init__(self, server: Server, decoder: StreamDecoder) -> None:
        self._server, self._decoder = server, decoder
        self._changed = threading.Condition()
        self._chunks = list[Chunk]()
        self._answer: Generation | Exception | None = None
        self._text, self._fresh = "", list[str]()
        self._submitted, self._first = perf_counter(), 0.0
        self._failure: Exception | None = None  # of decoding its text
        self.job: Job

    @property
    def done(self) -> bool:
        """Has it ended?"""
        return self._answer is not None

    def cancel(self) -> None:
        """Stop it. What it has said by then stays its answer, with `finish_reason` "cancelled"."""
        self._server.cancel(self)

    def result(self, timeout: float | None = None) -> Generation:
        """Wait for the whole answer. Raises the error that ended it, or TimeoutError after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"no answer within {timeout} s")
        if isinstance(self._answer, Exception):
            raise self._answer
        assert self._answer is not None
        return self._answer

    def __iter__(self) -> Iterator[Chunk]:
        at = 0
        while fresh := self._after(at):
            yield from fresh
            at += len(fresh)
        self.result()  # raises what ended it

    def _after(self, at: int) -> list[Chunk]:
        """The chunks from number `at` on, at least one; none when there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: self.done or len(self._chunks) > at)
            return self._chunks[at:]

    # the server's side

    def stop(self, text: Sequence_) -> bool:
        """Asked by the loop after every token."""
        try:
            self._fresh.append(self._decoder.push(text.tokens[-1]))
        except Exception as error:  # one answer's text must not end the others
            self._failure = error
        return self._failure is not None or self._decoder.stop is not None

    def take(self, event: Event, host: Stats) -> None:
        """News from the scheduler."""
        now, error = perf_counter() - self._submitted, event.error or self._failure
        with self._changed:
            first = not self._chunks
            if first:
                self._first = now
            ended = event.finish is not None and error is None
            pieces = pieces_of(self._fresh, len(event.tokens), self._decoder.finish() if ended else "")
            text, self._fresh = "".join(pieces), []
            self._text += text
            if error is not None:
                self._answer = error
            elif event.finish is not None:
                self._answer = self._generation(FINISH[event.finish], now, host)
            if event.tokens or isinstance(self._answer, Generation):
                reason = FINISH.get(event.finish) if event.finish else None
                whole = self._answer if isinstance(self._answer, Generation) else None
                accepted = 0 if first else max(0, len(event.tokens) - 1)
                self._chunks.append(Chunk(text, event.tokens, 0, accepted, event.sources, reason, whole, pieces))
            self._changed.notify_all()

    def _generation(self, reason: str, seconds: float, host: Stats) -> Generation:
        text, own = self.job.text, self.job.stats
        stats = GenerationStats.of(own, host, self._first, seconds=seconds)
        return Generation(self._text, text.tokens[text.prompt :], text.prompt, reason, stats)


class Server:
    """Answers many prompts at once; made by `Executable.serve`. Leaving its `with` block waits for the answers, or cancels them after an error."""

    def __init__(self, scheduler: Scheduler, text: Text, settings: Settings, release: Callable[[], None]) -> None:
        """`settings` checks what a request gives (as `generate` does), `release` is called when the last answer is done."""
        self._scheduler, self._text, self._settings, self._release = scheduler, text, settings, release
        self._handles = dict[Job, Handle]()
        self._work = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="planc server", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> BatchStats:
        """How full the passes were so far."""
        return self._scheduler.stats

    def submit(
        self,
        prompt: Prompt,
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
        id: int = 0,  # noqa: A002
    ) -> Handle:
        """Ask for an answer; returns at once, from any thread. Arguments as for `generate`, and checked here.

        Sampling noise belongs to `seed` and `id` and to nothing else: the answer is that of `generate` with the same arguments, whatever
        else is being answered; give several answers to one prompt different ids.
        """
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        decode = self._settings(max_new_tokens, stop, {**sampling, "repetition_penalty": repetition_penalty, "seed": seed})
        prompts, single = read_prompts(self._text, prompt, chat)
        if not single:
            raise InputError("input-invalid", "a request has one prompt, not a list of them", fix="submit each prompt")
        if not 0 <= id < 2**64:
            raise InputError("input-invalid", f"an id is a number from 0 to 2**64 - 1, not {id}")
        handle = Handle(self, StreamDecoder(self._text, decode.stop))
        handle.job = Job(self._scheduler.run.text(prompts[0], decode, id, handle.stop))
        with self._work:
            if self._closed:
                raise InputError("server-closed", "the server takes no more prompts", fix="submit inside its `with` block")
            self._handles[handle.job] = handle
            self._scheduler.submit(handle.job)
            self._work.notify_all()
        return handle

    def cancel(self, handle: Handle) -> None:
        """See `Handle.cancel`."""
        self._scheduler.cancel(handle.job)

    def close(self, *, cancel: bool = False) -> None:
        """Take no more prompts, answer those that are there (or cancel them), and hand the memory back."""
        with self._work:
            self._closed = True
            for handle in self._handles.values() if cancel else ():
                self.cancel(handle)
            self._work.notify_all()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(cancel=kind is not None)

    def _loop(self) -> None:
        try:
            while True:
                with self._work:
                    self._work.wait_for(lambda: self._closed or not self._scheduler.idle)
                    if self._scheduler.idle:
                        return
                self._deliver(self._scheduler.turn())
        except Exception as error:  # a fault of ours: nobody may wait for ever
            with self._work:
                self._closed = True
            self._deliver(self._scheduler.fail(error))
        finally:
            self._release()

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            handle = self._handles[event.job]
            if event.finish is not None:
                with self._work:
                    del self._handles[event.job]
            handle.take(event, self._scheduler.run.stats)
