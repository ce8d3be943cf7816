"""H2: which slots are run through the network again. The strongest plain caches, against which others are to be compared."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from planc.runtime.engine import Ints
from planc.runtime.masked.canvas import Canvas, Slots
from planc.runtime.masked.hooks import Ask, CacheHook


def everything(canvas: Canvas) -> Slots:
    """All slots that exist."""
    return np.arange(canvas.length)


class Uncached(CacheHook):
    """No cache: every pass runs all slots, which is exact."""

    def query(self, canvas: Canvas) -> Ask:
        return Ask(everything(canvas), "full", cached=False)


class Prefix(CacheHook):
    """All slots when a block begins, then the block and what follows, with cached keys and values of what lies before (Fast-dLLM)."""

    def start(self, canvas: Canvas) -> _SinceBlockBegan:
        return _SinceBlockBegan(suffix=True)


class Dual(CacheHook):
    """All slots when a block begins, then the block alone, with cached keys and values of what lies before and after (Fast-dLLM)."""

    def start(self, canvas: Canvas) -> _SinceBlockBegan:
        return _SinceBlockBegan(suffix=False)


class _SinceBlockBegan:
    """A cache filled when the row's block began."""

    def __init__(self, suffix: bool) -> None:
        self.suffix, self._start = suffix, -1

    def query(self, canvas: Canvas) -> Ask:
        if canvas.start != self._start:
            self._start = canvas.start
            return Ask(everything(canvas), "fill")
        return Ask(np.arange(canvas.start, canvas.length if self.suffix else canvas.stop), "suffix" if self.suffix else "block")


class BlockCausal(CacheHook):
    """For models trained so that a block sees itself and what lies before: that is cached exactly, and a pass runs one block."""

    size: int = Field(32, ge=1, description="slots of a block, as in the window `blocks`")

    def segments(self, canvas: Canvas) -> Ints:
        """0 for the prompt, then a number for every block."""
        at = np.arange(len(canvas.tokens)) - canvas.prompt
        return np.where(at < 0, 0, 1 + at // self.size)

    def start(self, canvas: Canvas) -> _Finished:
        return _Finished()


class _Finished:
    """Up to where a row's keys and values are final. The slots that the last passes left are run along with the next block."""

    def __init__(self) -> None:
        self._final = 0

    def query(self, canvas: Canvas) -> Ask:
        ask = Ask(np.arange(self._final, canvas.stop), "block")
        self._final = canvas.start
        return ask
