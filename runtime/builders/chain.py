"""A chain: one guess after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from planc.runtime.builders.base import BuilderPart, Growth
from planc.runtime.builders.source import Source
from planc.runtime.trees import Draft

if TYPE_CHECKING:
    from planc.runtime.drafters.base import Context


class Chain(BuilderPart):
    """Guesses one token after the other; one draft pass each."""

    draws: ClassVar[Literal["chain", "tree"]] = "chain"
    threshold: float = Field(0.0, ge=0.0, lt=1.0, description="stop behind a guess that is reached with less probability than this")

    def grow(self, source: Source, context: Context, draft: Draft, key: str) -> None:
        growth, reach = Growth(source, context, draft, key), 1.0
        node = growth.root()
        while (row := growth.draw(node)) is not None:
            reach *= draft.p[row]  # the unlikely guess itself stays: to drop it for its token would bias the test
            if growth.full or reach < self.threshold or not growth.may_follow(row):
                return
            [node] = growth.expand([row])
