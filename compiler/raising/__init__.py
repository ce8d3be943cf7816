"""Raising: from traced ATen to the dialect. Each module recognises one structure and says what stopped a near match."""

from __future__ import annotations

from planc.compiler.program import Program
from planc.compiler.raising.glu import raise_glu
from planc.compiler.raising.layout import cancel_transposes
from planc.compiler.raising.linear import raise_linear
from planc.compiler.raising.norm import raise_rms_norm
from planc.compiler.raising.rope import raise_rope
from planc.compiler.raising.spatial import raise_spatial

RAISINGS = (raise_linear, raise_rms_norm, raise_rope, raise_glu, cancel_transposes, raise_spatial)


def raise_program(program: Program) -> Program:
    """All raisings, in order. Outputs stay equal to eager (bit for bit where the arithmetic is the same)."""
    for raising in RAISINGS:
        program = raising(program)
    return program
