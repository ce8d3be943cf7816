"""DySpec: the tree grows where the draft expects it to be reached (papers/12)."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from planc.runtime.builders.base import BuilderPart, Growth, Node
from planc.runtime.builders.source import Source
from planc.runtime.trees import Draft

if TYPE_CHECKING:
    from planc.runtime.drafters.base import Context


class Dynamic(BuilderPart):
    """Grows the tree where acceptance is most probable (DySpec): level by level down to a threshold, or the best guess first.

    The value of a slot is the probability that verification reaches it: that the parent is accepted and no sibling drawn before. What a
    sibling takes of it is the learned acceptance rate of such guesses, which starts at q and corrects the draft where it is too sure.
    """

    budget: int | None = Field(None, ge=1, description="most guesses; left out: what the controller allows")
    threshold: Literal["auto"] | Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        "auto", description="least value of a slot, in one draft pass per level; auto: 1 / budget; 0: best first, one draft pass per guess"
    )
    temperature: float | None = Field(
        None, gt=0.0, allow_inf_nan=False, description="of the draft; left out: that of the sampling, 1 if greedy"
    )

    def grow(self, source: Source, context: Context, draft: Draft, key: str) -> None:
        growth = Growth(source, context, draft, key, limit=self.budget, temperature=self.temperature)
        threshold = 1.0 / min(context.budget, self.budget or context.budget) if self.threshold == "auto" else self.threshold
        if threshold > 0.0:
            self._by_level(growth, max(threshold, context.row_price), context.pass_price)
        else:
            self._best_first(growth)

    def _by_level(self, growth: Growth, threshold: float, least: float) -> None:
        """`least`: what all slots of a level together must be worth, their parents' values being the most that it can be."""
        frontier = [(growth.root(), 1.0)]
        while frontier:
            following = dict[int, float]()  # row -> value
            for node, value in frontier:
                side = value  # of the next sibling
                while side >= threshold and (row := growth.draw(node)) is not None:
                    inside = value * growth.draft.p[row]
                    side -= inside
                    if inside >= threshold and growth.may_follow(row):
                        following[row] = inside
            if growth.full or sum(following.values()) < least:
                return
            frontier = list(zip(growth.expand(list(following)), following.values(), strict=True))

    def _best_first(self, growth: Growth) -> None:
        nodes = dict[int, tuple[Node, float]]()  # row -> node, value
        heap = [(-1.0, 0, 0)]  # (-value, depth, row): the lowest of these is the next slot
        while heap and not growth.full:
            minus, depth, row = heappop(heap)
            if row not in nodes:
                nodes[row] = (growth.expand([row])[0] if row else growth.root(), -minus)
            node, value = nodes[row]
            child = growth.draw(node)
            if child is None:
                continue
            inside = value * growth.draft.p[child]
            if growth.may_follow(child):
                heappush(heap, (-inside, depth + 1, child))
            if -minus > inside:
                heappush(heap, (minus + inside, depth, row))
