"""Train the low-rank factors beside quantised products on text; what is quantised stays as it is.

Matches   the factors that `quantize_weights: {low_rank: r}` left in the program        Produces  the same graph over other factors
Keeps     every other parameter        Refuses   a program without factors, and text of fewer than two tokens a sequence
Paper     LQ-LoRA (Guo et al. 2023), which trains them as a LoRA adapter; Adam with a cosine schedule on the loss of the next token
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from planc.compiler.calibration import calibration_text
from planc.compiler.passbase import Context, Pass, Stage
from planc.compiler.program import Program
from planc.compiler.training import differentiable, next_token_loss
from planc.runtime.errors import CompileError

_WARM = 0.1  # share of the steps in which the rate rises
_CLIP = 1.0  # norm of the gradient at most


class TrainLowRank(Pass):
    """Train the low-rank factors that quantize_weights made."""

    stage: ClassVar[Stage] = Stage.NUMERICS
    requires: ClassVar[tuple[str, ...]] = ("quantize_weights",)
    after: ClassVar[tuple[str, ...]] = ("quantize_weights",)
    conflicts: ClassVar[tuple[str, ...]] = ("train_low_rank",)
    calibrates: ClassVar[bool] = True
    steps: int = Field(default=100, ge=1, le=100_000, description="steps of one sequence of the calibration text each, over and over")
    rate: float = Field(default=5e-4, gt=0.0, le=1.0, description="largest learning rate")

    def apply(self, program: Program, context: Context) -> Program:
        """Adam over all factors together; float32 while training, float16 as before in the result."""
        if any(change.pass_name == self.key for change in program.history):
            return program
        names = [n for n in program.params if n.endswith((".left", ".right"))]
        if not names:
            fix = "give quantize_weights a `low_rank`, or remove train_low_rank"
            raise CompileError("pass-refused", "there are no low-rank factors to train", where=f"pass {self.key}", fix=fix)
        text = calibration_text(context, self.key)
        if text.shape[1] < 2:
            fix = "give sequences of two tokens or more"
            raise CompileError("calibration-short", "a sequence of one token has no next token", where=f"pass {self.key}", fix=fix)
        factors = {name: program.params[name].float().requires_grad_() for name in names}
        losses = self._train(program, factors, text, context.progress)
        edit = program.edit(self.key)
        edit.params |= {name: value.detach().to(program.params[name].dtype) for name, value in factors.items()}
        tenth = max(1, len(losses) // 10)
        first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
        return edit.done(len(names), len(names), [f"loss {first:.3f} -> {last:.3f} in {len(losses)} steps"])

    def _train(self, program: Program, factors: Mapping[str, Tensor], text: Tensor, progress: Any) -> list[float]:
        functions, losses, steps = differentiable(program), list[float](), range(self.steps)
        adam = torch.optim.Adam(factors.values(), lr=self.rate, betas=(0.9, 0.95))
        warm = max(1, round(_WARM * self.steps))
        for step in progress(steps, "training") if progress else steps:
            share = (step + 1) / warm if step < warm else 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, self.steps - warm))
            adam.param_groups[0]["lr"] = self.rate * share
            ids = text[step % len(text)][None]
            loss = next_token_loss(program, functions, ids, factors)
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(factors.values(), _CLIP)
            adam.step()
            losses.append(float(loss.detach()))
        return losses
