"""The documents say what the code does: commands parse, plans are valid, Python blocks name what exists, tables equal the registry."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import sys
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import planc
from planc.compiler.cli import app
from planc.compiler.models import models
from planc.compiler.peers import PEERS
from planc.compiler.plan import Plan
from planc.runtime import builders, registry
from planc.runtime.acceptance import RULES
from planc.runtime.contract import LEVELS
from planc.runtime.executable import Executable
from planc.runtime.registry import parts

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = sorted([README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks/README.md", *(ROOT / "docs").glob("**/*.md")])
PLANS = sorted([*(ROOT / "examples").glob("**/*.yaml"), *(ROOT / "benchmarks").glob("**/*.yaml")])
EXAMPLES = sorted((ROOT / "examples").glob("**/*.py"))
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

Plan()  # registers every part


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def section(page: Path, title: str) -> str:
    """The text below a heading of the second level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found, f"{page.name} has no section {title!r}"
    return found[1]


def table(text: str) -> list[tuple[str, ...]]:
    """Cells of the rows of the first table in a text, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [tuple(cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", line)[1:-1]) for line in lines[2:]]


def blocks(language: str) -> list[Any]:
    """Every fenced block of a language, as a test parameter."""
    found = []
    for page in PAGES:
        for match in re.finditer(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            line = page.read_text(encoding="utf-8")[: match.start()].count("\n") + 2
            found.append(pytest.param(match[1], id=f"{name_of(page)}:{line}"))
    return found


def commands() -> list[Any]:
    """Every command in a shell block or an indented block, continued lines joined."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        shell = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        shell += ["\n".join(line[4:] for line in part.splitlines()) for part in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)]
        for block in shell:
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                words = shlex.split(line, comments=True)
                while words and re.match(r"[A-Z_]+=", words[0]):
                    words = words[1:]
                if words and (words[0] in ("planc", "make") or "python" in words[0]):
                    found.append(pytest.param(words, id=f"{name_of(page)}: {' '.join(words)[:60]}"))
    return found


# ---- commands ----------------------------------------------------------------------------------------------------------------------


def test_there_are_commands_to_check() -> None:
    assert {case.values[0][0] for case in commands()} >= {"planc", "make", "python"}
    assert len(commands()) > 15
    assert blocks("python")
    assert blocks("yaml")


@pytest.mark.parametrize("words", commands())
def test_commands_parse(words: list[str]) -> None:
    program, *rest = words
    if program == "make":
        targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        wanted = {word for word in rest if "=" not in word}
        assert wanted <= targets, f"the Makefile has no {wanted - targets}"
    elif program == "planc":
        rest = rest[: next((i for i, word in enumerate(rest) if re.match(r"\d?>", word)), len(rest))]
        assert rest[0] in COMMANDS, f"there is no command {rest[0]}"
        try:
            COMMANDS[rest[0]].make_context(rest[0], rest[1:])
        except Exception as error:  # typer's and click's own, which have no public base in every version
            raise AssertionError(f"planc {' '.join(rest)}: {error}") from error
        for word in rest:
            assert not word.endswith((".yaml", "mixed.jsonl", "repeat.jsonl")) or (ROOT / word).is_file(), f"{word} does not exist"
    else:
        assert not rest or rest[0] == "-m" or (ROOT / rest[0]).is_file()


def test_a_wrong_command_would_be_seen() -> None:
    for words in (["planc", "runs", "x"], ["planc", "run", "plan.yaml", "hello", "--no-such-option"], ["planc", "bench", "plan.yaml"]):
        with pytest.raises(AssertionError):
            test_commands_parse(words)
    with pytest.raises(AssertionError):
        test_commands_parse(["make", "coffee"])


def test_command_table_lists_the_commands() -> None:
    rows = table(section(README, "Command line"))
    assert [row[0].split()[1] for row in rows] and {row[0].split()[1] for row in rows} == set(COMMANDS)
    options = {name: {option for p in command.params for option in p.opts} for name, command in COMMANDS.items()}
    for usage, about in rows:
        command = usage.split()[1]
        named = set(re.findall(r"--[a-z-]+", usage + about))
        assert named <= options[command], f"{command} has no {named - options[command]}"
    assert {name for name, known in options.items() if "--json" not in known} == {"schema"}, "the README says who takes --json"


