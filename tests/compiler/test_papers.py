"""The catalogue of methods and the record of their checks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from planc.compiler import papers
from planc.compiler.papers import Item, paper
from planc.runtime.errors import InputError

CHECK = """
from planc.compiler.papers import Item, paper

@paper({number})
def check():
    yield Item(1, "first", True, {{"gain": 2.0}})
    {rest}
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A repository with nothing in it, and a registry without checks."""
    monkeypatch.setattr(papers, "ROOT", tmp_path)
    monkeypatch.setattr(papers, "_CHECKS", {})
    import sys

    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("planc_paper_checks."):
            del sys.modules[name]


def add_check(root: Path, number: int, rest: str = "") -> None:
    (root / "benchmarks/papers").mkdir(parents=True, exist_ok=True)
    (root / f"benchmarks/papers/p{number}.py").write_text(CHECK.format(number=number, rest=rest or "pass"))


def add_plan(root: Path, number: int) -> None:
    entry = papers.papers()[number - 1]
    (root / entry.plan).parent.mkdir(parents=True, exist_ok=True)
    (root / entry.plan).write_text("planc: 1\n")


def row(number: int) -> dict[str, object]:
    return papers.listing()[number - 1]


def test_catalogue_is_complete() -> None:
    known = papers.papers()
    assert [entry.number for entry in known] == list(range(1, 88))
    assert len({entry.slug for entry in known}) == 87
    assert all(entry.name and entry.title and entry.checks > 0 for entry in known)
    assert known[19].plan == "examples/papers/20-token-recycling.yaml"
    assert known[0].plan == "examples/papers/01-trip-llm.yaml"


def test_plans_of_the_repository_belong_to_a_paper() -> None:
    plans = {entry.plan for entry in papers.papers()}
    found = {path.relative_to(papers.ROOT).as_posix() for path in (papers.ROOT / "examples/papers").glob("*.yaml")}
    assert found <= plans


def test_nothing_measured_is_missing(root: Path) -> None:
    add_plan(root, 20)
    assert {entry["status"] for entry in papers.listing()} == {"missing"}
    assert row(20)["plan"] == "examples/papers/20-token-recycling.yaml"
    assert row(1)["plan"] is None


def test_run_records_and_works_needs_every_condition(root: Path) -> None:
    conditions = papers.papers()[19].checks
    said: list[str] = []
    add_check(root, 20, f"yield from (Item(n, 'more', True) for n in range(2, {conditions + 1}))")
    assert papers.run(note=said.append)
    assert row(20)["status"] == "partial", "without a plan file it is not a plan yet"
    add_plan(root, 20)
    assert row(20)["status"] == "works"
    assert row(20)["measured"][0]["measured"] == {"gain": 2.0}  # type: ignore[index]
    assert "paper 20: holds 1. first (gain 2.0)" in said
    assert json.loads((root / "benchmarks/results/papers.json").read_text())["papers"]["20"]["hardware"]["cores"] >= 1


def test_a_condition_that_fails_or_is_not_measured_makes_it_partial(root: Path) -> None:
    add_plan(root, 20)
    add_check(root, 20, "yield Item(2, 'second', False)")
    assert not papers.run(note=lambda line: None)
    assert row(20)["status"] == "partial"
    assert row(20)["summary"] == "1 of 5 conditions hold, not 2"
    papers._CHECKS[20] = lambda: [Item(1, "first", True)]
    assert papers.run(note=lambda line: None), "every condition that was measured held"
    assert row(20)["status"] == "partial", "but four were not measured"
    papers._CHECKS[20] = lambda: [Item(1, "first", False)]
    papers.run(note=lambda line: None)
    assert row(20)["status"] == "missing"


def test_a_broken_check_stops_no_other(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_check(root, 20, "raise RuntimeError('boom')")
    add_check(root, 43)
    add_plan(root, 20)
    assert not papers.run(note=lambda line: None)
    assert (row(20)["status"], row(20)["error"]) == ("partial", "RuntimeError: boom")
    assert row(43)["measured"]
    assert "Traceback" in capsys.readouterr().err


def test_running_one_keeps_the_others(root: Path) -> None:
    add_check(root, 20)
    add_check(root, 43)
    papers.run(note=lambda line: None)
    before = papers._read_results()["43"]
    papers._CHECKS[20] = lambda: [Item(1, "first", False)]
    papers.run([20], note=lambda line: None)
    after = papers._read_results()
    assert after["43"] == before
    assert not after["20"]["items"][0]["passed"]
    with pytest.raises(InputError, match="paper 21 has no check"):
        papers.run([21])


def test_interruption_leaves_the_old_results(root: Path) -> None:
    add_check(root, 20)
    papers.run(note=lambda line: None)
    before = papers.results_file().read_text()

    def interrupted() -> Iterator[Item]:
        yield Item(1, "first", False)
        raise KeyboardInterrupt

    papers._CHECKS[20] = interrupted
    with pytest.raises(KeyboardInterrupt):
        papers.run(note=lambda line: None)
    assert papers.results_file().read_text() == before
    assert [path.name for path in papers.results_file().parent.iterdir()] == ["papers.json"]


def test_damaged_results(root: Path) -> None:
    papers.results_file().parent.mkdir(parents=True)
    papers.results_file().write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        papers.listing()


def test_checks_share_a_module(root: Path) -> None:
    add_check(root, 20, "from planc_paper_checks.common import figure; yield Item(2, 'second', True, {'figure': figure})")
    (root / "benchmarks/papers/common.py").write_text("figure = 7\n")
    papers.run(note=lambda line: None)
    assert row(20)["measured"][1]["measured"] == {"figure": 7}  # type: ignore[index]


def test_two_checks_for_one_paper(root: Path) -> None:
    paper(3)(list)
    with pytest.raises(AssertionError):
        paper(3)(list)


def test_main(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert papers.main(["list"]) == 2
    assert papers.main(["run", "21"]) == 2
    add_check(root, 20)
    assert papers.main(["run", "20"]) == 0
    assert "usage" in capsys.readouterr().err
