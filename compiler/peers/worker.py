"""One system to be measured, in a process of its own: JSON lines in, JSON lines out.

    PYTHON worker.py SYSTEM.py '{"threads": 2, ...}'

SYSTEM.py defines `class System` (see `transformers.py` for the shortest). Neither file imports planc, so any interpreter can run them.
Requests: `load`, `generate` {ids, max_new_tokens, eos}, `nll` {ids}, `close`, and whatever else the system's `commands` offers. Every answer is
one line; a failure is {"error": text, "missing": module or null} and leaves the process ready for the next request.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import traceback
from typing import Any


def peak_rss_mb() -> float:
    """Highest resident memory of this process so far, in MiB (VmHWM; it includes resident pages of mapped files)."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmHWM"):
                return round(int(line.split()[1]) / 1024, 1)
    return 0.0


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
            return {"load_s": round(time.perf_counter() - start, 3), "version": self.system.version, "peak_rss_mb": peak_rss_mb()}
        if op == "generate":
            start = time.perf_counter()
            result = self.system.generate(**request)
            seconds = time.perf_counter() - start
            first = result.pop("first", None)  # perf_counter at the first token, None when the system cannot tell
            ttft = None if first is None else round(1000 * (first - start), 2)
            return {**result, "seconds": seconds, "ttft_ms": ttft, "peak_rss_mb": peak_rss_mb()}
        if op == "nll":
            value = self.system.nll(request["ids"])
            return {"nll": None if value is None else float(value), "tokens": len(request["ids"]) - 1}
        command = getattr(self.system, "commands", {})[op]
        return dict(command(**request))


def main() -> int:
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
