"""Load an artifact: the one place that joins the runtime with a backend's engine."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from pydantic import ValidationError

from planc.runtime.artifact import Manifest, read_artifact
from planc.runtime.decode import Decode
from planc.runtime.engine import Engine
from planc.runtime.errors import ArtifactError
from planc.runtime.executable import Executable
from planc.runtime.text import Text


def load(directory: str | Path, *, threads: int | None = None, verify: bool = True) -> Executable:
    """Open an artifact that `planc.compile` or `planc compile` wrote; needs no torch.

    Args:
        directory: the artifact.
        threads: CPU threads of the engine; None takes the plan's number.
        verify: compare every file with its sha256.
    """
    directory = Path(directory).expanduser()
    manifest = read_artifact(directory, verify=verify)
    try:
        decode = Decode.model_validate(manifest.decode)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(
            "artifact-corrupt", f"the decode section is not valid: {where}: {first['msg']}", where=str(directory)
        ) from error
    text = Text.load(directory, eos_ids=manifest.eos_ids or None)
    return Executable(_engine(directory, manifest, threads), text, decode, manifest.contract, manifest, directory)


def _engine(directory: Path, manifest: Manifest, threads: int | None) -> Engine:
    """`planc.backends.NAME.engine.NameEngine` of the manifest's backend."""
    name = manifest.backend
    if not re.fullmatch(r"[a-z][a-z0-9]*", name):
        raise ArtifactError("artifact-corrupt", f"{name!r} is not the name of a backend", where=str(directory))
    module = f"planc.backends.{name}.engine"
    try:
        engine: Engine = getattr(importlib.import_module(module), f"{name.capitalize()}Engine")(directory, manifest, threads)
    except ModuleNotFoundError as error:
        ours = error.name is not None and module.startswith(error.name)
        message = f"this planc has no backend {name!r}" if ours else f"the {name} backend needs {error.name}, which is not installed"
        fix = "install the planc that wrote the artifact" if ours else f"pip install {error.name}"
        raise ArtifactError("backend-missing", message, where=str(directory), fix=fix) from error
    return engine
