"""Runs the forms of a masked model with ONNX Runtime: one session per form over one weight file, opened when it is first needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from planc.runtime.artifact import Manifest
from planc.runtime.errors import ArtifactError
from planc.runtime.masked.engine import MaskedEngine, MaskedSpec


class OnnxRunner:
    """A form is a file NAME.onnx; states are bound in place."""

    def __init__(self, directory: Path, threads: int | None) -> None:
        self.directory, self.threads = directory, threads
        self.sessions: dict[str, ort.InferenceSession] = {}
        self._inputs: dict[str, frozenset[str]] = {}

    def run(
        self, form: str, feeds: Mapping[str, np.ndarray], state: Mapping[str, np.ndarray], wanted: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """See `runtime.masked.engine.Runner`."""
        session = self.session(form)
        known = self._inputs[form]
        binding = session.io_binding()
        kept = {name: np.ascontiguousarray(array) for name, array in feeds.items() if name in known}
        for name, array in {**kept, **{n: a for n, a in state.items() if n in known}}.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in state.items():
            if name in known:  # the graph writes where it reads
                present = f"present.{name.removeprefix('past.')}"
                binding.bind_output(present, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name in wanted:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        return dict(zip(wanted, (value.numpy() for value in outputs[len(outputs) - len(wanted) :]), strict=True))

    def session(self, form: str) -> ort.InferenceSession:
        """The session of a form. Raises ArtifactError[artifact-corrupt] where its file cannot be loaded."""
        if form not in self.sessions:
            options = ort.SessionOptions()
            if self.threads:
                options.intra_op_num_threads = self.threads
            options.inter_op_num_threads = 1
            options.log_severity_level = 3
            try:
                session = ort.InferenceSession(str(self.directory / f"{form}.onnx"), options, providers=["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime raises its own types without a common base
                message = f"ONNX Runtime cannot load {form}.onnx: {error}"
                raise ArtifactError("artifact-corrupt", message, where=str(self.directory), fix="compile the plan again") from error
            self.sessions[form], self._inputs[form] = session, frozenset(i.name for i in session.get_inputs())
        return self.sessions[form]


class OnnxMaskedEngine(MaskedEngine):
    """The engine of an artifact, or of one of its further models, each in a folder of its own."""

    def __init__(self, directory: Path, manifest: Manifest, threads: int | None = None, model: int = 0) -> None:
        described = manifest.extra["models"][model]
        states = {name: ((int(heads), int(width)), np.dtype(kind)) for name, heads, width, kind in described["states"]}
        folder = directory / described["folder"] if described["folder"] else directory
        super().__init__(OnnxRunner(folder, threads or manifest.target.get("threads")), MaskedSpec(**described["spec"]), states)
