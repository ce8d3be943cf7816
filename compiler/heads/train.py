"""Teaching a draft head: the program itself is trained, through the references of its operations.

A head that is used several guesses deep reads its own estimates. So it is unrolled in training as it is in use (the training-time test of EAGLE-3):
in step n a row reads what step n - 1 thought of its state, sees true rows up to n tokens before it, and between them the rows that the steps
before it made on the same path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from planc.backends.reference import run
from planc.compiler.dialect import OPS
from planc.compiler.heads.texts import Texts
from planc.compiler.program import Program
from planc.runtime.drafters.draft_head import FEEDBACK
from planc.runtime.errors import CompileError

aten = torch.ops.aten
LOGITS = "tap.logits"  # output of a program in training: the vector that the head multiplies

_WARM_UP, _FLOOR = 0.03, 0.1  # share of the steps with a rising rate; the rate at the end, of the highest
_DECAY = 0.8  # weight of a step of the unrolled head, of the one before
_STATE_WEIGHT = 0.5  # of the distance of states beside the cross-entropy
_PROMPT_WEIGHT = 0.3  # of tokens that the target did not write
_NOISE = 0.1  # uniform, on the states that are read, of their mean size
_CLIP = 1.0
_DIVERGED = 3.0  # a loss of so many times the best is no accident


@dataclass(frozen=True)
class Options:
    """How a head is taught."""

    steps: int = 400
    batch: int = 8  # windows in a step
    window: int = 192  # tokens of a window
    rate: float = 1e-3
    unroll: int = 3  # guesses deep, in the last part of the training
    unrolled: float = 0.5  # which part that is
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Rows as the head will read them: token ids [B, L], the states before them and those to guess [B, L, K], weights [B, L]."""

    tokens: Tensor
    states: Tensor
    targets: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Score:
    """Share of places where the head's first choice is the target's, given true guesses before it; by depth of the guess."""

    agreement: tuple[float, ...]
    loss: float

    @property
    def expected(self) -> float:
        """Tokens per pass of a chain as deep as was looked at."""
        return 1.0 + float(np.cumprod(self.agreement).sum())


