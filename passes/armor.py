"""Replace dense layers by an N:M-sparse core between two block-diagonal wrappers, which take up part of what the zeros cost (ARMOR).

Matches   linear(x, W, c)       Produces  block_diagonal(linear(block_diagonal(x, B), S), A) + c, of every M neighbours in a row of S at most N not 0
Refuses   blocks that do not divide both sides of a matrix, or M that does not divide a block; weights with NaN; patterns that match nothing
Paper     62 ARMOR. On a CPU nothing gets faster: no kernel skips the zeros, and the wrappers are work on top. It is about what N:M keeps of a model.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch.fx import Node

from planc.compiler.calibration import Moments, calibration_text, collect
from planc.compiler.dialect import OPS
from planc.compiler.factors import Factors, Selection, factorise
from planc.compiler.passbase import Context, Pass, Stage
from planc.compiler.program import Editor, Program, describe, module_matches
from planc.runtime.errors import CompileError, PlanError

aten = torch.ops.aten


class Armor(Pass):
    """Factorise dense layers into wrappers and a sparse core."""

    stage: ClassVar[Stage] = Stage.STRUCTURE
    after: ClassVar[tuple[str, ...]] = ("prune", "realise", "slice")
    calibrates: ClassVar[bool] = True
    pattern: str = Field(default="2:4", pattern=r"^[1-9]:[2-8]$", description="N:M: of M neighbouring inputs of an output N stay")
    block: int = Field(default=32, ge=2, description="size of the wrappers' blocks; divides both sides of every matrix")
    steps: int = Field(default=300, ge=0, description="of the search; 0: the wrappers are scales, and the heaviest N of every M stay")
    rate: float = Field(default=1e-3, gt=0, description="Adam's learning rate")
    select: Selection = Field(
        default="random", description="which group of a block is chosen anew in a step: random by its gradient, greedy by it, or uniform"
    )
    seed: int = Field(default=0, description="of that choice")
    modules: tuple[str, ...] = Field(default=(), description="patterns of module paths; default: all dense layers but the last")

    @model_validator(mode="after")
    def _check(self) -> Self:
        n, m = map(int, self.pattern.split(":"))
        if n >= m:
            raise PlanError("plan-bad-value", f"{self.pattern} removes nothing", fix="N must be smaller than M")
        return self

    def apply(self, program: Program, context: Context) -> Program:
        """Measure the inputs, then one matrix after the other."""
        note = str(self.item())
        if any(c.pass_name == self.key and note in c.notes for c in program.history):
            return program
        n, m = map(int, self.pattern.split(":"))
        products = [x for x in program.main.nodes if x.target is aten.linear.default and x.args[1].op == "get_attr"]
        chosen = (
            [x for x in products if any(module_matches(str(x.args[1].target), p) for p in self.modules)] if self.modules else products[:-1]
        )
        if not chosen:
            patterns = ", ".join(self.modules)
            raise CompileError(
                "pass-no-match", f"no dense layer matches {patterns or 'this'}", where=f"pass {self.key}", fix="see `planc explain`"
            )
        for node in chosen:
            weight = program.params[str(node.args[1].target)]  # type: ignore[union-attr]
            if any(size % self.block for size in weight.shape) or self.block % m:
                message = (
                    f"blocks of {self.block} do not divide {list(weight.shape)}"
                    if not self.block % m
                    else f"{m} does not divide {self.block}"
                )
                raise CompileError(
                    "prune-pattern", message, node=describe(node), fix="use another `block`, or leave the layer out by `modules`"
                )
            if not bool(torch.isfinite(weight).all()):
                raise CompileError("pass-refused", "the weights hold NaN or infinity", node=describe(node), fix="check the checkpoint")
        seen = collect(program, {x.args[0]: {Moments} for x in chosen}, calibration_text(context, self.key), context.progress)  # type: ignore[misc]
        edit, notes = program.edit(self.key), [note]
        for old in chosen:
            node, name = edit[old], str(old.args[1].target)  # type: ignore[union-attr]
            factors = factorise(
                edit.params[name],
                seen[old.args[0], Moments].mean_square,  # type: ignore[index]
                (n, m),
                self.block,
                steps=self.steps,
                rate=self.rate,
                select=self.select,
                seed=self.seed,
            )
            notes.append(f"{name}: error {factors.first:.4f} -> {factors.last:.4f}")
            with edit.before(node):
                edit.replace(node, _wrapped(edit, node, name, factors))
        return edit.done(len(products), len(chosen), notes)


def _wrapped(edit: Editor, node: Node, name: str, factors: Factors) -> Node:
    right, core, left = (edit.param(f"{name}.{part}", getattr(factors, part)) for part in ("right", "core", "left"))
    inner = edit.call(aten.linear.default, edit.call(OPS.block_diagonal.default, node.args[0], right), core)
    outer = edit.call(OPS.block_diagonal.default, inner, left)
    bias = node.args[2] if len(node.args) > 2 else None
    return outer if bias is None else edit.call(aten.add.Tensor, outer, bias)
