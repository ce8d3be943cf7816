"""`planc.compile`: model and plan in, executable out. The whole way through the house on one page."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from planc.backends.onnx.artifact import write_onnx
from planc.backends.reference import ReferenceEngine
from planc.compiler.classify import compile_classifier
from planc.compiler.drafts import attach_drafts, places_of
from planc.compiler.image_models import load_classifier
from planc.compiler.masked import compile_masked
from planc.compiler.models import LoadedModel, load_model
from planc.compiler.passbase import Context, Pass
from planc.compiler.pipeline import run_passes
from planc.compiler.plan import Plan
from planc.compiler.program import ModelInfo, Program
from planc.compiler.quality import read_windows
from planc.compiler.raising import raise_program
from planc.compiler.search.spec import check_closed
from planc.compiler.trace import trace
from planc.compiler.verify import verify
from planc.passes.argmax import Argmax
from planc.passes.kv_cache import KvCache
from planc.passes.logits_rows import LogitsRows
from planc.passes.tap import Tap
from planc.passes.top_k import TopK
from planc.runtime.contract import Contract, PassEffect, hardware
from planc.runtime.drafters import DraftHead
from planc.runtime.errors import PlanError
from planc.runtime.executable import Executable
from planc.runtime.filler import Filler
from planc.runtime.registry import parts
from planc.runtime.text import Text
from planc.runtime.vision import Classifier, ImageSpec

DEFAULT_CAPACITY = 4096  # cache slots when the plan names none and the model allows more
SAMPLE_ROWS = 12  # tokens per sequence on which passes are compared
_CALIBRATION = Path(__file__).with_name("calibration.txt")


@dataclass(frozen=True)
class Planned:
    """A program with all rewrites of a plan, not lowered yet."""

    program: Program
    effects: tuple[PassEffect, ...]
    model: LoadedModel
    plan: Plan
    text_ids: tuple[int, ...]  # real text for probes: calibration text, or the model's own numbers where there is no tokenizer
    deeper: tuple[Program, ...] = ()  # of a draft head with a graph for each depth: those behind the first


def compile(  # noqa: A001 - the public name
    model: str | Path | nn.Module,
    plan: Plan | str | Path | dict[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    tokenizer: str | Path | Any | None = None,
    calibration: Tensor | None = None,
    disable: Sequence[str] = (),
    measure: bool = True,
    progress: bool = False,
    image: ImageSpec | dict[str, Any] | int | None = None,
    labels: Sequence[str] | str | Path | None = None,
) -> Executable | Classifier | Filler:
    """Compile a language model that writes from left to right or fills masked slots, or an image classifier, by a plan.

    Args:
        model: a name of `planc models`, a directory, a GGUF file, a Hugging Face id or a module of transformers.
        plan: a `Plan`, its YAML file, or plain data; None is the empty plan.
        out: directory of the artifact; None keeps it in a temporary directory until the process ends.
        tokenizer: overrides the model's own.
        calibration: token ids [S, L] int64 for passes that calibrate; None takes what the plan names, or a short text that comes with planc.
            Images [S, C, Y, X] float32 for those of a classifier.
        disable: keys of passes to leave out.
        measure: probe exactness and measure the cost table (about 15 s for 135M parameters on two cores).
        progress: show a progress bar on stderr.
        image: what a classifier expects of an image; needed for a module, and a size alone changes a named model's.
        labels: names of a classifier's classes, or a file with one a line.

    Raises PlanError, ModelError or CompileError; each names the place and the fix. Nothing is left at `out` then.
    """
    from planc._load import load
    from planc.compiler.measure import measured, stages

    plan = _plan(plan)
    _check_backend(plan)
    with stages(progress) as note:
        classifier = load_classifier(model, image, labels)
        if classifier is not None:
            where: Callable[[], Path] = lambda: Path(out) if out is not None else _temporary()  # noqa: E731
            made = compile_classifier(classifier, plan, where, calibration=calibration, disable=disable, note=note)
            return made if isinstance(made, Classifier) else load(made, verify=False)
        planned = rewrite(model, plan, tokenizer=tokenizer, calibration=calibration, disable=disable, note=note)
        if plan.decode.masked is not None:
            filled = compile_masked(planned, lambda: Path(out) if out is not None else _temporary(), note)
            return filled if isinstance(filled, Filler) else load(filled, verify=False)
        finish: Callable[[Any, Any], Contract] = measured(planned, note) if measure else lambda engine, spec: _unmeasured(planned)
        if planned.plan.target.backend == "reference":
            return _reference(planned, finish)
        directory = Path(out) if out is not None else _temporary()
        note("lowering to ONNX")
        write_onnx(planned, directory, capacity_of(planned), finish, partial(attach_drafts, planned, measure, note))
    return load(directory, verify=False)


def _check_backend(plan: Plan) -> None:
    where = plan.where("target", "backend")
    if plan.target.backend == "triton":
        message, fix = "there is no triton engine for language models in this release", "use `backend: onnx` or `backend: reference`"
        raise PlanError("backend-missing", message, plan=where, fix=fix)
    if plan.target.backend == "reference" and places_of(plan):
        message = "a draft model, and a graph with gates, lie in the artifact, and the reference backend writes none"
        raise PlanError("plan-conflict", message, plan=where, fix="use `backend: onnx`")


def rewrite(
    model: str | Path | nn.Module | LoadedModel,
    plan: Plan | str | Path | dict[str, Any] | None = None,
    *,
    tokenizer: str | Path | Any | None = None,
    calibration: Tensor | None = None,
    disable: Sequence[str] = (),
    check: bool = True,
    note: Callable[[str], None] = lambda text: None,
    program: Program | None = None,
) -> Planned:
    """The first half of `compile`: load, trace, raise and apply all passes. `program`: the model, where it was raised already."""
    chosen = _plan(plan)
    check_closed(chosen)
    passes = demanded(chosen, disable)
    note("loading the model")
    loaded = model if isinstance(model, LoadedModel) else load_model(model, tokenizer=tokenizer)
    if program is None:
        note("tracing")
        program = raised(loaded)
    if chosen.decode.masked is not None and chosen.decode.masked.mask_token is not None:
        program = program.replace(info=replace(program.info, mask_id=chosen.decode.masked.mask_token))
    ids = text_ids(loaded)
    context = context_of(chosen, loaded, ids, calibration)
    sample = torch.tensor(ids[: 2 * SAMPLE_ROWS]).reshape(2, SAMPLE_ROWS)
    program, effects = run_passes(program, passes, context, sample=sample if check else None, note=note)
    return Planned(program, effects, loaded, chosen, ids)


def raised(loaded: LoadedModel) -> Program:
    """The model in the dialect, before any pass."""
    info = ModelInfo(loaded.name, loaded.vocab_size, loaded.max_length, loaded.eos_ids, loaded.gguf, loaded.tokenizer_files)
    if loaded.mask is not None:
        info = replace(info, mask_id=loaded.mask.mask_id, shift=loaded.mask.shift)
    program = raise_program(trace(loaded.module, info))
    verify(program, "raising")
    return program


def demanded(plan: Plan, disable: Sequence[str] = ()) -> list[Pass]:
    """The plan's passes and those that its passes and its decode section demand.

    Raises PlanError[plan-unknown-name] for a name in `disable` that is no pass.
    """
    if unknown := [name for name in disable if name not in parts("pass")]:
        raise PlanError("plan-unknown-name", f"there is no pass {unknown[0]!r} to disable", fix="see `planc passes`")
    passes: list[Pass] = list(plan.passes)
    at = next((i for i, p in enumerate(passes) if isinstance(p, KvCache) and p.capacity), None)
    if at is not None and plan.target.capacity:
        raise PlanError(
            "plan-conflict",
            "the cache's capacity stands in the pass kv_cache and in the target",
            plan=plan.where("passes", at),
            fix="remove one of them",
        )
    have = {p.key for p in passes}
    passes += [parts("pass")[key]() for key in dict.fromkeys(key for p in passes for key in p.demands) if key not in have]  # type: ignore[misc]
    if plan.decode.masked is not None:  # its forms are made from the program without a cache
        return [p for p in passes if p.key not in disable]
    trees = tree_form(plan)
    if "kv_cache" not in have:
        passes.append(KvCache(trees=trees))
    passes = [p.model_copy(update={"trees": trees}) if isinstance(p, KvCache) and p.trees == "auto" else p for p in passes]
    speculative = plan.decode.speculative
    if speculative is not None and any(isinstance(part, DraftHead) for part in speculative.drafter):
        passes.append(Tap(final=True))
    passes += [LogitsRows(), Argmax()]
    width = max((d.needs_top_k for d in speculative.drafter), default=0) if speculative else 0
    if width and "top_k" not in have:
        passes.append(TopK(k=width))
    return [p for p in passes if p.key not in disable]


def tree_form(plan: Plan) -> Literal["none", "fused", "split"]:
    """The form of attention that the decode section needs: none for chains; trees whose rows may differ in the last bits, or may not."""
    speculative = plan.decode.speculative
    if speculative is None or speculative.tree.shape == "chain":
        return "none"
    if plan.exactness == "tokens":
        return "fused"
    return "split" if speculative.tree.shape == "tree" else "none"


def _plan(plan: Plan | str | Path | dict[str, Any] | None) -> Plan:
    if isinstance(plan, Plan):
        return plan
    if plan is None:
        return Plan()
    return Plan.from_dict(plan) if isinstance(plan, dict) else Plan.from_yaml(plan)


def text_ids(model: LoadedModel) -> tuple[int, ...]:
    """Token ids of the calibration text; evenly spread ids where the model has no tokenizer."""
    if "tokenizer.json" in model.tokenizer_files:
        return tuple(text_of(model).encode(_CALIBRATION.read_text(encoding="utf-8")))
    return tuple(int(i) for i in torch.randint(0, model.vocab_size, (768,), generator=torch.Generator().manual_seed(0)))


def text_of(model: LoadedModel) -> Text:
    """The model's text side; its files lie in one directory."""
    files = model.tokenizer_files
    return Text.load(next(iter(files.values())).parent, eos_ids=model.eos_ids) if files else Text(eos_ids=model.eos_ids)


