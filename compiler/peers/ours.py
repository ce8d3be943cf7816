"""An artifact of planc as a system to measure: the plan, and its plain forms on the same engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any


class System:
    """`config`: `artifact` directory, `threads` or null for the plan's own number.

    Forms: `plan`; `plain` (no speculation, the same minimum of rows: the reference for equal tokens); `plain_one_row` (no speculation, no minimum).
    """

    def __init__(self, config: dict[str, Any]) -> None:
        import planc
        from planc._load import load_text
        from planc.runtime.executable import Executable

        self.version = planc.__version__
        exe = load_text(config["artifact"], threads=config.get("threads"))
        plain = exe.plain()
        one_row = plain.decode.model_copy(update={"min_rows": 1})
        self.forms = {
            "plan": exe,
            "plain": plain,
            "plain_one_row": Executable(exe.engine, exe.text, one_row, exe.contract, exe.manifest, exe.directory),
        }
        self.files = [config["artifact"]]
        self.commands = {"about": self.about, "encode": self.encode, "write_logits": self.write_logits}

    def about(self) -> dict[str, Any]:
        exe = self.forms["plan"]
        report = exe.report(temperature=0.0)  # how `generate` below decodes
        return {
            "eos": list(exe.eos_ids),
            "exactness": report["exactness"],
            "exactness_line": report["exactness_line"],
            "min_rows": exe.min_rows,
            "speculative": exe.decode.speculative is not None,
            "torch": "torch" in sys.modules,
            "bytes": report.get("bytes"),
        }

    def encode(self, text: str, chat: bool | None) -> dict[str, Any]:
        from planc.runtime.prompts import read_prompts

        return {"ids": read_prompts(self.forms["plan"].text, text, chat)[0][0]}

    def generate(self, ids: list[int], max_new_tokens: int, eos: list[int], form: str = "plan") -> dict[str, Any]:
        import time

        start = time.perf_counter()
        answer = self.forms[form].generate(ids, max_new_tokens=max_new_tokens, temperature=0.0, stop=())
        assert not isinstance(answer, list)
        stats = answer.stats
        return {
            "ids": answer.ids,
            "first": start + stats.ttft_ms / 1000,
            "passes": stats.passes,
            "tokens_per_pass": stats.tokens_per_pass,
            "host_ms_per_step": stats.host_ms_per_pass,
            "purposes": stats.purposes,
            "widths": stats.widths,
            "accepted": stats.accepted,
            "drafted_by": stats.drafted_by,
            "accepted_by": stats.accepted_by,
        }

    def logits(self, ids: list[int]) -> Iterator[Any]:
        from planc.compiler.quality import window_logits

        return window_logits(self.forms["plan"].engine, ids, self.forms["plan"].min_rows)

    def write_logits(self, ids: list[int], path: str) -> dict[str, Any]:
        """Write the logits [len(ids) - 1, V] float32 as an .npy file for others to be compared with."""
        import numpy as np

        shape = (len(ids) - 1, self.forms["plan"].engine.spec.vocab_size)
        file, start = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape), 0
        for rows in self.logits(ids):
            file[start : start + len(rows)] = rows
            start += len(rows)
        file.flush()
        return {}
