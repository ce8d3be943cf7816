"""The artifact: a directory with `manifest.json` and the files that it lists with size and sha256.

Written to a temporary sibling and renamed into place, so a reader sees the old artifact or the new one and never half of one.
Checked on load: version, that every path stays inside the directory, size and hash of every file, and the manifest's own digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from planc.runtime.contract import Contract
from planc.runtime.engine import EngineSpec
from planc.runtime.errors import ArtifactError

MANIFEST = "manifest.json"
SCHEMA_VERSION: Literal[1] = 1

_CHUNK = 4 << 20  # bytes per read; large enough that hashing, not system calls, is what costs
_DIGEST = re.compile(rb'"digest": "([0-9a-f]{64})"')
_NO_DIGEST = "0" * 64


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Model):
    """What a file must look like."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class StateSpec(_Model):
    """One piece of state that the graph reads and writes, and how it forgets."""

    name: str
    kind: Literal["kv", "quantized_kv", "recurrent", "constraint", "random", "text"] = "kv"
    dtype: str = "float32"
    shape: tuple[int | str, ...] = ()  # names stand for symbolic sizes
    rollback: Literal["truncate", "checkpoint", "replay"] = "truncate"


class Signature(_Model):
    """What an engine needs to know to run the graph."""

    vocab_size: int = Field(ge=1)
    max_length: int = Field(ge=1)  # longest sequence that positions allow
    capacity: int = Field(ge=1)  # cache slots per sequence when the caller names no other number
    layers: int = Field(default=0, ge=0)
    kv_heads: tuple[int, ...] = ()  # per layer
    head_dims: tuple[int, ...] = ()  # per layer
    top_k: int = 0
    trees: bool = True
    taps: tuple[str, ...] = ()
    states: tuple[StateSpec, ...] = ()

    def spec(self) -> EngineSpec:
        """The part that decoding loops see."""
        return EngineSpec(self.vocab_size, self.max_length, self.top_k, self.trees, self.taps)


class Manifest(_Model):
    """Contents of `manifest.json`."""

    schema_version: Literal[1] = SCHEMA_VERSION
    planc: str  # version that wrote the artifact
    created_by: str = ""  # command or call that wrote it
    model: str = ""  # name, path or id of the model
    task: Literal["generation", "classification", "filling"] = "generation"
    plan: dict[str, Any] = Field(default_factory=dict)  # the plan as data
    decode: dict[str, Any] = Field(default_factory=dict)  # its decode section, with `auto` values settled
    backend: str = "onnx"
    target: dict[str, Any] = Field(default_factory=dict)
    signature: Signature = Signature(vocab_size=1, max_length=1, capacity=1)  # of a model that reads text
    image: dict[str, Any] = Field(default_factory=dict)  # of a model that reads images: the fields of `runtime.vision.ImageSpec`
    eos_ids: tuple[int, ...] = ()
    contract: Contract = Field(default_factory=Contract)
    extra: dict[str, Any] = Field(default_factory=dict)  # what only the backend understands: file roles, bindings
    files: dict[str, FileEntry] = Field(default_factory=dict)  # relative POSIX path -> what it must be
    digest: str = Field(default=_NO_DIGEST, pattern=r"^[0-9a-f]{64}$")  # of manifest.json itself, this field read as zeros


def is_artifact(directory: Path) -> bool:
    """Does the directory hold a manifest?"""
    return (directory / MANIFEST).is_file()


def sha256(path: Path) -> str:
    """Hex digest of a file, read in large blocks."""
    digest, block = hashlib.sha256(), memoryview(bytearray(min(_CHUNK, max(1, path.stat().st_size))))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def write_artifact(directory: Path, build: Callable[[Path], Manifest]) -> Manifest:
    """Let `build` fill an empty directory and return its manifest, then put the directory at `directory` in one step.

    `build` leaves `files` and `digest` alone; both are computed here from what it wrote. An artifact at `directory` is replaced, an
    empty directory too; anything else is refused. After a failure of any kind, Ctrl-C included, `directory` is as it was before.
    """
    target = Path(directory).expanduser().absolute()
    if target.is_symlink():
        target = target.resolve()
    _check_replaceable(target)
    with _os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        manifest = build(temporary)
        with _os_errors(target):
            temporary.chmod(0o755)  # mkdtemp makes it private
            manifest = manifest.model_copy(update={"files": _inventory(temporary)})
            manifest = write_manifest(temporary, manifest)
            for folder, _, _ in os.walk(temporary):
                _fsync(Path(folder))
            _check_replaceable(target)  # once more: building takes minutes
            _swap_in(temporary, target)
        return manifest
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already when all went well


def write_manifest(directory: Path, manifest: Manifest) -> Manifest:
    """Write `manifest.json` atomically with a fresh digest; used alone when only measurements change (`planc profile`)."""
    text = manifest.model_copy(update={"digest": _NO_DIGEST}).model_dump_json(indent=2).encode()
    digest = hashlib.sha256(text).hexdigest()
    before, _, after = text.rpartition(_NO_DIGEST.encode())  # the digest is the last field
    handle, name = tempfile.mkstemp(prefix=".manifest.", dir=directory)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(before + digest.encode() + after)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, directory / MANIFEST)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _fsync(directory)
    return manifest.model_copy(update={"digest": digest})


