"""`planc search` as a function: build the space, evolve a plan for each budget, keep the state on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from planc.compiler import files
from planc.compiler.compile import Planned, text_of
from planc.compiler.plan import Plan
from planc.compiler.quality import read_windows
from planc.compiler.search.budget import Budget
from planc.compiler.search.candidates import Candidates
from planc.compiler.search.evolution import Score, State, Text, evolve, start
from planc.compiler.search.fitness import Evaluator, Recipe, started
from planc.compiler.search.picture import Front, png
from planc.compiler.search.space import Infeasible, LevelSpace, Point
from planc.compiler.search.times import level_times
from planc.compiler.search.workers import scorer
from planc.compiler.search.workers import started as working
from planc.runtime.errors import InputError, PlanError

TEXT_TOKENS = 65_536  # of a text that is named
REPORTED = 16  # pieces of text on which the result is scored
_COUNTS = ("params", "nonzeros", "bytes")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Found:
    """The best plan for a budget. Divergences are in nats per token, over `tokens` of the text that was searched on."""

    budget: str
    plan: Plan
    point: Point
    cost: float  # of the first bound, in its unit (or percent)
    reached: str  # all bounds, as a budget is written
    kl: float
    start_kl: float  # of the best random plan, where the evolution started
    tokens: int
    history: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {**asdict(self), "plan": self.plan.to_dict(), "point": list(self.point), "history": list(self.history)}


@dataclass(frozen=True)
class Result:
    """The plans found, in the order of the budgets, and every point that was scored on the way as (cost, KL)."""

    found: tuple[Found, ...]
    tried: tuple[tuple[float, float], ...]
    unit: str


def search(
    model: Any,
    plan: Plan,
    budgets: Sequence[str] = (),
    *,
    text: Path | None = None,
    seed: int = 0,
    generations: int | None = None,
    workers: int = 1,
    ray: bool = False,
    state: Path | None = None,
    resume: bool = False,
    note: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda done, total: None,
) -> Result:
    """Settle what a plan leaves open.

    Args:
        model: what `planc.compile` takes, or for one worker what `started` made of it.
        plan: with a section `search`.
        budgets: one plan is found for each; empty takes the budget of the plan.
        text: file to compare on; None takes planc's own calibration text, which is short.
        seed: the same seed gives the same plans, with the same number of workers.
        generations: instead of the plan's.
        workers, ray: processes on this machine, or actors on a Ray cluster.
        state: JSON file that is rewritten after every generation.
        resume: go on from that file.

    Raises PlanError[search-infeasible] with the nearest budget that can be met, and InputError[input-invalid] for a state of another search.
    """
    if isinstance(model, Planned) and (workers > 1 or ray):
        raise InputError("input-invalid", "several workers trace the model themselves", where="model", fix="give its name, path or module")
    plan, wanted = _settled(plan, budgets, generations)
    settings = plan.search
    assert settings is not None
    note("loading and tracing the model")
    begun = started(model)
    candidates = Candidates(begun, plan, note)
    spaces, full = spaces_of(candidates, wanted, note)
    pieces = _pieces(begun, text, settings.length)
    memory = _Memory(state, _identity(plan, model, begun, pieces, seed), resume)
    note(f"{len(candidates.units)} units, {sum(map(len, pieces))} tokens of text")
    recipe = Recipe(model, plan, max(1, (os.cpu_count() or 1) // workers))
    found, tried = [], list[tuple[float, float]]()
    total = settings.generations * len(wanted)
    with working(recipe, Evaluator(candidates), workers, ray) as pool:
        for number, (budget, space) in enumerate(zip(wanted, spaces, strict=True)):
            score = _recorded(scorer(pool), space, budget, full, tried)
            now = memory.states.get(budget.text) or start(space, settings, score, pieces, seed)
            first = memory.firsts.setdefault(budget.text, now.parent)

            def done(now: State, budget: Budget = budget, base: int = number * settings.generations) -> None:
                memory.keep(budget.text, now)
                progress(base + now.generation, total)

            now = evolve(space, settings, score, pieces, seed, now, done)
            found.append(_found(candidates, space, budget, full, now, first, scorer(pool), pieces[:REPORTED]))
    return Result(tuple(found), tuple(tried), _axis(wanted[0]))


def _settled(plan: Plan, budgets: Sequence[str], generations: int | None) -> tuple[Plan, list[Budget]]:
    if plan.search is None:
        raise PlanError(
            "plan-requires", "the plan has no section `search`", plan=plan.where(), fix="say in `search: {space: [...]}` what is open"
        )
    texts = list(budgets) or ([plan.search.budget] if plan.search.budget else [])
    if not texts:
        raise InputError("input-invalid", "no budget is given", where="--budget", fix="say --budget '75% params', or `budget` in the plan")
    try:
        wanted = [Budget.parse(text) for text in texts]
    except ValueError as error:
        raise InputError("input-invalid", str(error), where="--budget") from None
    if len({budget.resources for budget in wanted}) > 1:
        raise InputError("input-invalid", "all budgets of one search must bound the same things", where="--budget")
    if generations is not None:
        plan = plan.model_copy(update={"search": plan.search.model_copy(update={"generations": generations})})
    return plan, wanted


# ---- the space ---------------------------------------------------------------------------------------------------------------------


def spaces_of(candidates: Candidates, budgets: Sequence[Budget], note: Callable[[str], None]) -> tuple[list[LevelSpace], dict[str, int]]:
    """A space for each budget, and what the unchanged model costs.

    Raises PlanError[search-infeasible] with the nearest budget that can be met.
    """
    top, added, full = dict[str, int](), dict[str, list[list[int]]](), dict[str, int]()
    resources = budgets[0].resources
    if any(name in _COUNTS for name in resources):
        note("counting what each level costs")
        top, added = _counted(candidates)
        full = candidates.counts(candidates.original)
    if "time" in resources:
        top["time"], added["time"], full["time"] = level_times(candidates, note)
    for kind, name in (("attention", "attention"), ("mlp", "mlp"), ("layer", "layers")):
        if name not in resources:
            continue
        top[name] = full[name] = sum(unit.kind == kind for unit in candidates.units)
        added[name] = [[0, *[-int(unit.kind == kind)] * (len(unit.levels) - 1)] for unit in candidates.units]
        if not top[name]:
            raise PlanError("search-infeasible", f"the search drops no {name}", where="--budget", fix="see `unit` of `drop`")
    costs = [np.array([added[name][u] for name in resources], dtype=np.int64).T for u in range(len(candidates.units))]
    rest = np.array([top[name] for name in resources], dtype=np.int64)
    spaces = []
    for budget in budgets:
        limits = np.array(budget.limits(full), dtype=np.int64)
        try:
            spaces.append(LevelSpace(costs, rest, limits, candidates.attentions))
        except Infeasible as error:
            least = budget.show(tuple(max(a, int(b)) for a, b in zip(error.least, limits, strict=True)), full)
            place = (
                candidates.plan.where("search", "budget")
                if candidates.plan.search and candidates.plan.search.budget == budget.text
                else None
            )
            message = f"no plan of this search is within {budget.text}"
            raise PlanError(
                "search-infeasible", message, plan=place, where="--budget", fix=f"the nearest that can be had: {least}"
            ) from None
    return spaces, full


def _counted(candidates: Candidates) -> tuple[dict[str, int], dict[str, list[list[int]]]]:
    """Counts of the program at its best levels, and what each level of each unit adds to them alone."""
    top = candidates.counts(candidates.program(candidates.top))
    added: dict[str, list[list[int]]] = {name: [] for name in top}
    for u, unit in enumerate(candidates.units):
        points = [tuple(level if i == u else 0 for i in range(len(candidates.units))) for level in range(1, len(unit.levels))]
        counts = [top, *(candidates.counts(candidates.program(point)) for point in points)]
        for name in top:
            added[name].append([count[name] - top[name] for count in counts])
    return top, added


def _pieces(begun: Planned, text: Path | None, length: int) -> Text:
    """Pieces of text to compare on."""
    if text is not None:
        return read_windows(text, text_of(begun.model).encode, tokens=TEXT_TOKENS, window=length, where="--text")
    ids = begun.text_ids
    return [ids[i : i + length] for i in range(0, len(ids) - 1, length)]


# ---- results -----------------------------------------------------------------------------------------------------------------------


def _found(
    candidates: Candidates,
    space: LevelSpace,
    budget: Budget,
    full: dict[str, int],
    now: State,
    first: Point,
    score: Score,
    pieces: Text,
) -> Found:
    kl, start_kl = score([now.parent, first], pieces)
    counts = tuple(map(int, space.cost(now.parent)))
    return Found(
        budget.text,
        candidates.resolved(now.parent),
        now.parent,
        _amount(budget, counts[0], full),
        budget.show(counts, full),
        kl,
        start_kl,
        sum(map(len, pieces)),
        now.history,
    )


def _recorded(score: Score, space: LevelSpace, budget: Budget, full: dict[str, int], tried: list[tuple[float, float]]) -> Score:
    """The score, which also remembers what it was asked for."""

    def recorded(points: Sequence[Point], text: Text) -> list[float]:
        values = score(points, text)
        tried.extend((_amount(budget, int(space.cost(point)[0]), full), value) for point, value in zip(points, values, strict=True))
        return values

    return recorded


def _amount(budget: Budget, count: int, full: dict[str, int]) -> float:
    return float(budget.bounds[0].show(count, full[budget.bounds[0].resource]).partition(" ")[0].rstrip("%"))


def _axis(budget: Budget) -> str:
    bound = budget.bounds[0]
    return f"% of the model's {bound.unit}" if bound.percent else bound.unit


def picture_of(result: Result, title: str) -> bytes:
    """The PNG of a result."""
    best = [(found.cost, found.kl, found.budget) for found in result.found]
    return png(Front(title, result.unit, result.tried, best))


# ---- state -------------------------------------------------------------------------------------------------------------------------


def _identity(plan: Plan, model: Any, begun: Planned, pieces: Text, seed: int) -> str:
    """What a state belongs to. More generations of the same search go on from it."""
    data = plan.to_dict()
    data["search"].pop("generations", None)
    data["search"].pop("budget", None)
    name = model if isinstance(model, str | Path) else begun.model.name
    text = json.dumps([data, str(name), [list(piece) for piece in pieces], seed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class _Memory:
    """States by budget, in a file that is replaced as a whole, so that a kill at any moment leaves a complete one."""

    def __init__(self, path: Path | None, identity: str, resume: bool) -> None:
        self._path, self._identity = path, identity
        self.states: dict[str, State] = {}
        self.firsts: dict[str, Point] = {}
        if not resume or path is None or not path.is_file():
            return
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["search"] != identity:
                message = f"{path} belongs to another search: the plan, the model, the text or the seed differs"
                raise InputError("input-invalid", message, where="--resume", fix="leave out --resume, or name another output")
            for budget, entry in data["budgets"].items():
                self.states[budget] = State(tuple(entry["parent"]), entry["generation"], tuple(entry["history"]))
                self.firsts[budget] = tuple(entry["first"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InputError("input-invalid", f"{path} is not the state of a search: {error}", where="--resume") from None

    def keep(self, budget: str, state: State) -> None:
        """Write the state of a budget."""
        self.states[budget] = state
        if self._path is not None:
            entries = {text: {**state.as_dict(), "first": list(self.firsts[text])} for text, state in self.states.items()}
            files.write(self._path, json.dumps({"search": self._identity, "budgets": entries}).encode())
