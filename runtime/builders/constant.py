"""RSD-C: the same number of children for every guess of a level (papers/21)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from planc.runtime.builders.base import BuilderPart, Growth
from planc.runtime.builders.source import Source
from planc.runtime.trees import Draft

if TYPE_CHECKING:
    from planc.runtime.drafters.base import Context


class Constant(BuilderPart):
    """Constant branching per level, children by Gumbel top-k (RSD-C); one draft pass per level."""

    branching: Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1)] = Field(
        (2, 2, 2), description="children per guess, from the root down"
    )
    replacement: bool = Field(False, description="draw siblings independently (SpecInfer); matters where draws are tested")

    def grow(self, source: Source, context: Context, draft: Draft, key: str) -> None:
        growth = Growth(source, context, draft, key, kind="with_replacement" if self.replacement else "without_replacement")
        level = [growth.root()]
        for depth, count in enumerate(self.branching, 1):
            # all first children before all second ones: a budget that ends inside the level costs the later draws
            drawn = [growth.draw(node) for _ in range(count) for node in level]
            rows = dict.fromkeys(row for row in drawn if row is not None and growth.may_follow(row))  # drawn twice, expanded once
            if growth.full or depth == len(self.branching):
                return
            level = growth.expand(list(rows))
