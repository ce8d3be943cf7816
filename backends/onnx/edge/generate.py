"""Continues a text with the language model in this folder.

    python run.py "Why is the sky blue?"          as a chat where the model has a template, else (or with --raw) as it is
    python run.py --ids 504 6016 314 260          token ids in, token ids out

Needs onnxruntime and numpy. Text needs the package `tokenizers`, too; without it only ids can be given, and ids are printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

FOLDER = Path(__file__).resolve().parent
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def greedy(session: ort.InferenceSession, prompt: list[int], count: int, ends: list[int]) -> Iterator[int]:
    """The likeliest tokens behind `prompt`, one a pass, at most `count`; keys and values stay in buffers that the graph extends in place."""
    inputs = {value.name: value for value in session.get_inputs()}
    slots = len(prompt) + count + 1  # a pass of one row may use a spare slot behind its own
    binding = session.io_binding()
    binding.bind_output("argmax")
    for name, value in inputs.items():
        if name.startswith("past."):
            cache = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, value.shape[1], slots, value.shape[3]), TYPES[value.type]))
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(name.replace("past.", "present.", 1), cache)
    rows, done = prompt, 0
    for _ in range(count):
        positions = range(done, done + len(rows))
        feeds = {"input_ids": [rows], "position_ids": [positions], "lengths": [done], "logits_from": [len(rows) - 1]}
        arrays = {name: np.array(values, np.int64) for name, values in feeds.items() if name in inputs}  # alive until the pass is over
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        session.run_with_iobinding(binding)
        token = int(binding.get_outputs()[0].numpy()[0, -1])
        yield token
        if token in ends:
            return
        rows, done = [token], done + len(rows)


def tokenizer() -> Any:
    """The tokenizer, or None where the model or this Python has none."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    file = FOLDER / "tokenizer.json"
    return Tokenizer.from_file(str(file)) if file.is_file() else None


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", help="needs the package tokenizers")
    parser.add_argument("--ids", nargs="+", type=int, help="token ids in place of a text")
    parser.add_argument("--count", type=int, default=64, help="tokens to make at most")
    parser.add_argument("--raw", action="store_true", help="no chat template")
    parser.add_argument("--graph", default="model.onnx", help="model.onnx, or model.ort where it was exported")
    options = parser.parse_args()
    manifest = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
    words = tokenizer()
    if (options.text is None) == (options.ids is None):
        parser.error("give a text, or --ids")
    if options.text is not None and words is None:
        sys.exit("text needs tokenizer.json and the package `tokenizers` (pip install tokenizers); give the prompt as --ids")
    chat = None if options.raw else manifest["extra"]["edge"].get("chat")
    before, after = chat or ("", "")
    ids = options.ids or words.encode(before + options.text + after, add_special_tokens=chat is None).ids
    known, room = manifest["signature"]["vocab_size"], manifest["signature"]["capacity"]
    if not 0 < len(ids) <= room - options.count or not all(0 <= token < known for token in ids):
        sys.exit(f"ids must be 0 to {known - 1}, and prompt and answer together 1 to {room} tokens")
    session = ort.InferenceSession(str(FOLDER / options.graph), providers=["CPUExecutionProvider"])
    answer = list(greedy(session, ids, options.count, manifest["eos_ids"]))
    print(words.decode(answer) if options.text is not None else " ".join(map(str, answer)))


if __name__ == "__main__":
    main()
