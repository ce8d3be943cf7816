"""Short training of a program's weights: what was removed from it is made up for by the rest, with the untouched program as the teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planc.backends.reference import run
from planc.compiler.calibration import batch_of
from planc.compiler.program import Program
from planc.runtime.errors import CompileError

#: Arguments of an operation that are learned; running statistics, rotary frequencies and the like are not.
_LEARNED = {
    "linear": (1, 2),
    "conv1d": (1, 2),
    "conv2d": (1, 2),
    "embedding": (0,),
    "rms_norm": (1,),
    "layer_norm": (2, 3),
    "batch_norm": (1, 2),
}


def tuned(
    program: Program,
    teacher: Program,
    samples: Tensor,
    keep: Mapping[str, Tensor],
    *,
    steps: int,
    rate: float,
    batch: int,
    seed: int = 0,
    decay: bool = False,
) -> dict[str, Tensor]:
    """The learned parameters by name after `steps` of Adam on KL(teacher || program) of the logits; `program` keeps its own.

    Args:
        samples: token ids [S, L], or images [S, C, Y, X]; each step draws `batch` of them.
        keep: masks by parameter; what they hide is zero in every forward pass, so it gets neither a gradient nor a moment, and stays zero.
        rate: Adam's; with `decay` it falls to zero along a line.

    Raises CompileError[pass-refused] when the loss is no longer a number.
    """
    leaves = {name: program.params[name].clone().requires_grad_() for name in _learned(program)}
    optimiser = torch.optim.Adam(leaves.values(), lr=rate)
    random = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * (1 - step / steps) if decay else rate
        inputs = batch_of(samples[torch.randint(len(samples), (min(batch, len(samples)),), generator=random)])
        want = run(teacher, inputs)["logits"].log_softmax(-1)
        masked = {name: leaf * keep[name] if name in keep else leaf for name, leaf in leaves.items()}
        have = run(program.replace(params={**program.params, **masked}), inputs, grad=True)["logits"].log_softmax(-1)
        loss = (want.exp() * (want - have)).sum(-1).mean()
        if not math.isfinite(value := float(loss.detach())):
            raise CompileError("pass-refused", f"the loss is {value} after {step} steps of tuning", fix="lower `rate`")
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return {name: (leaf * keep[name] if name in keep else leaf).detach() for name, leaf in leaves.items()}


def _learned(program: Program) -> list[str]:
    names: dict[str, None] = {}
    for node in program.main.nodes:
        for index in _LEARNED.get(getattr(node.target, "_opname", ""), ()):
            argument: Any = node.args[index] if len(node.args) > index else None
            if isinstance(argument, Node) and argument.op == "get_attr" and program.params[str(argument.target)].is_floating_point():
                names[str(argument.target)] = None
    return list(names)
