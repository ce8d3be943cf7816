"""Run a suite of tasks: answers of several plans, judged, with what they cost; `planc bench --suite`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from planc.compiler.suites.parallelbench import TASKS, WAITING_LINE, Example
from planc.runtime.errors import InputError
from planc.runtime.filler import ONE_A_PASS, Filled, Filler, total
from planc.runtime.masked import Cost
from planc.runtime.text import Text

SUITES = ("parallelbench",)
HINTS = (
    ("copy", "reverse"),
    ("shuffle", "replace_random"),
)  #: what every claim of speed is to be shown with: tasks without and with dependence


@dataclass
class Result:
    """What one plan did on the examples."""

    answers: list[Filled] = field(default_factory=list)
    right: dict[str, list[bool]] = field(default_factory=dict)  # task -> whether each answer is valid
    seconds: float = 0.0

    @property
    def cost(self) -> Cost:
        """Of all answers."""
        return total(self.answers)

    def share(self, *tasks: str) -> float:
        """Of right answers, over these tasks (all of them by default)."""
        found = [ok for task in (tasks or tuple(self.right)) for ok in self.right.get(task, [])]
        return round(sum(found) / len(found), 4) if found else float("nan")

    @property
    def tokens_per_pass(self) -> float:
        """Tokens in front of the end token, over all answers."""
        return round(sum(a.stats.tokens for a in self.answers) / max(1, self.cost.passes), 4)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        cost = self.cost
        by_task = {task: self.share(task) for task in self.right}
        figures = {
            "passes": cost.passes,
            "token_layers": cost.token_layers,
            "attention_pairs": cost.attention_pairs,
            "kv_bytes": cost.kv_bytes,
        }
        return {
            "accuracy": self.share(),
            "tasks": by_task,
            "tokens_per_pass": self.tokens_per_pass,
            **figures,
            "seconds": round(self.seconds, 4),
        }


def draw(tasks: Sequence[str], count: int, seed: int = 0, lengths: dict[str, int] | None = None) -> list[Example]:
    """`count` examples of every task. Raises InputError[input-invalid] for a task that there is not."""
    for task in tasks:
        if task not in TASKS:
            raise InputError("input-invalid", f"there is no task {task!r}", fix=f"tasks: {', '.join(TASKS)}")
    examples = []
    for task in tasks:
        rng = np.random.default_rng([seed, list(TASKS).index(task)])
        examples += [TASKS[task].example(rng, (lengths or {}).get(task)) for _ in range(count)]
    return examples


def known_tasks(text: Text) -> tuple[str, ...]:
    """The tasks whose names are words of the model; those of the benchmark where it has no such words."""
    tokenizer = text.tokenizer
    named = tuple(task for task in TASKS if tokenizer is not None and tokenizer.token_to_id(task) is not None)
    return named or WAITING_LINE


def trained_tasks(model: str) -> tuple[str, ...]:
    """The same of a model that is not loaded yet."""
    folder = Path(model).expanduser()
    return known_tasks(Text.load(folder) if folder.is_dir() else Text())


def words(exe: Filler, answer: Filled) -> list[str]:
    """The words in front of the end token; none where there is no end."""
    ids = answer.ids
    return exe.text.decode(ids).split() if ids and ids[-1] in exe.eos_ids else []


def judge(exe: Filler, examples: Sequence[Example], **options: Any) -> Result:
    """Answers of one executable; `options` as for `generate`. Batches are of `runtime.filler.BATCH` prompts."""
    result = Result()
    answers = exe.generate([example.prompt for example in examples], **options)
    assert isinstance(answers, list)
    for example, answer in zip(examples, answers, strict=True):
        result.right.setdefault(example.task, []).append(TASKS[example.task].valid(example, words(exe, answer)))
    result.answers = answers
    return result


def bench_suite(
    suite: str, fillers: dict[str, Filler], *, count: int, seed: int, note: Callable[[str], None], **options: Any
) -> dict[str, Any]:
    """Every plan of `fillers` on the same examples, beside one slot a pass by the whole model. Batches of one prompt, for times."""
    if suite not in SUITES:
        raise InputError("input-invalid", f"there is no suite {suite!r}", fix=f"suites: {', '.join(SUITES)}")
    first = next(iter(fillers.values()))
    tasks = known_tasks(first.text)
    examples = draw(tasks, count, seed)
    systems = {"one slot a pass": first.with_plan(**ONE_A_PASS), **fillers}
    results = {}
    for name, exe in systems.items():
        note(f"{name}: {len(examples)} prompts of {len(tasks)} tasks")
        exe.generate(examples[0].prompt, **options)  # warm
        begin = perf_counter()
        found = judge(exe, examples, **options)
        found.seconds = perf_counter() - begin
        results[name] = found
    plain = results["one slot a pass"]
    rows = {}
    for name, found in results.items():
        same = sum(a.ids == b.ids for a, b in zip(found.answers, plain.answers, strict=True))
        ratios = {
            "fewer_passes": round(plain.cost.passes / found.cost.passes, 4),
            "fewer_token_layers": round(plain.cost.token_layers / found.cost.token_layers, 4),
            "ratio": round(plain.seconds / found.seconds, 4),
        }
        rows[name] = {**found.as_dict(), **ratios, "identical": same, "prompts": len(examples)}
    return {"suite": suite, "seed": seed, "tasks": list(tasks), "plans": rows}
