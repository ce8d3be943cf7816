"""Points of a search, what they cost, and how they mutate: one level per unit, and a budget that every point meets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Point = tuple[int, ...]  #: the level of each unit, 0 is the best quality

_ATTEMPTS = 40  # mutations that are tried before a child is given up
_REPAIRS = 4  # moves that may make up for one


@dataclass(frozen=True)
class Infeasible(Exception):
    """No point meets the budget; `least` [R] is the least that each resource can be."""

    least: tuple[int, ...]


class LevelSpace:
    """Units with levels, costs that add up, and limits.

    A move changes the level of one unit. A mutation is a move together with others whose costs cancel it exactly, so that a child costs what
    its parent costs in every resource (papers/18, items 1 and 5).

    Args:
        costs: per unit [levels, R] int64, what the unit costs at each level.
        rest: [R] int64, what is spent whatever the levels are.
        limits: [R] int64, what all may cost.
        needed: units of which one at least must stay at level 0; empty for none.

    Raises Infeasible when even the cheapest levels cost too much.
    """

    def __init__(
        self,
        costs: Sequence[NDArray[np.int64]],
        rest: NDArray[np.int64],
        limits: NDArray[np.int64],
        needed: Sequence[int] = (),
    ) -> None:
        self.costs, self.rest, self.limits, self._needed = costs, rest, limits, tuple(needed)
        moves = [(u, a, b) for u, levels in enumerate(costs) for a in range(len(levels)) for b in range(len(levels)) if a != b]
        self._unit, self._from, self._to = np.array(moves, dtype=np.int64).reshape(-1, 3).T
        self._delta = np.array([costs[u][b] - costs[u][a] for u, a, b in moves], dtype=np.int64).reshape(-1, len(rest))  # [M, R]
        least = rest + sum((levels.min(axis=0) for levels in costs), np.zeros_like(rest))
        if self._needed:
            least = least + np.min([costs[u][0] - costs[u].min(axis=0) for u in self._needed], axis=0)
        if (least > limits).any():
            raise Infeasible(tuple(map(int, least)))

    def cost(self, point: Point) -> NDArray[np.int64]:
        """What a point costs, [R]."""
        return self.rest + sum((levels[level] for levels, level in zip(self.costs, point, strict=True)), np.zeros_like(self.rest))

    def feasible(self, point: Point) -> bool:
        """Does it meet the limits, and run what must run?"""
        return bool((self.cost(point) <= self.limits).all()) and (not self._needed or any(point[u] == 0 for u in self._needed))

    def random(self, rng: np.random.Generator) -> Point:
        """A point within the limits that wastes nothing: levels fall at random until it fits, then rise where there is room."""
        point = np.zeros(len(self.costs), dtype=np.int64)
        while ((over := self.cost(tuple(point)) - self.limits) > 0).any():
            lowers = (self._delta[:, over > 0] < 0).any(axis=1)
            helps = np.asarray(lowers & (self._delta <= 0).all(axis=1))
            moves = self._moves(point, helps)
            if not len(moves):
                raise Infeasible(tuple(map(int, self.cost(tuple(point)))))
            steps = self._to[moves] - self._from[moves]
            self._apply(point, int(rng.choice(moves[steps == steps.min()])))
        while len(
            moves := self._moves(point, (self._to < self._from) & (self._delta <= self.limits - self.cost(tuple(point))).all(axis=1))
        ):
            self._apply(point, int(rng.choice(moves)))
        return tuple(map(int, point))

    def mutate(self, point: Point, rng: np.random.Generator) -> Point | None:
        """A child at exactly the parent's cost, one to three changes away; None when none was found."""
        changes = int(min(rng.integers(1, 4), rng.integers(1, 4)))
        for _ in range(_ATTEMPTS):
            child: NDArray[np.int64] | None = np.array(point, dtype=np.int64)
            for _ in range(changes):
                child = self._switched(child, rng) if child is not None else None
            if child is not None and tuple(child) != point:
                return tuple(map(int, child))
        return None

    def _switched(self, point: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64] | None:
        """One move, and moves of other units that give back exactly what it took."""
        point = point.copy()
        if not len(moves := self._moves(point)):
            return None
        move = int(rng.choice(moves))
        owed, touched = -self._delta[move], [self._unit[move]]
        self._apply(point, move)
        for _ in range(_REPAIRS):
            if not owed.any():
                break
            fits = (self._delta * owed >= 0).all(axis=1) & (abs(self._delta) <= abs(owed)).all(axis=1) & self._delta.any(axis=1)
            moves = self._moves(point, fits & ~np.isin(self._unit, touched))
            if not len(moves):
                return None
            exact = moves[(self._delta[moves] == owed).all(axis=1)]
            move = int(rng.choice(exact if len(exact) and rng.random() < 0.5 else moves))
            owed = owed - self._delta[move]
            touched.append(self._unit[move])
            self._apply(point, move)
        return point if not owed.any() and (not self._needed or (point[list(self._needed)] == 0).any()) else None

    def _moves(self, point: NDArray[np.int64], which: NDArray[np.bool_] | bool = True) -> NDArray[np.int64]:
        """Numbers of the moves that start from this point."""
        open_ = (point[self._unit] == self._from) & which
        if self._needed and (point[list(self._needed)] == 0).sum() == 1:  # the last one stays
            last = next(u for u in self._needed if point[u] == 0)
            open_ = open_ & (self._unit != last)
        return np.flatnonzero(open_)

    def _apply(self, point: NDArray[np.int64], move: int) -> None:
        point[self._unit[move]] = self._to[move]