def test_inline_commands_exist() -> None:
    for page in PAGES:
        for found in re.findall(r"`planc ([a-z]+)", page.read_text(encoding="utf-8")):
            assert found in COMMANDS, f"{page.name}: planc {found}"


# ---- plans -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", blocks("yaml"))
def test_plan_blocks_are_valid(text: str) -> None:
    Plan.from_yaml(text)


@pytest.mark.parametrize("path", PLANS, ids=name_of)
def test_example_plans_are_valid(path: Path) -> None:
    plan = Plan.from_yaml(path)
    assert Plan.from_yaml(plan.to_yaml()) == plan
    if path.parent.name == "papers" and path.is_relative_to(ROOT / "examples"):
        assert plan.paper == int(path.name[:2])


def test_first_plan_is_the_example() -> None:
    text = re.search(r"^```yaml\n(.*?)^```", section(README, "A first plan"), re.MULTILINE | re.DOTALL)
    assert text
    shown, real = Plan.from_yaml(text[1]), Plan.from_yaml(ROOT / "examples/fast-cpu.yaml")
    assert shown == real.model_copy(update={"name": None, "description": None})


# ---- Python ------------------------------------------------------------------------------------------------------------------------


class Names(ast.NodeVisitor):
    """Checks that what a piece of code imports, reads and calls exists, as far as the types of our own API carry."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self.checked = 0

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.names[alias.asname or alias.name.partition(".")[0]] = importlib.import_module(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = importlib.import_module(node.module or "")
        for alias in node.names:
            assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
            self.names[alias.asname or alias.name] = getattr(module, alias.name)

    def visit_Assign(self, node: ast.Assign) -> None:
        self._bind(node.targets[0], self.kinds(node.value))
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        items = [typing.get_args(kind)[0] for kind in self.kinds(node.iter) if typing.get_args(kind)]
        self._bind(node.target, items)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.kinds(node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function = self.value(node.func)
        if function is not None and str(getattr(function, "__module__", "")).startswith("planc"):
            known = inspect.signature(function).parameters
            for keyword in node.keywords:
                assert keyword.arg in known or any(p.kind is p.VAR_KEYWORD for p in known.values()), f"{function} takes no {keyword.arg}"
            self.checked += 1
        self.generic_visit(node)

    def value(self, node: ast.expr) -> Any:
        """The function or class that an expression names; None when it is not known."""
        if isinstance(node, ast.Name):
            found = self.names.get(node.id)
            return None if isinstance(found, list) else found
        if isinstance(node, ast.Attribute):
            owner = self.value(node.value)
            owners = [owner] if owner is not None else self.kinds(node.value)
            return next((getattr(owner, node.attr) for owner in owners if hasattr(owner, node.attr)), None)
        return None

    def kinds(self, node: ast.expr) -> list[Any]:
        """Types that an expression may have; empty when they are not known."""
        if isinstance(node, ast.Name):
            found = self.names.get(node.id)
            return found if isinstance(found, list) else []
        if isinstance(node, ast.Call):
            function = self.value(node.func)
            if inspect.isclass(function):
                return [function]
            return _alternatives(_hints(function).get("return")) if inspect.isroutine(function) else []
        if isinstance(node, ast.Attribute):
            module = self.value(node.value)
            if isinstance(module, ModuleType):
                assert hasattr(module, node.attr), f"{module.__name__} has no {node.attr}"
                return []
            owners = [kind for kind in self.kinds(node.value) if str(getattr(kind, "__module__", "")).startswith("planc")]
            if owners:
                assert any(_has(owner, node.attr) for owner in owners), f"{owners} have no {node.attr}"
                self.checked += 1
            return [kind for owner in owners for kind in _alternatives(_attribute(owner, node.attr))]
        return []

    def _bind(self, target: ast.expr, kinds: list[Any]) -> None:
        if isinstance(target, ast.Name):
            self.names[target.id] = kinds


def _hints(owner: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(owner)
    except (TypeError, NameError):
        return {}


def _alternatives(kind: Any) -> list[Any]:
    if kind is None:
        return []
    return list(typing.get_args(kind)) if isinstance(kind, UnionType) or typing.get_origin(kind) is typing.Union else [kind]


def _has(owner: Any, name: str) -> bool:
    known = set(dir(owner)) | set(getattr(owner, "model_fields", {})) | ({f.name for f in fields(owner)} if is_dataclass(owner) else set())
    if owner is Executable:  # attributes that __init__ sets
        known |= set(re.findall(r"self\.([a-z]\w*)", inspect.getsource(Executable.__init__)))
    return name in known


def _attribute(owner: Any, name: str) -> Any:
    found = getattr(owner, name, None)
    if isinstance(found, property):
        return _hints(found.fget).get("return")
    return _hints(owner).get(name)


@pytest.mark.parametrize("text", [*blocks("python"), *(pytest.param(p.read_text(encoding="utf-8"), id=name_of(p)) for p in EXAMPLES)])
def test_python_names_what_exists(text: str) -> None:
    names = Names()
    names.visit(ast.parse(text))
    compile(text, "block", "exec")


@pytest.mark.parametrize(
    "wrong",
    [
        "import planc\nplanc.no_such_name",
        "import planc\nplanc.compile('m', plans=None)",
        "import planc\nexe = planc.load('d')\nexe.no_such_method('x')",
        "import planc\nexe = planc.load('d')\nexe.plain().generate('x', max_tokens=3)",
        "import planc\nexe = planc.load('d')\nexe.generate('x').stats.no_such_field",
        "import planc\nexe = planc.load('d')\nfor chunk in exe.stream('x'):\n    chunk.no_such_field",
        "from planc.compiler.compile import no_such_function",
    ],
)
def test_wrong_names_would_be_seen(wrong: str) -> None:
    with pytest.raises(AssertionError, match=r"no_such|takes no"):
        test_python_names_what_exists(wrong)


def test_quickstart_is_short_and_checked() -> None:
    text = (ROOT / "examples/quickstart.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 40
    names = Names()
    names.visit(ast.parse(text))
    assert names.checked > 10


def test_public_names_are_in_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    for name in ("compile", "load", "Plan"):
        assert name in planc.__all__
        assert f"planc.{name}" in text


def test_pass_of_contributing_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass that CONTRIBUTING.md shows is one: it registers, rewrites, verifies, and does nothing the second time."""
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    tiny = importlib.import_module("models_tiny")
    monkeypatch.setitem(registry._PARTS, "pass", dict(registry._PARTS["pass"]))  # what the block registers is forgotten afterwards
    [block] = [case.values[0] for case in blocks("python") if "class ScaleLogits" in str(case.values[0])]
    path = "planc_docs_scale_logits"
    spec = importlib.util.spec_from_loader(path, loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path, module)  # pydantic looks its annotations up here
    exec(compile(block, path, "exec"), module.__dict__)
    plan = Plan.from_yaml("planc: 1\npasses:\n  - scale_logits: {by: 2.0}\n")
    new = tiny.applied(plan.passes[0], tiny.raised("llama"))
    ids = tiny.token_ids(1, 7)
    reference = importlib.import_module("planc.backends.reference")
    tiny.close(reference.probe(new, ids)["logits"], tiny.eager(tiny.model("llama"), ids) / 2)
    with pytest.raises(planc.PlancError, match="only once"):
        Plan.from_yaml("planc: 1\npasses: [scale_logits: {by: 2}, scale_logits: {by: 3}]\n")


