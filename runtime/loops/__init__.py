"""Decoding loops: plain, and draft-and-verify. Both are generators of `Piece`s and share `Run`, so they differ only in the loop itself."""

from __future__ import annotations

from planc.runtime.loops.autoregressive import autoregressive
from planc.runtime.loops.run import Piece, Stats, Text
from planc.runtime.loops.speculative import speculative

__all__ = ["Piece", "Stats", "Text", "autoregressive", "speculative"]
