"""What drafters need in the artifact: a draft model or head in a folder of its own, the sublayers that a target leaves out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planc.backends.onnx.artifact import write_onnx
from planc.backends.onnx.engine import OnnxEngine
from planc.compiler.blocks import find_blocks
from planc.compiler.passbase import Pass
from planc.compiler.plan import Plan
from planc.compiler.plan_source import Source
from planc.compiler.program import Program
from planc.compiler.skip_fit import fit_skip
from planc.passes.attach_head import AttachHead
from planc.passes.kv_cache import KvCache
from planc.passes.load_weights import LoadWeights
from planc.passes.quantize_weights import QuantizeWeights
from planc.passes.skip_layers import SkipLayers
from planc.passes.trim_vocab import TrimVocab
from planc.runtime import profile
from planc.runtime.artifact import MANIFEST, Manifest, read_artifact, sha256
from planc.runtime.contract import Contract, hardware
from planc.runtime.decode import Decode
from planc.runtime.drafters import DrafterPart, DraftHead, DraftModel, NgramModel, SelfSkip
from planc.runtime.drafters.draft_head import HEAD
from planc.runtime.drafters.draft_model import FOLDER, FUZZY
from planc.runtime.drafters.ngram_model import NgramDrafter
from planc.runtime.drafters.vocabulary import vocabulary
from planc.runtime.engine import Engine
from planc.runtime.errors import CompileError, PlanError
from planc.runtime.text import TOKENIZER, Text

if TYPE_CHECKING:
    from planc.compiler.compile import Planned

DATA = "drafters"  #: where the artifact of a target keeps files that its drafters read

_DEAREST, _PAST = 0.9, 128  # a fuzzy form whose pass takes a larger share of the exact form's, behind so many tokens, is left out


def places_of(plan: Plan) -> dict[int, DrafterPart]:
    """The plan's drafters that need something in the artifact, by their place in the list."""
    drafters = plan.decode.speculative.drafter if plan.decode.speculative is not None else ()
    return {i: part for i, part in enumerate(drafters) if isinstance(part, DraftModel | SelfSkip | DraftHead) or data_of(part) is not None}


def data_of(part: DrafterPart) -> str | None:
    """The file that a drafter reads, as the plan names it."""
    return getattr(part, part.data_file) if part.data_file is not None else None


def attach_drafts(
    planned: Planned, measure: bool, note: Callable[[str], None], directory: Path, manifest: Manifest, engine: OnnxEngine
) -> Manifest:
    """Write what the plan's drafters need into `directory`; the manifest whose decode section finds it there."""
    parts, extra = places_of(planned.plan), dict(manifest.extra)
    if not parts:
        return manifest
    decode = Decode.model_validate(manifest.decode)
    assert decode.speculative is not None
    drafters: list[DrafterPart | None] = list(decode.speculative.drafter)
    for index, part in parts.items():
        place = planned.plan.where("decode", "speculative", "drafter", index)
        try:
            if isinstance(part, DraftModel):
                extra |= _attach_model(planned, part, directory / FOLDER, place, measure, note)
                drafters[index] = part.model_copy(update={"artifact": FOLDER, "plan": None, "model": None, "passes": (), "fuzzy": ()})
            elif isinstance(part, DraftHead):
                _attach_head(planned, part, place, directory / HEAD, measure, note)
                drafters[index] = part.model_copy(update={"artifact": HEAD, "file": None})
            elif isinstance(part, SelfSkip):
                drafters[index], found = fit_skip(part, engine, planned.text_ids, manifest.contract, note)
                extra |= found
            else:
                drafters[index] = _attach_data(planned, part, index, directory, note)
        except PlanError as error:
            error.plan = error.plan or place
            raise
    left = tuple(part for part in drafters if part is not None)
    decode = decode.model_copy(update={"speculative": decode.speculative.model_copy(update={"drafter": left}) if left else None})
    return manifest.model_copy(update={"decode": decode.model_dump(mode="json"), "extra": extra})