@dataclass
class Trainer:
    """A program in training. `kept` are the tokens that the head will choose from, `head` [V, K] the target's own output layer."""

    program: Program
    head: Tensor
    kept: Tensor
    options: Options
    params: dict[str, Tensor] = field(init=False)
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = trainable(self.program)
        self.params = {name: self.program.params[name].detach().float().clone().requires_grad_() for name in names}
        self._rows = self.head[self.kept].float()

    def train(self, data: Data, progress: Callable[[int, int, float], None], save: Callable[[], None]) -> None:
        """Run all steps that `losses` does not have yet. Raises CompileError[fit-diverged]; the last good parameters are kept."""
        options = self.options
        optimiser = torch.optim.AdamW(self.params.values(), lr=options.rate, betas=(0.9, 0.95), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, self._rate_at, last_epoch=-1)
        good, batches = self.snapshot(), data.batches(options, skip=len(self.losses))
        for _ in range(len(self.losses)):
            schedule.step()
        for step in range(len(self.losses), options.steps):
            depth = options.unroll if step >= options.steps * (1.0 - options.unrolled) else 1
            loss = self._loss(self._noisy(next(batches), step), depth)
            value = float(loss.detach())
            recent = float(np.mean(self.losses[-20:])) if self.losses else value
            if not math.isfinite(value) or (step > 20 and depth == 1 and value > _DIVERGED * recent):
                self._restore(good)
                save()
                message = f"the loss went from {recent:.3g} to {value:.3g} in step {step}; the parameters before are kept"
                raise CompileError("fit-diverged", message, fix="use a lower --rate, or more text")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.params.values(), _CLIP)
            optimiser.step()
            schedule.step()
            self.losses.append(value)
            progress(step + 1, options.steps, value)
            if (step + 1) % 50 == 0:
                good = self.snapshot()
                save()

    def score(self, data: Data, depth: int = 3) -> Score:
        """How often the head is right on texts, by depth."""
        hits, weight, total, batches = torch.zeros(depth), torch.zeros(depth), 0.0, 0
        with torch.no_grad():
            for batch in data.all(self.options):
                for level, (logits, _) in enumerate(self._unrolled(batch, depth)):
                    chosen = self.kept[logits.argmax(-1)]
                    right = (chosen == (batch.targets @ self.head.float().T).argmax(-1)).float()
                    of = (batch.weights == 1.0).float()
                    of[:, :level] = 0.0
                    hits[level] += (right * of).sum()
                    weight[level] += of.sum()
                total, batches = total + float(self._loss(batch, 1)), batches + 1
        return Score(tuple((hits / weight.clamp(min=1.0)).tolist()), total / max(1, batches))

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the parameters."""
        return {name: value.detach().clone() for name, value in self.params.items()}

    def _restore(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self.params[name].copy_(value)

    def _rate_at(self, step: int) -> float:
        warm = max(1.0, _WARM_UP * self.options.steps)
        if step < warm:
            return (step + 1) / warm
        return _FLOOR + (1.0 - _FLOOR) * 0.5 * (1.0 + math.cos(math.pi * step / max(1, self.options.steps)))

    def _noisy(self, batch: Batch, step: int) -> Batch:
        generator = torch.Generator().manual_seed(self.options.seed + step)
        size = _NOISE * batch.states.abs().mean()
        noise = (torch.rand(batch.states.shape, generator=generator) - 0.5) * 2 * size
        return Batch(batch.tokens, batch.states + noise, batch.targets, batch.weights)

    def _loss(self, batch: Batch, depth: int) -> Tensor:
        """Cross-entropy to the target's distribution over the kept tokens, and in the first step the distance of the states."""
        teacher = torch.softmax(batch.targets @ self._rows.T, -1)
        total, weights = torch.zeros(()), batch.weights
        for level, (logits, feedback) in enumerate(self._unrolled(batch, depth)):
            weights = weights.clone()
            weights[:, :level] = 0.0  # these rows have no row so far before them
            share = weights / weights.sum().clamp(min=1.0)
            total = total + _DECAY**level * (-(teacher * torch.log_softmax(logits, -1)).sum(-1) * share).sum()
            if level == 0:
                apart = F.smooth_l1_loss(feedback, batch.targets, reduction="none").mean(-1)
                total = total + _STATE_WEIGHT * (apart * share).sum()
        return total

    def _unrolled(self, batch: Batch, depth: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(logits over the kept tokens, feedback) of every step of the unrolled head."""
        states, seen = batch.states, _Seen()
        program = self.program.replace(params={**self.program.params, **self.params})
        positions = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)
        for _ in range(depth):
            inputs = {"input_ids": batch.tokens, "position_ids": positions, "states": states}
            out = run(program, inputs, grad=torch.is_grad_enabled(), ops={OPS.attention.default: seen.attend})
            yield out[LOGITS] @ self._rows.T, out[FEEDBACK]
            states = torch.cat([out[FEEDBACK][:, :1], out[FEEDBACK][:, :-1]], 1)  # row t reads what row t - 1 thinks is its state
            seen.turn()


class _Seen:
    """Attention of an unrolled head: keys and values of the steps before, per attention in the order of the program."""

    def __init__(self) -> None:
        self.steps: list[list[tuple[Tensor, Tensor]]] = [[]]

    def turn(self) -> None:
        """The next step begins."""
        self.steps.append([])

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool, window: int, softcap: float
    ) -> Tensor:
        """As `planc::attention`; in step n row t sees rows 0 .. t - n of the first step, row t - m of step n - m, and itself."""
        assert causal and bias is None
        place, n = len(self.steps[-1]), len(self.steps) - 1
        self.steps[-1].append((k, v))
        group, rows = q.shape[2] // k.shape[2], q.shape[1]
        wide = [tuple(x.transpose(1, 2).repeat_interleave(group, 1) for x in step[place]) for step in self.steps]  # [B, H, L, D]
        queries = q.transpose(1, 2)
        at = torch.arange(rows)
        back = at[:, None] - at[None]
        hidden = back < n
        if window:
            hidden = hidden | (back >= window)
        scores = [torch.where(hidden, torch.finfo(torch.float32).min, _capped(queries @ wide[0][0].transpose(2, 3) * scale, softcap))]
        for m in range(1, n + 1):
            shift = n - m
            along = _capped((queries * wide[m][0].roll(shift, 2)).sum(-1, keepdim=True) * scale, softcap)
            scores.append(along.masked_fill((at < shift)[:, None], torch.finfo(torch.float32).min))
        weights = torch.softmax(torch.cat(scores, -1), -1)
        out = weights[..., :rows] @ wide[0][1]
        for m in range(1, n + 1):
            out = out + weights[..., rows + m - 1, None] * wide[m][1].roll(n - m, 2)
        return out.transpose(1, 2).contiguous()


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return torch.tanh(scores / softcap) * softcap if softcap else scores


@dataclass(frozen=True)
class Data:
    """Texts with the target's states behind every token, [tokens, K] each."""

    texts: Texts
    states: Sequence[NDArray[np.float16]]

    def batches(self, options: Options, skip: int = 0) -> Iterator[Batch]:
        """Windows of texts in random order, for ever; the first `skip` batches are left out."""
        rng, made = np.random.default_rng(options.seed), 0
        while True:
            windows = self._windows(options.window)
            order = rng.permutation(len(windows))
            order = order[: len(order) // options.batch * options.batch] if len(order) >= options.batch else order
            for first in range(0, len(order), options.batch):
                made += 1
                if made > skip:
                    yield self._batch([windows[i] for i in order[first : first + options.batch]])

    def all(self, options: Options) -> Iterator[Batch]:
        """Every window once."""
        windows = self._windows(options.window)
        for first in range(0, len(windows), options.batch):
            yield self._batch(windows[first : first + options.batch])

    def _windows(self, length: int) -> list[tuple[int, int, int]]:
        """(text, first row, row after the last) of every window; a row needs the token after it and the state behind that."""
        rows = [len(ids) - 1 for ids in self.texts.tokens]
        return [(i, start, min(start + length, count)) for i, count in enumerate(rows) for start in range(0, count, length)]

    def _batch(self, windows: Sequence[tuple[int, int, int]]) -> Batch:
        width = max(stop - start for _, start, stop in windows)
        tokens = torch.zeros(len(windows), width, dtype=torch.long)
        size = self.states[0].shape[1]
        states, targets = torch.zeros(len(windows), width, size), torch.zeros(len(windows), width, size)
        weights = torch.zeros(len(windows), width)
        for row, (i, start, stop) in enumerate(windows):
            ids, known, count = self.texts.tokens[i], self.states[i], stop - start
            tokens[row, :count] = torch.from_numpy(ids[start + 1 : start + 1 + count])
            states[row, :count] = torch.from_numpy(known[start : start + count].astype(np.float32))
            targets[row, :count] = torch.from_numpy(known[start + 1 : start + 1 + count].astype(np.float32))
            written = torch.arange(start + 2, start + 2 + count) >= self.texts.starts[i]  # the token that the row guesses
            weights[row, :count] = torch.where(written, 1.0, _PROMPT_WEIGHT)
        return Batch(tokens, states, targets, weights)


def trainable(program: Program) -> list[str]:
    """Parameters of products and norms between the embedding and the output layer."""
    names = list[str]()
    for node in program.main.nodes:
        if node.op == "call_function" and node.target in (aten.linear.default, OPS.rms_norm.default, aten.layer_norm.default):
            names += [str(a.target) for a in node.args[1:] if isinstance(a, torch.fx.Node) and a.op == "get_attr"]
    return list(dict.fromkeys(names))
