"""Runs the forms of a masked model node by node with torch: what the other backends are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from planc.backends.reference import run
from planc.compiler.program import Program
from planc.runtime.masked.engine import MaskedEngine, MaskedSpec


class ReferenceRunner:
    """A form is a program."""

    def __init__(self, forms: Mapping[str, Program]) -> None:
        self.forms = dict(forms)

    def run(
        self, form: str, feeds: Mapping[str, np.ndarray], state: Mapping[str, np.ndarray], wanted: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """See `runtime.masked.engine.Runner`."""
        program = self.forms[form]
        arrays = {name: array for name, array in {**feeds, **state}.items() if name in program.inputs}
        out = run(program, {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()})
        for name, array in state.items():
            array[...] = out[f"present.{name.removeprefix('past.')}"].numpy()
        return {name: out[name].numpy() for name in wanted}


def reference_engine(forms: Mapping[str, Program], spec: MaskedSpec) -> MaskedEngine:
    """The engine of programs."""
    states = {
        f"{s.name}.{part}": ((s.heads, width), torch.empty(0, dtype=s.dtype).numpy().dtype)
        for s in forms["slots"].states
        for part, width in (("key", s.key_width), ("value", s.value_width))
    }
    return MaskedEngine(ReferenceRunner(forms), spec, states)
