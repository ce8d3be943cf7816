"""What the command line does for models that fill masked slots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from planc.compiler import canvas_view
from planc.compiler.store import open_any
from planc.compiler.suites.run import bench_suite
from planc.runtime.errors import InputError
from planc.runtime.filler import ONE_A_PASS, Filled, Filler


def fill(exe: Filler, text: str, settings: dict[str, Any], *, compare: bool, trace: bool, pictures: Iterable[Path]) -> dict[str, Any]:
    """Print an answer, and what it cost beside one slot a pass by the whole model; the same as plain data."""
    if settings.pop("stop") or settings.pop("repetition_penalty"):
        raise InputError(
            "input-invalid", "models that fill masked slots know no stop strings and no repetition penalty", fix="leave them out"
        )
    word, console = canvas_view.words_of(exe.text, exe.eos_ids), Console(highlight=False)
    plain = exe.with_plan(**ONE_A_PASS) if compare else exe
    for warm in (plain, exe):  # both sides of the pair run warm
        warm.generate(text, **settings)
    reference = plain.generate(text, **settings) if compare else None
    answer: Filled | None = None
    for frame in exe.stream(text, **settings):
        if trace:
            console.print(canvas_view.line(frame.canvases[0], word))
        answer = frame.finished[0][1] if frame.finished else answer
    assert answer is not None and not isinstance(reference, list)
    print(answer.text if exe.text.tokenizer is not None else " ".join(map(str, answer.ids)))
    for path in pictures:
        canvas_view.write_picture(answer, path, f"{answer.stats.passes} passes")
    stats, report = answer.stats, exe.report()
    result = {"text": answer.text, "ids": answer.ids, "prompt_tokens": answer.prompt_tokens, "finish_reason": answer.finish_reason}
    result |= {**vars(stats), "tokens_per_pass": round(stats.tokens_per_pass, 4), "tokens_per_s": round(stats.tokens_per_s, 2)}
    result |= {
        "exactness": report["exactness"],
        "exactness_line": report["exactness_line"],
        "ratio": None,
        "plain_passes": None,
        "identical": None,
    }
    parts = [
        f"{stats.tokens} tokens",
        f"{stats.tokens_per_s:.1f} tokens/s",
        f"{stats.passes} passes",
        f"{stats.tokens_per_pass:.2f} tokens per pass",
    ]
    if reference is not None:
        result |= {"ratio": round(reference.stats.seconds / stats.seconds, 4), "plain_passes": reference.stats.passes}
        result["identical"] = answer.ids == reference.ids
        same = "the same tokens" if result["identical"] else "OTHER TOKENS"
        parts.append(f"{result['ratio']:.2f}x one slot a pass ({reference.stats.passes} passes, {same})")
    parts.append(f"exactness {report['exactness']}")
    print("\n" + " | ".join(parts), flush=True)
    return {**result, "trace": [vars(commit) for commit in answer.trace]}


def suite_of(
    suite: str | None, plans: Sequence[Path], model: str, limit: int | None, note: Callable[[str], None]
) -> tuple[tuple[str, ...], list[dict[str, Any]], dict[str, Any]]:
    """Plans for masked slots judged on a suite, `limit` examples of every task: columns and rows of a table, and all of it as plain data."""
    if suite is None:
        raise InputError(
            "input-invalid", "there is nothing to run", fix="name a file with --prompts, or a suite with --suite parallelbench"
        )
    fillers = {}
    for plan in plans:
        exe, _ = open_any(plan, model)
        if not isinstance(exe, Filler):
            raise InputError("input-invalid", "suites are for models that fill masked slots", where=str(plan), fix="use --prompts")
        fillers[plan.stem] = exe
    result = bench_suite(suite, fillers, count=limit or 25, seed=0, note=note)
    figures = ("tokens_per_pass", "fewer_passes", "fewer_token_layers", "ratio")
    rows = [{"plan": name, **row["tasks"], **{key: row[key] for key in figures}} for name, row in result["plans"].items()]
    return tuple(rows[0]), rows, result
