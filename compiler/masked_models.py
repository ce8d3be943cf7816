"""Masked (diffusion) language models: what makes one, and checkpoints in the layouts of LLaDA and Dream, which transformers has no classes for.

Both are decoders whose attention sees all slots. They are loaded as the decoder of transformers that has the same arithmetic, with attention that
is not causal, so that everything behind the front door treats them as any other model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from planc.runtime.errors import ModelError


@dataclass(frozen=True)
class MaskSpec:
    """What the loop has to know of a masked model."""

    mask_id: int
    shift: bool = False  # the output of slot i - 1 predicts slot i (models that began as causal ones)


#: Names inside a layer of LLaDA and of Llama.
_LAYER = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
_OUTSIDE = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
_PREFIX = "model.transformer."
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def mask_spec(module: nn.Module, tokenizer_files: Mapping[str, Path]) -> MaskSpec | None:
    """The mask token that the configuration names, else the tokenizer's; None for a model without one."""
    config = getattr(module, "config", None)
    found = getattr(config, "mask_token_id", None)
    if found is None and "tokenizer.json" in tokenizer_files and "tokenizer_config.json" in tokenizer_files:
        from tokenizers import Tokenizer

        named = json.loads(tokenizer_files["tokenizer_config.json"].read_text(encoding="utf-8")).get("mask_token")
        named = named.get("content") if isinstance(named, dict) else named
        found = Tokenizer.from_file(str(tokenizer_files["tokenizer.json"])).token_to_id(named) if named else None
    return None if found is None else MaskSpec(int(found), bool(getattr(config, "shifted_logits", False)))


def bidirectional(module: nn.Module) -> nn.Module:
    """The module with every attention seeing all slots; changed in place."""
    for part in module.modules():
        if hasattr(part, "is_causal"):
            part.is_causal = False  # type: ignore[assignment]
    module.config.is_causal = False  # type: ignore[union-attr] # for the masks that transformers makes in eager mode
    return module


def is_masked_checkpoint(home: Path) -> bool:
    """Whether the directory holds a checkpoint in one of the layouts of this module."""
    return _model_type(home) in _LOADERS


def load_masked_checkpoint(home: Path, dtype: torch.dtype) -> nn.Module:
    """The module of a checkpoint, in eval mode. Raises ModelError[model-load] where its files do not fit its configuration."""
    data = json.loads((home / "config.json").read_text(encoding="utf-8"))
    try:
        module, weights = _LOADERS[_model_type(home)](data, _read(home))
        tied = bool(module.config.tie_word_embeddings)  # type: ignore[union-attr]
        missing, unexpected = module.load_state_dict(weights, strict=False)
        missing = [name for name in missing if not (tied and name == "lm_head.weight")]
        if missing or unexpected:
            raise KeyError(f"missing: {', '.join(missing[:3]) or 'none'}; unexpected: {', '.join(unexpected[:3]) or 'none'}")
    except Exception as error:  # a configuration may be wrong in as many ways as transformers has checks
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        message = f"the masked model in {home} cannot be loaded: {first}"
        raise ModelError("model-load", message, where=str(home), fix="the cause is chained below") from error
    return bidirectional(module).to(dtype).eval()


def _model_type(home: Path) -> str:
    try:
        return str(json.loads((home / "config.json").read_text(encoding="utf-8")).get("model_type", ""))
    except (OSError, ValueError):
        return ""


def _read(home: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    files = sorted(home.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError("no safetensors file")
    return {name: value for file in files for name, value in load_file(file).items()}


def _llada(data: dict[str, Any], weights: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    if data.get("block_type", "llama") != "llama" or not data.get("rope", True) or data.get("attention_layer_norm"):
        raise ValueError("only blocks of type llama with rotary positions and without norms of queries are known")
    config = LlamaConfig(
        vocab_size=data.get("embedding_size") or data["vocab_size"],
        hidden_size=data["d_model"],
        intermediate_size=data["mlp_hidden_size"],
        num_hidden_layers=data["n_layers"],
        num_attention_heads=data["n_heads"],
        num_key_value_heads=data.get("n_kv_heads") or data["n_heads"],
        max_position_embeddings=data["max_sequence_length"],
        rms_norm_eps=data.get("rms_norm_eps", 1e-5),
        rope_parameters={"rope_type": "default", "rope_theta": data.get("rope_theta", 10000.0)},
        tie_word_embeddings=data.get("weight_tying", False),
        attention_bias=data.get("include_qkv_bias", False),
        pad_token_id=data.get("pad_token_id"),
        bos_token_id=None,
        eos_token_id=data.get("eos_token_id"),
    )
    config.mask_token_id = data["mask_token_id"]
    return LlamaForCausalLM(config), {_from_llada(name): value for name, value in weights.items()}


def _from_llada(name: str) -> str:
    rest = name.removeprefix(_PREFIX)
    if rest.startswith("blocks."):
        _, number, part, kind = rest.split(".")
        return f"model.layers.{number}.{_LAYER[part]}.{kind}"
    part, kind = rest.split(".")
    return f"{_OUTSIDE[part]}.{kind}"


def to_llada(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a decoder of the Llama family under LLaDA's names; a tied head is left out."""
    inner, outer = {v: k for k, v in _LAYER.items()}, {v: k for k, v in _OUTSIDE.items()}
    named = {}
    for name, value in module.state_dict().items():
        if name == "lm_head.weight" and module.config.tie_word_embeddings:  # type: ignore[union-attr]
            continue
        if found := _LAYER_NAME.fullmatch(name):
            named[f"{_PREFIX}blocks.{found[1]}.{inner[found[2]]}.{found[3]}"] = value
        else:
            part, _, kind = name.rpartition(".")
            named[f"{_PREFIX}{outer[part]}.{kind}"] = value
    return named


def _dream(data: dict[str, Any], weights: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    ours = {"model_type", "architectures", "auto_map", "mask_token_id", "transformers_version"}
    config = Qwen2Config(**{name: value for name, value in data.items() if name not in ours})
    config.mask_token_id, config.shifted_logits = data["mask_token_id"], True
    return Qwen2ForCausalLM(config), weights


_LOADERS = {"llada": _llada, "Dream": _dream}
