"""Store float weights entropy-coded: two thirds of the bytes of bf16, every bit kept.

Matches   linear(x, w) and embedding(w, ids) whose weights are bf16 numbers (a bf16 checkpoint, read as float32)
Produces  the same with w = decode_bf16(container); a tied table is coded once
Keeps     the function, bit for bit; with `round`, up to the rounding of other weights to bf16
Refuses   weights that are not bf16 numbers, unless `round` is set
Paper     DFloat11, 70% Size, 100% Accuracy (Zhang et al. 2025)
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.fx import Node

from planc.compiler.dialect import OPS
from planc.compiler.passbase import CHANGES, Context, Effect, Pass, Stage
from planc.compiler.program import Program, describe
from planc.runtime import entropy
from planc.runtime.errors import CompileError

aten = torch.ops.aten


class EntropyCode(Pass):
    """Store the weights of products and embeddings in an entropy code, without loss."""

    stage: ClassVar[Stage] = Stage.NUMERICS
    after: ClassVar[tuple[str, ...]] = ("smooth", "quantize_weights")
    round: bool = Field(default=False, description="round weights that are not bf16 numbers to the nearest ones first")

    @property
    def effect(self) -> Effect:
        """Bit-equal, unless weights are rounded."""
        return CHANGES if self.round else Effect("exact", 0.0)

    def apply(self, program: Program, context: Context) -> Program:
        """Code every weight once, however many nodes read it."""
        readers: dict[str, list[tuple[Node, int]]] = {}
        for node in program.main.nodes:
            place = {aten.linear.default: 1, aten.embedding.default: 0}.get(node.target)
            if place is not None and node.args[place].op == "get_attr":
                readers.setdefault(str(node.args[place].target), []).append((node, place))
        if not readers:
            return program
        edit, rounded = program.edit(self.key), 0
        for name, users in readers.items():
            value = program.params[name]
            words = _words(value)
            if not torch.equal(_wide(words), value.float().view(torch.int32)):
                rounded += 1
                if not self.round:
                    raise CompileError(
                        "pass-refused",
                        f"{name} holds numbers that bf16 does not have, so coding it would change them",
                        node=describe(users[0][0]),
                        fix="set `round: true` to round the weights to bf16 first, or start from a bf16 checkpoint",
                    )
            with edit.before(edit[users[0][0]]):
                coded = edit.param(f"{name}.coded", torch.from_numpy(entropy.encode(words.numpy().view("uint16")).copy()))
                matrix = edit.call(OPS.decode_bf16.default, coded, *value.shape)
            for node, place in users:
                edit[node].update_arg(place, matrix)
        return edit.done(len(readers), len(readers), [f"{rounded} matrices rounded to bf16"] if rounded else [])


def _words(value: Tensor) -> Tensor:
    """bf16 words of float32 numbers as int16: the nearest, ties to even; a NaN stays one, with the bits that bf16 has room for."""
    bits = value.float().contiguous().view(torch.int32)
    exact = (bits >> 16).to(torch.int16)
    nearest = value.to(torch.bfloat16).view(torch.int16)
    return torch.where((bits & 0xFFFF) == 0, exact, nearest)


def _wide(words: Tensor) -> Tensor:
    return words.to(torch.int32) << 16
