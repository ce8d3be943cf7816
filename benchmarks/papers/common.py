"""What several checks need; a check imports it as `planc_paper_checks.common`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from planc.backends.reference import run
from planc.compiler.bench import load_prompts
from planc.compiler.compile import text_of
from planc.compiler.papers import ROOT
from planc.compiler.program import Program
from planc.compiler.quality import perplexity, program_nll, read_windows
from planc.runtime.builders import BuilderPart, Source
from planc.runtime.contract import CostTable
from planc.runtime.decode import Speculative, Tree
from planc.runtime.drafters import Context, DrafterPart, Loaded
from planc.runtime.drafters.model_source import ModelSource
from planc.runtime.engine import Engine, Floats, Step
from planc.runtime.executable import Executable, Generation
from planc.runtime.trees import Draft, Rates

MODEL = "smollm2-135m"
MIXED = ROOT / "benchmarks/prompts/mixed.jsonl"


def data(name: str) -> Path | None:
    """A file of the data beside the project, or None where it is not at hand."""
    path = Path(os.environ.get("PLANC_DATA", ROOT.parent / "shared/data"), name)
    return path if path.is_file() else None


def chats(exe: Executable, file: Path, limit: int) -> list[list[int]]:
    """The first `limit` prompts of a file as chats, evenly from its categories; token ids."""
    return [exe.text.apply_chat([{"role": "user", "content": prompt.text}]) for prompt in load_prompts(str(file), limit)]


def drafting(base: Executable, drafter: DrafterPart, tree: Tree, cost: CostTable | None = None) -> Executable:
    """The compiled plan with another drafter and tree, and the same minimum of rows; `cost` replaces what was measured."""
    decode = base.decode.model_copy(update={"speculative": Speculative(drafter=(drafter,), tree=tree), "min_rows": base.min_rows})
    contract = base.contract if cost is None else base.contract.model_copy(update={"cost": cost})
    return Executable(base.engine, base.text, decode, contract, base.manifest, base.directory)


def answer(exe: Executable, ids: Sequence[int], tokens: int, **options: Any) -> Generation:
    """One answer; `options` as for `generate`."""
    made = exe.generate(list(ids), max_new_tokens=tokens, **options)
    assert isinstance(made, Generation)
    return made


def answers(exe: Executable, prompts: Sequence[Sequence[int]], tokens: int, **options: Any) -> list[Generation]:
    """Answers one after another, so that what a drafter learns from one is there for the next."""
    return [answer(exe, ids, tokens, **options) for ids in prompts]


def equal(found: Sequence[Generation], wanted: Sequence[Generation]) -> int:
    """How many answers have the tokens of their counterparts."""
    return sum(a.ids == b.ids for a, b in zip(found, wanted, strict=True))


def per_pass(made: Sequence[Generation]) -> float:
    """Tokens per decoding pass over all answers; prompt passes and their tokens are not counted."""
    passes = sum(each.stats.passes for each in made)
    return round(sum(each.stats.tokens_per_pass * each.stats.passes for each in made) / max(1, passes), 4)


class TableSource:
    """A draft model for builders whose distribution depends on the last token alone: `table` [V,V] log-probabilities."""

    def __init__(self, table: Floats) -> None:
        self.table = table

    def begin(self, tokens: Sequence[int]) -> Floats:
        """[V] behind a text."""
        return self.table[tokens[-1]]

    def expand(self, draft: Draft, rows: Sequence[int]) -> Floats:
        """[rows, V] behind these rows of a tree."""
        return self.table[[draft.tokens[row] for row in rows]]


def wikitext(loaded: Any, sequences: int, length: int, windows: int = 4, window: int = 512) -> tuple[Tensor, list[list[int]]]:
    """Token ids [sequences, length] to calibrate on, and `windows` of `window` ids each from later in the text to measure on."""
    file = data("wikitext2/valid.txt")
    assert file is not None, "the text beside the project is needed: set PLANC_DATA"
    ids = [
        i
        for part in read_windows(file, text_of(loaded).encode, tokens=sequences * length + 2 * windows * window, window=length)
        for i in part
    ]
    later = ids[-windows * window :]
    return torch.tensor(ids[: sequences * length]).reshape(sequences, length), [
        later[i * window : (i + 1) * window] for i in range(windows)
    ]


def quality(program: Program, windows: Sequence[Sequence[int]]) -> float:
    """Perplexity of a program without cache."""
    return round(perplexity(program_nll(program, windows), sum(len(w) - 1 for w in windows)), 4)


def logits_of(program: Program, ids: Sequence[int]) -> Tensor:
    """Logits [R, V] of a program without cache."""
    return run(program, {"input_ids": torch.tensor([list(ids)]), "position_ids": torch.arange(len(ids))[None]})["logits"][0]


def divergence(dense: Program, other: Program, windows: Sequence[Sequence[int]]) -> float:
    """Mean KL of the next token's distribution from that of `dense`, in nats."""
    total = 0.0
    for ids in windows:
        want, have = (logits_of(p, ids).log_softmax(-1) for p in (dense, other))
        total += float((want.exp() * (want - have)).sum(-1).mean())
    return round(total / len(windows), 5)


