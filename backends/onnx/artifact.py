"""Writes the artifact of the ONNX backend: graph, weights, text files, manifest, and the description that onnxruntime-genai reads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planc.backends.onnx.engine import OnnxEngine, level_name
from planc.backends.onnx.genai import write_genai
from planc.backends.onnx.lanes import write_lanes
from planc.backends.onnx.lower import lower, lower_forms, lower_gated
from planc.backends.reference import layers_of
from planc.compiler.program import Program
from planc.runtime.artifact import Manifest, Signature, StateSpec, write_artifact
from planc.runtime.contract import Contract
from planc.runtime.drafters import SelfSkip
from planc.runtime.engine import Engine

if TYPE_CHECKING:
    from planc.compiler.compile import Planned

#: (directory, manifest, engine) -> the manifest of what the directory then holds
Attach = Callable[[Path, Manifest, OnnxEngine], Manifest]


def write_onnx(
    planned: Planned, directory: Path, capacity: int, finish: Callable[[Engine, int], Contract], attach: Attach = lambda *made: made[1]
) -> None:
    """Write the artifact at `directory`.

    `finish` measures the engine; `attach` then adds what the drafters need to the directory and to the manifest.
    """
    plan, program = planned.plan, planned.program

    def build(target: Path) -> Manifest:
        extra = _lower(planned, target, capacity)
        for name, path in planned.model.tokenizer_files.items():
            shutil.copyfile(path, target / name)
        manifest = Manifest(
            planc=metadata.version("planc"),
            created_by="planc.compile",
            model=planned.model.name,
            plan=plan.to_dict(),
            decode=plan.decode.model_dump(mode="json"),
            backend="onnx",
            target=plan.target.model_dump(mode="json"),
            signature=signature(program, capacity),
            eos_ids=planned.model.eos_ids,
            extra={
                "lanes": write_lanes(target, plan.decode.batching.sequences) if plan.decode.batching else 0,
                "batches": program.policy is None and (plan.target.ops == "standard" or all(s.split for s in program.states)),
                **extra,
                **write_genai(planned, target, capacity),
            },
        )
        engine = OnnxEngine(target, manifest)
        return attach(target, manifest.model_copy(update={"contract": finish(engine, capacity)}), engine)

    write_artifact(directory, build)


def _lower(planned: Planned, target: Path, capacity: int) -> dict[str, Any]:
    """Write the graphs; what the manifest has to say of them."""
    plan, program = planned.plan, planned.program
    drafters = plan.decode.speculative.drafter if plan.decode.speculative is not None else ()
    if any(isinstance(part, SelfSkip) for part in drafters):
        return {"units": lower_gated(program, target, ops=plan.target.ops, positions=capacity)}
    if planned.deeper:
        forms = dict(enumerate((program, *planned.deeper)))
        lower_forms({level_name(level): form for level, form in forms.items()}, target, ops=plan.target.ops, positions=capacity)
        return {"levels": len(forms)}
    lower(program, target, ops=plan.target.ops, positions=capacity)
    return policy_of(program)


def policy_of(program: Program) -> dict[str, Any]:
    """What the manifest has to say of the cache's policy, if it has one."""
    if program.policy is None:
        return {}
    layers = [layer.model_dump(mode="json") for layer in layers_of(program)]
    return {"kv": {"policy": program.policy.model_dump(mode="json", exclude_defaults=True), "layers": layers}}


def signature(program: Program, capacity: int) -> Signature:
    """What a loader must know of the graph."""
    top = program.outputs.get("top_ids")
    return Signature(
        vocab_size=program.info.vocab_size,
        max_length=program.info.max_length,
        capacity=capacity,
        layers=len(program.states),
        kv_heads=tuple(s.heads for s in program.states),
        head_dims=tuple(s.key_width for s in program.states),
        top_k=int(top.meta["val"].shape[-1]) if top is not None else 0,
        trees=any(name.startswith("bias") for name in program.inputs),
        taps=tuple(name for name in program.outputs if name.startswith("tap.")),
        states=tuple(
            StateSpec(name=f"{s.name}.{part}", dtype=str(s.dtype).removeprefix("torch."), shape=("batch", s.heads, "capacity", width))
            for s in program.states
            for part, width in (("key", s.key_width), ("value", s.value_width))
        ),
    )
