"""What a store is: how blocks of 64 rows are kept once they left the dense window (papers/A4 sections 2, 3 and 5).

Letters: N blocks, G key/value heads, T rows of a block (64, or a few that were picked out), D head width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from planc.runtime.engine import Floats
from planc.runtime.registry import PlanPart

BLOCK = 64  #: rows of a block

Part = Literal["key", "value"]
PARTS: tuple[Part, Part] = ("key", "value")
Payload = dict[str, np.ndarray]  # name -> [N, ...]


class Store(PlanPart):
    """A format of blocks. Keys come turned to their positions, unless `before_rope`."""

    kind: ClassVar[str] = "kv_store"
    by_rows: ClassVar[bool] = True  # every array is [N, G or 1, T, ...], so that single rows can be picked out
    before_rope: ClassVar[bool] = False  # keys are stored as they were before they were turned
    in_graph: ClassVar[bool] = True  # a graph can read all of it; otherwise a selection has to pick what is read

    def check(self, width: int) -> str | None:
        """Why heads of this width cannot be kept so, or None."""
        return None

    def fit(self, rows: Floats, part: Part) -> Payload:
        """Arrays that all blocks of a sequence share, from rows [N,G,T,D] of its prompt; none for most formats."""
        return {}

    def encode(self, rows: Floats, part: Part, fitted: Payload) -> Payload:
        """The payload of rows [N,G,T,D] float32."""
        raise NotImplementedError

    def decode(self, payload: Payload, part: Part, fitted: Payload) -> Floats:
        """The rows [N,G,T,D] of a payload."""
        raise NotImplementedError


def pick(payload: Payload, rows: np.ndarray) -> Payload:
    """Single rows [G,n] (block * 64 + row) of a payload that is kept by rows, as one block per head [1,G,n,...]."""
    heads = np.arange(rows.shape[0])[:, None]
    return {name: array[rows // BLOCK, heads if array.shape[1] > 1 else 0, rows % BLOCK][None] for name, array in payload.items()}