def context_of(plan: Plan, model: LoadedModel, ids: Sequence[int], calibration: Tensor | None = None) -> Context:
    """What the passes of a plan may use: `calibration`, or the text that the plan names, or blocks of `ids`.

    Raises InputError[input-invalid] for a text that cannot be read or has fewer than two tokens.
    """
    if calibration is None and plan.calibration is not None:
        chosen, where = plan.calibration, plan.where("calibration", "text") or "calibration.text"
        if chosen.text is None:
            raise PlanError("plan-conflict", "the plan calibrates on images, but the model reads text", plan=plan.where("calibration"))
        file = plan.folder / Path(chosen.text).expanduser()
        windows = read_windows(file, text_of(model).encode, tokens=chosen.tokens, window=chosen.length, where=where)
        calibration = torch.tensor([w for w in windows if len(w) == chosen.length] or windows[:1])
    return Context(calibration if calibration is not None else calibration_blocks(ids), None, plan.folder)


def calibration_blocks(ids: Sequence[int], length: int = 256, most: int = 3) -> Tensor:
    """[S, L] ids for calibration."""
    count = max(1, min(most, len(ids) // length))
    length = min(length, len(ids))
    return torch.tensor(ids[: count * length]).reshape(count, length)


def capacity_of(planned: Planned) -> int:
    """Cache slots per sequence: what the plan asks for, or the default, as far as the model's positions go."""
    cache = next((p for p in planned.plan.passes if isinstance(p, KvCache)), None)
    wanted = planned.plan.target.capacity or (cache.capacity if cache else None) or DEFAULT_CAPACITY
    return min(wanted, planned.program.info.max_length)


def _unmeasured(planned: Planned) -> Contract:
    return Contract(effects=planned.effects, hardware=hardware())


def _reference(planned: Planned, finish: Callable[[Any, Any], Contract]) -> Executable:
    engine = ReferenceEngine(planned.program)
    return Executable(engine, text_of(planned.model), planned.plan.decode, finish(engine, capacity_of(planned)))


def _temporary() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="planc-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory / "artifact"
