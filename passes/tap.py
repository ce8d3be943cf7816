"""Output hidden states.

Matches   the hidden state that leaves layer i, i in layers        Produces  the output `tap.i` [B,R,K]
          the state that the head multiplies, with `final`                   the output `tap.state` [B,R,K]
Refuses   a layer that the model does not have
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from planc.compiler.blocks import find_blocks, head_of
from planc.compiler.passbase import EXACT, Context, Effect, Pass, Stage
from planc.compiler.program import Program
from planc.passes.skip_layers import check_layers
from planc.runtime.drafters.head_source import STATE
from planc.runtime.errors import PlanError


class Tap(Pass):
    """Add the hidden states behind some layers as outputs."""

    stage: ClassVar[Stage] = Stage.OUTPUTS
    layers: tuple[int, ...] = ()
    final: bool = Field(False, description="the state behind the last norm, which the head multiplies, as `tap.state`")

    @property
    def effect(self) -> Effect:
        """Only adds outputs."""
        return EXACT

    def apply(self, program: Program, context: Context) -> Program:
        """Name the states; nothing is computed that was not."""
        blocks = {b.index: b for b in find_blocks(program)} if self.layers else {}
        check_layers(self.layers, blocks, self.key)
        wanted: dict[str, Any] = {f"tap.{i}": blocks[i].exit for i in self.layers}
        if self.final:
            wanted[STATE] = head_of(program).args[0].name
        new = {name: node for name, node in wanted.items() if name not in program.outputs}
        if not new:
            return program
        edit = program.edit(self.key)
        edit.outputs(**{name: edit[node] for name, node in new.items()})
        return edit.done(len(new), len(new))

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.layers and not self.final:
            raise PlanError("plan-bad-value", "tap outputs nothing: it names no layers", fix="tap: {layers: [0]}, or tap: {final: true}")
        return self
