"""Skip decoder layers, or the attention or MLP of a layer, that the plan names.

Matches   h2 = layer_i(h1), i in layers        Produces  uses of h2 read h1; the layer's parameters and cache slot are gone
          h2 = h1 + attention_i(h1), or mlp_i            the same for the sublayer alone
Keeps     shapes, dtypes, outputs              Refuses   a layer that the model does not have; all layers or all attentions at once
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
from planc.compiler.units import Unit, find_units
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
    """Remove whole decoder layers, or attentions and MLPs on their own, from the graph."""

    stage: ClassVar[Stage] = Stage.STRUCTURE
    layers: tuple[int, ...] = Field((), description="numbers of the layers to skip, counted from 0 in the original model")
    attention: tuple[int, ...] = Field((), description="layers that lose only their attention, and with it their part of the cache")
    mlp: tuple[int, ...] = Field((), description="layers that lose only their MLP")
    keep: tuple[int, ...] | None = Field(None, min_length=1, description="instead of `layers`: numbers of the layers that stay")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.keep is not None and self.layers:
            raise PlanError("plan-bad-value", "skip_layers takes layers or keep, not both", fix="skip_layers: {keep: [0, 1]}")
        return self

    def apply(self, program: Program, context: Context) -> Program:
        """Connect each skipped layer's readers to its input, and replace each sum with a skipped sublayer by its other summand."""
        blocks = {b.index: b for b in find_blocks(program)}
        names = self._names(blocks)
        if not names or any(c.pass_name == self.key and names == c.notes for c in program.history):
            return program
        check_layers((*(self.layers or self.keep or ()), *self.attention, *self.mlp), blocks, self.key)
        whole = self._whole(blocks)
        if whole.union(self.attention) == set(blocks):
            what = "decoder layers" if whole == set(blocks) else "attentions"
            raise CompileError("pass-refused", f"all {what} are skipped", where=f"pass {self.key}", fix="leave at least one")
        if any(c.pass_name == "slice" and c.notes[-1].endswith("layer") for c in program.history):
            message = "each sublayer has a basis of its own since `slice`, so what goes in cannot stand for what comes out"
            raise CompileError("pass-refused", message, where=f"pass {self.key}", fix="skip layers first, or use `bases: one`")
        edit = program.edit(self.key)
        moved: dict[Node, Node] = {}  # a node that is gone, and what its readers read now
        for unit in self._units(program, whole):
            total, other = _sum_with(edit[unit.term], moved)
            edit.replace(total, other)
            moved[total] = other
        for index in sorted(whole):
            exit_, entry = edit[blocks[index].exit], edit[blocks[index].entry]
            while entry in moved:  # the layer before was skipped as well, or ends in a sublayer that was
                entry = moved[entry]
            edit.replace(exit_, entry)
            moved[exit_] = entry
        return edit.done(len(set(names)), len(set(names)), notes=names)

    def _whole(self, blocks: Mapping[int, Block]) -> set[int]:
        return set(self.layers) if self.keep is None else set(blocks) - set(self.keep)

    def _names(self, blocks: Mapping[int, Block]) -> tuple[str, ...]:
        whole = self.layers if self.keep is None else sorted(self._whole(blocks))
        return (*map(str, whole), *(f"attention {i}" for i in self.attention), *(f"mlp {i}" for i in self.mlp))

    def _units(self, program: Program, whole: set[int]) -> list[Unit]:
        """The named sublayers of layers that stay."""
        wanted = [(i, kind) for kind, layers in (("attention", self.attention), ("mlp", self.mlp)) for i in layers if i not in whole]
        units: dict[tuple[int, str], Unit] = {(unit.layer, unit.kind): unit for unit in find_units(program)} if wanted else {}
        for index, kind in wanted:
            if (index, kind) not in units:
                message = f"layer {index} does not add its {kind} to the hidden state, so it cannot be left out on its own"
                raise CompileError("pass-refused", message, where=f"pass {self.key}", fix=f"skip the whole layer with `layers: [{index}]`")
        return [units[key] for key in dict.fromkeys(wanted)]


def _sum_with(term: Node, moved: Mapping[Node, Node]) -> tuple[Node, Node]:
    """The sum that reads the term, and its other summand."""
    [total] = [user for user in term.users if user not in moved]
    first, second = total.args[:2]
    return total, second if first is term else first
