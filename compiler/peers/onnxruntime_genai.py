"""onnxruntime-genai with the int4 model that its own builder makes from the Hugging Face directory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from typing import Any


class System:
    """`config`: `hf` directory, `cache` directory for the built model, `threads`."""

    def __init__(self, config: dict[str, Any]) -> None:
        import onnxruntime_genai as og

        self.og = og
        self.version = og.__version__
        built = self._build(config)
        self.model, self.files = og.Model(built), [built]

    def _build(self, config: dict[str, Any]) -> str:
        """The built model's directory; built once, complete or absent."""
        target = os.path.join(config["cache"], f"onnxruntime-genai-{self.version}-int4")
        if not os.path.exists(target):
            partial = f"{target}.{os.getpid()}.partial"
            command = [
                sys.executable,
                "-m",
                "onnxruntime_genai.models.builder",
                "-i",
                config["hf"],
                "-o",
                partial,
                "-p",
                "int4",
                "-e",
                "cpu",
            ]
            try:
                subprocess.run([*command, "-c", os.path.join(partial, "hf-cache")], check=True, stdout=sys.stderr)
                shutil.rmtree(os.path.join(partial, "hf-cache"), ignore_errors=True)
                os.replace(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        path = os.path.join(target, "genai_config.json")
        with open(path, encoding="utf-8") as file:
            settings = json.load(file)
        options = settings["model"]["decoder"]["session_options"]
        if options.get("intra_op_num_threads") != config["threads"]:
            options["intra_op_num_threads"] = config["threads"]
            with open(path, "w", encoding="utf-8") as file:
                json.dump(settings, file, indent=4)
        return target

    def _generator(self, length: int) -> Any:
        params = self.og.GeneratorParams(self.model)
        params.set_search_options(max_length=length, do_sample=False, batch_size=1)
        return self.og.Generator(self.model, params)

    def generate(self, ids: list[int], max_new_tokens: int, eos: list[int]) -> dict[str, Any]:
        generator = self._generator(len(ids) + max_new_tokens)
        generator.append_tokens(ids)
        made: list[int] = []
        first = 0.0
        while len(made) < max_new_tokens and not generator.is_done():
            generator.generate_next_token()
            made.append(int(generator.get_next_tokens()[0]))
            first = first or time.perf_counter()
            if made[-1] in eos:
                break
        return {"ids": made, "first": first}

    def logits(self, ids: list[int]) -> list[Any] | None:
        generator = self._generator(len(ids) + 1)
        generator.append_tokens(ids)
        rows = generator.get_output("logits")[0]  # [rows, V]
        return [rows[:-1]] if len(rows) == len(ids) else None  # the builder may have cut the head down to the last row
