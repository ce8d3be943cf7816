"""Compute the logits of some tokens alone.

Matches   logits = head(x), head one dense product and whatever follows it element by element
Produces  logits' = index_select(cat(head'(x), -1e4)), head' the rows of the kept tokens; ids stay those of the model
Keeps     the logits of the kept tokens
Refuses   a head that is not a float product; tokens outside the vocabulary
Paper     VocabTrim (48), FR-Spec: the head is most of what a small draft model reads
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

import torch
from pydantic import Field, PositiveInt, model_validator

from planc.compiler.passbase import Context, Pass, Stage
from planc.compiler.program import Program, describe
from planc.passes.load_weights import VOCABULARY, read_tensors
from planc.runtime.errors import CompileError, PlanError

aten = torch.ops.aten
NEVER = -1e4  #: logit of all other tokens: no probability is left in float64, and differences of logits stay numbers


class TrimVocab(Pass):
    """Keep the head's rows of the most frequent tokens; no other token is ever chosen."""

    stage: ClassVar[Stage] = Stage.STRUCTURE
    keep: PositiveInt | None = Field(
        None, description="keep this many of the lowest ids, which byte-pair tokenizers give to frequent tokens"
    )
    file: str | None = Field(
        None, description="safetensors file whose tensor `vocabulary` lists the kept ids; counts from the plan's folder"
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.keep is None) == (self.file is None):
            raise PlanError("plan-bad-value", "trim_vocab takes either keep or file", fix="trim_vocab: {keep: 8192}")
        return self

    def apply(self, program: Program, context: Context) -> Program:
        """Gather rows of the head, and spread its results over the vocabulary again."""
        if any(c.pass_name == self.key for c in program.history):
            return program
        size = program.info.vocab_size
        kept = self._kept(size, program.info.eos_ids, context.folder)
        if len(kept) == size:
            return program
        edit = program.edit(self.key)
        logits = head = edit[program.outputs["logits"]]
        while head.target is not aten.linear.default or head.args[1].op != "get_attr":
            if head.op != "call_function" or len(head.all_input_nodes) != 1:
                raise CompileError("pass-refused", "the logits do not come from one float product", node=describe(head))
            [head] = head.all_input_nodes
        with edit.before(head):
            for index, node in enumerate(head.args[1:], 1):
                if node is not None:
                    name = str(node.target)
                    head.update_arg(index, edit.param(f"{name}.kept", edit.params[name][kept].contiguous()))
        edit.refresh(head.args[1])
        slots = torch.full((size,), len(kept))  # of the token that is never chosen
        slots[kept] = torch.arange(len(kept))
        with edit.after(logits):
            first = edit.call(aten.slice.Tensor, logits, -1, 0, 1)
        with edit.after(first):
            nothing = edit.call(aten.mul.Tensor, first, 0.0)
        with edit.after(nothing):
            never = edit.call(aten.add.Tensor, nothing, NEVER)
        with edit.after(never):
            both = edit.call(aten.cat.default, [logits, never], -1)
        with edit.after(both):
            place = edit.param("vocabulary.slots", slots)
        with edit.after(place):
            edit.outputs(logits=edit.call(aten.index_select.default, both, -1, place))
        return edit.done(1, 1, [f"{len(kept)} of {size} tokens"])

    def _kept(self, size: int, eos_ids: tuple[int, ...], folder: Path) -> torch.Tensor:
        """Ids [k] int64, ascending; the tokens that end a text are always among them."""
        if self.file is None:
            listed = torch.arange(min(self.keep or 0, size))
        else:
            tensors, _ = read_tensors(folder / Path(self.file).expanduser())
            if VOCABULARY not in tensors:
                raise CompileError(
                    "input-invalid", f"{self.file} holds no tensor `{VOCABULARY}`", where=f"pass {self.key}", fix="give `keep`"
                )
            listed = tensors[VOCABULARY].long().reshape(-1)
        kept = torch.unique(torch.cat([listed, torch.tensor(eos_ids, dtype=torch.long)]))
        if kept[0] < 0 or kept[-1] >= size:
            message = f"token {int(kept[0] if kept[0] < 0 else kept[-1])} is outside the vocabulary of {size}"
            raise CompileError("pass-refused", message, where=f"pass {self.key}", fix="use a file for this model")
        return kept
