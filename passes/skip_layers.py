"""Skip decoder layers that the plan names.

Matches   h2 = layer_i(h1), i in layers        Produces  uses of h2 read h1; the layer's parameters and cache slot are gone
Keeps     shapes, dtypes, outputs              Refuses   a layer that the model does not have; all layers at once
Paper     used by SWIFT (43), EvoPress (18), ShortGPT-style depth pruning
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar, Self

from pydantic import Field, model_validator
from torch.fx import Node

from planc.compiler.blocks import find_blocks
from planc.compiler.passbase import Context, Pass, Stage
from planc.compiler.program import Block, Program
from planc.runtime.errors import CompileError, PlanError


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
    layers: tuple[int, ...] = Field((), description="numbers of the layers to skip, counted from 0 in the original model")
    keep: tuple[int, ...] | None = Field(None, min_length=1, description="instead of `layers`: numbers of the layers that stay")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.keep is not None and self.layers:
            raise PlanError("plan-bad-value", "skip_layers takes layers or keep, not both", fix="skip_layers: {keep: [0, 1]}")
        return self

    def apply(self, program: Program, context: Context) -> Program:
        """Connect each skipped layer's readers to its input."""
        if any(c.pass_name == self.key and self.layers == tuple(map(int, c.notes)) for c in program.history):
            return program
        blocks = {b.index: b for b in find_blocks(program)}
        check_layers(self.layers or self.keep or (), blocks, self.key)
        skipped = self.layers if self.keep is None else tuple(i for i in blocks if i not in self.keep)
        if not skipped:
            return program
        if len(set(skipped)) == len(blocks):
            raise CompileError("pass-refused", "all decoder layers are skipped", where=f"pass {self.key}", fix="leave at least one layer")
        edit = program.edit(self.key)
        moved: dict[Node, Node] = {}
        for index in sorted(set(skipped)):
            exit_, entry = edit[blocks[index].exit], edit[blocks[index].entry]
            while entry in moved:  # the layer before was skipped as well
                entry = moved[entry]
            edit.replace(exit_, entry)
            moved[exit_] = entry
        return edit.done(len(set(skipped)), len(set(skipped)), notes=map(str, skipped))
