"""The algorithm of EvoPress (papers/18): one parent, mutants at its cost, selections on more and more text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from planc.compiler.search.space import LevelSpace, Point
from planc.compiler.search.spec import Search

Text = Sequence[Sequence[int]]  #: pieces of text, as token ids
Score = Callable[[Sequence[Point], Text], list[float]]  #: mean divergence of each point on the same text, lower is better

_TRIES = 8  # mutations per child that is wanted, until the parent counts as having no more children


@dataclass(frozen=True)
class State:
    """Where an evolution stands after `generation` generations: all that it needs to go on."""

    parent: Point
    generation: int = 0
    history: tuple[float, ...] = field(default=())  # the parent's score in the last selection of each generation

    def as_dict(self) -> dict[str, object]:
        """Plain data."""
        return {"generation": self.generation, "parent": list(self.parent), "history": list(self.history)}


def start(space: LevelSpace, settings: Search, score: Score, text: Text, seed: int) -> State:
    """The best of some random points within the budget."""
    rng = np.random.default_rng([seed, 0])
    points = list(dict.fromkeys(space.random(rng) for _ in range(settings.starts)))
    return State(_best(points, settings.selection[0].tokens, 1, score, text, rng)[0][0])


def evolve(space: LevelSpace, settings: Search, score: Score, text: Text, seed: int, state: State, done: Callable[[State], None]) -> State:
    """Run the generations that are left; `done` is told after each.

    A generation draws from a random stream of its own, so that one that is run again after an interruption is the same.
    """
    for generation in range(state.generation + 1, settings.generations + 1):
        rng = np.random.default_rng([seed, generation])
        population, scores = offspring(space, state.parent, settings.offspring, rng), [math.nan]
        if not population:  # the budget leaves no choice
            return state
        for number, selection in enumerate(settings.selection, 1):
            if number == len(settings.selection):
                population.append(state.parent)  # elitism: the parent is compared on the same fresh text
            population, scores = _best(population, selection.tokens, selection.survivors, score, text, rng)
        state = State(population[0], generation, (*state.history, scores[0]))
        done(state)
    return state


def offspring(space: LevelSpace, parent: Point, count: int, rng: np.random.Generator) -> list[Point]:
    """Up to `count` distinct children; fewer where a small space has no more."""
    children: dict[Point, None] = {}
    for _ in range(_TRIES * count):
        if len(children) == count:
            break
        if (child := space.mutate(parent, rng)) is not None:
            children[child] = None
    return list(children)


def _best(
    population: list[Point], tokens: int, survivors: int, score: Score, text: Text, rng: np.random.Generator
) -> tuple[list[Point], list[float]]:
    """The best points on one random draw of text, best first, with their scores; of equals the one that came first."""
    scores = score(population, draw(text, tokens, rng))
    order = sorted(range(len(population)), key=lambda i: (scores[i], i))[:survivors]
    return [population[i] for i in order], [scores[i] for i in order]


def draw(text: Text, tokens: int, rng: np.random.Generator) -> list[Sequence[int]]:
    """Random pieces, the last one cut so that there are `tokens` in all; everything when the text has no more."""
    pieces: list[Sequence[int]] = []
    left = tokens
    for index in rng.permutation(len(text)):
        if left < 2:  # one token predicts nothing
            break
        pieces.append(text[int(index)][:left])
        left -= len(pieces[-1])
    return pieces
