"""llama.cpp through llama-cpp-python, on the GGUF itself."""

from __future__ import annotations

import time
from typing import Any


class System:
    """`config`: `gguf` file, `context` tokens, `threads`."""

    def __init__(self, config: dict[str, Any]) -> None:
        import llama_cpp

        self.llama_cpp, self.config = llama_cpp, config
        self.version, self.files = llama_cpp.__version__, [config["gguf"]]
        self.model = self._open(config["context"])

    def _open(self, context: int, **options: Any) -> Any:
        threads = self.config["threads"]
        return self.llama_cpp.Llama(
            self.config["gguf"], n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False, **options
        )

    def generate(self, ids: list[int], max_new_tokens: int, eos: list[int]) -> dict[str, Any]:
        self.model.reset()  # no prefix of an earlier prompt is reused: no other system does that here
        made: list[int] = []
        first = 0.0
        for token in self.model.generate(ids, temp=0.0, repeat_penalty=1.0):
            first = first or time.perf_counter()
            made.append(int(token))
            if len(made) == max_new_tokens or token in eos:
                break
        return {"ids": made, "first": first}

    def logits(self, ids: list[int]) -> list[Any]:
        scorer = self._open(len(ids), n_batch=len(ids), logits_all=True)
        scorer.eval(ids)
        rows = scorer.scores[: len(ids) - 1].copy()
        scorer.close()
        return [rows]
