"""Store and multiply dense layers in few bits.

Matches   linear(x, w) and embedding(w, ids), by module pattern
Produces  linear_int8 (int8 weights, one scale per output and one per activation row), linear_blocks (int4 or int8 in blocks), embedding_int8
Refuses   weights with NaN or infinity; a pattern that matches no module
Paper     row-wise int8: DESIGN of LLM.int8 / SmoothQuant per-token scheme; blocks: GGUF and MatMulNBits layouts
"""

from __future__ import annotations

import fnmatch
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.fx import Node

from planc.compiler.block_formats import gguf_blocks, round_blocks
from planc.compiler.dialect import OPS
from planc.compiler.passbase import Context, Pass, Stage
from planc.compiler.program import Editor, Program, describe
from planc.runtime.errors import CompileError

aten = torch.ops.aten
Format = Literal["int8", "int8_blocks", "int4_blocks", "keep", "none"]


class QuantizeWeights(Pass):
    """Quantise dense layers (and the embedding with `int8`)."""

    stage: ClassVar[Stage] = Stage.NUMERICS
    after: ClassVar[tuple[str, ...]] = ("smooth",)
    demands: ClassVar[tuple[str, ...]] = ("fuse_projections",)
    format: Format = Field(
        default="int8",
        description="int8: one scale per output and activation row; int8_blocks, int4_blocks: scales per block; keep: the blocks that a GGUF "
        "already has; none: float",
    )
    block: Literal[16, 32, 64, 128] = Field(default=32, description="weights per scale for the block formats")
    modules: dict[str, Format] = Field(default_factory=dict, description="module pattern -> format, first match wins over `format`")

    def apply(self, program: Program, context: Context) -> Program:
        """Quantise what the patterns choose; a second run finds only quantised layers and changes nothing."""
        self._check_patterns(program)
        edit, matched, done, served, notes = program.edit(self.key), 0, 0, 0, []
        kept = gguf_blocks(program) if "keep" in {self.format, *self.modules.values()} else {}
        for node in list(edit.graph.nodes):
            if node.target is aten.linear.default and node.args[1].op == "get_attr":
                matched += 1
                name = str(node.args[1].target)
                _check_finite(edit.params[name], node)
                form = self._format(name)
                if form == "keep" and name not in kept:
                    notes.append(f"{name} is not in the GGUF as blocks: float kept")
                    continue
                served += form == "keep"
                done += self._linear(edit, node, form, kept)
            elif node.target is aten.embedding.default and self._format(str(node.args[0].target)) == "int8":
                matched += 1
                done += self._embedding(edit, node)
        if notes and not served and not any(c.pass_name == self.key for c in program.history):
            raise CompileError(
                "pass-refused",
                "there are no GGUF blocks to keep: the model is not from a GGUF file, or another pass has changed the weights",
                where=f"pass {self.key}",
                fix="use format int4_blocks, or remove smooth",
            )
        return edit.done(matched, done, notes) if done else program

    def _format(self, name: str) -> Format:
        for path in _paths(name):
            for pattern, form in self.modules.items():
                if fnmatch.fnmatch(path, pattern) or fnmatch.fnmatch(path, f"*.{pattern}"):
                    return form
        return self.format

    def _check_patterns(self, program: Program) -> None:
        paths = {path for name in program.params for path in _paths(name)}
        for pattern in self.modules:
            if not any(fnmatch.fnmatch(p, pattern) or fnmatch.fnmatch(p, f"*.{pattern}") for p in paths):
                raise CompileError(
                    "pass-no-match",
                    f"the pattern {pattern!r} matches no module",
                    where=f"pass {self.key}",
                    fix="module paths look like " + ", ".join(sorted(paths)[:3]),
                )

    def _linear(self, edit: Editor, node: Node, form: Format, kept: dict[str, tuple[Tensor, Tensor, Tensor | None, int]]) -> int:
        x, weight = node.args[:2]
        bias = node.args[2] if len(node.args) > 2 else None
        name = str(weight.target)
        value = edit.params[name]
        with edit.before(node):
            if form == "int8":
                steps, scale = quantize_outputs(value)
                new = edit.call(OPS.linear_int8.default, x, _once(edit, f"{name}.int8", steps), _once(edit, f"{name}.scale", scale), bias)
            elif form == "keep":
                packed, scales, zeros, bits = kept[name]
                new = _blocks(edit, name, x, bias, packed, scales, zeros, bits, 32)
            elif form == "none":
                return 0
            else:
                bits = 4 if form == "int4_blocks" else 8
                if value.shape[1] % self.block:
                    raise CompileError(
                        "pass-refused",
                        f"{value.shape[1]} inputs do not divide into blocks of {self.block}",
                        node=describe(node),
                        fix="use another `block`",
                    )
                new = _blocks(edit, name, x, bias, *round_blocks(value, bits, self.block), bits, self.block)
        edit.replace(node, new)
        return 1

    def _embedding(self, edit: Editor, node: Node) -> int:
        table, ids = node.args[:2]
        name = str(table.target)
        steps, scale = quantize_outputs(edit.params[name])
        with edit.before(node):
            new = edit.call(OPS.embedding_int8.default, _once(edit, f"{name}.int8", steps), _once(edit, f"{name}.scale", scale), ids)
        edit.replace(node, new)
        return 1


def _paths(name: str) -> list[str]:
    """Module paths behind a parameter's name: several when products were joined; what passes append (`*s`, `.int8`) is left out."""
    return [part.partition(".weight")[0] for part in name.split("|")]


def _once(edit: Editor, name: str, value: Tensor) -> Node:
    return edit.param(name, edit.params.get(name, value))


def _blocks(
    edit: Editor, name: str, x: object, bias: object, packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, block: int
) -> Node:
    zero = None if zeros is None else _once(edit, f"{name}.zeros", zeros)
    parts = (_once(edit, f"{name}.int{bits}", packed), _once(edit, f"{name}.scales", scales), zero)
    return edit.call(OPS.linear_blocks.default, x, *parts, bias, bits, block)


def quantize_outputs(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale per row: weight [N,K] -> int8 [N,K], scale [N] float32."""
    scale = weight.float().abs().amax(1).clamp(min=1e-12) / 127.0
    return torch.round(weight.float() / scale[:, None]).to(torch.int8), scale


def _check_finite(weight: Tensor, node: Node) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise CompileError("pass-refused", "the weights hold NaN or infinity", node=describe(node), fix="check the checkpoint")
