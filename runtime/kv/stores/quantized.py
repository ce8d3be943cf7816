"""Few bits: keys by channel, values by token (papers/A4 section 5.2, as in "KIVI"). Both are quantised when a block closes."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from planc.runtime.engine import Floats
from planc.runtime.kv.stores.base import BLOCK, Part, Payload, Store


class Quantized(Store):
    """Asymmetric codes of 2, 4 or 8 bits; a key channel shares scale and zero over `group` tokens, a value over `group` channels."""

    by_rows: ClassVar[bool] = False
    bits: Literal[2, 4, 8] = 4
    group: int = Field(64, ge=8, le=64, description="numbers that share a scale and a zero")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if BLOCK % self.group:
            raise ValueError(f"a group of {self.group} does not divide the {BLOCK} tokens of a block")
        return self

    def check(self, width: int) -> str | None:
        """Groups of value channels must divide the head."""
        return None if width % self.group == 0 else f"groups of {self.group} do not divide heads of width {width}"

    def encode(self, rows: Floats, part: Part, fitted: Payload) -> Payload:
        """`codes` [N,G,T,D*bits/8] uint8, low bits first; `scale` and `zero` float16, [N,G,T/group,D] of keys and [N,G,T,D/group] of values."""
        grouped = _groups(rows, part, self.group)
        axis = _axis(part)
        low, high = grouped.min(axis, keepdims=True), grouped.max(axis, keepdims=True)
        zero = low.astype(np.float16)
        scale = ((high - zero) / (2**self.bits - 1)).astype(np.float16)
        steps = np.where(scale > 0, scale, 1).astype(np.float32)  # a constant group
        codes = np.clip(np.rint((grouped - zero.astype(np.float32)) / steps), 0, 2**self.bits - 1).astype(np.uint8).reshape(rows.shape)
        return {"codes": _pack(codes, self.bits), "scale": scale.squeeze(axis), "zero": zero.squeeze(axis)}

    def decode(self, payload: Payload, part: Part, fitted: Payload) -> Floats:
        """Codes times scale plus zero."""
        codes = _unpack(payload["codes"], self.bits)
        grouped = _groups(codes.astype(np.float32), part, self.group)
        axis = _axis(part)
        scale, zero = (np.expand_dims(payload[name].astype(np.float32), axis) for name in ("scale", "zero"))
        rows: Floats = (grouped * scale + zero).reshape(codes.shape)
        return rows


def _axis(part: Part) -> int:
    """The axis of a group in what `_groups` gives."""
    return 3 if part == "key" else 4


def _groups(rows: np.ndarray, part: Part, group: int) -> np.ndarray:
    """Keys [N,G,T/group,group,D], values [N,G,T,D/group,group]."""
    count, heads, tokens, width = rows.shape
    if part == "key":
        return rows.reshape(count, heads, tokens // group, group, width)
    return rows.reshape(count, heads, tokens, width // group, group)


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [...,D] -> bytes [...,D*bits/8], low bits first."""
    per = 8 // bits
    parts = codes.reshape(*codes.shape[:-1], -1, per) << (np.arange(per, dtype=np.uint8) * bits)
    packed: np.ndarray = np.bitwise_or.reduce(parts, axis=-1)
    return packed


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes: np.ndarray = ((packed[..., None] >> shifts) & (2**bits - 1)).reshape(*packed.shape[:-1], -1)
    return codes
