"""Positions and masks of the rows of a step (papers/A0 section 7)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planc.runtime.engine import Floats, Ints, Step

MASKED = np.finfo(np.float32).min


def depths_of(step: Step) -> Ints:
    """Depth of each row [B,R]: 0 for a child of the cache."""
    batch, rows = step.tokens.shape
    if step.parents is None:
        return np.broadcast_to(np.arange(rows, dtype=np.int64), (batch, rows))
    depth = np.zeros((batch, rows), dtype=np.int64)
    sequences = np.arange(batch)
    for row in range(rows):
        parent = step.parents[:, row]
        depth[:, row] = np.where(parent < 0, 0, depth[sequences, parent] + 1)
    return depth


def positions_of(lengths: Ints, step: Step) -> Ints:
    """Position of each row [B,R]: cached length plus depth, not the slot."""
    return lengths[:, None] + depths_of(step)


def ancestors_of(step: Step) -> NDArray[np.bool_]:
    """[B,R,R]: whether row i sees row j of the same step (itself and its ancestors)."""
    batch, rows = step.tokens.shape
    if step.parents is None:
        return np.broadcast_to(np.tri(rows, dtype=bool), (batch, rows, rows))
    sees = np.zeros((batch, rows, rows), dtype=bool)
    sequences = np.arange(batch)
    for row in range(rows):
        parent = step.parents[:, row]
        sees[:, row] = np.where((parent < 0)[:, None], False, sees[sequences, parent])
        sees[:, row, row] = True
    return sees


def bias_name(window: int, group: int = 0) -> str:
    """Name of the mask input of layers with this window (0: unlimited) and rows as in this group of states."""
    return f"bias.{window}.{group}" if group else f"bias.{window}" if window else "bias"


def bias_of(name: str) -> tuple[int, int]:
    """Window and group of a mask input."""
    _, window, group = (*name.split("."), "0", "0")[:3]
    return int(window), int(group)


def key_bias(lengths: Ints, step: Step, window: int = 0) -> Floats:
    """Additive mask [B,1,R,T], T = longest length + R: 0 where a row sees a key, the lowest float32 elsewhere. A window counts positions."""
    batch, rows = step.tokens.shape
    keys = np.arange(int(lengths.max()) + rows)
    hidden = np.broadcast_to((keys[None] >= lengths[:, None])[:, None], (batch, rows, len(keys))).copy()
    positions = positions_of(lengths, step)
    if window:
        hidden |= keys[None, None] <= positions[:, :, None] - window
    sees = ancestors_of(step)
    for b, length in enumerate(lengths):
        seen = sees[b]
        if window:
            seen = seen & (positions[b][None] > positions[b][:, None] - window)
        hidden[b, :, length : length + rows] = ~seen
    return np.where(hidden, MASKED, np.float32(0))[:, None]


def states_of(step: Step, width: int) -> Floats:
    """The states of the rows [B,R,width] float32; zeros where the step has none."""
    if step.states is None:
        return np.zeros((*step.tokens.shape, width), dtype=np.float32)
    return np.ascontiguousarray(step.states, dtype=np.float32)
