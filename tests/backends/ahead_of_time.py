"""Compile every Triton kernel for the compute capabilities named on the command line, without a GPU; prints what was compiled as JSON.

A program of its own, for whether kernels are interpreted is settled when triton is imported.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch

from planc.backends.triton import kernels
from planc.backends.triton.kernels.launch import ahead_of_time
from planc.runtime import entropy


def call_all(dtype: torch.dtype) -> None:
    """Every wrapper once, on tensors whose values do not matter."""
    x, step = torch.zeros(3, 256, dtype=dtype), torch.ones(64)
    kernels.rms_quantize(x, torch.ones(256, dtype=dtype))
    kernels.int8_matmul(
        torch.zeros(3, 256, dtype=torch.int8), torch.ones(3), torch.zeros(64, 256, dtype=torch.int8), step, step, torch.zeros(3, 64), dtype
    )
    kernels.block_matmul(x, torch.zeros(64, 8, 16, dtype=torch.uint8), torch.ones(64, 8), torch.ones(64, 8), step)
    q, cache, lengths = torch.zeros(2, 4, 6, 64, dtype=dtype), torch.zeros(2, 128, 2, 64, dtype=dtype), torch.full((2,), 99)
    parts = kernels.segment_attention(q, cache, cache, lengths, 0.1, torch.ones(2, 4, 128, dtype=torch.bool), 2)
    kernels.merge(parts, dtype)
    pages = torch.zeros(2, 2, 3, dtype=torch.int32)
    kernels.page_attention(q, cache.reshape(4, 64, 2, 64), cache.reshape(4, 64, 2, 64), pages, torch.ones(4, dtype=torch.int32), 0.1)
    rows = kernels.bitmap_encode(cache, 20)
    kernels.bitmap_attention(q, rows, rows, lengths, 0.1)
    kernels.top_k(x, 4)
    kernels.entropy_decode(kernels.Coded.load(entropy.encode(np.ones((3, 50), np.uint16)), "cpu"))


if __name__ == "__main__":
    found = []
    for capability in map(int, sys.argv[1:]):
        with ahead_of_time(capability) as compiled:
            call_all(torch.float16 if capability == 80 else torch.bfloat16)
        found += [[capability, each.metadata.name, len(each.asm["cubin"]), each.metadata.shared] for each in compiled]
    print(json.dumps(found))
