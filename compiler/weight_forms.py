"""One matrix in one of the formats of `quantize_weights`: format x block x rounding, ready to become a product of the dialect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from planc.compiler.block_formats import pack
from planc.compiler.codebooks import Lookup, lookup
from planc.compiler.dialect import OPS, unpack_blocks
from planc.compiler.program import Editor
from planc.compiler.rounding import Nearest, fitted_scales, gptq

Format = Literal["int8", "int8_blocks", "int4_blocks", "nf2", "nf3", "nf4", "codebook2", "codebook3", "codebook4"]


@dataclass(frozen=True)
class Stored:
    """A stored matrix: the product `op(x, *parts, bias, *constants)` computes with it."""

    op: Any
    parts: dict[str, Tensor | None]  # suffix of the parameter's name -> value, in the order of the arguments
    constants: tuple[int, ...]
    weight: Tensor  # the matrix that it stands for, float32 [N,K]

    def bits(self) -> int:
        """Bits of everything stored."""
        return 8 * sum(t.numel() * t.element_size() for t in self.parts.values() if t is not None)

    def parameters(self, edit: Editor, name: str) -> list[Node | None]:
        """The parts as nodes; products that read the same matrix share them."""
        named = {f"{name}.{suffix}": value for suffix, value in self.parts.items()}
        return [None if value is None else edit.param(full, edit.params.get(full, value)) for full, value in named.items()]

    def product(self, edit: Editor, name: str, x: Any, bias: Any) -> Node:
        """The product as a node."""
        return edit.call(self.op, x, *self.parameters(edit, name), bias, *self.constants)


def store(weight: Tensor, form: Format, block: int, gram: Tensor | None = None, importance: Tensor | None = None) -> Stored:
    """`weight` [N,K] in a format, rounded to nearest, or by GPTQ where the Gram matrix [K,K] of its inputs is given.

    Scales take in the largest magnitude of their block; where the `importance` [K] of the inputs is given, they are those of the least squared
    error weighed by it. The block must divide K (not asked of int8). codebookB is nfB with a table of its own for all rows here; see `joint.py`
    for learned ones.
    """
    if form == "int8":
        return int8_rows(weight, gram, importance)
    if form in ("int8_blocks", "int4_blocks"):
        return int_blocks(weight, 4 if form == "int4_blocks" else 8, block, gram, importance)
    return tabled(lookup(weight, int(form[-1]), block, gram=gram, importance=importance))


def int8_rows(weight: Tensor, gram: Tensor | None = None, importance: Tensor | None = None) -> Stored:
    """int8 with one scale per row."""
    scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127.0
    scale, steps = _rounded(weight, scale, lambda values: torch.round(values).clamp(-127, 127), gram, importance, signed=False)
    return Stored(OPS.linear_int8.default, {"int8": steps.to(torch.int8), "scale": scale[:, 0]}, (), steps * scale)


def int_blocks(weight: Tensor, bits: int, block: int, gram: Tensor | None = None, importance: Tensor | None = None) -> Stored:
    """int4 or int8 with one scale per block; the weight of largest magnitude keeps its sign, it is the end of the range with one more step."""
    outputs, middle = len(weight), 2 ** (bits - 1)
    cut = weight.float().reshape(outputs, -1, block)
    largest = cut.gather(2, cut.abs().argmax(2, keepdim=True)).squeeze(2)
    scale = torch.where(largest == 0, torch.ones_like(largest), largest / -middle)
    scale, steps = _rounded(weight, scale, lambda values: torch.round(values).clamp(-middle, middle - 1), gram, importance, signed=True)
    return blocks(pack((steps + middle).reshape(cut.shape).to(torch.uint8), bits), scale, None, bits, block)


def blocks(packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, block: int) -> Stored:
    """Blocks that are packed already."""
    weight = unpack_blocks(packed, scales, zeros, bits, block, scales.shape[1] * block)
    return Stored(OPS.linear_blocks.default, {f"int{bits}": packed, "scales": scales, "zeros": zeros}, (bits, block), weight)


def tabled(form: Lookup) -> Stored:
    """Places in tables."""
    names = ("codes", "tables", "rows", "scales", "coarse", "offset")
    return Stored(OPS.linear_lookup.default, dict(zip(names, form.arguments(), strict=True)), (form.bits, form.block), form.weight())


def _rounded(
    weight: Tensor, scale: Tensor, nearest: Nearest, gram: Tensor | None, importance: Tensor | None, *, signed: bool
) -> tuple[Tensor, Tensor]:
    """Scales [N,M] of the blocks and levels [N,K]."""
    weight = weight.float()
    if importance is not None:
        scale = fitted_scales(weight, scale, nearest, importance, signed=signed)
    wide = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    return scale, nearest(weight / wide) if gram is None else gptq(weight, gram, wide, nearest)