def pass_seconds(engine: Engine, rows: int, past: int = 0, passes: int = 8) -> float:
    """Seconds of `passes` passes of `rows` rows on top of `past` slots; of one where there is no past."""
    cache = engine.new_cache(1, past + rows)
    if past:
        engine.forward(cache, Step(np.full((1, past), 7, dtype=np.int64)))
        cache.keep(0, np.arange(past))
    step = Step(np.full((1, rows), 7, dtype=np.int64))
    begin = perf_counter()
    for _ in range(passes if past else 1):
        engine.forward(cache, step)
    return perf_counter() - begin


@dataclass
class Played:
    """What a builder did on the texts, round by round."""

    tokens: list[int] = field(default_factory=list)  # committed
    predicted: list[float] = field(default_factory=list)  # 1 + sum of the values of all guesses
    guesses: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)  # of the draft model

    @property
    def per_pass(self) -> float:
        """Tokens per pass of the target."""
        return float(np.mean(self.tokens))


class Counted:
    """A source that counts its calls."""

    def __init__(self, source: Source) -> None:
        self.source, self.calls = source, 0

    def begin(self, tokens: Sequence[int]) -> Floats:
        self.calls += 1
        return self.source.begin(tokens)

    def expand(self, draft: Draft, rows: Sequence[int]) -> Floats:
        self.calls += 1
        return self.source.expand(draft, rows)


def replay(
    model: Loaded, builder: BuilderPart, texts: list[tuple[list[int], list[int]]], budget: int, rates: Rates | None = None
) -> Played:
    """What a builder does with a draft model along texts of the target (`played`)."""
    source = ModelSource(model, max(len(prompt) + len(answer) for prompt, answer in texts) + budget)
    return played(source, builder, texts, budget, rates)


def played(
    source: Source,
    builder: BuilderPart,
    texts: list[tuple[list[int], list[int]]],
    budget: int,
    rates: Rates | None = None,
    see: Callable[[int, int], None] = lambda text, length: None,
    depth: int | None = None,
) -> Played:
    """Draft along texts of the target as its loop would, the first one to learn acceptance rates from where there are none yet.

    `see` is told, before every round, the number of the text and how much of it there is. `depth` is that of the deepest guess, by default `budget`.
    """
    found, rates = Played(), rates or Rates()
    counted = Counted(source)
    for index, (prompt, answer) in enumerate(texts):
        done = 1
        while done < len(answer):
            see(index, len(prompt) + done)
            counted.calls, draft = 0, Draft(answer[done - 1], rates)
            builder.grow(counted, Context(0, [*prompt, *answer[:done]], budget, 16), draft, "draft_model")
            row: int | None = 0
            taken = 0
            while row is not None and done + taken < len(answer):
                row = draft.children[row].get(answer[done + taken])
                taken += 1
            if index and done + (depth or budget) < len(answer):  # what the end of the text cuts short says nothing
                found.tokens.append(taken)
                found.predicted.append(sum(draft.reach()))
                found.guesses.append(len(draft) - 1)
                found.depths.append(max(draft.depths))
                found.calls.append(counted.calls)
            rates.learn(draft, answer[done : done + taken])
            done += taken
    return found
