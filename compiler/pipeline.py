"""The pipeline: passes sorted into stages, verified and probed one by one.

DUMP (environment) prints to stderr while compiling: 1 the order and timing, 2 the graph after each pass, 3 each node that a pass made, 4 the
lowered ONNX nodes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from planc.backends.reference import probe
from planc.compiler.passbase import Context, Pass
from planc.compiler.printer import show
from planc.compiler.program import Program
from planc.compiler.verify import verify
from planc.runtime.contract import PassEffect
from planc.runtime.errors import CompileError, PlanError


def dump_level() -> int:
    """Value of DUMP, 0 when it is not set to a number."""
    value = os.environ.get("DUMP", "0")
    return int(value) if value.isdigit() else 0


def dump(level: int, text: Callable[[], str]) -> None:
    """Print `text` to stderr at this level of DUMP or a higher one."""
    if dump_level() >= level:
        print(text(), file=sys.stderr, flush=True)


def ordered(passes: Iterable[Pass]) -> list[Pass]:
    """By stage; inside a stage as given, except that a pass follows those it names in `after`."""
    rest = sorted(passes, key=lambda p: p.stage)
    result: list[Pass] = []
    while rest:
        waiting = {(p.stage, p.key) for p in rest}
        index = next((i for i, p in enumerate(rest) if not any((p.stage, key) in waiting for key in p.after)), None)
        if index is None or rest[index].stage != rest[0].stage:
            raise PlanError("plan-conflict", f"the passes {', '.join(p.key for p in rest)} wait for each other")
        result.append(rest.pop(index))
    return result


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    context: Context,
    *,
    sample: Tensor | None = None,
    check: bool = True,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[Program, tuple[PassEffect, ...]]:
    """Apply the passes in order.

    With `check` each program is verified; with `sample` (token ids [B,R]) logits are compared before and after each pass, and a pass that
    declares itself exact but is not is refused with CompileError[equality-failed].
    """
    done = ordered(passes)
    dump(1, lambda: "passes: " + " -> ".join(p.key for p in done))
    logits = probe(program, sample)["logits"] if sample is not None and "logits" in program.outputs else None
    effects = []
    for part in done:
        note(part.key)
        start = time.perf_counter()
        try:
            new = part.apply(program, context)
        except CompileError as error:
            error.where = error.where or f"pass {part.key}"
            error.where += f", after: {', '.join(c.pass_name for c in program.history) or 'nothing'}"
            raise
        if check:
            verify(new, part.key, tuple(program.outputs))
        difference = None
        if logits is not None and sample is not None and new is not program:
            after = probe(new, sample)["logits"]
            difference = float((after - logits).abs().max())
            _check_effect(part, difference, float(logits.abs().max()))
            logits = after
        effects.append(_effect(part, program, new, difference, time.perf_counter() - start))
        _report(part, effects[-1], new)
        program = new
    return program, tuple(effects)


def _report(part: Pass, effect: PassEffect, program: Program) -> None:
    dump(1, lambda: f"  {effect.name}: {effect.nodes_before} -> {effect.nodes_after} nodes, {effect.seconds:.2f} s")
    dump(2, lambda: show(program))
    dump(3, lambda: _made(program, part.key))


def bisect(program: Program, passes: Sequence[Pass], context: Context, sample: Tensor, tolerance: float = 1e-3) -> str | None:
    """Key of the first pass after which the logits on `sample` differ by more than `tolerance` times the largest, or None."""
    wanted = probe(program, sample)["logits"]
    for part in ordered(passes):
        program = part.apply(program, context)
        difference = float((probe(program, sample)["logits"] - wanted).abs().max())
        if not difference <= tolerance * float(wanted.abs().max()):  # NaN is a difference, too
            return part.key
    return None


def _check_effect(part: Pass, difference: float, largest: float) -> None:
    effect = part.effect
    if effect.kind != "changes" and not difference <= effect.tolerance * max(largest, 1.0):  # NaN is not equal either
        raise CompileError(
            "equality-failed",
            f"{part.key} declares itself {effect.kind} (within {effect.tolerance:g} of the largest logit) but moved a logit by {difference:.3g}",
            where=f"pass {part.key}",
            fix=f"switch it off with --disable {part.key}",
        )


def _effect(part: Pass, old: Program, new: Program, difference: float | None, seconds: float) -> PassEffect:
    change = new.history[-1] if len(new.history) > len(old.history) else None
    return PassEffect(
        name=part.key,
        declared=part.effect.kind,
        nodes_before=len(old.main.nodes),
        nodes_after=len(new.main.nodes),
        params_bytes_before=old.bytes(),
        params_bytes_after=new.bytes(),
        counts={"matched": change.matched, "rewritten": change.rewritten} if change else {"matched": 0, "rewritten": 0},
        largest_difference=difference,
        notes=change.notes if change else ("nothing to do",),
        seconds=round(seconds, 3),
    )


def _made(program: Program, key: str) -> str:
    lines = [f"    {n.name} = {n.target}  from {n.meta.get('origin', '?')}" for n in program.main.nodes if n.meta.get("pass") == key]
    return "\n".join([f"  made by {key}:", *lines])
