"""The catalogue of methods: what each is called, which plan expresses it, and whether its working conditions were seen to hold.

Names stand in `papers.yaml`. Results stand in `benchmarks/results/papers.json`, which only `run` writes. A check is a function in
`benchmarks/papers/` marked `@paper(number)`; it yields one `Item` per working condition of the paper's card.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from planc.compiler.files import write
from planc.runtime.contract import hardware
from planc.runtime.errors import InputError, PlancError

STATUSES = ("works", "partial", "missing")

#: The repository; in an installed wheel there is none, and every method without results is `missing`.
ROOT = Path(__file__).resolve().parents[1]

Check = Callable[[], Iterable["Item"]]
_CHECKS: dict[int, Check] = {}
_PACKAGE = "planc_paper_checks"


@dataclass(frozen=True)
class Paper:
    """A line of `papers.yaml`."""

    number: int
    slug: str
    name: str
    title: str
    checks: int  # working conditions on the card

    @property
    def plan(self) -> str:
        """The plan file, relative to the repository."""
        return f"examples/papers/{self.number:02}-{self.slug}.yaml"


@dataclass(frozen=True)
class Item:
    """One working condition: its number on the card, what it says in short, whether it held, and the figures."""

    number: int
    what: str
    passed: bool
    measured: dict[str, Any] = field(default_factory=dict)


def paper(number: int) -> Callable[[Check], Check]:
    """Register a function as the check of a paper."""

    def register(check: Check) -> Check:
        assert number not in _CHECKS, f"two checks for paper {number}"
        _CHECKS[number] = check
        return check

    return register


def papers() -> list[Paper]:
    """All methods, by number."""
    return [Paper(**entry) for entry in yaml.safe_load(Path(__file__).with_name("papers.yaml").read_text(encoding="utf-8"))]


def results_file() -> Path:
    """Where `run` writes and `listing` reads."""
    return ROOT / "benchmarks/results/papers.json"


def listing() -> list[dict[str, Any]]:
    """What `planc papers --json` prints: number, name, title, plan, status, measured."""
    results = _read_results()
    return [_row(entry, results.get(str(entry.number), {})) for entry in papers()]


def _row(entry: Paper, result: dict[str, Any]) -> dict[str, Any]:
    items = result.get("items", [])
    held = [item for item in items if item["passed"]]
    has_plan = (ROOT / entry.plan).is_file()
    seen = {item["number"] for item in items}
    complete = has_plan and not result.get("error") and len(held) == len(items) and seen >= set(range(1, entry.checks + 1))
    status = "works" if complete else "partial" if held else "missing"
    failed = [str(item["number"]) for item in items if not item["passed"]]
    summary = f"{len(held)} of {entry.checks} conditions hold" if items else ""
    if failed:
        summary += f", not {', '.join(failed)}"
    return {
        "number": entry.number,
        "name": entry.name,
        "title": entry.title,
        "plan": entry.plan if has_plan else None,
        "status": status,
        "summary": summary,
        "conditions": entry.checks,
        "measured": items,
        "error": result.get("error"),
    }


def _read_results() -> dict[str, Any]:
    path = results_file()
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["papers"]
    except (OSError, ValueError, LookupError) as error:
        raise InputError("input-invalid", f"the results cannot be read: {error}", where=str(path), fix="run `make papers` again") from error
    return found


def run(numbers: Iterable[int] | None = None, note: Callable[[str], None] = print) -> bool:
    """Run checks (all, or those of `numbers`) and write the results after each; True when every condition held. Other results stay."""
    checks = _load_checks()
    wanted = sorted(checks) if numbers is None else list(numbers)
    for number in wanted:
        if number not in checks:
            known = ", ".join(map(str, sorted(checks))) or "none"
            raise InputError("input-invalid", f"paper {number} has no check", where="benchmarks/papers", fix=f"papers with checks: {known}")
    fine = True
    for number in wanted:
        result = _run_one(checks[number], lambda line, number=number: note(f"paper {number}: {line}"))  # type: ignore[misc]
        fine = fine and not result["error"] and all(item["passed"] for item in result["items"])
        _write_results({**_read_results(), str(number): result})
    return fine


def _run_one(check: Check, note: Callable[[str], None]) -> dict[str, Any]:
    start, items, error = time.perf_counter(), [], None
    try:
        for item in check():
            items.append(asdict(item))
            figures = ", ".join(f"{name} {value}" for name, value in item.measured.items())
            note(f"{'holds' if item.passed else 'FAILS'} {item.number}. {item.what} ({figures})")
    except PlancError as problem:
        error = str(problem)
    except Exception as problem:  # one broken check must not hide the results of the others
        traceback.print_exc()
        error = f"{type(problem).__name__}: {problem}"
    if error:
        note(f"stopped: {error}")
    return {"items": items, "error": error, "seconds": round(time.perf_counter() - start, 1), "hardware": hardware()}


def _load_checks() -> dict[int, Check]:
    """Import every file of `benchmarks/papers`; each registers itself. They are modules of a package that exists in memory only."""
    folder = ROOT / "benchmarks/papers"
    sys.modules.setdefault(_PACKAGE, ModuleType(_PACKAGE)).__path__ = [str(folder)]  # so that a check can import what it shares with others
    for path in sorted(folder.glob("p[0-9]*.py")):
        name = f"{_PACKAGE}.{path.stem}"
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
    return dict(_CHECKS)


def _write_results(results: dict[str, Any]) -> None:
    ordered = dict(sorted(results.items(), key=lambda entry: int(entry[0])))
    write(results_file(), (json.dumps({"papers": ordered}, indent=1, ensure_ascii=False) + "\n").encode())


def main(arguments: list[str]) -> int:
    """`python -m planc.compiler.papers run [NUMBER ...]`"""
    if not arguments or arguments[0] != "run" or not all(argument.isdigit() for argument in arguments[1:]):
        print("usage: python -m planc.compiler.papers run [NUMBER ...]", file=sys.stderr)
        return 2
    try:
        return 0 if run([int(argument) for argument in arguments[1:]] or None) else 1
    except PlancError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    # the checks register with the importable module, not with __main__
    from planc.compiler.papers import main as registered_main

    sys.exit(registered_main(sys.argv[1:]))
