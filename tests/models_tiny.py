"""Tiny seeded language models of ten families, their programs, and engines made from them. Everything traced is traced once per session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
import yaml
from torch import Tensor, nn

from planc.backends.onnx.artifact import policy_of, signature
from planc.backends.onnx.engine import OnnxEngine
from planc.backends.onnx.lanes import write_lanes
from planc.backends.onnx.lower import lower
from planc.compiler.passbase import Context, Pass
from planc.compiler.printer import show
from planc.compiler.program import ModelInfo, Program
from planc.compiler.raising import raise_program
from planc.compiler.trace import trace
from planc.compiler.verify import verify
from planc.passes.argmax import Argmax
from planc.passes.kv_cache import KvCache
from planc.passes.logits_rows import LogitsRows
from planc.passes.top_k import TopK
from planc.runtime.artifact import Manifest

VOCAB, MAX_LENGTH, WINDOW = 97, 256, 8
TOP_K = 4

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_COMMON = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": MAX_LENGTH}
_GROUPED = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2}

#: family -> configuration class and options; windows are shorter than what the tests run, so that they matter.
_CONFIGS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, _GROUPED),
    "mistral": (transformers.MistralConfig, {**_GROUPED, "sliding_window": WINDOW}),
    "qwen2": (transformers.Qwen2Config, _GROUPED),
    "qwen3": (transformers.Qwen3Config, {**_GROUPED, "head_dim": 16}),
    "gemma2": (transformers.Gemma2Config, {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW, "num_hidden_layers": 6},
    ),
    "phi3": (transformers.Phi3Config, {**_GROUPED, "sliding_window": WINDOW}),
    "gpt2": (transformers.GPT2Config, {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": MAX_LENGTH}),
    "opt": (transformers.OPTConfig, {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt_neox": (transformers.GPTNeoXConfig, {**_COMMON, "intermediate_size": 48, "rotary_pct": 0.5}),
}
FAMILIES = tuple(_CONFIGS)
WINDOWED = ("mistral", "gemma2", "gemma3", "phi3")

#: Llamas of other shapes than the families' for properties: layers, heads, key/value heads, widths and activations differ.
_VARIANTS: tuple[dict[str, Any], ...] = (
    {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 16, "intermediate_size": 64},
    {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 32, "hidden_act": "gelu"},
    {"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48, "hidden_act": "relu", "mlp_bias": True},
    {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 64, "attention_bias": True},
)


def make(family: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A model of the family with every parameter random: norms are not one and biases not zero, so that leaving one out shows."""
    config, options = _CONFIGS[family]
    module = transformers.AutoModelForCausalLM.from_config(config(**{**options, **_IDS, **changes})).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return module  # type: ignore[no-any-return]


@cache
def model(family: str) -> nn.Module:
    """The family's model; shared by the session, so treat it as read-only."""
    return make(family)


def info(family: str) -> ModelInfo:
    """What goes with the family's program."""
    return ModelInfo(family, VOCAB, MAX_LENGTH, (2,))


@cache
def traced(family: str) -> Program:
    """The family's program as traced."""
    return trace(model(family), info(family))


@cache
def raised(family: str) -> Program:
    """The family's program in the dialect: what passes see."""
    return raise_program(traced(family))


@cache
def variant(index: int) -> tuple[nn.Module, Program]:
    """One of the Llamas of unusual shape, with its program in the dialect."""
    module = make("llama", seed=index, **_VARIANTS[index])
    return module, raise_program(trace(module, info("llama")))


@cache
def one_layer() -> Program:
    """A Llama of one layer in the dialect, for golden files."""
    return raise_program(trace(make("llama", num_hidden_layers=1), info("llama")))


#: Names that `pooled` knows: what properties draw from.
POOL = ("llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "gemma2", *(f"variant {i}" for i in range(len(_VARIANTS))))


def pooled(name: str) -> tuple[nn.Module, Program]:
    """Model and program in the dialect of a name in POOL."""
    return variant(int(name.split()[1])) if name.startswith("variant") else (model(name), raised(name))


def apply(program: Program, *passes: Pass, context: Context | None = None) -> Program:
    """The program after the passes, in this order and unchecked."""
    for part in passes:
        program = part.apply(program, context or Context())
    return program


def applied(part: Pass, program: Program, context: Context | None = None) -> Program:
    """The program after one pass, with the promises of every pass checked.

    The result verifies, the input is untouched, the history is honest and a second run finds nothing to do.
    """
    context = context or Context()
    before, versions = show(program), {name: value._version for name, value in program.params.items()}
    new = part.apply(program, context)
    assert show(program) == before
    assert {name: value._version for name, value in program.params.items()} == versions, "a parameter was changed in place"
    verify(new, part.key, tuple(program.outputs))
    if new is program:
        return new
    assert new.history[:-1] == program.history
    assert new.history[-1].pass_name == part.key and 0 < new.history[-1].rewritten <= new.history[-1].matched
    assert show(new) != before or any(value is not program.params.get(name) for name, value in new.params.items())
    again = part.apply(new, context)
    assert again.history == new.history and show(again) == show(new)
    return new


def before_and_after(part: Pass, program: Program, context: Context | None = None) -> str:
    """Text of a golden file: the plan line, and the program before and after the pass."""
    line = yaml.safe_dump([part.item()], default_flow_style=None).strip()
    return f"plan\n  {line}\n\nbefore\n{show(program)}\nafter\n{show(applied(part, program, context))}"


def decoding(program: Program, trees: Literal["none", "fused", "split"] = "none") -> Program:
    """The program with cache and all outputs that loops read."""
    return apply(program, KvCache(trees=trees), LogitsRows(), Argmax(), TopK(k=TOP_K))


def token_ids(*shape: int, seed: int = 0) -> Tensor:
    """Random token ids without the special ones, int64."""
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def layers_of(module: nn.Module) -> nn.ModuleList:
    """The decoder layers, wherever the family keeps them."""
    return next(m for m in module.modules() if isinstance(m, nn.ModuleList))


def eager(module: nn.Module, ids: Tensor) -> Tensor:
    """Logits [B,R,V] of the model itself."""
    with torch.no_grad():
        return module(ids).logits  # type: ignore[no-any-return]


def close(have: Tensor | np.ndarray, want: Tensor | np.ndarray, tolerance: float = 3e-6) -> None:
    """Assert that the largest difference is within `tolerance` of the largest value (or of 1); the default is float32 rounding in a few layers."""
    have, want = np.asarray(have), np.asarray(want)
    assert have.shape == want.shape
    difference = float(np.abs(have.astype(np.float64) - want.astype(np.float64)).max())
    bound = tolerance * max(1.0, float(np.abs(want).max()))
    assert difference <= bound, f"differs by {difference:.3g}, allowed are {bound:.3g}"  # NaN fails, too


def onnx_engine(
    program: Program, directory: Path, ops: Literal["fast", "standard"] = "fast", threads: int | None = None, lanes: int = 0
) -> OnnxEngine:
    """The ONNX engine of a program with all decoding passes."""
    lower(program, directory, ops=ops, positions=MAX_LENGTH)
    batches = program.policy is None and (ops == "standard" or all(state.split for state in program.states))
    written = write_lanes(directory, lanes) if lanes else 0
    manifest = Manifest(
        planc="0", signature=signature(program, MAX_LENGTH), extra={"batches": batches, "lanes": written, **policy_of(program)}
    )
    return OnnxEngine(directory, manifest, threads)