def _attach_model(
    planned: Planned, part: DraftModel, target: Path, place: str | None, measure: bool, note: Callable[[str], None]
) -> dict[str, Any]:
    """Write the draft model into the folder `target`; what the manifest has to say of it."""
    note("the draft model")
    if part.artifact is not None:
        _copy(_beside(planned.plan, part.artifact), target)
    else:
        _compile(planned, part, place, target, measure, note)
    _check(planned, read_artifact(target, verify=False), target)
    if planned.plan.decode.context is not None and (part.artifact is not None or not _same_text(planned, target)):
        message = (
            "context shortens prompts by what the draft model attends to, so that model is compiled with the plan and has its tokenizer"
        )
        raise PlanError(
            "draft-mismatch", message, plan=place, fix="use draft_model: {passes: ...}, or {plan: ...} with a model of the family"
        )
    if not part.fuzzy:
        return {}
    note("the fuzzy form of the draft model")
    _compile(planned, part, place, target / FUZZY, measure, note, fuzzy=True)
    exact, fuzzy = (read_artifact(folder, verify=False).contract.cost for folder in (target, target / FUZZY))
    if exact is None or fuzzy is None:
        return {}
    ratio = fuzzy.ms(1, _PAST) / exact.ms(1, _PAST)
    if ratio > _DEAREST:  # worse guesses for the same time
        shutil.rmtree(target / FUZZY)
    return {"fuzzy": {"step_ratio": round(ratio, 4), "kept": ratio <= _DEAREST}}


def _attach_head(planned: Planned, part: DraftHead, place: str | None, target: Path, measure: bool, note: Callable[[str], None]) -> None:
    """Write the trained head into the folder `target`."""
    from planc.compiler.compile import raised

    note("the draft head")
    if part.file is None:
        message = "draft_head has no trained head yet"
        raise PlanError("plan-bad-value", message, plan=place, fix="name a `file`, and make it with `planc fit`")
    bare = raised(planned.model)
    plans = []
    for made in head_passes(bare, part):
        passes = (*made, LoadWeights(file=part.file, only=made[-1].own), TrimVocab(file=part.file), QuantizeWeights(format="int8"))
        plans.append(Plan(Source(str(planned.plan.folder / "head.yaml")), passes=passes, target=planned.plan.target))
    _write(planned, planned.model, plans[0], target, measure, note, "the draft head", bare, plans[1:])


def file_for(path: str, model: str) -> str:
    """A path of a plan with the model's name in the place of `{model}`."""
    return path.replace("{model}", Path(model).name)


def _attach_data(planned: Planned, part: DrafterPart, index: int, directory: Path, note: Callable[[str], None]) -> DrafterPart | None:
    """Copy the file that a drafter reads into the artifact, after it was read once; the drafter that finds it there, None if it is left out."""
    name, vocabulary_size = data_of(part), planned.program.info.vocab_size
    assert name is not None and part.data_file is not None
    source = _beside(planned.plan, file_for(name, planned.model.name))
    if isinstance(part, NgramModel) and part.optional and not source.exists():
        note(f"no {source}: compiled without it; `planc fit` makes one")
        return None
    read = part.model_copy(update={part.data_file: str(source)}).build(vocabulary_size)
    if isinstance(read, NgramDrafter) and (tokenizer := planned.model.tokenizer_files.get(TOKENIZER)) is not None:
        made_for = read.table.about.get("tokenizer")
        if made_for is not None and made_for != sha256(tokenizer):
            message = f"ngram_model: {name} was counted on the token ids of another model"
            raise PlanError("draft-mismatch", message, fix="make one for this model with `planc fit`")
    place = f"{DATA}/{index}{source.suffix}"
    (directory / DATA).mkdir(exist_ok=True)
    shutil.copyfile(source, directory / place)
    return part.model_copy(update={part.data_file: place})


def head_passes(bare: Program, part: DraftHead) -> list[tuple[*tuple[Pass, ...], AttachHead]]:
    """What makes of the model, as it is before any pass, each graph of a draft head that is not trained yet."""
    if part.body == "mlp":
        return [(AttachHead(body="mlp", fuse=part.fused, level=level, blocks=part.blocks),) for level in range(1, part.levels + 1)]
    layers = [block.index for block in find_blocks(bare)]
    layer = layers[part.layer] if -len(layers) <= part.layer < 0 else part.layer
    return [(SkipLayers(keep=(layer,)), AttachHead(fuse=part.fused, feedback=part.feedback))]


def _beside(plan: Plan, path: str) -> Path:
    """A path of a plan counts from the folder of the plan's file."""
    return plan.folder / Path(path).expanduser()


def _copy(source: Path, target: Path) -> None:
    """A checked copy of an artifact."""
    manifest = read_artifact(source)
    for name in (*manifest.files, MANIFEST):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _compile(
    planned: Planned, part: DraftModel, place: str | None, target: Path, measure: bool, note: Callable[[str], None], *, fuzzy: bool = False
) -> None:
    plan, model = _plan_of(planned.plan, part, place), _model_of(planned, part)
    if fuzzy:
        plan = plan.model_copy(update={"passes": (*plan.passes, *part.fuzzy)})
    draft = _write(planned, model, plan, target, measure, note, "the draft model")
    added = set[str]() if fuzzy else {extra.key for extra in part.passes}  # a fuzzy form may be the exact one: n = 1
    if idle := [effect.name for effect in draft.effects if effect.name in added and effect.notes == ("nothing to do",)]:
        message = f"draft_model: {idle[0]} finds nothing to do after the plan's own passes"
        raise CompileError("pass-no-match", message, plan=place, fix="remove it, or give the draft model a plan of its own")


