"""What a pass is: a frozen record of options with one function, Program -> Program."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from planc.compiler.program import Program
from planc.runtime.registry import PlanPart


class Stage(IntEnum):
    """The order of the pipeline."""

    STRUCTURE = 1
    NUMERICS = 2
    STATE = 3
    OUTPUTS = 4
    SCHEDULE = 5


@dataclass(frozen=True)
class Effect:
    """What a pass may do to the logits: `exact` (within `tolerance` times the largest logit), `bounded` or `changes`."""

    kind: str
    tolerance: float = 0.0


EXACT = Effect("exact", 1e-5)
CHANGES = Effect("changes")


@dataclass(frozen=True)
class Context:
    """What a pass may use besides the program: what to calibrate on (token ids [S, L], or images [S, C, Y, X]), a note of progress, and where its
    files lie."""

    calibration: Tensor | None = None
    progress: Any = None
    folder: Path = Path()  # that of the plan


class Pass(PlanPart):
    """A rewrite. Fields are the plan options; `apply` is pure and never stores anything on the pass."""

    kind: ClassVar[str] = "pass"
    stage: ClassVar[Stage]
    conflicts: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[tuple[str, ...]] = ()  # passes of the same stage that must have run
    demands: ClassVar[tuple[str, ...]] = ()  # passes that compile adds by itself
    calibrates: ClassVar[bool] = False  # whether `Context.calibration` is read

    @property
    def effect(self) -> Effect:
        """The declared effect; probed after the pass."""
        return CHANGES

    def apply(self, program: Program, context: Context) -> Program:
        """The rewritten program.

        Raises CompileError[pass-refused] or a code of its own where the program does not allow the rewrite.
        """
        raise NotImplementedError
