"""The whole way from a plan with a `draft_head` to its trained file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from planc.compiler.blocks import head_of
from planc.compiler.compile import compile as compile_model
from planc.compiler.compile import raised
from planc.compiler.drafts import head_passes
from planc.compiler.files import write
from planc.compiler.heads.states import states_of_texts
from planc.compiler.heads.texts import Texts, write_texts
from planc.compiler.heads.train import LOGITS, Data, Options, Score, Trainer, trainable
from planc.compiler.models import load_model
from planc.compiler.passbase import Context
from planc.compiler.pipeline import run_passes
from planc.compiler.plan import Plan
from planc.compiler.program import Program
from planc.compiler.search.picture import Front, png
from planc.passes.load_weights import FITS, VOCABULARY, fingerprint
from planc.passes.tap import Tap
from planc.runtime.drafters import DraftHead
from planc.runtime.errors import InputError, PlanError
from planc.runtime.executable import Executable

_HELD_OUT = 0.05  # share of the conversations that the head never sees
_LEAST = 2_000  # tokens of answers without which nothing is learned


@dataclass(frozen=True)
class Fit:
    """What was trained, on what, and how well it guesses texts that it has not seen."""

    file: Path
    tokens: int
    steps: int
    losses: tuple[float, ...]
    before: Score
    after: Score

    def as_dict(self) -> dict[str, Any]:
        """For `--json` and the file's card."""
        shown = {"file": str(self.file), "tokens": self.tokens, "steps": self.steps, "loss": [round(x, 4) for x in self.losses[::10]]}
        return shown | {"held_out": asdict(self.after), "held_out_before": asdict(self.before), "expected": round(self.after.expected, 4)}

    def __str__(self) -> str:
        guesses = ", ".join(f"{share:.1%}" for share in self.after.agreement)
        return f"{self.file}: {self.steps} steps on {self.tokens} tokens; held out, the first choice is the target's in {guesses} (1st, 2nd .. guess)"

    def picture(self, title: str) -> bytes:
        """The loss of every step, and its mean of twenty, as a PNG."""
        means = [(float(i), float(np.mean(self.losses[max(0, i - 19) : i + 1])), "") for i in range(0, len(self.losses), 10)]
        return png(Front(title, "step", [(float(i), loss) for i, loss in enumerate(self.losses)], means, "loss"))


Progress = Callable[[str, int, int], None]


