"""What a pass costs with each level, measured on the plan's target, for budgets in milliseconds."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from planc.backends.onnx.artifact import signature
from planc.backends.onnx.engine import OnnxEngine
from planc.backends.onnx.lower import lower
from planc.compiler.compile import demanded
from planc.compiler.passbase import Context, Stage
from planc.compiler.pipeline import run_passes
from planc.compiler.program import Program
from planc.runtime.artifact import Manifest
from planc.runtime.engine import Step
from planc.runtime.errors import PlanError
from planc.runtime.profile import fill_cache

if TYPE_CHECKING:
    from planc.compiler.search.candidates import Candidates

PAST, ROUNDS = 128, 15  # cached tokens behind which a pass of one row is timed, and how often


def level_times(candidates: Candidates, note: Callable[[str], None]) -> tuple[int, list[list[int]], int]:
    """Nanoseconds of a pass with every unit at its best level, what each level of each unit adds to them, and those of the unchanged model.

    Units of a kind share their times, so that exchanging one for another leaves the budget as it is. A level's time is that of a program in
    which all units of a kind but one have it, so what a unit saves is a mean.

    Raises PlanError[plan-conflict] for a target that is not ONNX Runtime.
    """
    target = candidates.plan.target
    if target.backend != "onnx":
        place = candidates.plan.where("target", "backend") or "target.backend"
        raise PlanError(
            "plan-conflict", f"milliseconds are not measured on the {target.backend} backend", plan=place, fix="use `backend: onnx`"
        )
    kinds = dict.fromkeys((unit.kind, unit.levels) for unit in candidates.units)
    members = {kind: [i for i, unit in enumerate(candidates.units) if unit.kind == kind] for kind, _ in kinds}
    cases: dict[tuple[str, int] | str, Program] = {"full": candidates.original, "top": candidates.program(candidates.top)}
    for kind, levels in kinds:
        moved = members[kind][1:] or members[kind]
        for level in range(1, len(levels)):
            cases[kind, level] = candidates.program(tuple(level if i in moved else 0 for i in range(len(candidates.units))))
    ns = _measured(candidates, cases, note)
    added = []
    for unit in candidates.units:
        count = len(members[unit.kind][1:] or members[unit.kind])
        added.append([0, *((ns[unit.kind, level] - ns["top"]) // count for level in range(1, len(unit.levels)))])
    return ns["top"], added, ns["full"]


def _measured(
    candidates: Candidates, cases: dict[tuple[str, int] | str, Program], note: Callable[[str], None]
) -> dict[tuple[str, int] | str, int]:
    """Medians in nanoseconds of one-row passes of each program, taken in turns."""
    plan = candidates.plan
    later = [part for part in demanded(plan) if part.stage > Stage.NUMERICS]
    times: dict[tuple[str, int] | str, list[int]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory(prefix="planc-") as folder:
        engines = []
        for number, (case, program) in enumerate(cases.items()):
            note(f"lowering level {number + 1} of {len(cases)} to be timed")
            ready, _ = run_passes(program, later, Context())
            directory = Path(folder) / str(number)
            directory.mkdir()
            capacity = min(2 * PAST, program.info.max_length)
            lower(ready, directory, ops=plan.target.ops, positions=capacity)
            engine = OnnxEngine(directory, Manifest(planc="0", signature=signature(ready, capacity)), plan.target.threads)
            cache = engine.new_cache(1, capacity)
            fill_cache(engine, cache, np.zeros((1, capacity // 2), dtype=np.int64))
            engines.append((case, engine, cache))
        note("timing the levels")
        for turn in range(ROUNDS + 1):
            for case, engine, cache in engines:
                begin = time.perf_counter_ns()
                engine.forward(cache, Step(np.array([[1]])))
                if turn:
                    times[case].append(time.perf_counter_ns() - begin)
    return {case: int(np.median(values)) for case, values in times.items()}
