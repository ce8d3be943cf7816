"""The hooks of the loop (papers/A2): what a policy may decide. Each is a kind of plan part; a paper fills one or two of them.

Policies read a `Canvas` and decide. They never write it: the loop checks what they decided, writes, and counts. `start` is called once per row, so
that what a policy remembers of a row never meets another row or another request; a policy that remembers nothing is its own `start`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from planc.runtime.engine import Floats, Ints
from planc.runtime.errors import PlanError
from planc.runtime.masked.canvas import Canvas, Mask, Slots
from planc.runtime.masked.engine import Probe, Reply
from planc.runtime.registry import PlanPart


@dataclass(frozen=True)
class Shape:
    """What is to be filled, as far as a plan or a call says: checked before anything runs."""

    field: int  # slots to fill
    blocks: int = 1  # windows that are finished one after the other


@dataclass(frozen=True)
class ByLayer:
    """The pass goes layer by layer, and `check` may have one and the layers behind it run for all slots."""

    watched: Ints  # [L] slot whose attention each layer reports
    window: Mask  # [S] slots whose attention is summed
    check: Callable[[int, Probe], bool]


@dataclass(frozen=True)
class Ask:
    """Slots for the next pass. `cached` False: all of them, and the cache is left alone."""

    slots: Slots
    mode: str  # for the books
    cached: bool = True
    layers: ByLayer | None = None


class Hook(PlanPart):
    """Base of all of them."""

    def check(self, shape: Shape) -> None:
        """Refuse, with PlanError[plan-conflict], what cannot be filled this way."""

    def start(self, canvas: Canvas) -> Any:
        """The policy for one row."""
        return self

    def bind(self, folder: Path) -> Self:
        """The part with what it reads from files, whose names (`file`) count from `folder`."""
        return self


class WindowHook(Hook):
    """H1: which slots may be committed now."""

    kind: ClassVar[str] = "window"

    def blocks(self, field: int) -> int:
        """Windows that are finished one after the other."""
        return 1

    def place(self, canvas: Canvas) -> tuple[int, int, Mask]:
        """First slot, end and mask [S] of the window; it holds a masked slot wherever the canvas does."""
        raise NotImplementedError

    def number(self, canvas: Canvas) -> int:
        """Which of the windows is open, counted from 0."""
        return 0


class CacheHook(Hook):
    """H2 and H3: which slots go through the network, and which keys and values stay as they are."""

    kind: ClassVar[str] = "slot_cache"
    by_layer: ClassVar[bool] = False  # whether the layers have to be lowered one by one

    def segments(self, canvas: Canvas) -> Ints:
        """[S] who sees whom, see `Query`; 0 everywhere is attention in both directions."""
        return np.zeros(len(canvas.tokens), dtype=np.int64)

    def query(self, canvas: Canvas) -> Ask:
        """The next pass; it has to hold the open slots of the window."""
        raise NotImplementedError


class FusionHook(Hook):
    """H4: what is done to logits before a token is proposed."""

    kind: ClassVar[str] = "fusion"
    width: ClassVar[int] = 0

    @property
    def tracked(self) -> int:
        """Tokens per slot whose logits are needed besides the best."""
        return 0

    def track(self, canvas: Canvas, slots: Slots) -> Ints:
        """[Q, K] those tokens."""
        raise NotImplementedError

    def fuse(self, canvas: Canvas, slots: Slots, reply: Reply) -> Reply:
        """What the model says about `slots`, changed."""
        raise NotImplementedError


class SelectHook(Hook):
    """H6: which open slots are committed."""

    kind: ClassVar[str] = "selection"

    def select(self, canvas: Canvas, slots: Slots, confidence: Floats) -> Mask:
        """[n] for the open slots of the window, ascending, and their confidence. Where nothing is chosen the loop commits the surest."""
        raise NotImplementedError

    def reserve(self, canvas: Canvas) -> Slots:
        """Slots that the next steps will commit, in order, asked after a write: until they are, the window holds nothing else."""
        return np.zeros(0, dtype=np.int64)

    def insist(self, canvas: Canvas, slots: Slots) -> Ints | None:
        """Tokens to write in place of what the model proposes for these slots: for rules that know better, such as an oracle."""
        return None


class StopHook(Hook):
    """H7: when everything that is left is filled at once."""

    kind: ClassVar[str] = "stop_rule"

    def region(self, canvas: Canvas) -> Slots:
        """Slots that every query has to hold for this."""
        return np.zeros(0, dtype=np.int64)

    def all_in(self, canvas: Canvas) -> bool:
        """Asked after a pass and before anything is committed."""
        raise NotImplementedError


class ReviseHook(Hook):
    """H9: which decisions are taken back."""

    kind: ClassVar[str] = "revision"

    def budget(self, field: int) -> int:
        """Most slots that it takes back in all."""
        raise NotImplementedError

    def remask(self, canvas: Canvas) -> Slots:
        """Slots of the window to mask again, asked after the writes of a step."""
        raise NotImplementedError


class EndHook(Hook):
    """H10: what an end token means for what is left."""

    kind: ClassVar[str] = "ending"

    def cut(self, canvas: Canvas) -> int | None:
        """New length of the canvas, or None."""
        return None

    def fill(self, canvas: Canvas) -> int | None:
        """Token that fills everything that is left, or None."""
        return None


class InputsHook(Hook):
    """H2: what slots read, where that is not what was decided there."""

    kind: ClassVar[str] = "inputs"

    def tokens(self, canvas: Canvas) -> Ints:
        """[S] token ids for the network."""
        raise NotImplementedError


class ModelHook(Hook):
    """H12: which model runs a window. A model that takes over has an empty cache, and reads first what was decided."""

    kind: ClassVar[str] = "model_choice"

    def pick(self, canvas: Canvas, window: int) -> int:
        """Number of the model for the window with this number, counted from 0."""
        raise NotImplementedError


def refuse(message: str, fix: str) -> PlanError:
    """What cannot be filled this way."""
    return PlanError("plan-conflict", message, fix=fix)
