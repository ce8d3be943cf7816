"""Compiled artifacts of (plan, model) pairs in the cache directory, so that a second run starts at once.

The key covers the plan's data, the model's identity, the versions and planc's own sources; nothing here imports torch unless it has to compile.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from planc.runtime.artifact import is_artifact
from planc.runtime.contract import LIBRARIES, version_of
from planc.runtime.errors import ArtifactError, PlanError

if TYPE_CHECKING:
    from planc.runtime.executable import Executable
    from planc.runtime.filler import Filler
    from planc.runtime.vision import Classifier

_NAMING = ("file", "second_model", "source", "warm")  # options that name a file to read

KEEP = 8  #: cached artifacts; the least recently used ones go first

#: Sources that cannot change an artifact.
_OUTSIDE = {
    "cli.py",
    "bench.py",
    "quality.py",
    "papers.py",
    "explain.py",
    "store.py",
    "colours.py",
    "run_cli.py",
    "page.py",
    "structure.py",
    "told.py",
    "canvas_view.py",
    "masked_cli.py",
    "fit.py",
    "peers",
    "search",
    "suites",
}


@dataclass(frozen=True)
class Stored:
    """An artifact for a plan and model."""

    directory: Path
    compile_s: float | None  # what compiling it took; None when the caller named a finished artifact
    cached: bool  # it was there already


def cache_dir() -> Path:
    """Where downloads, conversions and compiled artifacts live: `PLANC_CACHE`, or `~/.cache/planc`."""
    return Path(os.environ.get("PLANC_CACHE") or Path.home() / ".cache" / "planc").expanduser()


def obtain(plan: Path, model: str, *, progress: bool = True, refresh: bool = False) -> Stored:
    """The artifact of `plan` for `model`: `plan` itself when it is an artifact, else the cached one, else a fresh one."""
    if plan.is_dir():
        if not is_artifact(plan):
            raise ArtifactError(
                "artifact-not-found", f"{plan} holds no manifest.json", where=str(plan), fix="name a plan file, or an artifact"
            )
        return Stored(plan, None, True)
    if not plan.is_file():
        raise PlanError(
            "plan-not-found",
            f"there is no plan or artifact {str(plan)!r}",
            fix="name a YAML file, or a directory that `planc compile` wrote",
        )
    target = _place(plan, model)
    times = target.with_suffix(".json")
    if _finished(target) and not refresh:
        os.utime(times)
        return Stored(target, json.loads(times.read_text())["compile_s"], True)
    from planc.compiler.compile import compile as compile_plan
    from planc.compiler.plan import Plan

    start = time.perf_counter()
    compile_plan(model, Plan.from_yaml(plan), out=target, progress=progress)
    seconds = round(time.perf_counter() - start, 2)
    partial = times.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps({"compile_s": seconds, "plan": str(plan), "model": model}))
    os.replace(partial, times)
    _prune(target.parent)
    return Stored(target, seconds, False)


def _place(plan: Path, model: str) -> Path:
    return cache_dir() / "artifacts" / key(plan, model)


def _finished(target: Path) -> bool:
    return is_artifact(target) and target.with_suffix(".json").is_file()


def compiled(plan: Path, model: str) -> Path | None:
    """The cached artifact of `plan` for `model`, if it was compiled before."""
    target = _place(plan, model)
    return target if _finished(target) else None


def open_plan(plan: Path, model: str, *, progress: bool = True) -> tuple[Executable, Stored]:
    """`open_any` for what generates text. Raises InputError[input-invalid] for anything else."""
    from planc._load import text_only

    exe, stored = open_any(plan, model, progress=progress)
    return text_only(exe), stored


def open_any(plan: Path, model: str, *, progress: bool = True) -> tuple[Executable | Classifier | Filler, Stored]:
    """Load what `obtain` gives. A cached artifact that turns out damaged is compiled once more; one that the user named is not touched."""
    from planc import load

    stored = obtain(plan, model, progress=progress)
    try:
        return load(stored.directory), stored
    except ArtifactError:
        if stored.directory == plan or not stored.cached:
            raise
    stored = obtain(plan, model, progress=progress, refresh=True)
    return load(stored.directory), stored


def key(plan: Path, model: str) -> str:
    """32 hex digits that change whenever the artifact might."""
    text = plan.read_bytes()
    try:
        data: Any = yaml.safe_load(text)
    except yaml.YAMLError:
        data = text.decode(errors="replace")  # the plan parser will say what is wrong
    parts = [
        json.dumps(data, sort_keys=True, default=str),
        _model_identity(model),
        *_draft_identities(data, plan.parent),
        *_file_identities(data, plan.parent),
        *(f"{name}={version_of(name)}" for name in LIBRARIES),
        _sources(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _file_identities(plan: Any, folder: Path) -> list[str]:
    """What the files are that the options in `_NAMING` name, wherever they stand in the plan."""
    if isinstance(plan, list):
        return [line for item in plan for line in _file_identities(item, folder)]
    if not isinstance(plan, dict):
        return []
    named = [plan[name] for name in _NAMING if isinstance(plan.get(name), str)]
    # a name with the model's in it may mean any of these
    here = [
        _model_identity(str(file))
        for name in named
        for file in (sorted(folder.glob(name.replace("{model}", "*"))) if "{model}" in name else [folder / name])
    ]
    return here + _file_identities(list(plan.values()), folder)


def _draft_identities(plan: Any, folder: Path) -> list[str]:
    """What the files are that a plan's draft model is made from."""
    try:
        drafters = plan["decode"]["speculative"]["drafter"]
        items = [item["draft_model"] for item in (drafters if isinstance(drafters, list) else [drafters]) if "draft_model" in item]
        named = [str(item[name]) for item in items for name in ("artifact", "plan", "model") if item.get(name)]
    except (LookupError, TypeError, AttributeError):  # a plan without drafters, or not valid: the plan parser will say why
        return []
    return [_model_identity(str(folder / name) if (folder / name).exists() else name) for name in named]


def _model_identity(model: str) -> str:
    path = Path(model).expanduser()
    files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return json.dumps([str(path.resolve()) if stats else model, stats])


def _sources() -> str:
    """Names, sizes and times of the sources that make an artifact: a changed compiler must not be answered from the cache."""
    import planc

    digest = hashlib.sha256()
    for room in ("compiler", "passes", "backends", "runtime"):
        root = Path(next(iter(planc.__path__))) / room
        for path in sorted(root.rglob("*.py")):
            if room != "compiler" or path.relative_to(root).parts[0] not in _OUTSIDE:
                status = path.stat()
                digest.update(f"{room}/{path.relative_to(root)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _prune(home: Path) -> None:
    records = sorted(home.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for record in records[KEEP:]:
        shutil.rmtree(record.with_suffix(""), ignore_errors=True)
        record.unlink(missing_ok=True)