def read_artifact(directory: Path, *, verify: bool = True) -> Manifest:
    """Read and check an artifact. `verify=False` skips the hashes of the files, nothing else."""
    directory = Path(directory).expanduser()
    manifest = _read_manifest(directory)
    root = directory.resolve()
    entries = [(_inside(root, name), name, entry) for name, entry in manifest.files.items()]
    for path, name, entry in entries:
        _check_size(path, name, entry)
    if verify:
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:  # hashlib lets go of the interpreter lock
            for (_, name, entry), found in zip(entries, pool.map(_hash_or_refuse, entries), strict=True):
                if found != entry.sha256:
                    raise _corrupt(f"{name} has changed (sha256 {found[:12]}..., expected {entry.sha256[:12]}...)", directory / name)
    return manifest


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    if not path.is_file():
        raise ArtifactError(
            "artifact-not-found",
            f"{directory} holds no {MANIFEST}",
            where=str(directory),
            fix="give a directory that `planc compile` wrote",
        )
    try:
        raw = path.read_bytes()
        data = json.loads(raw)
    except (OSError, ValueError, RecursionError) as error:
        raise _corrupt(f"{MANIFEST} cannot be read: {error}", path) from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ArtifactError(
            "artifact-version",
            f"the artifact has schema version {version}, this planc reads {SCHEMA_VERSION}",
            where=str(path),
            fix="compile the model again, or install the planc that wrote it",
        )
    found = _DIGEST.findall(raw)
    if not found or hashlib.sha256(_NO_DIGEST.encode().join(raw.rsplit(found[-1], 1))).hexdigest().encode() != found[-1]:
        raise _corrupt(f"{MANIFEST} does not match its own digest: it was edited or damaged", path)
    try:
        return Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise _corrupt(f"{MANIFEST}: {'.'.join(map(str, first['loc']))}: {first['msg']}", path) from error


def _inside(root: Path, name: str) -> Path:
    """The file `name` of the artifact at `root`, after following links; refuses whatever leads outside."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    plain = (
        posix.parts and "\\" not in name and "\0" not in name and not posix.is_absolute() and not windows.drive and ".." not in posix.parts
    )
    if not plain or name == MANIFEST or str(posix) != name:
        raise ArtifactError("artifact-path", f"{name!r} is not a plain path inside the artifact", where=str(root / MANIFEST))
    try:
        path = (root / posix).resolve()
    except (OSError, RuntimeError) as error:
        raise _corrupt(f"{name} cannot be resolved: {error}", root / posix) from error
    if not path.is_relative_to(root):
        raise ArtifactError(
            "artifact-path",
            f"{name} is a link that leads outside the artifact",
            where=str(path),
            fix="copy the artifact with its links resolved (cp -rL)",
        )
    return path


def _check_size(path: Path, name: str, entry: FileEntry) -> None:
    try:
        status = path.stat()
    except OSError as error:
        raise _corrupt(f"{name} is missing", path) from error
    if not stat.S_ISREG(status.st_mode):
        raise _corrupt(f"{name} is not a regular file", path)
    if status.st_size != entry.bytes:
        raise _corrupt(f"{name} has {status.st_size} bytes, expected {entry.bytes}", path)


def _hash_or_refuse(item: tuple[Path, str, FileEntry]) -> str:
    try:
        return sha256(item[0])
    except OSError as error:
        raise _corrupt(f"{item[1]} cannot be read: {error}", item[0]) from error


def _corrupt(message: str, where: Path) -> ArtifactError:
    return ArtifactError("artifact-corrupt", message, where=str(where), fix="compile the model again or copy the artifact anew")


def _inventory(directory: Path) -> dict[str, FileEntry]:
    """Size and hash of every file below `directory`, flushed to disk on the way."""
    files: dict[str, FileEntry] = {}
    for path in sorted(directory.rglob("*")):
        assert not path.is_symlink(), f"{path} is a link: an artifact holds its files itself"
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name != MANIFEST:
            _fsync(path)
            files[name] = FileEntry(sha256=sha256(path), bytes=path.stat().st_size)
    return files


def copy_artifact(manifest: Manifest, source: Path, directory: Path) -> Path:
    """Copy the files of the artifact at `source` to `directory` in one step."""

    def build(target: Path) -> Manifest:
        for name in manifest.files:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
        return manifest

    write_artifact(directory, build)
    return directory


def _check_replaceable(target: Path) -> None:
    """Only an artifact or an empty directory may be overwritten."""
    if not target.exists() or (target.is_dir() and (is_artifact(target) or not any(target.iterdir()))):
        return
    kind = "a directory with other files" if target.is_dir() else "a file"
    raise ArtifactError("artifact-exists", f"{target} is {kind}", where=str(target), fix="name a new directory, or remove this one first")


def _swap_in(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target`; an artifact that stands there steps aside first and comes back if that fails."""
    aside: Path | None = None
    if target.exists() and any(target.iterdir()):  # a rename replaces an empty directory, but no other
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
        os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except BaseException:
        if aside is not None:
            os.rename(aside, target)
        raise
    _fsync(target.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _fsync(path: Path) -> None:
    """Flush a file or directory to disk; not every system can flush directories."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _os_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            "artifact-write", f"{target} cannot be written: {error.strerror or error}", where=str(target), fix="check space and permissions"
        ) from error
