"""The ONNX Runtime engine of image classifiers."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from planc.runtime.artifact import Manifest
from planc.runtime.engine import Floats
from planc.runtime.errors import ArtifactError


class OnnxImageEngine:
    """Runs `model.onnx`. Of a graph that was scheduled for memory, what a pass frees is given back at once, and nodes run in the graph's order."""

    def __init__(self, directory: Path, manifest: Manifest, threads: int | None = None) -> None:
        options = ort.SessionOptions()
        wanted = threads or manifest.target.get("threads")
        if wanted:
            options.intra_op_num_threads = int(wanted)
        options.log_severity_level = 3
        if manifest.extra.get("memory"):
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        try:
            self.session = ort.InferenceSession(str(directory / "model.onnx"), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises its own types without a common base
            message = f"ONNX Runtime cannot load model.onnx: {error}"
            raise ArtifactError("artifact-corrupt", message, where=str(directory), fix="compile the plan again") from error
        self.batches = not isinstance(self.session.get_inputs()[0].shape[0], int)

    def forward(self, pixels: Floats) -> Floats:
        """See `runtime.vision.ImageEngine`."""
        logits: Floats = self.session.run(["logits"], {"images": pixels})[0]
        return logits
