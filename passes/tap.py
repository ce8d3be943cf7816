"""Output hidden states.

Matches   the hidden state that leaves layer i, i in layers        Produces  the output `tap.i` [B,R,K]
Refuses   a layer that the model does not have
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from planc.compiler.blocks import find_blocks
from planc.compiler.passbase import EXACT, Context, Effect, Pass, Stage
from planc.compiler.program import Program
from planc.passes.skip_layers import check_layers


class Tap(Pass):
    """Add the hidden states behind some layers as outputs."""

    stage: ClassVar[Stage] = Stage.OUTPUTS
    layers: tuple[int, ...] = Field(min_length=1)

    @property
    def effect(self) -> Effect:
        """Only adds outputs."""
        return EXACT

    def apply(self, program: Program, context: Context) -> Program:
        """Name the states; nothing is computed that was not."""
        blocks = {b.index: b for b in find_blocks(program)}
        check_layers(self.layers, blocks, self.key)
        if all(f"tap.{i}" in program.outputs for i in self.layers):
            return program
        edit = program.edit(self.key)
        edit.outputs(**{f"tap.{i}": edit[blocks[i].exit] for i in self.layers})
        return edit.done(len(self.layers), len(self.layers))
