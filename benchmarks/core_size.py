"""How many bytes an artifact and all that runs it take beside ONNX Runtime, measured in fresh environments.

    python benchmarks/core_size.py ARTIFACT [--write benchmarks/results/core-size.json]

Two environments begin with onnxruntime and what that needs itself. One gets the wheel of this tree as pip installs it; the other, with --no-deps, the
wheel and what it runs on, without the client of the Hugging Face hub, which tokenizers asks for to download tokenizers by name and planc never
does. In both the artifact runs (two prompts, or one image of noise), and the bytes of what was added are counted. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT_MB = 80
ABSENT = ("torch", "transformers", "onnx", "onnxscript", "safetensors")

UNUSED = ("tokenizers", "huggingface-hub")  # asks for, without need at run time

#: name -> version, bytes of what pip recorded (compiled files included), and the names that it asks for
COUNT = """
import json, re
from importlib.metadata import distributions
try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
name = lambda text: re.sub("[-_.]+", "-", text).lower()
found = {}
for one in distributions():
    paths = {one.locate_file(file).resolve() for file in one.files or ()}
    asked = [Requirement(line) for line in one.requires or ()]
    needs = [name(r.name) for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]
    found[name(one.name)] = {"version": one.version, "bytes": sum(p.stat().st_size for p in paths if p.is_file()), "needs": needs}
print(json.dumps(found))
"""

RUN = """
import importlib.util, json, sys
import numpy as np
import planc
exe = planc.load(sys.argv[1])
if hasattr(exe, "classify"):
    pixels = np.random.default_rng(0).standard_normal((1, *exe.image.shape), np.float32)
    said = int(exe.engine.forward(pixels).argmax())
else:
    said = [exe.generate(prompt, max_new_tokens=16).ids for prompt in ([1, 2, 3], [4, 5])]
there = [name for name in sys.argv[2:] if importlib.util.find_spec(name) is not None]
print(json.dumps({"said": said, "there": there}))
"""


def call(*command: str | Path) -> str:
    """Standard output of a command that has to succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout


def wheel(folder: Path) -> Path:
    """The wheel of this tree; built from a copy, so that nothing is left in the tree."""
    kept_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "tests", "benchmarks", "examples")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=kept_out)
    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, folder / "source")
    [made] = folder.glob("planc-*.whl")
    return made


class Environment:
    """A fresh virtual environment with onnxruntime; `before` and `after` are its distributions by name."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=True)
        self.python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        self.tools = set(self.distributions(()))
        self.install("onnxruntime")
        self.before = self.distributions(self.tools)

    def install(self, *what: str | Path) -> None:
        call(self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt", *what)

    def distributions(self, but: Iterable[str]) -> dict[str, Any]:
        found = json.loads(call(self.python, "-c", COUNT))
        return {name: found[name] for name in sorted(set(found) - set(but))}

    def measure(self, artifact: Path) -> dict[str, Any]:
        """What was added to onnxruntime, after a run of the artifact."""
        ran = json.loads(call(self.python, "-c", RUN, artifact, *ABSENT).splitlines()[-1])
        assert not ran["there"], f"{ran['there']} came with the core"
        added = self.distributions({*self.tools, *self.before})
        sizes = {name: {"version": entry["version"], "bytes": entry["bytes"]} for name, entry in added.items()}
        total = sum(entry["bytes"] for entry in sizes.values())
        return {"mb": round(total / 1e6, 1), "bytes": total, "ran": ran["said"], "distributions": sizes}


def needed(distributions: dict[str, Any], name: str = "planc") -> set[str]:
    """The distributions that one runs on: all it asks for, and those ask for, without `UNUSED`."""
    found, left = set[str](), [name]
    while left:
        one = left.pop()
        if one in distributions and one not in found:
            found.add(one)
            left += [other for other in distributions[one]["needs"] if (one, other) != UNUSED]
    return found


def main() -> None:
    """See the top of this file."""
    from planc.runtime.artifact import read_artifact
    from planc.runtime.contract import hardware

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--write", type=Path, help="also write the result here")
    options = parser.parse_args()
    manifest, artifact = read_artifact(options.artifact), options.artifact.resolve()
    size = sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
    with tempfile.TemporaryDirectory(prefix="planc-core-") as name:
        made = wheel(Path(name))
        full = Environment(Path(name) / "full")
        full.install(made)
        there = full.distributions(full.tools)
        lean = Environment(Path(name) / "lean")
        wanted = needed(there) - set(full.before) - {"planc"}
        lean.install("--no-deps", made, *(f"{one}=={there[one]['version']}" for one in sorted(wanted)))
        ways = {"needed": lean.measure(artifact), "pip": full.measure(artifact)}
    for way, found in ways.items():
        print(f"{way}:")
        for one, entry in sorted(found["distributions"].items(), key=lambda item: -item[1]["bytes"]):
            print(f"  {one:<24} {entry['version']:<14} {entry['bytes'] / 1e6:8.2f} MB")
        found["with_artifact_mb"] = round((found["bytes"] + size) / 1e6, 1)
        print(f"  {found['mb']} MB, with the artifact {found['with_artifact_mb']} MB")
    result = {
        "benchmark": "core-size",
        "command": f"python benchmarks/core_size.py ARTIFACT  # planc export of {manifest.model}",
        "model": manifest.model,
        "artifact_mb": round(size / 1e6, 1),
        "limit_mb": LIMIT_MB,
        "within": {way: found["with_artifact_mb"] < LIMIT_MB for way, found in ways.items()},
        **ways,
        "beside": {name: {"version": entry["version"], "bytes": entry["bytes"]} for name, entry in full.before.items()},
        "hardware": hardware(),
    }
    if options.write is not None:
        options.write.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
