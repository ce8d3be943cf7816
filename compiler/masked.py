"""Compile a model that fills masked slots: the way of `compile.py`, to several forms over one set of weights."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from planc.backends.masked_reference import reference_engine
from planc.backends.onnx.artifact import signature
from planc.backends.onnx.lower import lower_forms
from planc.backends.onnx.masked import OnnxRunner
from planc.compiler.passbase import Context
from planc.compiler.pieces import layer_pieces
from planc.compiler.plan import Plan
from planc.compiler.program import Program
from planc.compiler.verify import verify
from planc.passes.proposals import Proposals
from planc.passes.segments import Segments
from planc.passes.slot_cache import SlotCache
from planc.runtime.artifact import Manifest, write_artifact
from planc.runtime.contract import Contract, Exactness, hardware
from planc.runtime.errors import PlanError
from planc.runtime.filler import Filler
from planc.runtime.masked import Uncached
from planc.runtime.masked.engine import MaskedSpec

if TYPE_CHECKING:
    from planc.compiler.compile import Planned
    from planc.runtime.decode import Masked

SECOND = "second"  #: folder of the second model in an artifact


def forms_of(program: Program, *, tracked: int = 0, by_layer: bool = False) -> dict[str, Program]:
    """The forms of a program with logits: full, slots where keys can be looked up by slot, and the pieces of the latter with `by_layer`."""
    context = Context()
    tail = Proposals(tracked=tracked)
    forms = {"full": tail.apply(Segments().apply(program, context), context)}
    forms["slots"] = tail.apply(SlotCache().apply(program, context), context)
    if by_layer:
        forms |= layer_pieces(program, tail.apply(SlotCache(probe=True).apply(program, context), context))
    for name, form in forms.items():
        verify(form, f"the form {name}")
    return forms


def spec_of(program: Program, slots: Program, *, tracked: int, by_layer: bool) -> MaskedSpec:
    """What an engine has to know."""
    info = program.info
    assert info.mask_id is not None
    size = sum(s.heads * (s.key_width + s.value_width) * np.dtype(str(s.dtype).removeprefix("torch.")).itemsize for s in slots.states)
    matrices = [
        p for name, p in program.params.items() if p.dim() == 2 and re.search(r"\.\d+\.", name)
    ]  # embeddings and head are not in layers
    weights = sum(p.numel() for p in matrices) // max(1, len(slots.states))
    return MaskedSpec(info.vocab_size, info.max_length, info.mask_id, len(slots.states), info.shift, tracked, by_layer, size, weights)


def check_masked(planned: Planned) -> None:
    """Refuse a model that has no mask token, or one outside its vocabulary. Raises PlanError."""
    info, plan = planned.program.info, planned.plan
    place = plan.where("decode", "masked", "mask_token") or plan.where("decode", "masked")
    if info.mask_id is None:
        fix = "use a diffusion language model; for one that was made into one, say `masked: {mask_token: ID}` and add the pass `bidirectional`"
        raise PlanError("plan-conflict", f"{planned.model.name} has no mask token, so there are no slots to fill", plan=place, fix=fix)
    if not 0 <= info.mask_id < info.vocab_size:
        message = f"the mask token {info.mask_id} is not in the vocabulary of {info.vocab_size}"
        raise PlanError("plan-conflict", message, plan=place, fix="name a token of the vocabulary")


@dataclass(frozen=True)
class _Model:
    """One model of a plan: its forms and what an engine has to know."""

    forms: dict[str, Program]
    spec: MaskedSpec
    folder: str = ""

    @classmethod
    def of(cls, planned: Planned, folder: str = "") -> _Model:
        check_masked(planned)
        masked = planned.plan.decode.masked
        assert masked is not None
        tracked, by_layer = masked.fusion.tracked if masked.fusion is not None else 0, masked.cache.by_layer
        forms = forms_of(planned.program, tracked=tracked, by_layer=by_layer)
        return cls(forms, spec_of(planned.program, forms["slots"], tracked=tracked, by_layer=by_layer), folder)

    def describe(self) -> dict[str, Any]:
        """For the manifest."""
        states = [(s.name, s.shape[1], s.shape[3], s.dtype) for s in signature(self.forms["slots"], self.spec.max_length).states]
        return {"folder": self.folder, "spec": vars(self.spec), "states": states}


def compile_masked(planned: Planned, out: Callable[[], Path], note: Callable[[str], None]) -> Path | Filler:
    """The artifact's directory, or the executable itself where the plan's backend writes none."""
    from planc.compiler.compile import rewrite, text_of

    plan, masked = planned.plan, planned.plan.decode.masked
    assert masked is not None
    note("forms for queries")
    models = [_Model.of(planned)]
    if masked.second_model is not None:
        path = plan.folder / Path(masked.second_model).expanduser()
        models.append(_Model.of(rewrite(path if path.exists() else masked.second_model, plan, note=note), SECOND))
        _check_pair(models, plan)
    spec, contract = models[0].spec, Contract(effects=planned.effects, exactness=promise(masked), hardware=hardware())
    if plan.target.backend == "reference":
        first, *others = (reference_engine(model.forms, model.spec) for model in models)
        return Filler(first, text_of(planned.model), plan.decode, contract, folder=plan.folder, others=others)
    note("lowering to ONNX")
    directory = out()

    def build(target: Path) -> Manifest:
        for model in models:
            (target / model.folder).mkdir(exist_ok=True)
            lower_forms(model.forms, target / model.folder, ops=plan.target.ops, positions=min(model.spec.max_length, 1 << 14))
        for name, path in planned.model.tokenizer_files.items():
            shutil.copyfile(path, target / name)
        manifest = Manifest(
            planc=metadata.version("planc"),
            created_by="planc.compile",
            model=planned.model.name,
            task="filling",
            plan=plan.to_dict(),
            decode=_with_files(plan, target).decode.model_dump(mode="json"),
            target=plan.target.model_dump(mode="json"),
            signature=signature(models[0].forms["slots"], spec.max_length),
            eos_ids=planned.model.eos_ids,
            contract=contract,
            extra={"models": [model.describe() for model in models]},
        )
        OnnxRunner(target, None).session("full")  # an artifact that does not load is not written
        return manifest

    write_artifact(directory, build)
    return directory


def _check_pair(models: list[_Model], plan: Plan) -> None:
    """Two models take turns on one canvas, so they have to mean the same by a token."""
    a, b = (model.spec for model in models)
    if (a.vocab_size, a.mask_id) != (b.vocab_size, b.mask_id):
        message = f"the second model has {b.vocab_size} tokens and the mask {b.mask_id}, the first {a.vocab_size} and {a.mask_id}"
        raise PlanError("plan-conflict", message, plan=plan.where("decode", "masked", "second_model"), fix="use two models of one family")


def promise(masked: Masked) -> Exactness:
    """One slot a pass by the whole model is what others are compared with; everything else changes tokens by design."""
    exact = masked == type(masked)(
        window=masked.window, score=masked.score, forced=masked.forced, mask_token=masked.mask_token, end=masked.end
    )
    exact = exact and isinstance(masked.cache, Uncached)
    level, note = (
        ("bitwise", "one slot a pass") if exact else ("lossy", "several slots a pass, or cached slots: tokens may differ from one a pass")
    )
    return Exactness(level=level, chains=level, note=note)  # type: ignore[arg-type]


def _with_files(plan: Plan, target: Path) -> Plan:
    """The plan whose hooks find their files in the artifact."""
    masked = plan.decode.masked
    assert masked is not None
    moved = {}
    for name, hook in masked.by_name.items():
        if hook is not None and (file := getattr(hook, "file", None)) is not None:
            hook.bind(plan.folder)  # refuses what is no such file
            shutil.copyfile(plan.folder / file, target / f"{hook.key}.safetensors")
            moved[name] = hook.model_copy(update={"file": f"{hook.key}.safetensors"})
    decode = plan.decode.model_copy(update={"masked": masked.model_copy(update=moved)})
    return plan.model_copy(update={"decode": decode})
