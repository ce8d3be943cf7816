"""The rows of one attention layer and one sequence: what a pass reads, dense, and the stored blocks behind it (papers/A4 section 2).

A row's life: written behind the others by a pass (the tail), committed to the window, moved to a stored block when 64 rows have left the
window, and maybe read back from there. What a pass reads lies in one buffer: `[front | window | tail]`, where the front holds rows that never
left (sinks, what an eviction kept, outliers) and those that are selected at the moment. Their order does not matter: positions are in the keys.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import BaseModel, ConfigDict

from planc.runtime.engine import NEVER, Floats, Ints
from planc.runtime.kv.policy import KvPolicy
from planc.runtime.kv.rope import Rope
from planc.runtime.kv.stores import BLOCK, PARTS, Part, Payload, Store, pick

_SLACK = 1  # a one-row pass may write a spare row behind its own
_STEP = 64  # buffers grow by at least so many rows


class LayerSpec(BaseModel):
    """What the graph says of one attention."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str  # of its state, such as past.3
    group: int = 0  # states of a group hold equally many rows; 0: no policy, 1: the policy's, 2: streaming heads
    heads: int
    which: tuple[int, ...] = ()  # of the layer's key/value heads
    key_width: int
    value_width: int
    query_heads: int
    scale: float = 1.0
    softcap: float = 0.0
    rope: Rope | None = None  # how its keys were turned; None where they were not

    def width(self, part: Part) -> int:
        """Of a key or a value."""
        return self.key_width if part == "key" else self.value_width


