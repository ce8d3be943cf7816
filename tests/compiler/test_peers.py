"""The worker protocol, with systems written here: no library, no model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from planc.compiler import peers
from planc.compiler.peers import PEERS, PeerError, PeerMissing, Worker, peer_python

ECHO = """
import time
class System:
    version = "7"
    def __init__(self, config):
        print("noise that a library prints")
        self.config = config
        self.commands = {"sleep": lambda duration: time.sleep(duration) or {}, "settings": lambda: self.config}
    def generate(self, ids, max_new_tokens, eos):
        return {"ids": (ids * max_new_tokens)[:max_new_tokens], "first": time.perf_counter()}
    def logits(self, ids):
        import numpy as np
        table = np.random.default_rng(0).normal(size=(9, 12))  # three ids of padding, the likeliest of all
        table[:, 9:] += 50.0
        return None if len(ids) > 8 else [table[ids[:3]], table[ids[3:-1]]]
"""


def worker(tmp_path: Path, source: str, **config: object) -> Worker:
    file = tmp_path / "system.py"
    file.write_text(source)
    return Worker("echo", str(file), dict(config), install="echo-library")  # an absolute path replaces the directory of peers


def test_protocol(tmp_path: Path) -> None:
    with worker(tmp_path, ECHO, threads=2) as system:
        loaded = system.ask("load")
        assert loaded["version"] == "7"
        assert loaded["peak_rss_mb"] > 1
        answer = system.ask("generate", ids=[4, 5], max_new_tokens=3, eos=[2])
        assert answer["ids"] == [4, 5, 4]
        assert 0 <= answer["ttft_ms"] <= 1000 * answer["seconds"] + 0.01
        assert system.ask("memory")["live_mb"] > 1
        assert system.ask("settings") == {"threads": 2}


def test_scores(tmp_path: Path) -> None:
    ids = [1, 2, 3, 4, 0, 8]
    table = np.random.default_rng(0).normal(size=(9, 12))
    q = np.random.default_rng(1).normal(size=(5, 9))
    q[2] = table[3, :9] - 7.0  # a row in which the two agree; logits are known up to a constant
    np.save(tmp_path / "reference.npy", q.astype(np.float32))

    def probabilities(logits: NDArray[np.floating]) -> NDArray[np.floating]:
        return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

    p, wanted = probabilities(table[ids[:-1], :9]), probabilities(np.float32(q).astype(float))
    with worker(tmp_path, ECHO) as system:
        system.ask("load")
        found = system.ask("score", ids=ids, reference=str(tmp_path / "reference.npy"))
        assert found["nll"] == pytest.approx(-np.log(p[range(5), ids[1:]]).sum())
        assert found["kl"] == pytest.approx((wanted * np.log(wanted / p)).sum())
        assert found["same"] == (wanted.argmax(1) == p.argmax(1)).sum() >= 1
        alone = system.ask("score", ids=ids)
        assert (alone["kl"], alone["same"], alone["tokens"]) == (None, None, 5)
        assert alone["nll"] > found["nll"], "nothing says that the last three ids are padding"
        assert system.ask("score", ids=[1] * 9)["nll"] is None


def test_files_are_counted_once(tmp_path: Path) -> None:
    (tmp_path / "model/below").mkdir(parents=True)
    for name, size in (("model/a", 5), ("model/below/b", 7), ("other", 11)):
        (tmp_path / name).write_bytes(b"x" * size)
    source = ECHO.replace("self.config = config", 'self.files = config["files"]')
    with worker(tmp_path, source, files=[str(tmp_path / "model"), str(tmp_path / "other")]) as system:
        assert system.ask("load")["file_bytes"] == 23


def test_missing_library(tmp_path: Path) -> None:
    source = "class System:\n    def __init__(self, config):\n        import no_such_library_here\n"
    with worker(tmp_path, source) as system, pytest.raises(PeerMissing) as caught:
        system.ask("load")
    assert "no_such_library_here" in caught.value.message
    assert caught.value.fix is not None
    assert caught.value.fix.endswith("-m pip install echo-library")


def test_failure_shows_the_log(tmp_path: Path) -> None:
    with worker(tmp_path, "class System:\n    def __init__(self, config):\n        raise ValueError('bad weights')\n") as system:
        with pytest.raises(PeerError, match="ValueError: bad weights") as caught:
            system.ask("load")
        assert caught.value.where is not None
        assert "Traceback" in caught.value.where or "bad weights" in caught.value.where
        with pytest.raises(PeerError, match="generate"):  # the process is still there
            system.ask("generate", ids=[1], max_new_tokens=1, eos=[])


def test_process_that_dies(tmp_path: Path) -> None:
    source = "import os\nclass System:\n    def __init__(self, config):\n        os._exit(3)\n"
    with worker(tmp_path, source) as system, pytest.raises(PeerError, match="ended with status 3"):
        system.ask("load")


def test_process_that_hangs_is_ended(tmp_path: Path) -> None:
    with worker(tmp_path, ECHO) as system:
        system.ask("load")
        with pytest.raises(PeerError, match="no answer within"):
            system.ask("sleep", seconds=0.2, duration=30)
        pid = system._process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def test_closing_lets_a_busy_process_clean_up(tmp_path: Path) -> None:
    """A peer that builds its model in a child process when Ctrl-C comes: the child ends and the half-built model goes."""
    source = f"""