def _write(
    planned: Planned,
    model: Any,
    plan: Plan,
    target: Path,
    measure: bool,
    note: Callable[[str], None],
    name: str,
    bare: Program | None = None,
    deeper: Sequence[Plan] = (),
) -> Planned:
    """The artifact `target` of what drafts for `planned`: `model` by `plan`; `bare` is the model where it was raised already.

    `deeper` are the plans of a head's graphs for further guesses.
    """
    from planc.compiler.compile import capacity_of, rewrite, tree_form

    def rewritten(plan: Plan) -> Planned:
        if tree_form(planned.plan) != "none" and not any(isinstance(p, KvCache) for p in plan.passes):
            plan = plan.model_copy(update={"passes": (*plan.passes, KvCache(trees="fused"))})  # so that siblings share a pass
        return rewrite(model, plan, note=lambda text: note(f"{name}: {text}"), program=bare)

    draft = replace(rewritten(plan), deeper=tuple(rewritten(each).program for each in deeper))

    def finish(engine: Engine, capacity: int) -> Contract:
        """Exactness is nobody's concern: the target verifies every guess."""
        cost = profile.measure_cost(engine, capacity=min(capacity, 1024), seconds=3.0, logits=True) if measure else None
        return Contract(cost=cost, effects=draft.effects, hardware=hardware())

    write_onnx(draft, target, min(capacity_of(planned), capacity_of(draft)), finish)
    return draft


def _plan_of(plan: Plan, part: DraftModel, place: str | None) -> Plan:
    """The draft model's own plan: plain decoding, for the same target."""
    if part.plan is None:
        # a draft model's cache follows no policy: nobody tells it where a prompt ends, and it goes back as far as drafts are rejected
        passes = (p.model_copy(update={"policy": None}) if isinstance(p, KvCache) else p for p in (*plan.passes, *part.passes))
        return _judging(plan, Plan(Source(str(plan.folder / "draft.yaml")), passes=tuple(passes), target=plan.target))
    own = Plan.from_yaml(_beside(plan, part.plan))
    if own.decode.speculative is not None:
        raise PlanError(
            "plan-conflict", f"the draft model's plan {part.plan} drafts itself", plan=place, fix="remove `speculative` from it"
        )
    if any(isinstance(p, KvCache) and p.policy is not None for p in own.passes):
        message = f"{part.plan} gives the draft model's cache a policy, and nobody tells it where a prompt ends"
        raise PlanError("plan-conflict", message, plan=place, fix="remove `policy` from it")
    if own.target.backend != "onnx":
        raise PlanError(
            "plan-conflict", f"{part.plan} is for the {own.target.backend} backend", plan=place, fix="use `backend: onnx` there"
        )
    return _judging(plan, own)


def _judging(plan: Plan, own: Plan) -> Plan:
    """The draft model's plan, whose cache also tells what it was asked where the target's prompts are shortened by that."""
    if plan.decode.context is None:
        return own
    cache = next((p for p in own.passes if isinstance(p, KvCache)), KvCache())
    passes = (*(p for p in own.passes if not isinstance(p, KvCache)), cache.model_copy(update={"policy": plan.decode.context.policy}))
    return own.model_copy(update={"passes": passes})


def _same_text(planned: Planned, folder: Path) -> bool:
    """Whether a draft model in this folder reads the target's token ids."""
    ours = planned.model.tokenizer_files.get(TOKENIZER)
    theirs = folder / TOKENIZER
    return (ours.read_bytes() if ours is not None else b"") == (theirs.read_bytes() if theirs.is_file() else b"")


def _model_of(planned: Planned, part: DraftModel) -> Any:
    if part.model is None:
        return planned.model
    path = _beside(planned.plan, part.model)
    return path if path.exists() else part.model


def _check(planned: Planned, draft: Manifest, folder: Path) -> None:
    """Refuse a draft model of another vocabulary before the artifact is finished."""
    from planc.compiler.compile import text_of

    vocabulary(text_of(planned.model), Text.load(folder), planned.program.info.vocab_size, draft.signature.vocab_size)
