"""H2 and H3: Elastic-Cache. Layers are refreshed from the first one on whose most watched token is attended to differently than before."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from planc.runtime.engine import Floats, Ints
from planc.runtime.masked.caching import everything
from planc.runtime.masked.canvas import Canvas, Slots
from planc.runtime.masked.engine import Probe
from planc.runtime.masked.hooks import Ask, ByLayer, CacheHook


class Elastic(CacheHook):
    """A pass runs the window, the last window and the watched tokens; drift of their attention refreshes the deeper layers (papers/51).

    Drift is measured in every layer on the decided slot that the window attended to most in the pass before: the cosine between its attention
    then and now, both the mean over heads. A layer whose cosine is below `gamma` and all layers behind it run for all slots; the paper spares that
    one layer, but then even a pass that always refreshes is not exact.
    """

    by_layer: ClassVar[bool] = True
    gamma: float = Field(0.9, description="least cosine; above 1 refreshes in every pass, below -1 never")

    def start(self, canvas: Canvas) -> _Drift:
        return _Drift(self.gamma, len(canvas.tokens))


class _Drift:
    """What one row remembers of every layer: the watched slot and its attention."""

    def __init__(self, gamma: float, slots: int) -> None:
        self.gamma, self.slots = gamma, slots
        self.watched: dict[int, int] = {}  # layer -> slot
        self.rows: dict[int, tuple[int, Floats]] = {}  # layer -> (slot, [S] its attention)
        self._window: Slots = np.zeros(0, dtype=np.int64)
        self._decided: np.ndarray = np.zeros(slots, dtype=bool)
        self.cosines: list[tuple[int, float]] = []  # (layer, cosine) of every test

    def query(self, canvas: Canvas) -> Ask:
        window = canvas.open
        first = not self.watched
        tracked = list(self.watched.values())
        slots = (
            everything(canvas) if first else np.unique(np.concatenate([self._window, window, tracked, list(canvas.changed)]).astype(int))
        )
        slots = slots[slots < canvas.length]
        self._window = window
        self._decided = ~canvas.masked & (np.arange(self.slots) < canvas.length)
        mask = np.zeros(self.slots, dtype=bool)
        mask[window] = True
        watched: Ints = np.array([min(self.watched.get(layer, 0), canvas.length - 1) for layer in range(len(self.watched) or 1)])
        return Ask(slots, "fill" if first else "elastic", layers=ByLayer(watched, mask, self._check))

    def _check(self, layer: int, probe: Probe) -> bool:
        """Compare the same token with itself, then choose the one to watch next; one that is new is compared from the next pass on."""
        slot, cosine, row = self.watched.get(layer), 1.0, probe.row[: self.slots]
        if slot is not None:
            known = self.rows.get(layer)
            if known is not None and known[0] == slot:
                cosine = _cosine(known[1], row)
                self.cosines.append((layer, cosine))
            self.rows[layer] = (slot, row.copy())
        self.watched[layer] = int(np.argmax(np.where(self._decided, probe.column_sums[: self.slots], -1.0)))
        return slot is not None and cosine < self.gamma


def _cosine(a: Floats, b: Floats) -> float:
    return float(a @ b / max(1e-12, float(np.linalg.norm(a) * np.linalg.norm(b))))
