"""What several checks need; a check imports it as `planc_paper_checks.common`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from planc.compiler.bench import load_prompts
from planc.compiler.papers import ROOT
from planc.runtime.contract import CostTable
from planc.runtime.decode import Speculative, Tree
from planc.runtime.drafters import DrafterPart
from planc.runtime.engine import Floats
from planc.runtime.executable import Executable, Generation
from planc.runtime.trees import Draft

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
