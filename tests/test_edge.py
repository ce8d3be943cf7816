"""An artifact runs where torch, transformers and onnx cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from models_tiny import model

import planc

PLAN = {
    "passes": [{"quantize_weights": {"format": "int8"}}],
    "decode": {"speculative": {"drafter": ["prompt_lookup", "token_recycling"]}},
}
PROMPT = [5, 9, 5, 9, 5, 9, 7]

RUNNER = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "onnx", "onnxscript", "networkx", "gguf", "safetensors"}:
            raise ImportError(f"{name} is not available here")

sys.meta_path.insert(0, Refuse())
import planc
exe = planc.load(sys.argv[1])
answer = exe.generate(json.loads(sys.argv[2]), max_new_tokens=24)
print(json.dumps({"ids": answer.ids, "plain": exe.plain().generate(json.loads(sys.argv[2]), max_new_tokens=24).ids}))
"""


def test_artifact_without_torch(tmp_path: Path) -> None:
    exe = planc.compile(model("llama"), PLAN, out=tmp_path / "artifact", measure=False)
    expected = exe.generate(PROMPT, max_new_tokens=24).ids
    command = [sys.executable, "-c", RUNNER, str(tmp_path / "artifact"), json.dumps(PROMPT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ids"] == expected == found["plain"]
