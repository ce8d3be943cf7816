"""Kernels for what plain PyTorch does slowly: products with few rows in 8 and 4 bits, attention over segments, decoding of entropy-coded weights.

Each file holds a reference in PyTorch, the kernel with the shape of every argument, a checked wrapper and a timing (`benchmarks/gpu.py` runs them).
Importing this package needs triton.
"""

from planc.backends.triton.kernels.bitmap_attention import Bitmap, bitmap_attention, bitmap_encode
from planc.backends.triton.kernels.block_matmul import block_matmul
from planc.backends.triton.kernels.entropy_decode import Coded, entropy_decode
from planc.backends.triton.kernels.int8_matmul import int8_matmul
from planc.backends.triton.kernels.page_attention import page_attention, page_bounds
from planc.backends.triton.kernels.rms_quantize import rms_quantize
from planc.backends.triton.kernels.segment_attention import segment_attention
from planc.backends.triton.kernels.segments import Parts, merge
from planc.backends.triton.kernels.top_k import top_k

__all__ = [
    "Bitmap",
    "Coded",
    "Parts",
    "bitmap_attention",
    "bitmap_encode",
    "block_matmul",
    "entropy_decode",
    "int8_matmul",
    "merge",
    "page_attention",
    "page_bounds",
    "rms_quantize",
    "segment_attention",
    "top_k",
]