def fit_head(
    model: Any,
    plan: Plan,
    prompts: Sequence[str | Sequence[int]] | None = None,
    work: Path | None = None,
    *,
    out: Path | None = None,
    tokens: int = 150_000,
    longest: int = 160,
    options: Options | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Fit:
    """Train the head that a plan names and write its file.

    Args:
        model: what `planc.compile` takes.
        plan: its drafters hold one `draft_head`, whose `file` is written unless `out` says another place.
        prompts: what the target answers, as texts or token ids; the head learns from the answers. None: it also writes the questions.
        work: folder for texts and the state of training, from which an interrupted run goes on; None: beside the file, `NAME.fit`.
        tokens: how many tokens the target shall write.
        longest: most tokens of an answer.

    Raises PlanError where the plan has no head to fit, InputError[input-invalid] for too little text, CompileError[fit-diverged].
    """
    options = options or Options()
    part = head_of_plan(plan)
    if part is None:
        raise PlanError(
            "plan-requires", "the plan has no draft_head to fit", fix="add `draft_head: {file: NAME.safetensors}` to its drafters"
        )
    target_file = out or (plan.folder / part.file if part.file is not None else None)
    if target_file is None:
        raise PlanError("plan-bad-value", "draft_head names no file to write", fix="give it `file: NAME.safetensors`, or say --out")
    work = work or target_file.with_suffix(".fit")
    exe = _target(model, plan, progress)
    texts = write_texts(exe, prompts, work, tokens, longest, lambda done, total: progress("the target writes", done, total))
    if texts.written < _LEAST:
        message = f"the target wrote {texts.written} tokens, and a head needs {_LEAST} at least"
        raise InputError("input-invalid", message, where=str(work), fix="give more prompts, or raise --tokens")
    states = states_of_texts(exe.engine, texts, work, lambda done, total: progress("the target's states", done, total))
    programs, frozen, head = untrained(model, plan, part)
    kept = torch.from_numpy(texts.frequent(part.vocabulary, exe.eos_ids))
    trainer = Trainer(part, programs, head, kept, options)
    checkpoint = work / "head.safetensors"
    _resume(trainer, checkpoint)
    seen, held = _split(texts, options.seed)
    data, unseen = (Data(texts.part(which), [states[i] for i in which]) for which in (seen, held))
    before = Trainer(part, programs, head, kept, options).score(unseen)

    def save_state() -> None:
        about = {"losses": torch.tensor(trainer.losses, dtype=torch.float64), "spent": torch.tensor([trainer.spent], dtype=torch.float64)}
        write(checkpoint, save({**trainer.snapshot(), **about}, {"options": json.dumps(asdict(options))}))

    trainer.train(data, lambda done, total, loss: progress(f"training, loss {loss:.3f}", done, total), save_state)
    save_state()
    result = Fit(target_file, texts.written, len(trainer.losses), tuple(trainer.losses), before, trainer.score(unseen))
    name = exe.manifest.model if exe.manifest else ""
    write(target_file, packed(part, trainer.snapshot(), kept, {FITS: frozen, "model": name, "card": json.dumps(result.as_dict())}))
    return result


def packed(part: DraftHead, values: Mapping[str, Tensor], kept: Tensor, about: Mapping[str, str]) -> bytes:
    """The file of a head: its parameters in float16, the ids it chooses from, and in `about[FITS]` the fingerprint of all that it leaves."""
    tensors = {name: value.detach().half() for name, value in values.items()}
    return save({**tensors, VOCABULARY: kept.to(torch.int32)}, {**about, "head": json.dumps(part.item())})


def head_of_plan(plan: Plan) -> DraftHead | None:
    """The draft head among a plan's drafters; there is one at most."""
    drafters = plan.decode.speculative.drafter if plan.decode.speculative is not None else ()
    return next((part for part in drafters if isinstance(part, DraftHead)), None)


def _target(model: Any, plan: Plan, progress: Progress) -> Executable:
    """What the head will draft for, with its states as an output; it drafts for itself with what the plan has besides the head."""
    progress("compiling the target", 0, 1)
    speculative, decode = plan.decode.speculative, plan.decode
    assert speculative is not None
    others = tuple(part for part in speculative.drafter if not isinstance(part, DraftHead))
    kept = speculative.model_copy(update={"drafter": others}) if others else None
    decode = decode.model_copy(update={"speculative": kept})
    exe = compile_model(model, plan.model_copy(update={"passes": (*plan.passes, Tap(final=True)), "decode": decode}), measure=False)
    assert isinstance(exe, Executable)
    return exe


def untrained(model: Any, plan: Plan, part: DraftHead) -> tuple[list[Program], str, Tensor]:
    """The graphs of the head to train, over float weights; the fingerprint of what it leaves as it is; the target's output layer [V, K]."""
    bare, programs = raised(load_model(model)), list[Program]()
    for passes in head_passes(bare, part):
        program, _ = run_passes(bare, passes, Context(folder=plan.folder))
        product: Any = head_of(program)
        edit = program.edit("fit")
        edit.outputs(**{LOGITS: edit[product.args[0]], "logits": None})
        programs.append(edit.done(1, 1))
    frozen = fingerprint(program.params, trainable(programs[-1]))  # the same for all graphs
    return programs, frozen, program.params[str(product.args[1].target)]


def _split(texts: Texts, seed: int) -> tuple[list[int], list[int]]:
    """Conversations to learn from, and those to measure on: of other prompts."""
    prompts = [tuple(ids[:start].tolist()) for ids, start in zip(texts.tokens, texts.starts, strict=True)]
    unique = list(dict.fromkeys(prompts))
    held = {unique[i] for i in np.random.default_rng(seed).permutation(len(unique))[: max(1, round(_HELD_OUT * len(unique)))]}
    return [i for i, p in enumerate(prompts) if p not in held], [i for i, p in enumerate(prompts) if p in held]


def _resume(trainer: Trainer, checkpoint: Path) -> None:
    """Go on where an interrupted training of the same head stopped."""
    if not checkpoint.exists():
        return
    tensors = load_file(checkpoint)
    losses, spent = tensors.pop("losses").tolist(), float(tensors.pop("spent"))
    if {name: value.shape for name, value in tensors.items()} != {name: value.shape for name, value in trainer.params.items()}:
        raise InputError(
            "input-invalid", "this folder holds the training of another head", where=str(checkpoint), fix="name another --work"
        )
    with torch.no_grad():
        for name, value in tensors.items():
            trainer.params[name].copy_(value)
    trainer.losses, trainer.spent = losses, spent
