"""Draft models of a plan: each becomes an artifact in a folder of the target's artifact, which so stays complete in itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planc.backends.onnx.artifact import write_onnx
from planc.compiler.plan import Plan
from planc.passes.kv_cache import KvCache
from planc.runtime import profile
from planc.runtime.artifact import MANIFEST, Manifest, read_artifact
from planc.runtime.contract import Contract, hardware
from planc.runtime.decode import Decode
from planc.runtime.drafters import DraftModel
from planc.runtime.drafters.draft_model import FOLDER
from planc.runtime.drafters.vocabulary import vocabulary
from planc.runtime.engine import Engine
from planc.runtime.errors import PlanError
from planc.runtime.text import Text

if TYPE_CHECKING:
    from planc.compiler.compile import Planned


def draft_of(plan: Plan) -> tuple[int, DraftModel] | None:
    """The plan's draft model and its place among the drafters."""
    drafters = plan.decode.speculative.drafter if plan.decode.speculative is not None else ()
    return next(((i, part) for i, part in enumerate(drafters) if isinstance(part, DraftModel)), None)


def attach_drafts(planned: Planned, directory: Path, measure: bool, note: Callable[[str], None]) -> Decode:
    """Write the plan's draft model into `directory`, and the decode section that finds it there."""
    found = draft_of(planned.plan)
    if found is None:
        return planned.plan.decode
    index, part = found
    place = planned.plan.where("decode", "speculative", "drafter", index)
    target = directory / FOLDER
    note("the draft model")
    if part.artifact is not None:
        _copy(_beside(planned.plan, part.artifact), target)
    else:
        _compile(planned, part, place, target, measure, note)
    _check(planned, read_artifact(target, verify=False), target, place)
    speculative = planned.plan.decode.speculative
    assert speculative is not None
    drafters = list(speculative.drafter)
    drafters[index] = DraftModel(artifact=FOLDER, min_p=part.min_p)
    return planned.plan.decode.model_copy(update={"speculative": speculative.model_copy(update={"drafter": tuple(drafters)})})


def _beside(plan: Plan, path: str) -> Path:
    """A path of a plan counts from the folder of the plan's file."""
    return plan.folder / Path(path).expanduser()


def _copy(source: Path, target: Path) -> None:
    """A checked copy of an artifact."""
    manifest = read_artifact(source)
    for name in (*manifest.files, MANIFEST):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _compile(planned: Planned, part: DraftModel, place: str | None, target: Path, measure: bool, note: Callable[[str], None]) -> None:
    from planc.compiler.compile import capacity_of, rewrite, tree_form

    plan, model = _plan_of(planned.plan, part, place), _model_of(planned, part)
    if tree_form(planned.plan) != "none" and not any(isinstance(p, KvCache) for p in plan.passes):
        plan = plan.model_copy(update={"passes": (*plan.passes, KvCache(trees="fused"))})  # so that siblings share a pass
    draft = rewrite(model, plan, note=lambda text: note(f"the draft model: {text}"))

    def finish(engine: Engine, capacity: int) -> Contract:
        """Exactness is nobody's concern: the target verifies every guess."""
        cost = profile.measure_cost(engine, capacity=min(capacity, 1024), seconds=3.0, logits=True) if measure else None
        return Contract(cost=cost, effects=draft.effects, hardware=hardware())

    capacity = min(capacity_of(planned), draft.program.info.max_length)
    write_onnx(draft, target, capacity, finish, lambda directory: plan.decode)


def _plan_of(plan: Plan, part: DraftModel, place: str | None) -> Plan:
    """The draft model's own plan: plain decoding, for the same target."""
    if part.plan is None:
        return Plan(passes=(*plan.passes, *part.passes), target=plan.target)
    own = Plan.from_yaml(_beside(plan, part.plan))
    if own.decode.speculative is not None:
        raise PlanError(
            "plan-conflict", f"the draft model's plan {part.plan} drafts itself", plan=place, fix="remove `speculative` from it"
        )
    if own.target.backend != "onnx":
        raise PlanError(
            "plan-conflict", f"{part.plan} is for the {own.target.backend} backend", plan=place, fix="use `backend: onnx` there"
        )
    return own


def _model_of(planned: Planned, part: DraftModel) -> Any:
    if part.model is None:
        return planned.model
    path = _beside(planned.plan, part.model)
    return path if path.exists() else part.model


def _check(planned: Planned, draft: Manifest, folder: Path, place: str | None) -> None:
    """Refuse a draft model of another vocabulary while the line of the plan is known."""
    from planc.compiler.compile import text_of

    try:
        vocabulary(text_of(planned.model), Text.load(folder), planned.program.info.vocab_size, draft.signature.vocab_size)
    except PlanError as error:
        error.plan = error.plan or place
        raise
