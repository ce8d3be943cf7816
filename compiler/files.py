"""Files that people asked for: complete or not there."""

from __future__ import annotations

import os
from pathlib import Path

from planc.runtime.errors import InputError


def write(path: Path, data: bytes, where: str | None = None) -> None:
    """Write a file, complete or not at all. Raises InputError[input-invalid] where that cannot be done; `where` names the option that asked."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        raise InputError("input-invalid", f"{path} cannot be written: {error.strerror}", where=where) from error
    finally:
        partial.unlink(missing_ok=True)
