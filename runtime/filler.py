"""An executable that fills masked slots: an engine, its text side and a decode plan. Holds nothing between calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from planc.runtime.artifact import Manifest, copy_artifact
from planc.runtime.contract import Contract
from planc.runtime.decode import Decode, Masked, Sampling
from planc.runtime.errors import ArtifactError, InputError
from planc.runtime.loops.masked import Filling
from planc.runtime.masked import Canvas, Commit, Cost
from planc.runtime.masked.engine import MaskedEngine
from planc.runtime.prompts import Prompt, read_prompts
from planc.runtime.text import Text

BATCH = 8  #: canvases that share passes, unless an executable's `batch` says otherwise

#: What plans that fill masked slots are compared with.
ONE_A_PASS: dict[str, Any] = {"select": "top_k", "cache": "uncached", "fusion": None, "stop": None, "revise": None, "end": None}


@dataclass(frozen=True)
class FillStats:
    """What filling one canvas took. Of prompts that ran as one batch, `seconds` are those of the batch."""

    tokens: int  # in front of the end token
    passes: int
    token_layers: int  # slots through layers, padding of batches not counted
    attention_pairs: int
    multiplications: int  # of slots with the weights of layers
    kv_bytes: int  # of keys and values written
    seconds: float
    modes: dict[str, int] = field(default_factory=dict)  # kind of pass -> how often
    remasked: int = 0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens in front of the end token, by passes: padding is not counted as speed."""
        return self.tokens / self.passes if self.passes else 0.0

    @property
    def tokens_per_s(self) -> float:
        """The same by time."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Filled:
    """An answer. `text` is without special tokens; `ids` end with the end token, where there is one."""

    text: str
    ids: list[int]
    canvas: list[int]  # all slots, the prompt and what follows the end token included
    prompt_tokens: int
    finish_reason: str  # stop (an end token) or length
    stats: FillStats
    trace: tuple[Commit, ...]  # which slots were written when, and how sure


@dataclass(frozen=True)
class Frame:
    """How the canvases stand after a round. They go on changing: copy what is to be kept."""

    canvases: Sequence[Canvas]
    finished: tuple[tuple[int, Filled], ...] = ()  # prompts that are done, and their answers


class Filler:
    """Fills slots behind prompts; made by `planc.load` and `planc.compile` from plans with `decode: {masked: ...}`.

    Args:
        engine: runs passes.
        text: tokenizer and chat template; may hold neither.
        decode: the plan's decode section.
        contract: what was changed.
        manifest, directory: the artifact that this came from, if any.
        folder: where files that the decode section names lie; the artifact by default.
        others: models beside the first, between which the decode section chooses.
    """

    def __init__(
        self,
        engine: MaskedEngine,
        text: Text,
        decode: Decode,
        contract: Contract | None = None,
        manifest: Manifest | None = None,
        directory: Path | None = None,
        folder: Path | None = None,
        others: Sequence[MaskedEngine] = (),
    ) -> None:
        self.engine, self.others = engine, tuple(others)
        self.text, self.manifest, self.directory = text, manifest, directory
        self.contract = contract if contract is not None else manifest.contract if manifest is not None else Contract()
        self.eos_ids = manifest.eos_ids if manifest is not None and manifest.eos_ids else text.eos_ids
        self.folder = folder or directory or Path()
        self.batch = BATCH
        self.decode = self._bound(decode)

    def _bound(self, decode: Decode) -> Decode:
        masked = decode.masked
        if masked is None:
            raise InputError(
                "input-invalid", "the model fills masked slots, and the decode section has no `masked`", fix="compile it with one"
            )
        masked = masked.model_copy(update={name: hook.bind(self.folder) for name, hook in masked.by_name.items() if hook is not None})
        spec, wanted = self.engine.spec, masked.fusion.tracked if masked.fusion is not None else 0
        if wanted > spec.tracked or (masked.cache.by_layer and not spec.by_layer) or (masked.models is not None and not self.others):
            message = "the decode section needs outputs, or a second model, that the artifact was not given"
            raise InputError("output-missing", message, fix="compile again with this decode section")
        return decode.model_copy(update={"masked": masked})

    @property
    def plan(self) -> Masked:
        """The section `masked`."""
        assert self.decode.masked is not None
        return self.decode.masked

    def with_plan(self, **changes: Any) -> Filler:
        """The same engine with other entries of the section `masked`; what the graph cannot do is refused."""
        masked = Masked.model_validate({**{name: getattr(self.plan, name) for name in type(self.plan).model_fields}, **changes})
        decode = self.decode.model_copy(update={"masked": masked})
        return Filler(self.engine, self.text, decode, self.contract, self.manifest, self.directory, self.folder, self.others)

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        chat: bool | None = None,
    ) -> Filled | list[Filled]:
        """Fill an answer, or a list of them for a list of prompts; what is not given is the plan's.

        A prompt is as for `Executable.generate`. `max_new_tokens` are the slots of the field. Noise belongs to the prompt's place in the list.
        """
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
        prompts, single = read_prompts(self.text, prompt, chat)
        found = {i: filled for frame in self._stream(prompts, max_new_tokens, sampling) for i, filled in frame.finished}
        return found[0] if single else [found[i] for i in range(len(prompts))]

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        chat: bool | None = None,
    ) -> Iterator[Frame]:
        """The same, a `Frame` after every round."""
        prompts, _ = read_prompts(self.text, prompt, chat)
        return self._stream(
            prompts, max_new_tokens, {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
        )

    def canvas(self, prompt: Sequence[int], field_size: int, seed: int, key: int) -> Canvas:
        """An empty canvas behind a prompt. Raises InputError where it does not fit or holds a token that the model does not have."""
        spec = self.engine.spec
        if not prompt:
            raise InputError("prompt-empty", "the prompt has no tokens")
        if min(prompt) < 0 or max(prompt) >= spec.vocab_size:
            raise InputError("input-invalid", f"the prompt has a token outside the vocabulary of {spec.vocab_size}")
        if len(prompt) + field_size > spec.max_length:
            message = f"{len(prompt)} tokens and a field of {field_size} slots are more than the {spec.max_length} positions of the model"
            raise InputError("prompt-too-long", message, fix="shorten the prompt, or lower max_new_tokens")
        forced = {part.offset: self._token(part.token) for part in self.plan.forced}
        return Canvas(prompt, field_size, spec.mask_id, ends=self.eos_ids, forced=forced, seed=seed, key=key)

    def _token(self, token: int | str) -> int:
        ids = [token] if isinstance(token, int) else self.text.encode(token, special=False)
        if len(ids) != 1 or not 0 <= ids[0] < self.engine.spec.vocab_size:
            raise InputError("input-invalid", f"`forced`: {token!r} is not one token", fix="force tokens one by one")
        return ids[0]

    def _stream(self, prompts: Sequence[Sequence[int]], slots: int | None, sampling: Mapping[str, Any]) -> Iterator[Frame]:
        given = {name: value for name, value in sampling.items() if value is not None}
        wanted = Sampling.model_validate({**self.decode.sampling.model_dump(), **given})
        if wanted.temperature > 0.0 and self.plan.cache.by_layer:
            raise InputError("input-invalid", f"`{self.plan.cache.key}` returns no logits to sample from", fix="use temperature 0")
        size = slots if slots is not None else self.decode.max_new_tokens
        canvases = [self.canvas(prompt, size, wanted.seed, key) for key, prompt in enumerate(prompts)]
        for start in range(0, len(canvases), self.batch):
            yield from self._batch(canvases[start : start + self.batch], start, wanted)

    def _batch(self, canvases: list[Canvas], first: int, sampling: Sampling) -> Iterator[Frame]:
        begin, told = perf_counter(), set[int]()
        for _ in Filling(self.engine, canvases, self.plan, sampling, self.others):
            fresh = [i for i, canvas in enumerate(canvases) if canvas.done and i not in told]
            told.update(fresh)
            yield Frame(canvases, tuple((first + i, self._filled(canvases[i], perf_counter() - begin)) for i in fresh))
        if rest := [i for i in range(len(canvases)) if i not in told]:  # nothing was left to fill
            yield Frame(canvases, tuple((first + i, self._filled(canvases[i], perf_counter() - begin)) for i in rest))

    def _filled(self, canvas: Canvas, seconds: float) -> Filled:
        ids, cost = canvas.ids, canvas.cost
        tokens = len(ids) - (bool(ids) and ids[-1] in canvas.ends)
        stats = FillStats(
            tokens=tokens,
            passes=cost.passes,
            token_layers=cost.token_layers,
            attention_pairs=cost.attention_pairs,
            multiplications=cost.multiplications,
            kv_bytes=cost.kv_bytes,
            seconds=seconds,
            modes=dict(cost.modes),
            remasked=canvas.remasked,
        )
        text = self.text.decode(ids) if self.text.tokenizer is not None else ""
        reason = "stop" if tokens < len(ids) else "length"
        return Filled(text, ids, [int(t) for t in canvas.tokens[: canvas.length]], canvas.prompt, reason, stats, tuple(canvas.trace))

    def report(self) -> dict[str, Any]:
        """What this executable is and promises, as plain data."""
        exactness = self.contract.exactness
        report: dict[str, Any] = {
            "task": "filling",
            "exactness": exactness.level if exactness is not None else None,
            "exactness_line": f"{exactness.level} ({exactness.note})" if exactness is not None else "not measured",
            "contract": self.contract.model_dump(mode="json"),
        }
        if self.manifest is not None:
            files = {name: entry.bytes for name, entry in self.manifest.files.items()}
            report |= {"model": self.manifest.model, "plan": self.manifest.plan, "backend": self.manifest.backend}
            report |= {"target": self.manifest.target, "files": files, "bytes": sum(files.values())}
        return report

    def save(self, directory: str | Path) -> Path:
        """Copy the artifact."""
        if self.manifest is None or self.directory is None:
            raise ArtifactError("artifact-write", "this executable has no artifact to copy", fix="compile with `backend: onnx`")
        return copy_artifact(self.manifest, self.directory, Path(directory))


def total(answers: Sequence[Filled]) -> Cost:
    """What several answers have cost together."""
    cost = Cost()
    for answer in answers:
        s = answer.stats
        one = Cost(s.passes, s.token_layers, s.attention_pairs, s.multiplications, s.kv_bytes)
        one.modes.update(s.modes)
        cost.add(one)
    return cost
