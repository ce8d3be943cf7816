"""Rows by the attention of the prompt's end ("SnapKV")."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from planc.runtime.engine import Floats
from planc.runtime.kv.evictions.base import Eviction, odd, pooled


class AttentionWindow(Eviction):
    """Keeps what the last rows attend to, summed over them and smoothed along the text."""

    kernel: Annotated[int, AfterValidator(odd)] = Field(5, ge=1, description="neighbours that a score is averaged over, odd")

    def scores(self, attention: Floats) -> Floats:
        """Mean over queries and neighbours."""
        return pooled(attention.mean(1), self.kernel, largest=False)
