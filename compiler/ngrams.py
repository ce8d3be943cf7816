"""Counts the table of an `ngram_model`: what a target expects after the last few tokens of texts that it wrote itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from planc.compiler.compile import compile as compile_model
from planc.compiler.drafts import file_for
from planc.compiler.files import write
from planc.compiler.heads.texts import LANES, Texts, write_texts
from planc.compiler.plan import Plan
from planc.runtime.artifact import sha256
from planc.runtime.decode import Batching
from planc.runtime.drafters import NgramModel
from planc.runtime.drafters.ngram_model import MULTIPLIER, BackOff, write_table
from planc.runtime.engine import Engine, Ints, Step
from planc.runtime.errors import InputError, PlanError
from planc.runtime.executable import Executable
from planc.runtime.text import TOKENIZER

Probabilities = NDArray[np.float32]

_TOP = 8  # likeliest tokens of a place that count
_CHUNK = 128  # rows of a pass
_BACK_OFF = 1.0  # how many places of a context the next shorter one weighs
_SAME = 0.1  # a context that expects the same as the next shorter one, up to this probability, is left out
_HELD_OUT = 0.05  # share of the texts that are not counted but judge the table
_LEAST = 2_000  # tokens of answers from which a table is worth counting


@dataclass(frozen=True)
class Counted:
    """What was counted, and how well it guesses texts that were not."""

    file: Path
    tokens: int  # that the target wrote
    contexts: int
    agreement: float  # share of held-out places whose likeliest token is the table's first guess

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"file": str(self.file), "agreement": round(self.agreement, 4)}

    def __str__(self) -> str:
        return f"{self.file}: {self.contexts} contexts of {self.tokens} tokens; held out, the first guess is the target's in {self.agreement:.1%}"


@dataclass(frozen=True)
class Expected:
    """A text and what the target expects after each of its tokens but the last."""

    tokens: Ints  # [n]
    top: Ints  # [n - 1, k], likeliest first
    p: Probabilities  # [n - 1, k]
    start: int  # where the answer begins


def part_of_plan(plan: Plan) -> NgramModel | None:
    """The n-gram model among a plan's drafters."""
    drafters = plan.decode.speculative.drafter if plan.decode.speculative is not None else ()
    return next((part for part in drafters if isinstance(part, NgramModel)), None)


