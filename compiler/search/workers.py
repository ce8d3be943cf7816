"""Where candidates are scored: in this process, in several, or on a Ray cluster. All give the same numbers for the same work."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, Protocol

from planc.compiler.search.evolution import Score, Text
from planc.compiler.search.fitness import Evaluator, Recipe
from planc.compiler.search.space import Point
from planc.runtime.errors import InputError

Task = tuple[Sequence[Point], Sequence[int]]  #: points to score on one piece of text


class Workers(Protocol):
    """Runs tasks; results come in the order of the tasks."""

    count: int

    def run(self, tasks: Sequence[Task]) -> list[list[float]]:
        """What `Evaluator.divergence` gives for each task."""


def scorer(workers: Workers, tick: Callable[[int], None] = lambda tokens: None) -> Score:
    """The mean divergence per position, with pieces of text, and if there are few of them the points, spread over the workers.

    `tick` is told how many tokens were read by candidates.
    """

    def score(points: Sequence[Point], text: Text) -> list[float]:
        parts = min(len(points), math.ceil(workers.count / len(text)))
        chunks = [points[i * len(points) // parts : (i + 1) * len(points) // parts] for i in range(parts)]
        sums = iter(workers.run([(chunk, piece) for piece in text for chunk in chunks]))
        totals = [0.0] * len(points)
        for _ in text:
            found = [value for _ in chunks for value in next(sums)]
            totals = [total + value for total, value in zip(totals, found, strict=True)]
        tick(sum(map(len, text)) * len(points))
        return [total / sum(len(piece) - 1 for piece in text) for total in totals]

    return score


class Local:
    """This process."""

    count = 1

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def run(self, tasks: Sequence[Task]) -> list[list[float]]:
        """See Workers."""
        return [self._evaluator.divergence(*task) for task in tasks]


_evaluator: Evaluator | None = None  # of a worker process


def _prepare(recipe: Recipe) -> None:
    global _evaluator
    _evaluator = recipe.evaluator()


def _divergence(task: Task) -> list[float]:
    assert _evaluator is not None
    return _evaluator.divergence(*task)


class Processes:
    """Fresh processes on this machine; each loads the model once."""

    def __init__(self, executor: ProcessPoolExecutor, count: int) -> None:
        self._executor, self.count = executor, count

    @classmethod
    @contextmanager
    def started(cls, recipe: Recipe, count: int) -> Iterator[Processes]:
        """Running until the block is left."""
        with ProcessPoolExecutor(count, get_context("spawn"), _prepare, (recipe,)) as executor:
            yield cls(executor, count)

    def run(self, tasks: Sequence[Task]) -> list[list[float]]:
        """See Workers."""
        return list(self._executor.map(_divergence, tasks))


class RayWorkers:
    """Actors on a Ray cluster: the one that the environment names, or a new one on this machine."""

    def __init__(self, actors: list[Any]) -> None:
        self._actors, self.count = actors, len(actors)

    @classmethod
    @contextmanager
    def started(cls, recipe: Recipe, count: int) -> Iterator[RayWorkers]:
        """Running until the block is left; a cluster that was started here stops with it.

        Raises InputError[backend-missing] when Ray is not installed.
        """
        try:
            import ray
        except ImportError:
            raise InputError("backend-missing", "ray is not installed", where="--ray", fix="pip install 'planc[ray]'") from None
        own = not ray.is_initialized()
        if own:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            # a cluster of our own has a slot per actor, or the actors would wait for ever
            ray.init(
                num_cpus=None if "RAY_ADDRESS" in os.environ else count,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
            )
        try:
            actor: Any = ray.remote(_Actor)
            actors = [actor.options(num_cpus=1).remote(recipe) for _ in range(count)]
            ray.get([each.ready.remote() for each in actors])
            yield cls(actors)
        finally:
            if own:
                ray.shutdown()

    def run(self, tasks: Sequence[Task]) -> list[list[float]]:
        """See Workers."""
        from ray.util import ActorPool

        return list(ActorPool(self._actors).map(lambda actor, task: actor.divergence.remote(*task), list(tasks)))


class _Actor:
    def __init__(self, recipe: Recipe) -> None:
        self._evaluator = recipe.evaluator()

    def ready(self) -> bool:
        return True

    def divergence(self, points: Sequence[Point], ids: Sequence[int]) -> list[float]:
        return self._evaluator.divergence(points, ids)


@contextmanager
def started(recipe: Recipe, evaluator: Evaluator, count: int, ray: bool) -> Iterator[Workers]:
    """The workers that a command asks for: with one and no cluster it is this process."""
    if ray:
        with RayWorkers.started(recipe, count) as cluster:
            yield cluster
    elif count > 1:
        with Processes.started(recipe, count) as processes:
            yield processes
    else:
        yield Local(evaluator)
