"""Skip decoder layers that the plan names.

Matches   h2 = layer_i(h1), i in layers        Produces  uses of h2 read h1; the layer's parameters and cache slot are gone
Keeps     shapes, dtypes, outputs              Refuses   a layer that the model does not have; all layers at once
Paper     used by SWIFT (43), EvoPress (18), ShortGPT-style depth pruning
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from pydantic import Field
from torch.fx import Node

from planc.compiler.blocks import find_blocks
from planc.compiler.passbase import Context, Pass, Stage
from planc.compiler.program import Block, Program
from planc.runtime.errors import CompileError


def check_layers(layers: Iterable[int], blocks: Mapping[int, Block], key: str) -> None:
    """Raise CompileError[skip-out-of-range] for a layer number that is not in `blocks`."""
    if wrong := sorted(set(layers) - set(blocks)):
        have = f"{len(blocks)} decoder layers, {min(blocks)}..{max(blocks)}" if blocks else "no decoder layers"
        which = ", ".join(map(str, wrong))
        raise CompileError(
            "skip-out-of-range",
            f"layer {which} does not exist (the model has {have})",
            where=f"pass {key}",
            fix=f"use {min(blocks)}..{max(blocks)}, or remove {which} from the list" if blocks else None,
        )


class SkipLayers(Pass):
    """Remove whole decoder layers from the graph."""

    stage: ClassVar[Stage] = Stage.STRUCTURE
    layers: tuple[int, ...] = Field(description="numbers of the layers to skip, counted from 0 in the original model")

    def apply(self, program: Program, context: Context) -> Program:
        """Connect each skipped layer's readers to its input."""
        if not self.layers or any(c.pass_name == self.key and self.layers == tuple(map(int, c.notes)) for c in program.history):
            return program
        blocks = {b.index: b for b in find_blocks(program)}
        check_layers(self.layers, blocks, self.key)
        if len(set(self.layers)) == len(blocks):
            raise CompileError("pass-refused", "all decoder layers are skipped", where=f"pass {self.key}", fix="leave at least one layer")
        edit = program.edit(self.key)
        moved: dict[Node, Node] = {}
        for index in sorted(set(self.layers)):
            exit_, entry = edit[blocks[index].exit], edit[blocks[index].entry]
            while entry in moved:  # the layer before was skipped as well
                entry = moved[entry]
            edit.replace(exit_, entry)
            moved[exit_] = entry
        return edit.done(len(set(self.layers)), len(set(self.layers)), notes=map(str, self.layers))
