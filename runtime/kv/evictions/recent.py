"""The last rows alone: what any other eviction has to beat."""

from __future__ import annotations

import numpy as np

from planc.runtime.engine import Floats
from planc.runtime.kv.evictions.base import Eviction


class Recent(Eviction):
    """Keeps the end of the prompt."""

    def scores(self, attention: Floats) -> Floats:
        """Later is better."""
        heads, _, rows = attention.shape
        return np.broadcast_to(np.arange(rows, dtype=np.float32), (heads, rows))
