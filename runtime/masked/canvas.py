"""One row that is being filled: what is decided, what the model last said of every slot, what it has cost. Policies read it; the loop writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from planc.runtime.engine import Floats, Ints
from planc.runtime.errors import InputError
from planc.runtime.masked.engine import HIDDEN, Reply

Slots = NDArray[np.int64]  # slot numbers, ascending
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Commit:
    """Slots written in one step. Reasons: `chosen` (by the selection), `progress` (nothing was), `all_in`, `forced`, `ended`."""

    step: int
    slots: tuple[int, ...]
    tokens: tuple[int, ...]
    confidence: tuple[float, ...]
    reason: str = "chosen"


@dataclass
class Cost:
    """What a row has cost, padding not counted."""

    passes: int = 0
    token_layers: int = 0  # slots that went through a layer, over all layers
    attention_pairs: int = 0  # (query slot, key slot) pairs, over all layers
    multiplications: int = 0  # of slots with the weights of layers, so that models of different sizes can be compared
    kv_bytes: int = 0  # written
    refreshed_layers: int = 0  # layers that ran for all slots because one was found stale
    modes: Counter[str] = field(default_factory=Counter)  # what kind of pass -> how often

    def add(self, other: Cost) -> None:
        """Count the costs of another row too."""
        self.passes += other.passes
        self.token_layers += other.token_layers
        self.attention_pairs += other.attention_pairs
        self.multiplications += other.multiplications
        self.kv_bytes += other.kv_bytes
        self.refreshed_layers += other.refreshed_layers
        self.modes.update(other.modes)


class Canvas:
    """S slots: a prompt and `length - prompt` slots to fill.

    Args:
        prompt: committed tokens.
        field: slots to fill.
        mask_id: stands in slots that are not decided.
        ends: tokens after which a text is over.
        forced: offset in the field -> token that stands there whatever happens.
        seed, key: of the row's own stream of random numbers.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        field: int,
        mask_id: int,
        *,
        ends: Collection[int] = (),
        forced: Mapping[int, int] | None = None,
        seed: int = 0,
        key: int = 0,
    ) -> None:
        self.prompt, self.field, self.mask_id, self.ends, self.key = len(prompt), field, mask_id, frozenset(ends), key
        slots = len(prompt) + field
        self.tokens: Ints = np.array([*prompt, *[mask_id] * field], dtype=np.int64)
        self.locked: Mask = np.arange(slots) < len(prompt)
        self.segments: Ints = np.zeros(slots, dtype=np.int64)
        self.length = slots  # slots that still exist
        self.start, self.stop = len(prompt), slots  # of the block that is being filled
        self.window: Mask = ~self.locked  # slots that may be committed in this step, if they are masked
        self.x0: Ints = np.full(slots, mask_id, dtype=np.int64)  # the model's last proposal ...
        self.confidence: Floats = np.zeros(slots, dtype=np.float32)
        self.gap: Floats = np.zeros(slots, dtype=np.float32)  # ... and its raw top-2 gap
        self.asked: Ints = np.full(slots, -1, dtype=np.int64)  # step of that proposal; -1: never
        self.commit_step: Ints = np.full(slots, -1, dtype=np.int64)
        self.commit_confidence: Floats = np.zeros(slots, dtype=np.float32)
        self.changed: set[int] = set()  # slots written since they were last run through the network
        self.reserved: Slots = np.zeros(0, dtype=np.int64)  # slots that the selection will commit in the next steps, in this order
        self.step = 0  # passes so far
        self.remasked = 0
        self.done = False
        self.finish = ""
        self.cost = Cost()
        self.trace: list[Commit] = []
        self.reply: Reply | None = None  # of this step, about `self.queried`
        self.queried: Slots = np.zeros(0, dtype=np.int64)
        self.rng = np.random.Generator(np.random.Philox(key=np.array([seed, key], dtype=np.uint64)))
        for offset, token in (forced or {}).items():
            if not 0 <= offset < field or token == mask_id:
                message = f"a token is forced at offset {offset} of a field of {field}" if token != mask_id else "the mask token is forced"
                raise InputError("input-invalid", message, fix="force ordinary tokens at offsets inside the field")
            self.tokens[self.prompt + offset], self.locked[self.prompt + offset] = token, True
            self.trace.append(Commit(0, (self.prompt + offset,), (token,), (1.0,), "forced"))

    @property
    def masked(self) -> Mask:
        """[S] slots that are not decided."""
        return np.asarray((self.tokens == self.mask_id) & (np.arange(len(self.tokens)) < self.length))

    @property
    def open(self) -> Slots:
        """Masked slots of the window."""
        return np.flatnonzero(self.masked & self.window)

    @property
    def visible(self) -> Ints:
        """[S] segments, with the slots that were cut off hidden."""
        return np.where(np.arange(len(self.tokens)) < self.length, self.segments, HIDDEN)

    @property
    def committed(self) -> float:
        """Share of the field that is decided."""
        return 1.0 - float(self.masked.sum()) / max(1, self.length - self.prompt)

    def write(self, slots: Slots, reason: str) -> Commit:
        """Decide slots by their proposals."""
        assert self.masked[slots].all() and not self.locked[slots].any(), "only masked, unlocked slots are written"
        tokens, sure = self.x0[slots], self.confidence[slots]
        assert not (tokens == self.mask_id).any(), "the mask token was proposed"
        self.tokens[slots] = tokens
        self.commit_step[slots], self.commit_confidence[slots] = self.step, sure
        self.changed.update(map(int, slots))
        commit = Commit(self.step, tuple(map(int, slots)), tuple(map(int, tokens)), tuple(map(float, sure)), reason)
        self.trace.append(commit)
        return commit

    def remask(self, slots: Slots) -> None:
        """Take decisions back."""
        assert not self.locked[slots].any(), "locked slots stay"
        self.tokens[slots] = self.mask_id
        self.commit_step[slots] = -1
        self.changed.update(map(int, slots))
        self.remasked += len(slots)

    def cut(self, length: int) -> None:
        """Slots from `length` on do not exist any more."""
        assert self.prompt < length <= self.length
        self.length = length
        self.stop = min(self.stop, length)

    def fill_rest(self, token: int) -> None:
        """Every slot that is not decided becomes `token`."""
        rest = np.flatnonzero(self.masked)
        if len(rest):
            self.x0[rest], self.confidence[rest] = token, 1.0
            self.write(rest, "ended")

    @property
    def ids(self) -> list[int]:
        """The field up to and with its first end token."""
        found = [int(t) for t in self.tokens[self.prompt : self.length]]
        at = next((i for i, token in enumerate(found) if token in self.ends), None)
        return found if at is None else found[: at + 1]
