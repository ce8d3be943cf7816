"""Entropy-coded weights on their way into a session: decoded when the graph is opened, float32 from then on.

ONNX Runtime has no operator that decodes inside the graph. So coding saves bytes on disk and on the wire, not memory or time.
"""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import onnxruntime as ort

from planc.runtime import entropy
from planc.runtime.errors import ArtifactError

CODED_FILE = "model.coded.npz"


def read_coded(directory: Path) -> dict[str, ort.OrtValue]:
    """The decoded matrices of an artifact by the name of their initializer; none where nothing is coded.

    Sessions read them in place, so they must live as long. Raises ArtifactError[artifact-corrupt] when one does not match its checksums.
    """
    path = directory / CODED_FILE
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            containers = {name: file[name] for name in file.files}
    except (OSError, ValueError, BadZipFile) as error:
        raise ArtifactError(
            "artifact-corrupt", f"{CODED_FILE} cannot be read: {error}", where=str(path), fix="compile the plan again"
        ) from error
    return {name: ort.OrtValue.ortvalue_from_numpy(entropy.widen(entropy.decode(container))) for name, container in containers.items()}
