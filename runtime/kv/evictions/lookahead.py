"""Rows by the attention of the prompt's end and of guesses of what follows (papers/87, "SpecKV")."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from planc.runtime.engine import Floats
from planc.runtime.kv.evictions.base import Eviction, odd, pooled


class Lookahead(Eviction):
    """Keeps what any of the last rows, or of `tokens` drafted ones, attends to. The draft's own rows are dropped again."""

    tokens: int = Field(16, ge=1, le=63, description="tokens that the plan's drafters guess when the prompt ends")
    kernel: Annotated[int, AfterValidator(odd)] = Field(7, ge=1, description="neighbours that a score is the largest of, odd")

    @property
    def guesses(self) -> int:
        """The first token of the answer is known by then; the others are drafted."""
        return self.tokens

    def scores(self, attention: Floats) -> Floats:
        """Maximum over queries and neighbours."""
        return pooled(attention.max(1), self.kernel, largest=True)
