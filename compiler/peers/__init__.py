"""Systems to compare with, each in a process of its own. `Worker` is this side of the protocol that `worker.py` speaks on the other side.

A peer is one file here, run by an interpreter that has the library; planc itself needs none of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planc.runtime.errors import PlancError

HERE = Path(__file__).resolve().parent

#: Wall seconds that a request may take before the system counts as hung; the first load may build a model.
LOAD_SECONDS, REQUEST_SECONDS = 1800.0, 600.0


class PeerError(PlancError):
    """A system to compare with could not be run."""


@dataclass(frozen=True)
class Peer:
    """A system that `bench --peer` knows."""

    name: str
    file: str  # in this directory
    install: str  # what to give pip
    gguf: bool = False  # it reads GGUF files only


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("transformers", "transformers.py", "transformers torch"),
        Peer("onnxruntime-genai", "onnxruntime_genai.py", "onnxruntime-genai onnx onnx-ir transformers torch"),
        # the default build of llama.cpp crashes on CPUs with AMX in batches of more than one token
        Peer(
            "llama.cpp",
            "llama_cpp.py",
            'llama-cpp-python (with AMX: CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON")',
            gguf=True,
        ),
        Peer("openvino-genai", "openvino_genai.py", "openvino-genai", gguf=True),
    )
}

#: The worker file of our own plans.
OURS = "ours.py"


class PeerMissing(PeerError):
    """The library of a peer is not installed for the interpreter that was to run it."""


def peer_python(given: Path | None = None) -> str:
    """The interpreter that runs peers: `given`, else PLANC_PEERS_PYTHON, else ~/.cache/planc-peers/bin/python when present, else this one."""
    named = given or (Path(os.environ["PLANC_PEERS_PYTHON"]) if os.environ.get("PLANC_PEERS_PYTHON") else None)
    if named is not None:
        if not named.exists():
            raise PeerError(
                "peer-failed", f"the interpreter for peers, {named}, does not exist", fix="give --peer-python a Python executable"
            )
        return str(named)
    usual = Path.home() / ".cache/planc-peers/bin/python"
    return str(usual) if usual.exists() else sys.executable


def unknown_peer(name: str) -> PeerError:
    """The error for a name that no peer has."""
    return PeerError("input-invalid", f"no peer is named {name!r}", where="--peer", fix=f"use one of {', '.join(PEERS)}")


class Worker:
    """One system in its own process. Use as a context manager: leaving it ends the process whatever happened."""

    def __init__(self, name: str, file: str, config: dict[str, Any], *, python: str = sys.executable, install: str = "") -> None:
        self.name, self.install, self.python = name, install, python
        self._log = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed by `close`)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        if python == sys.executable:  # our own worker imports planc from where this process has it
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [_import_root(), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [python, str(HERE / "worker.py"), str(HERE / file), json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process only; it ends the workers itself
        )
        assert self._process.stdout is not None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        self._buffer = b""

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, op: str, *, seconds: float = REQUEST_SECONDS, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its answer. Raises `PeerMissing` when a library is absent, `PeerError` on any other failure."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **request}).encode() + b"\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._line(seconds))
        except (OSError, ValueError) as error:
            raise self._failure(f"{op}: {error}") from error
        if missing := answer.get("missing"):
            fix = f"{self.python} -m pip install {self.install}"
            raise PeerMissing("peer-failed", f"{self.name} is not installed (no module {missing!r})", where=self.python, fix=fix)
        if "error" in answer:
            raise self._failure(f"{op}: {answer['error']}")
        return answer

    def _line(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        until = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            if not self._selector.select(max(0.0, until - time.monotonic())):
                raise OSError(f"no answer within {seconds:.0f} s")
            piece = os.read(self._process.stdout.fileno(), 1 << 20)
            if not piece:
                raise OSError(f"the process ended with status {self._process.wait()}")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _failure(self, message: str) -> PeerError:
        self._log.seek(0)
        tail = "\n         ".join(self._log.read().strip().splitlines()[-6:])
        return PeerError("peer-failed", f"{self.name} failed: {message}", where=tail or None)

    def close(self) -> None:
        """End the process and whatever it started: by closing its input, then by an interrupt, on which it cleans up, then by force."""
        process = self._process
        for pipe in (process.stdin, process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:  # the process is gone already
                pass
        for patience, interruption in ((1, signal.SIGINT), (5, signal.SIGKILL), (None, None)):
            try:
                process.wait(timeout=patience)
                break
            except subprocess.TimeoutExpired:
                assert interruption is not None
                _signal_group(process.pid, interruption)
        self._selector.close()
        self._log.close()


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
        os.killpg(group, number)


def _import_root() -> str:
    """The directory that `import planc` was found in."""
    import planc

    return str(Path(next(iter(planc.__path__))).absolute().parent)
