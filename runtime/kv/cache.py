"""A cache whose rows follow a policy. Positions count the text; how many rows each layer reads is another matter (papers/A4 section 3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from planc.runtime.engine import Cache, Floats, Ints
from planc.runtime.kv.layer import Layer, LayerSpec
from planc.runtime.kv.policy import KvPolicy


class PolicyCache(Cache):
    """State of B sequences under one policy.

    Until a sequence is sealed it is a dense cache. What an engine needs are the buffers (`tensors`), how many rows lie in them (`rows`), room
    for its pass (`reserve`) and, where the policy asks for queries, a place to put them (`observe`).
    """

    def __init__(self, policy: KvPolicy, layers: Sequence[LayerSpec], batch: int, capacity: int) -> None:
        self.policy, self.specs, self.capacity = policy, tuple(layers), capacity
        self.lengths: Ints = np.zeros(batch, dtype=np.int64)
        self.prompt_rows = policy.prompt_rows
        self.sealed = [False] * batch
        self.version = [0] * batch  # changes when buffers move
        self.bindings: dict[Any, Any] = {}  # of the engine
        self.buffers: dict[Any, np.ndarray] = {}  # of the engine
        self._layers = [self._fresh() for _ in range(batch)]
        self._settled = [0] * batch  # length at the last change of what is visible
        self._chosen = [0] * batch  # length at the last selection
        self._seen: list[tuple[int, dict[str, Floats]]] = [(0, {})] * batch  # first row with queries of the last pass, and the queries

    # ---- the loops' side ----

    def keep(self, sequence: int, rows: Ints) -> None:
        """See the engine contract. In a sealed sequence blocks close and selections are renewed, by the committed count alone."""
        rows = np.asarray(rows, dtype=np.int64)
        length, (first, queries) = int(self.lengths[sequence]), self._seen[sequence]
        for layer in self._layers[sequence]:
            layer.keep(rows, length)
            if layer.spec.name in queries:
                layer.remember(queries[layer.spec.name][rows[rows >= first] - first], self._most(sequence))
        self.lengths[sequence] += len(rows)
        if self.sealed[sequence] and len(rows):
            self._settle(sequence)

    def rollback(self, sequence: int, length: int) -> None:
        """See the engine contract. A sealed sequence goes back to its last change of state at most, or to nothing."""
        assert 0 <= length <= self.lengths[sequence]
        if length == 0 and (self.sealed[sequence] or self.lengths[sequence]):
            self._layers[sequence], self.sealed[sequence] = self._fresh(), False
            self.version[sequence] += 1
        else:
            assert not self.sealed[sequence] or length >= self._settled[sequence], "what was stored or dropped does not come back"
            for layer in self._layers[sequence]:
                layer.forget(int(self.lengths[sequence]) - length)
        self.lengths[sequence] = length

    def horizon(self, sequence: int) -> int:
        """See the engine contract."""
        if not self.sealed[sequence]:
            return super().horizon(sequence)
        commits = min(layer.horizon() for layer in self._layers[sequence])
        select = self.policy.select
        return commits if select is None else min(commits, self._chosen[sequence] + select.interval - int(self.lengths[sequence]))

    def seal(self, sequence: int, guessed: int = 0) -> None:
        """See the engine contract."""
        assert not self.sealed[sequence]
        prompt, (_, queries) = int(self.lengths[sequence]), self._seen[sequence]
        self.sealed[sequence] = True
        for layer in self._layers[sequence]:
            if layer.spec.group == 0:
                continue
            if self.policy.evict is not None and not layer.streams:
                if guessed:
                    layer.remember(queries[layer.spec.name][:guessed], self.policy.prompt_rows + guessed)
                layer.evict(prompt, guessed)
            layer.seal()
        self._chosen[sequence] = prompt
        self._settle(sequence, first=True)
        for layer in self._layers[sequence]:
            if layer.spec.group:
                layer.shrink()
        self.version[sequence] += 1

    # ---- the engine's side ----

    def layers(self, sequence: int) -> dict[str, Layer]:
        """The layers of a sequence by the names of their states."""
        return {layer.spec.name: layer for layer in self._layers[sequence]}

    def tensors(self, sequence: int) -> dict[str, np.ndarray]:
        """The buffers [1,G,S,D] that a pass reads and writes, by the graph's names."""
        return {f"{name}.{part}": getattr(layer, part) for name, layer in self.layers(sequence).items() for part in ("key", "value")}

    def stored(self, sequence: int) -> dict[str, np.ndarray]:
        """Arrays [N,...] of stored blocks that the graph reads, by the graph's names."""
        if not self.policy.in_graph:
            return {}
        return {
            f"body.{name.partition('.')[2]}.{part}.{field}": array
            for name, layer in self.layers(sequence).items()
            if layer.body is not None
            for part in ("key", "value")
            for field, array in layer.body.payload(part).items()
        }

    def rows(self, sequence: int, group: int) -> int:
        """Rows that a pass reads in the layers of a group."""
        counts = {layer.rows for layer in self._layers[sequence] if layer.spec.group == group}
        assert len(counts) == 1, f"layers of one group hold {counts} rows"
        return counts.pop()

    def reserve(self, sequence: int, rows: int) -> None:
        """Make room for a pass."""
        if sum(layer.reserve(rows) for layer in self._layers[sequence]):
            self.version[sequence] += 1

    def observe(self, sequence: int, first: int, queries: Mapping[str, Floats]) -> None:
        """Queries [R',H,D] of the rows from `first` on of the pass that was just made, by state; views are enough."""
        self._seen[sequence] = first, dict(queries)

    def seen(self, sequence: int) -> Mapping[str, Floats]:
        """The queries of the last pass."""
        return self._seen[sequence][1]

    # ---- what it takes ----

    def bytes(self) -> int:
        """Bytes of all buffers, blocks, statistics and positions."""
        return sum(layer.nbytes() for layers in self._layers for layer in layers)

    def usage(self) -> dict[str, int]:
        """Bytes in use by kind: window, front, payload, stats, positions, fitted."""
        used: Counter[str] = Counter()
        for layers in self._layers:
            for layer in layers:
                used.update(layer.usage())
        return dict(used)

    def _fresh(self) -> list[Layer]:
        return [Layer(spec, self.policy, self.capacity) for spec in self.specs]

    def _most(self, sequence: int) -> int:
        return 1 if self.sealed[sequence] else max(1, self.policy.prompt_rows)

    def _settle(self, sequence: int, *, first: bool = False) -> None:
        """Whole blocks leave the window; then, if they did or it is time, selections are renewed."""
        length, select = int(self.lengths[sequence]), self.policy.select
        layers = [layer for layer in self._layers[sequence] if layer.spec.group]
        moved = sum(layer.settle() for layer in layers) > 0 or first
        if select is not None and (moved or length >= self._chosen[sequence] + select.interval):
            for layer in layers:
                if not layer.streams:
                    layer.choose()
            self._chosen[sequence], moved = length, True
        if moved:
            self._settled[sequence] = length