import pathlib, subprocess, sys
class System:
    def __init__(self, config):
        half = pathlib.Path({str(tmp_path)!r}, "half-built")
        half.mkdir()
        try:
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            (half / "pid").write_text(str(child.pid))
            child.wait()
        finally:
            (half / "pid").rename(half.with_name("child"))
            half.rmdir()
"""
    with worker(tmp_path, source) as system:
        assert system._process.stdin is not None
        system._process.stdin.write(b'{"op": "load"}\n')
        system._process.stdin.flush()
        until = time.monotonic() + 30
        while not (tmp_path / "half-built/pid").exists() and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.2)  # the pid is written before the process waits for its child
    assert not (tmp_path / "half-built").exists()
    child = int((tmp_path / "child").read_text())
    status = Path(f"/proc/{child}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_worker_ends_when_the_parent_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "system.py"
    file.write_text(ECHO)
    script = f"""
import os
from planc.compiler.peers import Worker
worker = Worker("echo", {str(file)!r}, {{}})
worker.ask("load")
print(worker._process.pid, flush=True)
os._exit(0)
"""
    root = str(Path(peers.__file__).absolute().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    pid = int(out.stdout)
    until = time.monotonic() + 10
    while time.monotonic() < until and Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


def test_peer_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PLANC_PEERS_PYTHON", raising=False)
    assert peer_python() == sys.executable
    usual = tmp_path / ".cache/planc-peers/bin/python"
    usual.parent.mkdir(parents=True)
    usual.touch()
    assert peer_python() == str(usual)
    other = tmp_path / "python"
    other.touch()
    monkeypatch.setenv("PLANC_PEERS_PYTHON", str(other))
    assert peer_python() == str(other)
    assert peer_python(usual) == str(usual)
    with pytest.raises(PeerError, match="does not exist"):
        peer_python(tmp_path / "absent")


@pytest.mark.parametrize("name", PEERS)
def test_peer_files_stand_alone(name: str) -> None:
    source = (peers.HERE / PEERS[name].file).read_text()
    assert "planc" not in source.replace("planc's", "")
    assert "class System" in source


def test_a_peer_file_does_not_hide_its_library() -> None:
    """`transformers.py` lies beside worker.py; the worker must import the library of that name, or say that it is absent."""
    with Worker("transformers", "transformers.py", {"hf": "/nowhere", "threads": 1}) as system, pytest.raises(PeerError) as caught:
        system.ask("load")
    assert "partially initialized" not in str(caught.value)
    assert "System" not in caught.value.message
