"""Entropy-coded bf16 weights back to bf16, bit for bit (the container of `runtime/entropy.py`; DFloat11)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from planc.backends.triton.kernels.launch import Timing, check, check_tensors, launch
from planc.runtime import entropy

NAME = "entropy_decode"
_PADDING = 12  # bytes behind the stream that a lane may look at without using them


@dataclass(frozen=True)
class Coded:
    """A container's arrays as tensors on one device."""

    shape: tuple[int, int]
    transposed: bool
    table: Tensor  # int32 [4096]: next 12 bits -> symbol << 8 | bits of its code
    bases: Tensor  # int64 [blocks + 1]
    offsets: Tensor  # int32 [blocks, LANES]
    words: Tensor  # int32: the stream in words of 32 bits, high bit first
    plane: Tensor  # uint8 [rows * columns]: sign and mantissa

    @classmethod
    def load(cls, coded: NDArray[np.uint8], device: torch.device | str) -> Self:
        """From a container. Raises ArtifactError[artifact-corrupt] for one that is damaged."""
        parsed = entropy.Container.parse(coded)
        stream = np.concatenate([parsed.stream, np.zeros(-len(parsed.stream) % 4 + _PADDING, np.uint8)])
        arrays = (
            parsed.table.astype(np.int32), parsed.bases, parsed.offsets.astype(np.int32), stream.view(">u4").astype(np.uint32).view(np.int32),
            parsed.plane,
        )  # fmt: skip
        return cls(parsed.shape, parsed.transposed, *(torch.from_numpy(np.array(a)).to(device) for a in arrays))

    def bytes(self) -> int:
        """Bytes on the device."""
        return sum(t.numel() * t.element_size() for t in (self.table, self.bases, self.offsets, self.words, self.plane))


def reference(coded: NDArray[np.uint8]) -> Tensor:
    """With numpy, from the container, on the CPU."""
    return torch.from_numpy(np.ascontiguousarray(entropy.decode(coded)).view(np.int16)).view(torch.bfloat16)


# Bytes: about 10.7 bits of every word are read and 16 written; no FLOPs. A lane keeps 64 bits of its stream in a register and refills it after
# four codes of at most 12 bits; lanes of a block are neighbours in the output, so plane and result are read and written in full lines.


@triton.jit
def _kernel(
    table_ptr,  # [4096] int32
    bases_ptr,  # [blocks + 1] int64
    offsets_ptr,  # [blocks, LANES] int32
    words_ptr,  # int32
    plane_ptr,  # [n] uint8
    out_ptr,  # [n - first * LANES * STEPS] int16, contiguous
    first,  # block
    n,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    LONGEST: tl.constexpr,
    REFILL: tl.constexpr,
):
    block = (tl.program_id(0) + first).to(tl.int64)
    lane = tl.arange(0, LANES)
    bit = 8 * (tl.load(bases_ptr + block) + tl.load(offsets_ptr + block * LANES + lane))
    last = 8 * tl.load(bases_ptr + block + 1)
    low = tl.full((LANES,), 0xFFFFFFFF, tl.int64)
    for group in range(STEPS // REFILL):
        place = words_ptr + (tl.minimum(bit, last) >> 5)  # a damaged stream must not lead a lane out of it
        shift = bit & 31
        ahead = ((tl.load(place).to(tl.int64) & low) << 32) | (tl.load(place + 1).to(tl.int64) & low)
        ahead = (ahead << shift) | ((tl.load(place + 2).to(tl.int64) & low) >> (32 - shift))
        for step in tl.static_range(REFILL):
            entry = tl.load(table_ptr + ((ahead >> (64 - LONGEST)) & ((1 << LONGEST) - 1)))
            index = block * (LANES * STEPS) + (group * REFILL + step) * LANES + lane
            plane = tl.load(plane_ptr + index, mask=index < n, other=0).to(tl.int32)
            word = ((plane & 128) << 8) | ((entry >> 8) << 7) | (plane & 127)
            tl.store(out_ptr + index - first * (LANES * STEPS), word.to(tl.int16), mask=index < n)
            used = (entry & 255).to(tl.int64)
            ahead = ahead << used
            bit += used


def entropy_decode(coded: Coded) -> Tensor:
    """The matrix of a container, bf16 [rows, columns] (transposed where the container says so: a view).

    Raises InputError[kernel-unsupported] off a CUDA device.
    """
    check_tensors(NAME, "`planc.runtime.entropy.decode`", coded.table, coded.bases, coded.offsets, coded.words, coded.plane)
    flat = decode_blocks(coded, 0, len(coded.offsets))
    matrix = flat.view(torch.bfloat16).reshape(coded.shape)
    return matrix.t() if coded.transposed else matrix


def decode_blocks(coded: Coded, first: int, last: int) -> Tensor:
    """The words of blocks first .. last - 1 (32768 each), flat int16: rows of an embedding need only their own blocks."""
    check(0 <= first <= last <= len(coded.offsets), NAME, f"there are blocks 0 .. {len(coded.offsets)}", "give a range within them")
    size, n = entropy.LANES * entropy.STEPS, coded.plane.numel()
    out = torch.empty(max(0, min(n, last * size) - first * size), dtype=torch.int16, device=coded.plane.device)
    launch(
        _kernel, (last - first,), coded.table, coded.bases, coded.offsets, coded.words, coded.plane, out, first, min(n, last * size),
        LANES=entropy.LANES, STEPS=entropy.STEPS, LONGEST=entropy.LONGEST, REFILL=4, warps=entropy.LANES // 32,
    )  # fmt: skip
    return out


def timing() -> Timing:
    """A matrix of 14336 x 4096 normal weights, against copying it."""
    words = (torch.randn(14336, 4096) * 0.02).bfloat16()
    coded = Coded.load(entropy.encode(words.view(torch.int16).numpy().view(np.uint16)), "cuda")
    source = words.cuda()
    target = torch.empty_like(source)
    moved = coded.bytes() + 2 * words.numel()
    return Timing(NAME, lambda: entropy_decode(coded), lambda: target.copy_(source), "copy of the bf16 matrix", moved, 0)