# ---- tables ------------------------------------------------------------------------------------------------------------------------


def test_pass_table_is_the_registry() -> None:
    rows = [row[:3] for row in table(section(README, "Passes"))]
    known = [(key, part.stage, part.model_construct().effect.kind) for key, part in parts("pass").items()]  # type: ignore[attr-defined]
    assert rows == [
        (key, stage.name.lower(), effect) for key, stage, effect in sorted(known, key=lambda row: (row[1], _order(rows, row[0])))
    ]


def _order(rows: list[tuple[str, ...]], key: str) -> int:
    """Inside a stage the README may choose the order."""
    return next((i for i, row in enumerate(rows) if row[0] == key), len(rows))


def test_drafter_table_is_the_registry() -> None:
    assert [row[0] for row in table(section(README, "Drafters"))] == sorted(parts("drafter"))


def test_acceptance_and_builder_tables_are_the_code() -> None:
    assert [row[0] for row in table(section(README, "Acceptance"))] == list(RULES)
    assert [row[0] for row in table(section(README, "Builders"))] == sorted(parts(builders.BuilderPart.kind))


def test_other_tables_are_the_code() -> None:
    assert [row[0] for row in table(section(README, "Models"))] == [model.name for model in models()]
    levels = [row[0] for row in table(section(README, "Exactness"))]
    assert levels == [level for level in LEVELS if level in levels]
    others = set(LEVELS) - set(levels)
    assert all(f"`{level}`" in section(README, "Exactness") for level in others)
    assert all(f"`{peer}`" in section(README, "Benchmarks and peers") for peer in PEERS)


