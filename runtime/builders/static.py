"""A tree of fixed shape: given, or the best one for the acceptance rates measured so far (Sequoia, papers/A0 section 12)."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field, model_validator

from planc.runtime.builders.base import BuilderPart, Growth, Node
from planc.runtime.builders.source import Source
from planc.runtime.trees import Draft

if TYPE_CHECKING:
    from planc.runtime.drafters.base import Context

Template = tuple[tuple[Annotated[int, Field(ge=0)], ...], ...]


class Static(BuilderPart):
    """A fixed shape of tree; left open, the best one for the acceptance rate of each rank, solved by dynamic programming (Sequoia)."""

    template: Template | None = Field(None, description="paths of child ranks: [[0], [1], [0, 0]]; left out: solved")
    budget: int | None = Field(None, ge=1, le=256, description="guesses of the solved tree; left out: what the controller allows")
    branching: int = Field(8, ge=1, le=64, description="most children per guess of the solved tree")
    acceptance: Annotated[tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...], Field(min_length=1)] = Field(
        (0.6, 0.15, 0.07, 0.04, 0.03, 0.02, 0.015, 0.01), description="acceptance rate of each rank before anything is learned"
    )

    @model_validator(mode="after")
    def _template_is_a_tree(self) -> Static:
        if self.template is None:
            return self
        if self.model_fields_set & {"budget", "branching"}:
            raise ValueError("`budget` and `branching` are of the solved tree; a template has its own")
        if not self.template:
            raise ValueError("the template has no paths")
        paths = {(), *self.template}
        for path in self.template:
            if not path:
                raise ValueError("a path of the template has at least one rank")
            for needed in (path[:-1], (*path[:-1], max(0, path[-1] - 1))):
                if needed not in paths:
                    raise ValueError(f"the template has {list(path)} and lacks {list(needed)}")
        return self

    def grow(self, source: Source, context: Context, draft: Draft, key: str) -> None:
        growth = Growth(source, context, draft, key, limit=self.budget, by_rank=self.acceptance)
        template = self.template if self.template is not None else self._solve(growth, context, draft)
        nodes: dict[tuple[int, ...], Node] = {(): growth.root()}
        rows: dict[tuple[int, ...], int] = {}
        for depth in range(1, 1 + max(map(len, template), default=0)):
            for path in sorted((path for path in template if len(path) == depth), key=lambda path: (path[-1], path)):
                parent = nodes.get(path[:-1])
                row = growth.draw(parent) if parent is not None else None
                if row is not None:
                    rows[path] = row
            inner = [path for path in rows if len(path) == depth and (*path, 0) in template and growth.may_follow(rows[path])]
            if growth.full or not inner:
                return
            nodes |= zip(inner, growth.expand([rows[path] for path in inner]), strict=True)

    def _solve(self, growth: Growth, context: Context, draft: Draft) -> Template:
        rates = growth.rank_rates(self.branching)
        return best_template(tuple(round(rate, 2) for rate in rates), growth.room, min(context.depth, growth.room))


@lru_cache(maxsize=256)
def best_template(acceptance: tuple[float, ...], guesses: int, depth: int) -> Template:
    """The tree of at most `guesses` guesses and `depth` levels with most expected tokens, as paths of child ranks, level by level.

    `acceptance[r]` is the probability that the child of rank r is the accepted one, its parent being accepted. T(m, l, b), the tokens of a
    tree of m rows and l levels whose root has b children, is the maximum over y of T(m - y, l, b - 1) + a_b T(y, l - 1).
    """
    rows, ranks = guesses + 1, min(len(acceptance), guesses)
    m, y = np.indices((rows + 1, rows + 1))
    split = (y >= 1) & (y < m)  # rows of the last child, of m
    best = np.ones(rows + 1)  # T(m, l - 1), best over b; entry 0 is never used
    widths, choices = list[np.ndarray](), list[np.ndarray]()  # per level: [m] best b; [b, m] best y
    for _ in range(depth):
        table, choice = [np.where(np.arange(rows + 1) >= 1, 1.0, -np.inf)], list[np.ndarray]()
        for rank in range(ranks):
            value = np.where(split, table[-1][np.maximum(m - y, 0)] + acceptance[rank] * best[y], -np.inf)  # [m, y]
            choice.append(value.argmax(1))
            table.append(value.max(1))
        widths.append(np.argmax(table, axis=0))
        choices.append(np.array(choice))
        best = np.maximum(np.max(table, axis=0), 0.0)

    def paths(m: int, level: int, path: tuple[int, ...]) -> list[tuple[int, ...]]:
        found = list[tuple[int, ...]]()
        for rank in reversed(range(int(widths[level][m]) if level >= 0 else 0)):
            y = int(choices[level][rank, m])
            found += [(*path, rank), *paths(y, level - 1, (*path, rank))]
            m -= y
        return found

    return tuple(sorted(paths(rows, depth - 1, ()), key=lambda path: (len(path), path)))
