"""Weights as places in a table: NormalFloat (QLoRA, LQ-LoRA) and learned codebooks (JLCM), with scales per block in 8 bits.

A weight is `table[t, code] / 127 * scale`: `code` has 2, 3 or 4 bits, t is the row's table, `scale` that of its block. Entries of tables are whole
numbers from -127 to 127, so that a backend may multiply in 8 bits. Scales are stored as offset + q * coarse / 255, q in 8 bits and `coarse` one
float per SCALES of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from planc.compiler.dialect import SCALES, unpack_lookup
from planc.compiler.rounding import fitted_scales, gptq

UNIT = 127  #: steps of a table between 0 and 1


@dataclass(frozen=True)
class Lookup:
    """A matrix [N,K] in such a form, in the arguments of `linear_lookup`."""

    codes: Tensor  # uint8 [N,K], not packed
    tables: Tensor  # int8 [G, 2^bits], each rising
    rows: Tensor | None  # uint8 [N]: which table a row uses; None where there is one
    scales: Tensor  # uint8 [M, SCALES], those of the blocks one behind the other, padded
    coarse: Tensor  # float32 [M, 1]
    offset: Tensor  # float32 [1]
    bits: int
    block: int

    def arguments(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]:
        """What the operation reads besides x and the bias."""
        return pack(self.codes, self.bits), self.tables, self.rows, self.scales, self.coarse, self.offset

    def weight(self) -> Tensor:
        """The matrix that it stands for, float32 [N,K]."""
        return unpack_lookup(*self.arguments(), self.bits, self.block, self.codes.shape[1])

    def size(self) -> int:
        """Bits of everything stored."""
        return 8 * sum(t.numel() * t.element_size() for t in self.arguments() if t is not None)


def bits_of(outputs: int, inputs: int, bits: int, block: int, tables: int = 1) -> int:
    """Bits of a matrix in such a form, by formula: codes, scales, coarse scales, offset, tables and the table of each row."""
    blocks = outputs * inputs // block
    coarse = -(-blocks // SCALES)
    return outputs * inputs * bits + 8 * coarse * SCALES + 32 * coarse + 32 + 8 * tables * (1 << bits) + (8 * outputs if tables > 1 else 0)


def normal_float(bits: int) -> Tensor:
    """The 2^bits levels of NormalFloat, [1, 2^bits] int8: quantiles of a normal distribution, scaled to -1 .. 1, with 0 among them."""
    edge = 0.9677083
    low, high = torch.linspace(1 - edge, 0.5, 2 ** (bits - 1)), torch.linspace(0.5, edge, 2 ** (bits - 1) + 1)
    quantiles = torch.cat((low[:-1], high))
    levels = torch.special.ndtri(quantiles.double())
    return torch.round(levels / levels[-1] * UNIT).to(torch.int8)[None]


def lookup(
    weight: Tensor,
    bits: int,
    block: int,
    tables: Tensor | None = None,
    rows: Tensor | None = None,
    gram: Tensor | None = None,
    importance: Tensor | None = None,
) -> Lookup:
    """Quantise weight [N,K]; to nearest, or by GPTQ where a Gram matrix [K,K] is given.

    The scale of a block is its largest magnitude, or with the `importance` [K] of the inputs the one of least weighed error.
    """
    outputs, inputs = weight.shape
    tables = normal_float(bits) if tables is None else tables
    levels = (tables.float() / UNIT)[torch.zeros(outputs, dtype=torch.long) if rows is None else rows.long()]  # [N, 2^bits]
    peaks = weight.float().reshape(outputs, -1, block).abs().amax(2)

    def place(values: Tensor) -> Tensor:
        return torch.searchsorted((levels[:, 1:] + levels[:, :-1]) / 2, values.contiguous())

    def nearest(values: Tensor) -> Tensor:
        return levels.gather(1, place(values))

    if importance is not None:
        peaks = fitted_scales(weight.float(), peaks.clamp(min=1e-12), nearest, importance, signed=False)
    scales, coarse, offset = quantize_scales(peaks.reshape(-1))
    form = Lookup(torch.zeros(weight.shape, dtype=torch.uint8), tables, rows, scales, coarse, offset, bits, block)
    scale = block_scales(form, outputs * inputs // block).reshape(outputs, -1).repeat_interleave(block, 1)
    codes = place(weight.float() / scale if gram is None else gptq(weight, gram, scale, nearest))
    return replace(form, codes=codes.to(torch.uint8))


def quantize_scales(scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales [n] > 0 in 8 bits above the smallest of them: codes uint8 [M, SCALES], coarse scales [M, 1], offset [1]."""
    scale = scale.clamp(min=1e-12)
    offset = scale.min()
    padded = torch.nn.functional.pad(scale - offset, (0, -len(scale) % SCALES)).reshape(-1, SCALES)
    coarse = padded.amax(1, keepdim=True)
    codes = torch.round(padded * 255 / torch.where(coarse > 0, coarse, torch.ones_like(coarse)))
    return codes.to(torch.uint8), coarse, offset[None]


def block_scales(form: Lookup, count: int) -> Tensor:
    """The first `count` scales, float32."""
    return (form.offset + form.scales.float() * (form.coarse / 255)).reshape(-1)[:count]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [N,K] to bytes [N, K*bits/8], low bits first; 3 bits are a plane of two and a plane of one behind it."""
    planes = [(0, 2), (2, 1)] if bits == 3 else [(0, bits)]
    return torch.cat([_plane((codes >> shift) & (2**width - 1), width) for shift, width in planes], 1).contiguous()


def _plane(codes: Tensor, width: int) -> Tensor:
    each = 8 // width
    parts = codes.reshape(len(codes), -1, each).to(torch.int32) << (torch.arange(each, dtype=torch.int32) * width)
    return parts.sum(2).to(torch.uint8)
