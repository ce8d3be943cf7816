"""What a builder asks of a draft model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from planc.runtime.engine import Floats
from planc.runtime.trees import Draft


class Source(Protocol):
    """A draft model in one round of one text. Returned arrays may be overwritten by the next call."""

    def begin(self, tokens: Sequence[int]) -> Floats:
        """Logits [V] after the committed text, whose last token is the root of the draft. Starts the round."""

    def expand(self, draft: Draft, rows: Sequence[int]) -> Floats:
        """Logits [n, V] after these rows of the tree, in one pass with tree attention.

        Each row is expanded at most once a round, and after all rows on its path.
        """
