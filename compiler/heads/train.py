"""Teaching a draft head: the program itself is trained, through the references of its operations.

A head is taught all guesses behind a place at once, given the true tokens before each (papers/A1 section 8). One graph that is used several
guesses deep reads its own estimates, and so it does in training (the training-time test of EAGLE-3): in step n a row reads what step n - 1 thought
of its state, sees true rows up to n tokens before it, and between them the rows that the steps before it made on the same path. Where each depth
has a graph of its own, step n runs the nth, and a row reads what the graph before it has handed on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from planc.backends.reference import run
from planc.compiler.dialect import OPS
from planc.compiler.heads.texts import Texts
from planc.compiler.program import Program
from planc.runtime.drafters import DraftHead
from planc.runtime.drafters.head_source import FEEDBACK
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
_LONG, _SHORT = 192, 32  # tokens of a window with attention, and without
_BLOCK = 512  # rows whose logits are in memory at a time
_SAVE = 50  # steps
_WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Options:
    """How a head is taught."""

    steps: int = 400
    minutes: float | None = None  # of training, instead of `steps`
    batch: int = 1536  # rows in a step
    window: int | None = None  # tokens of a window; left out: as far as attention needs them
    rate: float = 1e-3
    unroll: int = 3  # body: layer. Guesses deep, in the last part of the training
    unrolled: float = 0.5  # body: layer. Which part that is
    seed: int = 0

    def of(self, part: DraftHead) -> Options:
        """With everything settled for this head: one without attention has no use for long windows, and learns all its guesses from the start."""
        if part.body == "layer":
            return self
        return replace(self, window=self.window or _SHORT, unroll=part.heads, unrolled=1.0)

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.window or _LONG

    @property
    def windows(self) -> int:
        """Windows in a step."""
        return max(1, self.batch // self.length)


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
    """A draft head in training: its graphs, from the first guess on.

    `kept` are the tokens that the head will choose from, `head` [V, K] the target's own output layer.
    """

    part: DraftHead
    programs: Sequence[Program]
    head: Tensor
    kept: Tensor
    given: Options
    options: Options = field(init=False)
    params: dict[str, Tensor] = field(init=False)
    losses: list[float] = field(default_factory=list)
    spent: float = 0.0  # seconds

    def __post_init__(self) -> None:
        self.options = self.given.of(self.part)
        named = {name: program.params[name] for program in self.programs for name in trainable(program)}
        self.params = {name: value.detach().float().clone().requires_grad_() for name, value in named.items()}
        self._rows = self.head[self.kept].float()

    @property
    def done(self) -> float:
        """Share of the training that is over."""
        if self.options.minutes is not None:
            return min(1.0, self.spent / (60.0 * self.options.minutes))
        return len(self.losses) / self.options.steps

    def train(self, data: Data, progress: Callable[[int, int, float], None], save: Callable[[], None]) -> None:
        """Go on from `losses` to the end. Raises CompileError[fit-diverged]; the last good parameters are kept."""
        options = self.options
        optimiser = torch.optim.AdamW(self.params.values(), lr=options.rate, betas=(0.9, 0.95), weight_decay=_WEIGHT_DECAY)
        good, batches = self.snapshot(), data.batches(options, skip=len(self.losses))
        while self.done < 1.0:
            begin, step = perf_counter(), len(self.losses)
            for group in optimiser.param_groups:
                group["lr"] = options.rate * self._share_of_rate()
            depth = options.unroll if self.done >= 1.0 - options.unrolled else 1
            with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16()):
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
            self.losses.append(value)
            self.spent += perf_counter() - begin
            progress(round(1000 * self.done), 1000, value)
            if len(self.losses) % _SAVE == 0:
                good = self.snapshot()
                save()

    def score(self, data: Data, depth: int | None = None) -> Score:
        """How often the head is right on texts, by depth."""
        depth = depth or self.options.unroll
        hits, weight, total, batches = torch.zeros(depth), torch.zeros(depth), 0.0, 0
        with torch.no_grad():
            for batch in data.all(self.options):
                own = batch.weights == 1.0
                truth = torch.full(own.shape, -1)
                truth[own] = (batch.targets[own] @ self.head.float().T).argmax(-1)
                for level, (made, _) in enumerate(self._unrolled(batch, depth)):
                    of = own.clone()
                    of[:, :level] = False
                    hits[level] += (self.kept[(made[of] @ self._rows.T).argmax(-1)] == truth[of]).sum()
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

    def _share_of_rate(self) -> float:
        if self.done < _WARM_UP:
            return max(self.done, 1e-3) / _WARM_UP
        return _FLOOR + (1.0 - _FLOOR) * 0.5 * (1.0 + math.cos(math.pi * self.done))

    def _noisy(self, batch: Batch, step: int) -> Batch:
        generator = torch.Generator().manual_seed(self.options.seed + step)
        size = _NOISE * batch.states.abs().mean()
        noise = (torch.rand(batch.states.shape, generator=generator) - 0.5) * 2 * size
        return Batch(batch.tokens, batch.states + noise, batch.targets, batch.weights)

    def _loss(self, batch: Batch, depth: int) -> Tensor:
        """Cross-entropy to the target's distribution over the kept tokens; where guesses are fed estimates, also the distance of the first states."""
        guesses, shares, weights = list[Tensor](), list[Tensor](), batch.weights
        apart = torch.zeros(())
        for level, (made, feedback) in enumerate(self._unrolled(batch, depth)):
            weights = weights.clone()
            weights[:, :level] = 0.0  # these rows have no row so far before them
            share = weights / weights.sum().clamp(min=1.0)
            if level == 0 and self.part.body == "layer":
                distance = F.smooth_l1_loss(feedback, batch.targets, reduction="none").mean(-1)
                apart = _STATE_WEIGHT * (distance * share).sum()
            guesses.append(made.flatten(0, 1))
            shares.append(_DECAY**level * share.flatten())
        loss: Tensor = _Distil.apply(torch.stack(guesses), batch.targets.flatten(0, 1), self._rows, torch.stack(shares))
        return apart + loss

    def _unrolled(self, batch: Batch, depth: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(vectors for the output layer, feedback) of every step of the unrolled head; in all of them row t is about the same token."""
        states, seen = batch.states, _Seen()
        positions = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)
        if self.part.body == "mlp":
            positions = torch.zeros_like(batch.tokens)  # a row without neighbours has no place
        for level in range(depth):
            program = self.programs[min(level, len(self.programs) - 1)]
            program = program.replace(params={**program.params, **self.params})
            inputs = {"input_ids": batch.tokens, "position_ids": positions, "states": states}
            out = run(program, inputs, grad=torch.is_grad_enabled(), ops={OPS.attention.default: seen.attend})
            yield out[LOGITS], out[FEEDBACK]
            states = torch.cat([out[FEEDBACK][:, :1], out[FEEDBACK][:, :-1]], 1)  # row t reads what row t - 1 thinks is its state
            seen.turn()


class _Distil(torch.autograd.Function):
    """Cross-entropy of guesses [L,N,K] to what the target says at its states [N,K], both times the rows [V',K] of its output layer.

    Weights are [L,N]. The gradient is made with the value, some rows at a time: the logits of a whole batch would be most of what is moved.
    """

    @staticmethod
    def forward(ctx: Any, guesses: Tensor, targets: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        gradient, total = torch.empty_like(guesses), torch.zeros(())
        for start in range(0, len(targets), _BLOCK):
            part = slice(start, start + _BLOCK)
            teacher = torch.softmax((targets[part] @ rows.T).float(), -1)
            for level, each in enumerate(weights[:, part]):
                logits = (guesses[level, part] @ rows.T).float()
                chances = torch.softmax(logits, -1)
                norm = logits.amax(-1) - chances.amax(-1).log()  # faster than logsumexp by far
                total += (each * (norm - (teacher * logits).sum(-1))).sum()
                gradient[level, part] = (chances.sub_(teacher).mul_(each[:, None]) @ rows).float()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        [gradient] = ctx.saved_tensors
        return outer * gradient, None, None, None


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices several times faster than others, so that it is worth its rounding in training."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


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
        first = _capped(queries @ wide[0][0].transpose(2, 3) * scale, softcap)
        scores = [first.masked_fill(hidden, torch.finfo(first.dtype).min)]  # products may be bfloat16, whose least number is another
        for m in range(1, n + 1):
            shift = n - m
            along = _capped((queries * wide[m][0].roll(shift, 2)).sum(-1, keepdim=True) * scale, softcap)
            scores.append(along.masked_fill((at < shift)[:, None], torch.finfo(along.dtype).min))
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
            windows = self._windows(options.length)
            order, count = rng.permutation(len(windows)), options.windows
            order = order[: len(order) // count * count] if len(order) >= count else order
            for first in range(0, len(order), count):
                made += 1
                if made > skip:
                    yield self._batch([windows[i] for i in order[first : first + count]])

    def all(self, options: Options) -> Iterator[Batch]:
        """Every window once."""
        windows = self._windows(options.length)
        for first in range(0, len(windows), options.windows):
            yield self._batch(windows[first : first + options.windows])

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
