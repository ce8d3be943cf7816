"""`planc fit`: learn what a plan's parts need from data, and write the files that they name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PrivateAttr
from safetensors.torch import save
from torch import nn

from planc.compiler.compile import compile as compile_plan
from planc.compiler.files import write
from planc.compiler.plan import Plan
from planc.runtime.engine import Floats
from planc.runtime.errors import PlanError
from planc.runtime.filler import ONE_A_PASS, Filler
from planc.runtime.loops.masked import Filling
from planc.runtime.masked import Canvas, LearnedFilter, Oracle, TopK
from planc.runtime.masked.canvas import Mask, Slots
from planc.runtime.masked.hooks import SelectHook
from planc.runtime.masked.learned_filter import NAMES

EPOCHS, RATE = 2000, 3e-3


def fit(plan: Plan, model: Any, prompts: Sequence[Any], *, seed: int = 0, note: Callable[[str], None] = print) -> dict[str, Any]:
    """Fit every part of a plan that is learned; what was written and how good it is on held-out prompts, by the part's key.

    Raises PlanError[plan-requires] where nothing in the plan is learned.
    """
    masked = plan.decode.masked
    if masked is None or not isinstance(masked.select, LearnedFilter):
        raise PlanError("plan-requires", "nothing in the plan is learned from data", fix="parts that are: learned_filter")
    return {masked.select.key: fit_filter(plan, masked.select, model, prompts, seed, note)}


class _Recorder(SelectHook):
    """An oracle that notes what it saw: the confidences of the block, and which proposals were the reference's."""

    kind = "recorder"
    reference: tuple[int, ...]
    size: int
    _seen: list[tuple[Floats, Floats]] = PrivateAttr(default_factory=list)

    def select(self, canvas: Canvas, slots: Slots, confidence: Floats) -> Mask:
        inputs, labels = np.ones(self.size, np.float32), np.ones(self.size, np.float32)
        block = slice(canvas.start, canvas.stop)
        at = np.arange(block.start, block.stop)
        inputs[: len(at)] = canvas.confidence[block]
        labels[: len(at)] = canvas.x0[block] == np.array(self.reference)[at - canvas.prompt]
        self._seen.append((inputs, labels))
        return self._oracle.select(canvas, slots, confidence)

    def insist(self, canvas: Canvas, slots: Slots) -> NDArray[np.int64]:
        return self._oracle.insist(canvas, slots)

    @property
    def _oracle(self) -> Oracle:
        return Oracle(reference=self.reference)


def rollouts(exe: Filler, prompts: Sequence[Any], size: int) -> tuple[Floats, Floats]:
    """Confidences [N, size] and labels [N, size] of every pass of oracle rollouts; the reference is one slot a pass by the whole model."""
    plain = exe.with_plan(**ONE_A_PASS)
    seen: list[tuple[Floats, Floats]] = []
    references = plain.generate(list(prompts))
    assert isinstance(references, list)
    for answer in references:
        prompt, field = answer.canvas[: answer.prompt_tokens], answer.canvas[answer.prompt_tokens :]
        canvas = exe.canvas(prompt, len(field), 0, 0)
        recorder = _Recorder(reference=tuple(field), size=size)
        filling = Filling(
            exe.engine, [canvas], exe.plan.model_copy(update={"select": recorder, "end": None, "stop": None}), exe.decode.sampling
        )
        for _ in filling:
            pass
        seen += recorder._seen
    return np.stack([s[0] for s in seen]), np.stack([s[1] for s in seen])


def fit_filter(
    plan: Plan, part: LearnedFilter, model: Any, prompts: Sequence[Any], seed: int, note: Callable[[str], None]
) -> dict[str, Any]:
    """Learn2PD's filter from oracle rollouts (papers/09): two layers, binary cross-entropy, a tenth of the passes held out."""
    masked = plan.decode.masked
    assert masked is not None
    size = getattr(masked.window, "size", None)
    if size is None:
        raise PlanError(
            "plan-requires", "a learned filter reads blocks of one size", plan=plan.where("decode", "masked"), fix="use `window: blocks`"
        )
    trial = plan.model_copy(update={"decode": plan.decode.model_copy(update={"masked": masked.model_copy(update={"select": TopK()})})})
    exe = compile_plan(model, trial)
    assert isinstance(exe, Filler)
    note(f"rollouts on {len(prompts)} prompts")
    inputs, labels = (torch.from_numpy(v) for v in rollouts(exe, prompts, size))
    held = torch.rand(len(inputs), generator=torch.Generator().manual_seed(seed)) < 0.1
    torch.manual_seed(seed)
    network: nn.Sequential = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))
    optimiser = torch.optim.AdamW(network.parameters(), lr=RATE)
    for _ in range(EPOCHS):
        optimiser.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(network(inputs[~held]), labels[~held])
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        says = torch.sigmoid(network(inputs[held])) > part.theta
    right = labels[held] > 0.5
    path = plan.folder / part.file
    _write(network, path)
    precision = float((says & right).sum() / says.sum().clamp(min=1))
    figures = {"file": str(path), "passes": len(inputs), "loss": round(float(loss.detach()), 4), "precision": round(precision, 4)}
    note(", ".join(f"{name} {value}" for name, value in figures.items()))
    return {**figures, "recall": round(float((says & right).sum() / right.sum().clamp(min=1)), 4)}


def _write(network: nn.Sequential, path: Path) -> None:
    values = list(network.parameters())
    write(path, save({name: value.detach().contiguous() for name, value in zip(NAMES, values, strict=True)}))
