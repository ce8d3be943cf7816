"""Next-scale image models (VAR): maps of growing size, each the residual of the picture so far. Windows, caches and inputs by scale.

A canvas holds a class in front and the codes of all scales behind each other. What a slot reads is not what was decided there but the picture so far,
averaged to the size of its scale and rounded to one of `levels` tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr

from planc.runtime.engine import Ints
from planc.runtime.masked.canvas import Canvas, Mask
from planc.runtime.masked.hooks import Ask, CacheHook, InputsHook, ModelHook, Shape, WindowHook, refuse
from planc.runtime.masked.learned_filter import read_tensors

RANGE = 1.5  # what averages are rounded in: -RANGE .. RANGE
Pictures = NDArray[np.float32]  # [..., side, side]
Sizes = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1, description="sides of the maps, rising")]


def pooled(pictures: Pictures, size: int) -> Pictures:
    """Averages over size x size cells."""
    *batch, side, _ = pictures.shape
    cell = side // size
    return np.asarray(pictures.reshape(*batch, size, cell, size, cell).mean((-3, -1)), dtype=np.float32)


def spread(values: Pictures, side: int) -> Pictures:
    """Every value repeated over its cell."""
    cell = side // values.shape[-1]
    return np.asarray(values.repeat(cell, -2).repeat(cell, -1), dtype=np.float32)


def levels_of(values: Pictures, levels: int) -> Ints:
    """Numbers of the levels that values are rounded to."""
    return np.clip(np.round((values + RANGE) / (2 * RANGE) * (levels - 1)), 0, levels - 1).astype(np.int64)


def bounds(sizes: tuple[int, ...]) -> Ints:
    """First slot of every scale, and the end."""
    return np.concatenate([[0], np.cumsum([s * s for s in sizes])]).astype(np.int64)


class Scales(WindowHook):
    """Maps of growing size, each filled as a whole."""

    sizes: Sizes

    def blocks(self, field: int) -> int:
        return len(self.sizes)

    def check(self, shape: Shape) -> None:
        if shape.field != sum(s * s for s in self.sizes):
            raise refuse(
                f"maps of {list(self.sizes)} have {sum(s * s for s in self.sizes)} slots, the field {shape.field}",
                "set max_new_tokens to that",
            )

    def number(self, canvas: Canvas) -> int:
        left = np.flatnonzero(canvas.masked)
        return int(np.searchsorted(bounds(self.sizes) + canvas.prompt, left[0], side="right")) - 1 if len(left) else len(self.sizes) - 1

    def place(self, canvas: Canvas) -> tuple[int, int, Mask]:
        edges, scale = bounds(self.sizes) + canvas.prompt, self.number(canvas)
        at = np.arange(len(canvas.tokens))
        return int(edges[scale]), int(edges[scale + 1]), (at >= edges[scale]) & (at < edges[scale + 1])


class ScaleCausal(CacheHook):
    """A scale sees itself and the smaller ones, whose keys and values are final: a pass runs one scale."""

    sizes: Sizes

    def segments(self, canvas: Canvas) -> Ints:
        edges = bounds(self.sizes) + canvas.prompt
        return np.searchsorted(edges, np.arange(len(canvas.tokens)), side="right")

    def start(self, canvas: Canvas) -> _Seen:
        return _Seen()


class _Seen:
    """Up to where a row has been run."""

    def __init__(self) -> None:
        self._end = 0

    def query(self, canvas: Canvas) -> Ask:
        ask = Ask(np.arange(self._end, canvas.stop), "scale" if self._end else "prefill")
        self._end = canvas.stop
        return ask


class NextScale(InputsHook):
    """A slot reads the picture so far at its scale; `file` holds the numbers that codes stand for, `codebooks` [scales, codes]."""

    sizes: Sizes
    file: str = Field(description="safetensors file of the codebooks")
    levels: int = Field(64, ge=2, description="tokens behind the codes that averages are rounded to")
    _books: NDArray[np.float32] | None = PrivateAttr(None)

    def bind(self, folder: Path) -> Self:
        """The part with its codebooks, read from `folder`."""
        bound = self.model_copy()
        bound._books = read_tensors(folder / self.file, ("codebooks",), "codebook", "name the file that was made with the model")[0]
        if len(bound._books) != len(self.sizes):
            raise refuse(f"{len(self.sizes)} maps and {len(bound._books)} codebooks", "give one codebook for every map")
        return bound

    def tokens(self, canvas: Canvas) -> Ints:
        """[S] what the slots read; scales that cannot be known yet read nothing that is used."""
        assert self._books is not None, "bind before use"
        read, made, codes = canvas.tokens.copy(), self._blank(), self._books.shape[1]
        for scale, (first, last) in enumerate(self._slots(canvas)):
            size = self.sizes[scale]
            read[first:last] = codes + levels_of(pooled(made, size), self.levels).reshape(-1)
            if canvas.masked[first:last].any():
                read[last:] = codes
                break
            made = made + self._map(canvas, scale, first, last)
        return read

    def picture(self, canvas: Canvas) -> Pictures:
        """[side, side] the picture of all scales that are decided."""
        made = self._blank()
        for scale, (first, last) in enumerate(self._slots(canvas)):
            if not canvas.masked[first:last].any():
                made = made + self._map(canvas, scale, first, last)
        return made

    def _blank(self) -> Pictures:
        return np.zeros((self.sizes[-1], self.sizes[-1]), np.float32)

    def _slots(self, canvas: Canvas) -> list[tuple[int, int]]:
        edges = bounds(self.sizes) + canvas.prompt
        return [(int(a), int(b)) for a, b in zip(edges, edges[1:], strict=False)]

    def _map(self, canvas: Canvas, scale: int, first: int, last: int) -> Pictures:
        assert self._books is not None
        size, codes = self.sizes[scale], np.minimum(canvas.tokens[first:last], self._books.shape[1] - 1)
        return spread(self._books[scale][codes].reshape(size, size), self.sizes[-1])


class Switch(ModelHook):
    """A large model for the first `at` windows, the small one for the rest, which first reads what was decided (CoDe, papers/74)."""

    at: int = Field(ge=0, description="windows of the first model")

    def pick(self, canvas: Canvas, window: int) -> int:
        return int(window >= self.at)
