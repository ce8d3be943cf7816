"""Rules of the repository itself: who imports what, how it is packaged, what the documents list."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from planc.runtime.errors import CODES

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("compiler", "passes", "backends", "runtime")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

#: Other rooms that a room may import.
MAY_IMPORT = {
    "runtime": set[str](),
    "passes": {"compiler", "runtime"},
    "backends": {"compiler", "runtime"},
    "compiler": {"passes", "backends", "runtime"},
}
#: What the runtime may import besides the standard library: the core dependencies. psutil-like extras are not among them.
RUNTIME_LIBRARIES = {
    "numpy",
    "onnxruntime",
    "tokenizers",
    "jinja2",
    "pydantic",
    "pydantic_core",
    "yaml",
    "typer",
    "rich",
    "array_api_compat",
    "PIL",  # only where an image is read or resized, with an error that names the extra
}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every import in a file, the ones inside functions and type-checking blocks included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room: str) -> None:
    wrong = []
    for path in (path for path in SOURCES if path.relative_to(ROOT).parts[0] == room):
        for line, name in imports(path):
            first, *rest = name.split(".")
            if first in ROOMS:
                wrong.append(f"{name_of(path)}:{line}: import planc.{name}, not {name}")
            elif first == "planc" and rest and rest[0] in ROOMS:
                if rest[0] not in {room, *MAY_IMPORT[room]}:
                    wrong.append(f"{name_of(path)}:{line}: {room} may not import planc.{rest[0]}")
            elif first == "planc" and room == "runtime" and rest[:1] != ["__version__"]:
                wrong.append(f"{name_of(path)}:{line}: the runtime may not import the package's front door, which offers the compiler")
            elif room == "runtime" and first not in RUNTIME_LIBRARIES and first not in sys.stdlib_module_names:
                wrong.append(f"{name_of(path)}:{line}: the runtime may not import {first}")
    assert not wrong, "\n".join(wrong)


def test_tests_import_the_package_by_its_name() -> None:
    wrong = [f"{name_of(path)}:{line}: {name}" for path in TESTS for line, name in imports(path) if name.split(".")[0] in ROOMS]
    assert not wrong, "\n".join(wrong)


def test_files_and_functions_stay_readable() -> None:
    long = [name_of(path) for path in (*SOURCES, *TESTS) if len(path.read_text(encoding="utf-8").splitlines()) >= 600]
    functions = (
        (path, node, (node.end_lineno or 0) - node.lineno + 1)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    )
    long += [f"{name_of(path)}:{node.lineno}: {node.name} has {length} lines" for path, node, length in functions if length > 60]
    assert not long, "\n".join(long)


def test_importing_planc_does_not_import_torch(tmp_path: Path) -> None:
    heavy = "{'torch', 'transformers', 'onnx', 'onnxscript'}"
    check = "import sys, planc, planc.runtime.executable; print(sorted(" + heavy + " & set(sys.modules)))"
    done = run(sys.executable, "-c", check, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("room", ROOMS)
def test_short_names_are_not_importable(room: str, tmp_path: Path) -> None:
    done = run(sys.executable, "-c", f"import {room}", cwd=tmp_path)
    assert f"No module named '{room}'" in done.stderr


def test_wheel_holds_real_files(tmp_path: Path) -> None:
    source = tmp_path / "source"
    kept_out = shutil.ignore_patterns(
        ".venv", ".git", "__pycache__", "build", "dist", "*.egg-info", ".*_cache", ".hypothesis", "tests", "benchmarks"
    )
    shutil.copytree(ROOT, source, symlinks=True, ignore=kept_out)
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path))
    done = run(sys.executable, "-m", "pip", "wheel", *options, str(source), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {info.filename: archive.read(info) for info in archive.infolist()}
        assert not [info.filename for info in archive.infolist() if info.external_attr >> 28 == 0xA], "the wheel holds links"
    for path in SOURCES:
        assert held.get(f"planc/{name_of(path)}") == path.read_bytes(), f"{name_of(path)} is missing or another"
    for path in (path for room in ROOMS for kind in ("yaml", "html", "css", "js") for path in (ROOT / room).rglob(f"*.{kind}")):
        assert f"planc/{name_of(path)}" in held
    assert not [name for name in held if not name.startswith(("planc/", "planc-"))]


def test_rooms_are_relative_links() -> None:
    for room in ROOMS:
        link = ROOT / "src" / "planc" / room
        assert link.is_symlink()
        assert link.readlink() == Path("../..") / room


def test_error_page_lists_every_code_in_order() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| ([^|]+) \| [^|]+ \|$", (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == list(CODES.items())


def test_every_error_code_is_used_and_every_used_code_exists() -> None:
    used: set[str] = set()
    for path in SOURCES:
        used |= set(re.findall(r"\"([a-z]+(?:-[a-z]+)+)\"", path.read_text(encoding="utf-8"))) if path.name != "errors.py" else set()
    assert set(CODES) <= used, set(CODES) - used
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and re.fullmatch(r"(Plan|Planc|Model|Compile|Artifact|Input)Error", node.func.id)
            ):
                first = node.args[0] if node.args else None
                if isinstance(first, ast.Constant):
                    assert first.value in CODES, f"{name_of(path)}:{node.lineno}: {first.value}"


def test_constraints_pin_and_name_no_place() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert "torch==2.13.0" in lines
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)
