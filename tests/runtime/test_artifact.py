"""Artifacts: written whole or not at all, and refused when anything about them is not as written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planc.runtime import artifact
from planc.runtime.artifact import MANIFEST, Manifest, Signature, read_artifact, write_artifact, write_manifest
from planc.runtime.contract import Contract, CostTable
from planc.runtime.errors import ArtifactError

FILES = {"model.onnx": b"graph" * 50, "weights/main.data": bytes(range(256)), "empty": b"", 'odd "name".json': b"{}"}


def manifest(**changes: object) -> Manifest:
    signature = Signature(vocab_size=32, max_length=64, capacity=64, layers=2, kv_heads=(1, 1), head_dims=(8, 4))
    plan = {"planc": 1, "passes": [{"odd": '"digest": "' + "0" * 64 + '"'}]}
    return Manifest.model_validate({"planc": "0", "signature": signature, "plan": plan, "eos_ids": (2,), **changes})


def builder(files: dict[str, bytes] = FILES) -> Callable[[Path], Manifest]:
    def build(directory: Path) -> Manifest:
        for name, data in files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(data)
        return manifest()

    return build


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(ArtifactError) as caught:
        call()
    return caught.value.code


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


# ---- writing ----


def test_round_trip(tmp_path: Path) -> None:
    written = write_artifact(tmp_path / "deep" / "model", builder())
    read = read_artifact(tmp_path / "deep" / "model")
    assert read == written
    assert {name: entry.bytes for name, entry in read.files.items()} == {name: len(data) for name, data in FILES.items()}
    assert read.signature.spec().vocab_size == 32
    assert names(tmp_path / "deep") == ["model"], "nothing temporary is left"


def test_replaces_an_artifact_and_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_artifact(tmp_path / "a", builder({"one": b"1", "two": b"2"}))
    write_artifact(tmp_path / "a", builder({"one": b"new"}))
    assert names(tmp_path / "a") == [MANIFEST, "one"]
    read_artifact(tmp_path / "a")
    assert names(tmp_path) == ["a"]


def test_refuses_to_overwrite_anything_else(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("years of work")
    (tmp_path / "file").write_text("x")
    assert code_of(lambda: write_artifact(tmp_path / "thesis", builder())) == "artifact-exists"
    assert code_of(lambda: write_artifact(tmp_path / "file", builder())) == "artifact-exists"
    assert (tmp_path / "thesis" / "chapter1").read_text() == "years of work"


def test_refuses_what_appeared_while_building(tmp_path: Path) -> None:
    def build(directory: Path) -> Manifest:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "other").write_text("mine")
        return builder()(directory)

    assert code_of(lambda: write_artifact(tmp_path / "a", build)) == "artifact-exists"
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["other"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError, OSError])
def test_a_failed_build_leaves_the_old_artifact(tmp_path: Path, failure: type[BaseException]) -> None:
    write_artifact(tmp_path / "a", builder())

    def build(directory: Path) -> Manifest:
        (directory / "half").write_text("half")
        raise failure

    with pytest.raises(failure):
        write_artifact(tmp_path / "a", build)
    assert names(tmp_path) == ["a"]
    read_artifact(tmp_path / "a")


def test_a_failed_rename_brings_the_old_artifact_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_artifact(tmp_path / "a", builder())
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(artifact.os, "rename", rename)
    assert code_of(lambda: write_artifact(tmp_path / "a", builder({"new": b""}))) == "artifact-write"
    monkeypatch.undo()
    assert names(tmp_path) == ["a"]
    assert set(read_artifact(tmp_path / "a").files) == set(FILES)


def test_measurements_can_be_rewritten(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", builder())
    cost = CostTable(rows=(1, 2), past=(16,), measured=(((1.5, 2.5),),))
    write_manifest(tmp_path / "a", read_artifact(tmp_path / "a").model_copy(update={"contract": Contract(cost=cost)}))
    assert read_artifact(tmp_path / "a").contract.cost == cost


# ---- reading ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("artifact") / "a"
    write_artifact(directory, builder())
    return directory


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flipped_byte_is_noticed(whole: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([MANIFEST, *(n for n, content in FILES.items() if content)]))
    path = whole / name
    good = path.read_bytes()
    bad = bytearray(good)
    bad[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        path.write_bytes(bad)
        with pytest.raises(ArtifactError):
            read_artifact(whole)
    finally:
        path.write_bytes(good)
    read_artifact(whole)


def test_missing_and_truncated_files(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", builder())
    (tmp_path / "a" / "model.onnx").write_bytes(b"graph")
    assert code_of(lambda: read_artifact(tmp_path / "a", verify=False)) == "artifact-corrupt"
    (tmp_path / "a" / "model.onnx").unlink()
    assert code_of(lambda: read_artifact(tmp_path / "a", verify=False)) == "artifact-corrupt"
    (tmp_path / "a" / "model.onnx").mkdir()
    assert code_of(lambda: read_artifact(tmp_path / "a", verify=False)) == "artifact-corrupt"
    assert code_of(lambda: read_artifact(tmp_path / "b")) == "artifact-not-found"


def test_without_verification_only_the_hashes_are_skipped(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", builder({"data": b"aaaa"}))
    (tmp_path / "a" / "data").write_bytes(b"aaab")
    read_artifact(tmp_path / "a", verify=False)
    assert code_of(lambda: read_artifact(tmp_path / "a")) == "artifact-corrupt"


def test_other_schema_version(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", builder())
    data = json.loads((tmp_path / "a" / MANIFEST).read_text())
    (tmp_path / "a" / MANIFEST).write_text(json.dumps({**data, "schema_version": 2, "news": 1}))
    assert code_of(lambda: read_artifact(tmp_path / "a")) == "artifact-version"


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/passwd",
        "a/../../outside",
        "a\\..\\outside",
        "C:/x",
        "",
        ".",
        "a//b",
        "./x",
        "x\0y",
        MANIFEST,
        "manifest.json/../x",
    ],
)
def test_paths_stay_inside(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").write_bytes(b"")
    write_artifact(tmp_path / "a", builder({}))
    entry = {"sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "bytes": 0}
    write_manifest(tmp_path / "a", manifest(files={name: entry}))
    assert code_of(lambda: read_artifact(tmp_path / "a")) == "artifact-path"


def test_links_stay_inside(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", builder())
    data = tmp_path / "a" / "weights" / "main.data"
    data.rename(tmp_path / "a" / "weights" / "other")
    data.symlink_to("other")
    read_artifact(tmp_path / "a")  # a link inside is harmless
    data.unlink()
    (tmp_path / "main.data").write_bytes(FILES["weights/main.data"])
    data.symlink_to(tmp_path / "main.data")
    assert code_of(lambda: read_artifact(tmp_path / "a")) == "artifact-path"
    data.unlink()
    data.symlink_to("main.data")  # a loop
    assert code_of(lambda: read_artifact(tmp_path / "a")) in ("artifact-path", "artifact-corrupt")
