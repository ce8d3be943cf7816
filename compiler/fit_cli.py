"""What `planc fit` does: finds what it learns from, fits what the plan has that is learned, and tells of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from planc.compiler import files
from planc.compiler.bench import load_prompts
from planc.compiler.fit import fit
from planc.compiler.heads.fit import fit_head, head_of_plan
from planc.compiler.heads.train import Options
from planc.compiler.ngrams import fit_ngrams, part_of_plan
from planc.compiler.plan import Plan
from planc.compiler.suites.run import SUITES, draw, trained_tasks
from planc.runtime.errors import InputError
from planc.runtime.profile import titled_bar


def texts_of(model: str, prompts: str | None, suite: str | None, limit: int, seed: int) -> list[Any] | None:
    """Prompts of a file or of a suite's tasks, at most `limit`; None where neither is named."""
    if (prompts is not None and suite is not None) or (suite is not None and suite not in SUITES):
        raise _nothing_named()
    if prompts is not None:
        return [prompt.text for prompt in load_prompts(prompts, limit)]
    if suite is None:
        return None
    tasks = trained_tasks(model)
    return [example.prompt for example in draw(tasks, -(-limit // len(tasks)), seed + 1)][:limit]


def fit_parts(
    model: str,
    plan: Plan,
    texts: Sequence[Any] | None,
    options: Options,
    *,
    work: Path | None,
    out: Path | None,
    tokens: int,
    png: Path | None,
) -> dict[str, Any]:
    """Fit the plan's draft head, else its n-gram model, else what learns from examples of tasks; figures by the part's key."""
    if head_of_plan(plan) is not None:
        with titled_bar() as show:
            head = fit_head(model, plan, texts, work, out=out, tokens=tokens, options=options, progress=show)
        if png is not None:
            files.write(png, head.picture(f"draft head of {model}"))
        print(head)
        return {"draft_head": head.as_dict()}
    if part_of_plan(plan) is not None:
        with titled_bar() as show:
            counted = fit_ngrams(model, plan, texts, work, out=out, tokens=tokens, progress=show)
        print(counted)
        return {"ngram_model": counted.as_dict()}
    if texts is None:
        raise _nothing_named()
    found = fit(plan, model, texts, seed=options.seed, note=lambda line: print(line, file=sys.stderr))
    for key, figures in found.items():
        print(f"{key}: {figures['file']}")
    return found


def _nothing_named() -> InputError:
    return InputError("input-invalid", "name prompts to learn from", fix="--prompts FILE, or --suite parallelbench")
