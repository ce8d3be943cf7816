"""OpenVINO GenAI's LLMPipeline, reading the GGUF itself."""

from __future__ import annotations

import importlib
import time
from typing import Any


class System:
    """`config`: `gguf` file, `threads`."""

    def __init__(self, config: dict[str, Any]) -> None:
        import numpy as np
        import openvino_genai

        self.files = [config["gguf"]]
        self.np, self.genai = np, openvino_genai
        self.ov = importlib.import_module("openvino")
        self.version = openvino_genai.__version__
        self.pipeline = openvino_genai.LLMPipeline(config["gguf"], "CPU", INFERENCE_NUM_THREADS=config["threads"])

    def generate(self, ids: list[int], max_new_tokens: int, eos: list[int]) -> dict[str, Any]:
        settings = self.genai.GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False)
        settings.stop_token_ids = set(eos)
        settings.eos_token_id = eos[0] if eos else -1
        settings.apply_chat_template = False
        tokens = self.np.asarray([ids], dtype=self.np.int64)
        inputs = self.genai.TokenizedInputs(self.ov.Tensor(tokens), self.ov.Tensor(self.np.ones_like(tokens)))
        start = time.perf_counter()
        result = self.pipeline.generate(inputs, settings)
        return {"ids": [int(token) for token in result.tokens[0]], "first": start + result.perf_metrics.get_ttft().mean / 1000}

    def logits(self, ids: list[int]) -> None:
        return None  # the pipeline hands out no logits
