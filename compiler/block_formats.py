"""The packing of blocks, and the blocks of a GGUF file as they are."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from planc.compiler.dialect import OPS, unpack_blocks
from planc.compiler.program import Program

Blocks = tuple[Tensor, Tensor, Tensor | None, int]


def pack(steps: Tensor, bits: int) -> Tensor:
    """Steps [N, blocks, block] to bytes; two 4-bit steps per byte, low nibble first."""
    return (steps[..., 0::2] | (steps[..., 1::2] << 4)).contiguous() if bits == 4 else steps.contiguous()


def gguf_blocks(program: Program) -> dict[str, Blocks]:
    """Blocks of 32 of the program's GGUF by parameter name: (packed, scales, zeros in steps, bits). Types Q4_0, Q4_1 and Q8_0.

    A name like `a|b` (joined products) is served when all its parts are there in one format.
    """
    if program.info.gguf is None:
        return {}
    import gguf

    tensors = {t.name: t for t in gguf.GGUFReader(str(program.info.gguf)).tensors}
    if "output.weight" not in tensors:  # tied: the head reads the embedding
        tensors["output.weight"] = tensors["token_embd.weight"]
    width = next((int(n.args[1].meta["val"].shape[3]) for n in program.main.nodes if n.target is OPS.attention.default), 0)
    found: dict[str, Blocks] = {}
    for name, value in program.params.items():
        if value.dim() != 2 or not value.is_floating_point():
            continue
        row, parts = 0, []
        for part in name.split("|"):
            blocks = _decode(tensors.get(_gguf_name(part)))
            rows = 0 if blocks is None else blocks[0].shape[0]
            parts.append(None if blocks is None else _matching(blocks, value[row : row + rows], width))
            row += rows
        if all(p is not None for p in parts) and len({(p[3], p[2] is None) for p in parts if p}) == 1:
            columns: list[Any] = [torch.cat([p[i] for p in parts]) if parts[0][i] is not None else None for i in range(3)]
            found[name] = (columns[0], columns[1], columns[2], parts[0][3])
    return found


def _matching(blocks: Blocks, value: Tensor, width: int) -> Blocks | None:
    """The blocks with rows in the module's order: as they are, or turned back from the interleaved rotary order of Llama files; None when
    neither gives the weights in the program (a pass has changed them)."""
    rows = blocks[0].shape[0]
    orders = [torch.arange(rows)]
    if width and rows % width == 0:
        orders.append(torch.arange(rows).reshape(-1, width // 2, 2).transpose(1, 2).reshape(-1))
    for order in orders:
        packed, scales, zeros = blocks[0][order], blocks[1][order], None if blocks[2] is None else blocks[2][order]
        if value.shape[0] == rows and torch.allclose(unpack_blocks(packed, scales, zeros, blocks[3], 32, value.shape[1]), value, atol=1e-5):
            return packed, scales, zeros, blocks[3]
    return None


_GGUF = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def _gguf_name(name: str) -> str:
    if match := re.search(r"layers\.(\d+)\.(.+)\.weight$", name):
        return f"blk.{match[1]}.{_GGUF.get(match[2], match[2])}.weight"
    return {"lm_head.weight": "output.weight", "model.embed_tokens.weight": "token_embd.weight"}.get(name, name)


def _decode(tensor: Any) -> Blocks | None:
    """Blocks of one tensor in the file's order of rows; None for another type."""
    kind = getattr(getattr(tensor, "tensor_type", None), "name", "")
    if kind not in ("Q4_0", "Q4_1", "Q8_0"):
        return None
    raw = np.asarray(tensor.data)
    size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind]
    blocks = raw.reshape(raw.shape[0], -1, size)
    scale = blocks[..., :2].copy().view(np.float16)[..., 0].astype(np.float32)
    zeros = None
    if kind == "Q8_0":
        steps = (blocks[..., 2:].view(np.int8).astype(np.int16) + 128).astype(np.uint8)
    else:
        nibbles = blocks[..., size - 16 :]
        steps = np.concatenate((nibbles & 15, nibbles >> 4), -1)
        if kind == "Q4_1":
            low = blocks[..., 2:4].copy().view(np.float16)[..., 0].astype(np.float32)
            zeros = torch.from_numpy(np.where(scale == 0, 0, -low / np.where(scale == 0, 1, scale)).astype(np.float32))
    bits = 8 if kind == "Q8_0" else 4
    packed, scales = pack(torch.from_numpy(steps), bits), torch.from_numpy(scale)
    return packed, scales, zeros, bits