def fit_ngrams(
    model: Any,
    plan: Plan,
    prompts: Sequence[str | Sequence[int]] | None = None,
    work: Path | None = None,
    *,
    out: Path | None = None,
    tokens: int = 150_000,
    longest: int = 160,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Counted:
    """Count the table that a plan's `ngram_model` names, and write its file.

    Args:
        model: what `planc.compile` takes.
        plan: its drafters hold an `ngram_model`, whose `file` is written unless `out` says another place.
        prompts: what the target answers; None: it also writes the questions.
        work: folder for the texts, from which an interrupted run goes on; None: beside the file, `NAME.fit`.
        tokens: how many tokens the target shall write.
        longest: most tokens of an answer.

    Raises PlanError where the plan has no table to count, InputError[input-invalid] for too little text.
    """
    part = part_of_plan(plan)
    if part is None:
        raise PlanError("plan-requires", "the plan has no ngram_model", fix="add `ngram_model: {file: NAME.npz}` to its drafters")
    if out is None and part.file is None:
        raise PlanError("plan-bad-value", "ngram_model names no file to write", fix="give it `file: NAME.npz`, or say --out")
    progress("compiling the target", 0, 1)
    decode = plan.decode.model_copy(update={"speculative": None, "batching": Batching(sequences=LANES)})
    bare = plan.model_copy(update={"decode": decode})
    exe = compile_model(model, bare, measure=False)
    assert isinstance(exe, Executable) and exe.manifest is not None
    target_file = out or plan.folder / file_for(part.file or "", exe.manifest.model)
    work = work or target_file.with_suffix(".fit")
    texts = write_texts(exe, prompts, work, tokens, longest, lambda done, total: progress("the target writes", done, total))
    if texts.written < _LEAST:
        message = f"the target wrote {texts.written} tokens, and a table needs {_LEAST} at least"
        raise InputError("input-invalid", message, where=str(work), fix="give more prompts, or raise --tokens")
    known = expected(exe.engine, texts, lambda done, total: progress("what the target expects", done, total))
    held = max(1, round(_HELD_OUT * len(known)))
    vocabulary = exe.engine.spec.vocab_size
    agreement = agreement_of(count(known[held:], part.order, part.successors, vocabulary), known[:held])
    about = {"model": exe.manifest.model, "tokens": texts.written, "agreement": round(agreement, 4)}
    if exe.directory is not None and (exe.directory / TOKENIZER).is_file():
        about["tokenizer"] = sha256(exe.directory / TOKENIZER)
    table = count(known, part.order, part.successors, vocabulary)
    write(target_file, write_table(part.order, table.keys, table.ids, table.shares, about))
    return Counted(target_file, texts.written, len(table.keys), agreement)


def expected(engine: Engine, texts: Texts, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Expected]:
    """What the target expects behind every token of the texts, teacher-forced through the engine that the table will draft for."""
    cache = engine.new_cache(1, max(map(len, texts.tokens)) + _CHUNK)
    found = []
    for index, (ids, start) in enumerate(zip(texts.tokens, texts.starts, strict=True)):
        cache.rollback(0, 0)
        tops, shares = [], []
        for first in range(0, len(ids) - 1, _CHUNK):
            rows = ids[first : min(first + _CHUNK, len(ids) - 1)]
            outputs = engine.forward(cache, Step(rows[None]), logits=True)
            assert outputs.logits is not None
            logits = torch.from_numpy(outputs.logits[0, : len(rows)])
            values, top = logits.topk(min(_TOP, logits.shape[1]))
            tops.append(top.numpy())
            shares.append((values - logits.logsumexp(1, keepdim=True)).exp().numpy())
            cache.keep(0, np.arange(len(rows)))
        found.append(Expected(ids, np.concatenate(tops), np.concatenate(shares), start))
        progress(index + 1, len(texts.tokens))
    return found


@dataclass(frozen=True)
class _Level:
    """The contexts of one length: `keys` [c] ascending, `pairs` [m] = context · V + token ascending with their `values`, and the likeliest [c, s]."""

    keys: NDArray[np.uint64]
    pairs: Ints
    values: NDArray[np.float64]
    top: Ints
    p: NDArray[np.float64]


def count(texts: Sequence[Expected], order: int, successors: int, vocab_size: int) -> BackOff:
    """The table of contexts of 1 .. `order` tokens.

    The value of token w after context c is the mean probability that the target gave to w where c stood, with the value after the next shorter
    context counted as `_BACK_OFF` more places.
    """
    top = np.concatenate([text.top for text in texts])
    p = np.concatenate([text.p for text in texts])
    levels, backs = list[_Level](), list[Ints]()
    hashes = np.zeros(len(top), np.uint64)
    for n in range(1, order + 1):
        whole = np.concatenate([np.arange(len(text.top)) >= n - 1 for text in texts])  # the context lies inside the text
        shorter, hashes = hashes, np.concatenate([_hash(text.tokens[:-1], n) for text in texts])
        level, back = _level(hashes[whole], shorter[whole], top[whole], p[whole], levels[-1] if levels else None, successors, vocab_size)
        levels.append(level)
        backs.append(back)
    kept = [np.ones(len(levels[0].keys), dtype=bool)]
    for level, shorter_level, back in zip(levels[1:], levels, backs[1:], strict=False):
        other = level.top[:, 0] != shorter_level.top[back, 0]
        kept.append(other | (np.abs(level.p[:, 0] - shorter_level.p[back, 0]) > _SAME))
    for n in range(order - 1, 0, -1):  # a search that begins with one token must not stop before a longer context
        kept[n - 1][backs[n][kept[n]]] = True
    keys, first = np.unique(np.concatenate([level.keys[keep] for level, keep in zip(levels, kept, strict=True)]), return_index=True)
    ids = np.concatenate([level.top[keep] for level, keep in zip(levels, kept, strict=True)])[first]
    values = np.concatenate([level.p[keep] for level, keep in zip(levels, kept, strict=True)])[first]
    return BackOff(order, keys, ids.astype(np.int32), np.rint(255 * values.clip(0, 1)).astype(np.uint8), {})


def _hash(tokens: Ints, n: int) -> NDArray[np.uint64]:
    """The key of the `n` tokens that end at each place, as `BackOff.find` computes it; meaningless where there are fewer."""
    found = np.zeros(len(tokens), np.uint64)
    for j in range(n):
        power = np.uint64(pow(MULTIPLIER, j, 2**64))
        found[j:] += (tokens[: len(tokens) - j] + 1).astype(np.uint64) * power
    return found


def _level(
    hashes: NDArray[np.uint64],
    before: NDArray[np.uint64],
    top: Ints,
    p: Probabilities,
    shorter: _Level | None,
    successors: int,
    vocab_size: int,
) -> tuple[_Level, Ints]:
    """The contexts of one length, and of each the place of the next shorter context in `shorter`."""
    keys, where, inverse, places = np.unique(hashes, return_index=True, return_inverse=True, return_counts=True)
    pairs = (inverse[:, None] * vocab_size + top).ravel()
    weights = p.ravel().astype(np.float64)
    back = np.zeros(len(keys), np.int64)
    if shorter is not None:  # what the shorter context expects is a candidate, too
        back = np.searchsorted(shorter.keys, before[where])
        more = shorter.top[back]
        known = more >= 0
        pairs = np.concatenate([pairs, (np.arange(len(keys))[:, None] * vocab_size + more)[known]])
        weights = np.concatenate([weights, np.zeros(int(known.sum()))])
    pairs, inverse = np.unique(pairs, return_inverse=True)
    values = np.bincount(inverse, weights).astype(np.float64)
    context, token = np.divmod(pairs, vocab_size)
    if shorter is None:
        values = values / places[context]
    else:
        wanted = back[context] * vocab_size + token
        at = np.searchsorted(shorter.pairs, wanted).clip(max=len(shorter.pairs) - 1)
        base = np.where(shorter.pairs[at] == wanted, shorter.values[at], 0.0)
        values = (values + _BACK_OFF * base) / (places[context] + _BACK_OFF)
    order = np.lexsort((-values, context))
    rank = np.arange(len(order)) - np.searchsorted(context[order], context[order])
    best = order[rank < successors]
    ids, likely = np.full((len(keys), successors), -1, np.int64), np.zeros((len(keys), successors))
    ids[context[best], rank[rank < successors]] = token[best]
    likely[context[best], rank[rank < successors]] = values[best]
    return _Level(keys, pairs, values, ids, likely), back


def agreement_of(table: BackOff, texts: Sequence[Expected]) -> float:
    """Share of the places in answers where the table's first guess is what the target finds likeliest."""
    right = total = 0
    for text in texts:
        tokens = text.tokens.tolist()
        for at in range(max(0, text.start - 1), len(text.top)):
            row, _ = table.find(tokens[max(0, at + 1 - table.order) : at + 1])
            right += row >= 0 and int(table.ids[row, 0]) == int(text.top[at, 0])
            total += 1
    return right / max(1, total)
