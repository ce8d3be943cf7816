"""Load an artifact: the one place that joins the runtime with a backend's engine."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from planc.runtime.artifact import MANIFEST, Manifest, read_artifact
from planc.runtime.decode import Decode
from planc.runtime.drafters import DraftHead, DraftModel, Loaded
from planc.runtime.drafters.draft_model import FUZZY
from planc.runtime.drafters.vocabulary import vocabulary
from planc.runtime.engine import Engine
from planc.runtime.errors import ArtifactError, InputError
from planc.runtime.executable import Executable
from planc.runtime.filler import Filler
from planc.runtime.text import TOKENIZER, Text
from planc.runtime.vision import Classifier, ImageEngine, ImageSpec


def load(directory: str | Path, *, threads: int | None = None, verify: bool = True) -> Executable | Classifier | Filler:
    """Open an artifact that `planc.compile` or `planc compile` wrote; needs no torch. What it is for decides which of the three it becomes.

    Args:
        directory: the artifact.
        threads: CPU threads of the engine; None takes the plan's number.
        verify: compare every file with its sha256.
    """
    directory = Path(directory).expanduser()
    manifest = read_artifact(directory, verify=verify)
    if manifest.task == "classification":
        return _classifier(directory, manifest, threads)
    try:
        decode = Decode.model_validate(manifest.decode)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(
            "artifact-corrupt", f"the decode section is not valid: {where}: {first['msg']}", where=str(directory)
        ) from error
    text = Text.load(directory, eos_ids=manifest.eos_ids or None)
    if manifest.task == "filling":
        make = _engine_class("masked", "MaskedEngine", directory, manifest)
        first, *others = (make(directory, manifest, threads, number) for number in range(len(manifest.extra["models"])))
        return Filler(first, text, decode, None, manifest, directory, others=others)
    models = _draft_models(directory, manifest, decode, text, threads)
    return Executable(_engine(directory, manifest, threads), text, decode, manifest.contract, manifest, directory, models)


def load_text(directory: str | Path, *, threads: int | None = None, verify: bool = True) -> Executable:
    """The same for an artifact that generates text. Raises InputError[input-invalid] for another."""
    return text_only(load(directory, threads=threads, verify=verify))


def text_only(exe: Executable | Classifier | Filler) -> Executable:
    """`exe` where it generates text. Raises InputError[input-invalid] where it does something else."""
    if isinstance(exe, Filler):
        where = str(exe.directory) if exe.directory is not None else None
        raise InputError("input-invalid", "this model fills masked slots; here it takes one that writes from left to right", where=where)
    if isinstance(exe, Classifier):
        where = str(exe.directory) if exe.directory is not None else None
        raise InputError("input-invalid", "this model classifies images and generates no text", where=where, fix="name a language model")
    return exe


def _classifier(directory: Path, manifest: Manifest, threads: int | None) -> Classifier:
    try:
        image = ImageSpec.model_validate(manifest.image)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError("artifact-corrupt", f"the image section is not valid: {where}: {first['msg']}", where=str(directory)) from error
    labels = (directory / "labels.txt").read_text(encoding="utf-8").splitlines() if "labels.txt" in manifest.files else ()
    engine: ImageEngine = _engine_class("images", "ImageEngine", directory, manifest)(directory, manifest, threads)
    return Classifier(engine, image, labels, manifest.contract, manifest, directory)


def _draft_models(directory: Path, manifest: Manifest, decode: Decode, text: Text, threads: int | None) -> dict[str, Loaded]:
    """The draft models that drafters name, each an artifact in a folder of this one, whose files are among those already checked."""
    drafters = decode.speculative.drafter if decode.speculative is not None else ()
    models = {}
    for part in drafters:
        if isinstance(part, DraftModel | DraftHead):
            name = part.artifact
            if name is None or f"{name}/{MANIFEST}" not in manifest.files:
                raise ArtifactError(
                    "artifact-corrupt",
                    f"the draft model or head {name} is not part of the artifact",
                    where=str(directory),
                    fix="compile the plan again",
                )
            models[name] = _draft_model(directory / name, manifest, f"{name}/{TOKENIZER}", text, threads)
    return models


def _draft_model(folder: Path, target: Manifest, tokenizer: str, text: Text, threads: int | None) -> Loaded:
    draft = read_artifact(folder, verify=False)  # its files were checked as files of the target
    ours, theirs = target.files.get(TOKENIZER), target.files.get(tokenizer)
    same = ours is not None and theirs is not None and ours.sha256 == theirs.sha256
    sizes = target.signature.vocab_size, draft.signature.vocab_size
    words = None if same and sizes[0] == sizes[1] else vocabulary(text, Text.load(folder, eos_ids=draft.eos_ids or None), *sizes)
    engine = _engine(folder, draft, threads)
    if f"{folder.name}/{FUZZY}/{MANIFEST}" not in target.files:
        levels = engine.levels() if draft.extra.get("levels") else ()  # type: ignore[attr-defined]
        return Loaded(engine, draft.signature.capacity, words, draft.contract.cost, levels=levels)
    fuzzy = read_artifact(folder / FUZZY, verify=False)
    return Loaded(engine, draft.signature.capacity, words, fuzzy.contract.cost, _engine(folder / FUZZY, fuzzy, threads))


def _engine(directory: Path, manifest: Manifest, threads: int | None) -> Engine:
    engine: Engine = _engine_class("engine", "Engine", directory, manifest)(directory, manifest, threads)
    return engine


def _engine_class(file: str, kind: str, directory: Path, manifest: Manifest) -> Any:
    """`planc.backends.NAME.FILE.NameKind` of the manifest's backend."""
    name = manifest.backend
    if not re.fullmatch(r"[a-z][a-z0-9]*", name):
        raise ArtifactError("artifact-corrupt", f"{name!r} is not the name of a backend", where=str(directory))
    module = f"planc.backends.{name}.{file}"
    try:
        return getattr(importlib.import_module(module), f"{name.capitalize()}{kind}")
    except ModuleNotFoundError as error:
        ours = error.name is not None and module.startswith(error.name)
        message = f"this planc has no backend {name!r}" if ours else f"the {name} backend needs {error.name}, which is not installed"
        fix = "install the planc that wrote the artifact" if ours else f"pip install {error.name}"
        raise ArtifactError("backend-missing", message, where=str(directory), fix=fix) from error
