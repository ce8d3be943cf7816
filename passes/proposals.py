"""Output what a loop needs of every slot in place of the logits.

Matches   the output `logits` [B,R,V]
Produces  best [B,R] int64, top, second, total, mean [B,R] float32 (see `runtime.masked.Reply`), of logits in which the mask token is impossible; with
          `tracked` also tracked_logits [B,R,K] for the input tracked [B,R,K]
Keeps     the order of the other tokens         Refuses   a model without a mask token
"""

from __future__ import annotations

import operator
from typing import ClassVar

import torch
from pydantic import Field

from planc.compiler.passbase import Context, Pass, Stage
from planc.compiler.program import Program
from planc.runtime.errors import CompileError

aten = torch.ops.aten
IMPOSSIBLE = -1e30  # finite, so that nothing times it is not a number


class Proposals(Pass):
    """The likeliest token of every slot and how sure it is, so that logits do not leave the graph; made for `decode: {masked: ...}` by itself."""

    stage: ClassVar[Stage] = Stage.OUTPUTS
    tracked: int = Field(0, ge=0, le=16, description="tokens of a slot whose logits are wanted besides")

    def apply(self, program: Program, context: Context) -> Program:
        """A dozen small operations behind the logits."""
        if "best" in program.outputs:
            return program
        mask_id = program.info.mask_id
        if mask_id is None:
            raise CompileError("pass-refused", "the model has no mask token", fix="name it: `masked: {mask_token: ID}`")
        edit = program.edit(self.key)
        logits = edit[program.outputs["logits"]]
        forbidden = torch.zeros(logits.meta["val"].shape[-1])
        forbidden[mask_id] = IMPOSSIBLE
        with edit.before(edit.graph.output_node()):
            possible = edit.call(aten.add.Tensor, logits, edit.param("proposals.forbidden", forbidden))
            values = edit.call(operator.getitem, edit.call(aten.topk.default, possible, 2), 0)
            top, second = (edit.call(aten.select.int, values, 2, i) for i in (0, 1))
            weights = edit.call(aten.exp.default, edit.call(aten.sub.Tensor, possible, edit.call(aten.unsqueeze.default, top, 2)))
            sums = edit.call(aten.sum.dim_IntList, weights, [2])
            moment = edit.call(aten.sum.dim_IntList, edit.call(aten.mul.Tensor, weights, possible), [2])
            outputs = {
                "logits": possible,
                "best": edit.call(aten.argmax.default, possible, -1),
                "top": top,
                "second": second,
                "total": edit.call(aten.add.Tensor, top, edit.call(aten.log.default, sums)),
                "mean": edit.call(aten.div.Tensor, moment, sums),
            }
            if self.tracked:
                batch, rows = logits.meta["val"].shape[:2]
                ids = edit.input("tracked", torch.int64, batch, rows, self.tracked)
                outputs["tracked_logits"] = edit.call(aten.gather.default, possible, 2, ids)
        edit.outputs(**outputs)
        return edit.done(1, 1)
