"""Compile an image classifier: the way of `compile.py` for models that read pixels and keep no state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from planc.backends.onnx.images import OnnxImageEngine
from planc.backends.onnx.lower import lower
from planc.backends.reference import ReferenceImageEngine
from planc.compiler.image_models import LoadedClassifier
from planc.compiler.memory import plan_memory
from planc.compiler.passbase import Context, Pass
from planc.compiler.pipeline import run_passes
from planc.compiler.plan import Plan
from planc.compiler.program import ModelInfo, Program
from planc.compiler.raising import raise_program
from planc.compiler.trace import trace_classifier
from planc.compiler.verify import verify
from planc.passes.fold_batch_norm import FoldBatchNorm
from planc.passes.patchwise import Patchwise
from planc.runtime.artifact import Manifest, write_artifact
from planc.runtime.contract import Contract, PassEffect, hardware
from planc.runtime.decode import Decode
from planc.runtime.errors import InputError, PlanError
from planc.runtime.registry import parts
from planc.runtime.vision import Classifier

LABELS_FILE = "labels.txt"
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")  # of the files to calibrate on


@dataclass(frozen=True)
class PlannedClassifier:
    """A classifier's program with all rewrites of a plan, not lowered yet."""

    program: Program
    effects: tuple[PassEffect, ...]
    model: LoadedClassifier
    plan: Plan


def demanded(plan: Plan, disable: Sequence[str] = ()) -> list[Pass]:
    """The plan's passes and those that every classifier gets.

    Raises PlanError[plan-conflict] where the plan says how to decode text.
    """
    if plan.decode != Decode():
        message = "the plan has a decode section, but the model classifies images"
        raise PlanError("plan-conflict", message, plan=plan.where("decode"), fix="remove `decode`, or name a language model")
    passes: list[Pass] = list(plan.passes)
    have = {p.key for p in passes}
    passes += [parts("pass")[key]() for key in dict.fromkeys(key for p in passes for key in p.demands) if key not in have]  # type: ignore[misc]
    if FoldBatchNorm.key not in have:
        passes.insert(0, FoldBatchNorm())
    return [p for p in passes if p.key not in disable]


def traced(model: LoadedClassifier) -> Program:
    """The classifier's program in the dialect."""
    info = ModelInfo(model.name, vocab_size=0, max_length=1, task="classification")
    program = raise_program(trace_classifier(model.module, model.image.shape, info))
    verify(program, "raising")
    return program


def calibration_images(model: LoadedClassifier, plan: Plan) -> Tensor | None:
    """The images [S, C, Y, X] that the plan names, as the model takes them; None where it names none.

    Raises PlanError[plan-conflict] for a text, InputError[input-invalid] for a folder without images or a file that is none.
    """
    if (chosen := plan.calibration) is None:
        return None
    if chosen.images is None:
        raise PlanError("plan-conflict", "the plan calibrates on text, but the model classifies images", plan=plan.where("calibration"))
    folder = plan.folder / Path(chosen.images).expanduser()
    files = sorted(f for f in folder.glob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        where = plan.where("calibration", "images")
        raise InputError(
            "input-invalid", f"there are no images in {folder}", where=where, fix=f"it wants files {', '.join(IMAGE_SUFFIXES)}"
        )
    few = files if len(files) <= chosen.count else [files[i * len(files) // chosen.count] for i in range(chosen.count)]
    return torch.from_numpy(np.stack([model.image.pixels(file) for file in few]))


def rewrite(
    model: LoadedClassifier,
    plan: Plan,
    *,
    calibration: Tensor | None = None,
    disable: Sequence[str] = (),
    check: bool = True,
    note: Callable[[str], None] = lambda text: None,
) -> PlannedClassifier:
    """Trace, raise and apply all passes, which may calibrate on images [S, C, Y, X]; with `check` each pass is probed on noise."""
    passes = demanded(plan, disable)
    note("tracing")
    program = traced(model)
    sample = torch.randn(1, *model.image.shape, generator=torch.Generator().manual_seed(0)) if check else None
    if calibration is None and any(p.calibrates for p in passes):
        calibration = calibration_images(model, plan)
    program, effects = run_passes(program, passes, Context(calibration, folder=plan.folder), sample=sample, note=note)
    return PlannedClassifier(program, effects, model, plan)


def _memory(planned: PlannedClassifier) -> dict[str, Any]:
    """What a schedule for memory promises, in bytes; nothing where the plan has none."""
    part = next((p for p in planned.plan.passes if isinstance(p, Patchwise)), None)
    if part is None or all(change.pass_name != part.key for change in planned.program.history):
        return {}
    peak = plan_memory(planned.program, part.allocation).peak
    return {"memory": {"peak_bytes": peak, "allocation": part.allocation.model_dump(exclude_defaults=True)}}


def compile_classifier(
    model: LoadedClassifier,
    plan: Plan,
    out: Callable[[], Path],
    *,
    calibration: Tensor | None = None,
    disable: Sequence[str] = (),
    note: Callable[[str], None],
) -> Path | Classifier:
    """The artifact's directory, or the classifier itself where the plan's backend writes none."""
    planned = rewrite(model, plan, calibration=calibration, disable=disable, note=note)
    contract = Contract(effects=planned.effects, hardware=hardware())
    if plan.target.backend == "reference":
        return Classifier(ReferenceImageEngine(planned.program), model.image, model.labels, contract)
    note("lowering to ONNX")
    directory = out()

    def build(target: Path) -> Manifest:
        lower(planned.program, target, ops="standard", positions=1)
        if model.labels:
            (target / LABELS_FILE).write_text("".join(f"{label}\n" for label in model.labels), encoding="utf-8")
        manifest = Manifest(
            planc=metadata.version("planc"),
            created_by="planc.compile",
            model=model.name,
            task="classification",
            plan=plan.to_dict(),
            target=plan.target.model_dump(mode="json"),
            image=model.image.model_dump(mode="json"),
            contract=contract,
            extra=_memory(planned),
        )
        OnnxImageEngine(target, manifest)  # an artifact that does not load is not written
        return manifest

    write_artifact(directory, build)
    return directory