class Body:
    """Stored blocks of one layer, behind each other in memory."""

    def __init__(self, spec: LayerSpec, store: Store, policy: KvPolicy) -> None:
        self.spec, self.store, self.select, self.evicts = spec, store, policy.select, policy.evict is not None
        self.count = 0  # blocks
        self.fitted: dict[Part, Payload] = {}
        self._arrays: dict[str, np.ndarray] = {}  # [capacity, ...]
        if policy.in_graph:  # the graph wants to see the arrays even while they are empty
            zeros = {part: np.zeros((1, spec.heads, BLOCK, spec.width(part)), np.float32) for part in PARTS}
            self._write({f"{part}.{name}": a for part in PARTS for name, a in store.encode(zeros[part], part, {}).items()}, 1)
            self.count = 0

    def append(self, rows: Mapping[Part, Floats], positions: Ints) -> None:
        """Store rows [G,T,D], T a multiple of 64, at positions [G,T]."""
        blocks = {part: _blocks(rows[part]) for part in PARTS}
        places = _blocks(positions[..., None])[..., 0]  # [N,G,64]
        stats: Payload = self.select.stats(blocks["key"]) if self.select is not None else {}
        if self.store.before_rope and self.spec.rope is not None:
            blocks["key"] = self.spec.rope.turn(blocks["key"], places, back=True)
        self.fitted = self.fitted or {part: self.store.fit(blocks[part], part) for part in PARTS}
        new: Payload = {f"stats.{name}": array for name, array in stats.items()}
        if self.store.before_rope:  # all heads have the same rows where none were evicted
            new["positions"] = (places if self.evicts else places[:, :1]).astype(np.int32)
        for part in PARTS:
            payload = self.store.encode(blocks[part], part, self.fitted[part])
            new |= {f"{part}.{name}": array for name, array in payload.items()}
        self._write(new, len(places))

    def rows(self, units: Ints, unit: int) -> dict[Part, Floats]:
        """Rows of the units [G,n] of `unit` rows each: keys, turned, and values [G, n*unit, D]."""
        wanted = rows_of(units, unit)
        found = {part: self._decoded(part, wanted) for part in PARTS}
        if self.store.before_rope and self.spec.rope is not None:
            found["key"] = self.spec.rope.turn(found["key"], pick({"": self._arrays["positions"]}, wanted)[""][0])
        return found

    def decoded(self, part: Part) -> Floats:
        """All rows [G, N*64, D], keys turned."""
        wanted = np.broadcast_to(np.arange(self.count * BLOCK), (self.spec.heads, self.count * BLOCK))
        return self.rows(wanted, 1)[part]

    def payload(self, prefix: str) -> Payload:
        """The arrays of one part, or the statistics, [N,...]."""
        return {
            name.removeprefix(f"{prefix}."): array[: self.count] for name, array in self._arrays.items() if name.startswith(f"{prefix}.")
        }

    def usage(self) -> dict[str, int]:
        """Bytes of the blocks by kind."""
        used: dict[str, int] = {}
        for name, array in self._arrays.items():
            kind = name if name == "positions" else "stats" if name.startswith("stats.") else "payload"
            used[kind] = used.get(kind, 0) + array[: self.count].nbytes
        used["fitted"] = sum(array.nbytes for fitted in self.fitted.values() for array in fitted.values())
        return used

    def nbytes(self) -> int:
        """Bytes of the memory that is taken."""
        return sum(array.nbytes for array in self._arrays.values()) + self.usage()["fitted"]

    def _decoded(self, part: Part, wanted: Ints) -> Floats:
        fitted, payload = self.fitted.get(part, {}), self.payload(part)
        if self.store.by_rows:
            return np.asarray(self.store.decode(pick(payload, wanted), part, fitted)[0])
        needed, place = np.unique(wanted // BLOCK, return_inverse=True)
        rows = self.store.decode({name: array[needed] for name, array in payload.items()}, part, fitted)  # [blocks,G,64,D]
        found: Floats = rows[place.reshape(wanted.shape), np.arange(len(wanted))[:, None], wanted % BLOCK]
        return found

    def _write(self, new: Payload, count: int) -> None:
        for name, array in new.items():
            old = self._arrays.get(name)
            if old is None or len(old) < self.count + count:
                grown = np.zeros((self.count + count + (self.count + count) // 8, *array.shape[1:]), array.dtype)
                if old is not None:
                    grown[: self.count] = old[: self.count]
                self._arrays[name] = old = grown
            old[self.count : self.count + count] = array
        self.count += count


class Layer:
    """One attention layer of one sequence."""

    def __init__(self, spec: LayerSpec, policy: KvPolicy, capacity: int) -> None:
        self.spec, self.policy = spec, policy
        self.streams = spec.group == 2
        #: least committed rows of the window; None where no row leaves it
        self.least: int | None = None
        self.body: Body | None = None
        if self.streams:
            assert policy.streaming is not None
            self.least = policy.streaming.local
        elif spec.group and (store := policy.kept) is not None:
            self.least, self.body = policy.window, Body(spec, store, policy)
        self.front = self.window = 0  # rows
        self.pinned = 0  # rows of the front that stay
        self.selected: Ints | None = None  # units [G,n] in the rest of the front
        self.resident: Ints = np.empty((spec.heads, 0), np.int64)  # units that are pinned, too
        self.queries: Floats = np.empty((0, spec.query_heads, spec.key_width), np.float32)  # of the last committed rows
        self.key, self.value, self.positions = self._buffers(capacity + _SLACK)

    @property
    def rows(self) -> int:
        """Rows that a pass reads, besides its own."""
        return self.front + self.window

    @property
    def slots(self) -> int:
        """Rows that the buffers hold."""
        return int(self.positions.shape[1])

    def horizon(self) -> int:
        """Commits until rows leave the window, that commit included."""
        return NEVER if self.least is None else self.least + BLOCK - self.window

    def reserve(self, rows: int) -> bool:
        """Make room for a pass of so many rows; whether the buffers moved."""
        if self.rows + rows + _SLACK <= self.slots:
            return False
        self._resize(self.rows + rows + max(_STEP, self.rows // 4))
        return True

    def keep(self, rows: Ints, position: int) -> None:
        """Commit rows of the last pass, ascending; the first gets `position`."""
        start, count = self.rows, len(rows)
        if not np.array_equal(rows, np.arange(count)):
            for buffer in (self.key, self.value):
                buffer[0, :, start : start + count] = buffer[0][:, start + rows]
        self.positions[:, start : start + count] = position + np.arange(count)
        self.window += count

    def forget(self, rows: int) -> None:
        """Drop the last rows of the window."""
        assert rows <= self.window
        self.window -= rows

    def evict(self, prompt: int, guessed: int) -> None:
        """Keep the rows of the prompt that the policy's eviction chooses; `guessed` rows of the last pass lie behind it."""
        eviction = self.policy.evict
        assert eviction is not None
        kept = eviction.keep(self.queries, self.key[0, :, : prompt + guessed], prompt, self.spec.scale, self.spec.softcap)
        sinks = min(self.policy.sinks, prompt)
        if sinks and kept.shape[1] < prompt:  # they take the places of the oldest rows that were chosen
            kept = np.stack([np.union1d(np.arange(sinks), row[row >= sinks][-(len(row) - sinks) :]) for row in kept])
        heads = np.arange(self.spec.heads)[:, None]
        count = kept.shape[1]
        for buffer in (self.key, self.value):
            buffer[0, :, :count] = buffer[0][heads, kept]
        self.positions[:, :count] = self.positions[heads, kept]
        self.window = count

    def seal(self) -> None:
        """The prompt is complete: the first rows are pinned, blocks that are not part of the window go."""
        assert self.front == 0
        sinks = self.policy.streaming.sink if self.streams and self.policy.streaming is not None else self.policy.sinks
        self.front = self.pinned = min(sinks, self.window) if self.least is not None else 0
        self.window -= self.front
        rows, _ = self._at(self.front, self._leaving())
        self.settle()
        if self.body is not None and self.body.count and (select := self.policy.select) is not None:
            self.resident = select.resident(_blocks(rows["key"]))
            wanted = rows_of(self.resident, select.unit)
            heads = np.arange(self.spec.heads)[:, None]
            self._stage({part: rows[part][heads, wanted] for part in PARTS})
            self.pinned = self.front

    def settle(self) -> bool:
        """Move whole blocks out of the window; whether there were any."""
        leaving = self._leaving()
        if not leaving:
            return False
        if self.body is not None:
            self.body.append(*self._at(self.front, leaving))
        self._move(self.front + leaving, self.front, self.window - leaving)
        self.window -= leaving
        return True

    def choose(self) -> None:
        """Read what the policy selects by the query of the last committed row."""
        select = self.policy.select
        assert select is not None and self.body is not None
        if not self.body.count:
            return
        units = select.choose(self.body.payload("stats"), self.queries[-1], self.spec.scale, self.resident)
        if self.selected is not None and np.array_equal(units, self.selected):
            return
        self.selected = units
        self._stage(self.body.rows(units, select.unit))

    def shrink(self) -> None:
        """Give memory back that the prompt took."""
        self._resize(self.rows + _STEP + _SLACK)

    def remember(self, queries: Floats, most: int) -> None:
        """Queries [n,H,D] of rows that were committed; the last `most` stay."""
        self.queries = np.concatenate([self.queries, queries])[-most:] if len(queries) < most else queries[-most:].copy()

    def usage(self) -> dict[str, int]:
        """Bytes in use by kind; the rows that a pass reads are `window` and `front`."""
        row = self.spec.heads * (self.spec.key_width + self.spec.value_width) * self.key.itemsize
        used = {"window": self.window * row, "front": self.front * row, "positions": self.rows * self.spec.heads * self.positions.itemsize}
        for name, count in (self.body.usage() if self.body is not None else {}).items():
            used[name] = used.get(name, 0) + count
        return used

    def nbytes(self) -> int:
        """Bytes of the memory that is taken (address space; memory is taken as slots are written)."""
        own = self.key.nbytes + self.value.nbytes + self.positions.nbytes + self.queries.nbytes
        return own + (self.body.nbytes() if self.body is not None else 0)

    def _leaving(self) -> int:
        return 0 if self.least is None else max(0, self.window - self.least) // BLOCK * BLOCK

    def _at(self, start: int, count: int) -> tuple[dict[Part, Floats], Ints]:
        """Copies of rows of the buffers."""
        place = slice(start, start + count)
        return {"key": self.key[0, :, place].copy(), "value": self.value[0, :, place].copy()}, self.positions[:, place].astype(np.int64)

    def _stage(self, rows: Mapping[Part, Floats]) -> None:
        """Put rows [G,n,D] behind what is pinned. Nobody asks for their positions again: they are in the keys, and the rows never leave."""
        front = self.pinned + rows["key"].shape[1]
        if front != self.front:
            if front + self.window > self.slots:
                self._resize(front + self.window + _STEP)
            self._move(self.front, front, self.window)
            self.front = front
        place = slice(self.pinned, front)
        self.key[0, :, place], self.value[0, :, place] = rows["key"], rows["value"]

    def _move(self, source: int, target: int, count: int) -> None:
        for buffer in (self.key[0], self.value[0], self.positions):
            buffer[:, target : target + count] = buffer[:, source : source + count].copy()

    def _buffers(self, slots: int) -> tuple[Floats, Floats, np.ndarray]:
        # zeros, not empty: a slot that nobody wrote must not hold NaN; untouched pages cost no memory
        heads = self.spec.heads
        key, value = (np.zeros((1, heads, slots, self.spec.width(part)), np.float32) for part in PARTS)
        return key, value, np.zeros((heads, slots), np.int32)

    def _resize(self, slots: int) -> None:
        old = self.key, self.value, self.positions
        self.key, self.value, self.positions = self._buffers(slots)
        for new, before in zip((self.key[0], self.value[0], self.positions), (old[0][0], old[1][0], old[2]), strict=True):
            new[:, : self.rows] = before[:, : self.rows]


def rows_of(units: Ints, unit: int) -> Ints:
    """The rows [G, n*unit] of units [G,n] of `unit` rows each."""
    rows: Ints = (units[..., None] * unit + np.arange(unit)).reshape(len(units), -1)
    return rows


def _blocks(rows: np.ndarray) -> np.ndarray:
    """[G, N*64, D] -> [N,G,64,D]."""
    return rows.reshape(len(rows), -1, BLOCK, rows.shape[2]).swapaxes(0, 1)
