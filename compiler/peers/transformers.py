"""Hugging Face transformers, fp32, `generate` with its own cache."""

from __future__ import annotations

import time
from typing import Any


class System:
    """`config`: `hf` directory, `threads`."""

    def __init__(self, config: dict[str, Any]) -> None:
        import torch
        import transformers

        torch.set_num_threads(config["threads"])
        transformers.utils.logging.disable_progress_bar()
        self.files = [config["hf"]]
        self.torch, self.version = torch, transformers.__version__
        self.model = transformers.AutoModelForCausalLM.from_pretrained(config["hf"], dtype=torch.float32).eval()

    def generate(self, ids: list[int], max_new_tokens: int, eos: list[int]) -> dict[str, Any]:
        clock = _Clock()
        with self.torch.inference_mode():
            tokens = self.torch.tensor([ids])
            out = self.model.generate(
                tokens,
                attention_mask=self.torch.ones_like(tokens),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=eos or None,
                pad_token_id=eos[0] if eos else 0,
                streamer=clock,
            )
        return {"ids": out[0, len(ids) :].tolist(), "first": clock.first}

    def logits(self, ids: list[int]) -> list[Any]:
        with self.torch.inference_mode():
            return [self.model(self.torch.tensor([ids[:-1]])).logits[0].float().numpy()]


class _Clock:
    """A streamer that only notes when the first generated token came; the first call hands over the prompt."""

    def __init__(self) -> None:
        self.calls, self.first = 0, 0.0

    def put(self, value: Any) -> None:
        self.calls += 1
        if self.calls == 2:
            self.first = time.perf_counter()

    def end(self) -> None:
        return None
