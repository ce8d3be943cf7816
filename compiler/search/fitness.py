"""How far candidates are from the model: the mean KL divergence of their next-token distributions on the same text."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from planc.backends.reference import run
from planc.compiler.compile import Planned, rewrite
from planc.compiler.program import Program
from planc.compiler.search.candidates import Candidates
from planc.compiler.search.space import Point

_READERS = (torch.ops.aten.linear.default, torch.ops.aten.embedding.default)


@dataclass(frozen=True)
class Recipe:
    """What a worker needs to make an evaluator of its own."""

    model: Any  # what `planc.compile` takes: a name, a path or a module
    plan: Any  # a Plan with a section `search`
    threads: int | None = None

    def evaluator(self) -> Evaluator:
        """Load, trace and rewrite the model; seconds for 135M parameters."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return Evaluator(Candidates(started(self.model), self.plan))


def started(model: Any) -> Planned:
    """The model, traced and raised, with nothing applied; what was started already is taken as it is."""
    if isinstance(model, Planned):
        return model
    return rewrite(model, disable=("kv_cache", "logits_rows", "argmax"), check=False)


class Evaluator:
    """Scores points against the unchanged model with the reference backend, in float32 or, as the plan says, in bfloat16."""

    def __init__(self, candidates: Candidates) -> None:
        assert candidates.plan.search is not None
        self.candidates = candidates
        self._coarse = candidates.plan.search.precision == "bfloat16"
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}  # by identity; holds the original, so that the identity stays its own
        self._teacher = self._cast(candidates.original)
        self._programs: OrderedDict[Point, Program] = OrderedDict()

    def divergence(self, points: Sequence[Point], ids: Sequence[int]) -> list[float]:
        """Per point, the sum over all positions but the last of KL(model || candidate) in nats, on one piece of text."""
        wanted = self._logits(self._teacher, ids)  # [L-1, V]
        probabilities, mass = wanted.softmax(-1), wanted.logsumexp(-1)
        found = []
        for point in points:
            logits = self._logits(self._program(point), ids)
            # sum of p (log p - log q), with the difference of the logits first: both sums then stay as small as the divergence
            kl = logits.logsumexp(-1) - mass + (probabilities * (wanted - logits)).sum(-1)
            found.append(float(kl.double().sum()))
        return found

    def _program(self, point: Point) -> Program:
        """The point's program; those of the last generation are kept."""
        if point not in self._programs:
            self._programs[point] = self._cast(self.candidates.program(point))
            while len(self._programs) > 64:
                self._programs.popitem(last=False)
        return self._programs[point]

    def _cast(self, program: Program) -> Program:
        """With weights of products and embeddings in bfloat16, if the plan wants it so: the rest follows its inputs."""
        if not self._coarse:
            return program
        weights = {str(a.target) for n in program.main.nodes if n.target in _READERS for a in n.all_input_nodes if a.op == "get_attr"}
        params = dict(program.params)
        for name in weights:
            value = params[name]
            if value.dtype == torch.float32:
                params[name] = self._casts.setdefault(id(value), (value, value.bfloat16()))[1]
        return program.replace(params=params)

    @staticmethod
    def _logits(program: Program, ids: Sequence[int]) -> Tensor:
        tokens = torch.tensor([list(ids)])
        inputs = {"input_ids": tokens, "position_ids": torch.arange(len(ids))[None]}
        return run(program, inputs)["logits"][0, :-1].float()