def test_dump_table_is_the_code() -> None:
    sources = [path for room in ("compiler", "backends", "passes") for path in (ROOT / room).rglob("*.py")]
    used = {int(level) for path in sources for level in re.findall(r"\bdump\((\d), ", path.read_text(encoding="utf-8"))}
    assert {int(row[0]) for row in table(section(README, "Look inside"))} == used


def test_papers_are_counted() -> None:
    said = re.findall(r"\b(\d+) methods", README.read_text(encoding="utf-8"))
    done = CliRunner().invoke(app, ["papers", "--json"])
    total = len(json.loads(done.stdout.splitlines()[-1])["papers"])
    assert said
    assert {int(number) for number in said} == {total}


def test_tour_takes_thirty_minutes() -> None:
    rows = table(section(README, "Thirty minutes through the code"))
    assert sum(int(row[0]) for row in rows) == 30


# ---- links, words and figures ------------------------------------------------------------------------------------------------------


def links(page: Path) -> Iterator[str]:
    """Relative links of a page, and paths in backticks that begin with a room or a file at the top."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    yield from (str(Path(name_of(page)).parent / target) for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text))
    tops = "|".join(("compiler", "passes", "backends", "runtime", "tests", "examples", "docs", "src"))
    yield from re.findall(rf"`((?:{tops})/[\w./-]*)`", text)
    yield from re.findall(r"`(\w+\.md)`", text)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page: Path) -> None:
    shown_only = ("passes/scale_logits.py", "tests/passes/test_scale_logits.py", "examples/papers/NN-name.yaml")
    wrong = [target for target in links(page) if target not in shown_only and not (ROOT / target).exists()]
    assert not wrong, f"{name_of(page)}: {wrong}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_anchors_lead_to_headings(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        other = (page.parent / target).resolve() if target else page
        headings = re.findall(r"^#+ (.+)$", other.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_figures_have_a_source() -> None:
    """No speed in the README that is not in a committed result, at the precision given."""
    committed = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("results/**/*") if path.is_file())
    numbers = [float(number) for number in re.findall(r"\d+\.?\d*", committed)]
    for figure in re.findall(r"(\d+(?:\.\d+)?) ?(?:tokens/s|ms\b|x\b|× |MB\b|MiB\b|GB\b)", README.read_text(encoding="utf-8")):
        digits = len(figure.partition(".")[2])
        assert any(abs(number - float(figure)) <= 0.5 * 10**-digits for number in numbers), f"{figure} is in no file of benchmarks/results"


@pytest.mark.parametrize("page", [*PAGES, *PLANS, *EXAMPLES], ids=name_of)
def test_pages_name_no_place(page: Path) -> None:
    assert not re.search(r"/(?:home|root|work|Users|tmp)/|pypi\.org|pythonhosted", page.read_text(encoding="utf-8"))
