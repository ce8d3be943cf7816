"""One system to be measured, in a process of its own: JSON lines in, JSON lines out.

    PYTHON worker.py SYSTEM.py '{"threads": 2, ...}'

SYSTEM.py defines `class System` (see `transformers.py` for the shortest). Neither file imports planc, so any interpreter can run them.
Requests: `load`, `generate` {ids, max_new_tokens, eos}, `score` {ids, reference}, `memory`, `close`, and whatever else the system's
`commands` offers. Every answer is one line; a failure is {"error": text, "missing": module or null} and leaves the process ready for the next
request. For `score` a system has `logits(ids)`: blocks [R, V] of the logits after each of `ids[:-1]`, or None where it hands out none.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from typing import Any

ROWS = 64  # rows whose distributions are compared at once


def resident_mb(field: str = "VmHWM") -> float:
    """Highest resident memory of this process so far, in MiB (it includes resident pages of mapped files); `VmRSS`: what is resident now."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith(field):
                return round(int(line.split()[1]) / 1024, 1)
    return 0.0


def bytes_of(paths: Iterable[str]) -> int:
    """Size of files, and of all files below directories."""
    files = [os.path.join(root, name) for path in paths for root, _, names in os.walk(path) for name in names]
    return sum(os.path.getsize(path) for path in [*(path for path in paths if os.path.isfile(path)), *files])


def score(blocks: Iterable[Any] | None, ids: list[int], reference: str | None) -> dict[str, Any]:
    """What the logits after each of `ids[:-1]` say about the text and about the reference, an .npy file of logits [len(ids) - 1, V].

    Sums over the rows: `nll`, the negative log-likelihood of the next id, `kl`, KL(reference || this) in nats, `same`, rows with equal argmax.
    A vocabulary that was padded is cut to the reference's. `nll` is null where there are no logits, `kl` and `same` without a reference.
    """
    found: dict[str, Any] = {"nll": None, "kl": None, "same": None, "tokens": len(ids) - 1}
    if blocks is None:
        return found
    import numpy as np

    wanted = None if reference is None else np.load(reference, mmap_mode="r")
    nll, kl, same, start = 0.0, 0.0, 0, 0
    for block in blocks:
        for first in range(0, len(block), ROWS):
            rows = np.asarray(block[first : first + ROWS])
            end = start + len(rows)
            log_p = log_softmax(rows if wanted is None else rows[:, : wanted.shape[1]])
            nll -= float(log_p[np.arange(end - start), ids[start + 1 : end + 1]].sum())
            if wanted is not None:
                log_q = log_softmax(wanted[start:end, : log_p.shape[1]])
                kl += float((np.exp(log_q) * (log_q - log_p)).sum())
                same += int((log_q.argmax(1) == log_p.argmax(1)).sum())
            start = end
    assert start == len(ids) - 1, f"logits of {start} rows for {len(ids)} ids"
    return {**found, "nll": nll} if wanted is None else {**found, "nll": nll, "kl": kl, "same": same}


def log_softmax(logits: Any) -> Any:
    """Of rows [R, V], in float64."""
    import numpy as np

    rows = np.asarray(logits, dtype=np.float64)
    rows = rows - rows.max(axis=1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def load_system(path: str) -> Any:
    """The module at `path`, under a name that cannot shadow the library it wraps."""
    spec = importlib.util.spec_from_file_location("_planc_system", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Server:
    """Answers requests with one loaded system."""

    def __init__(self, path: str, config: dict[str, Any]) -> None:
        self.path, self.config = path, config
        self.system: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        op = request.pop("op")
        if op == "load":
            start = time.perf_counter()
            self.system = load_system(self.path).System(self.config)
            answer = {"load_s": round(time.perf_counter() - start, 3), "version": self.system.version, "peak_rss_mb": resident_mb()}
            return {**answer, "file_bytes": bytes_of(getattr(self.system, "files", []))}
        if op == "generate":
            start = time.perf_counter()
            result = self.system.generate(**request)
            seconds = time.perf_counter() - start
            first = result.pop("first", None)  # perf_counter at the first token, None when the system cannot tell
            ttft = None if first is None else round(1000 * (first - start), 2)
            return {**result, "seconds": seconds, "ttft_ms": ttft, "peak_rss_mb": resident_mb()}
        if op == "score":
            return score(self.system.logits(request["ids"]), request["ids"], request.get("reference"))
        if op == "memory":
            return {"live_mb": resident_mb("VmRSS")}
        command = getattr(self.system, "commands", {})[op]
        return dict(command(**request))


def main() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # how the parent ends a busy worker; background jobs start with it ignored
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != here]  # transformers.py here must not hide the library
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints belongs to the log, not into the protocol
    server = Server(sys.argv[1], json.loads(sys.argv[2]))
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "close":
            break
        try:
            reply = server.answer(request)
        except ImportError as error:
            traceback.print_exc()
            reply = {"error": str(error), "missing": error.name or "unknown"}
        except Exception as error:  # the parent decides what a failure means; the log has the traceback
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}", "missing": None}
        out.write(json.dumps(reply) + "\n")
        out.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
