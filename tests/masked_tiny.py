"""Tiny random models that fill masked slots, as checkpoints in the layouts of LLaDA and Dream, and BERT."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
import transformers
from models_tiny import make
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from planc.compiler.masked_models import bidirectional, to_llada

VOCAB, MASK, END = 97, 90, 2
WORDS = {"[MASK]": MASK, "[END]": END, **{f"w{i}": i for i in range(VOCAB) if i not in (MASK, END)}}


def llada(folder: Path, *, seed: int = 0, **changes: object) -> nn.Module:
    """Write a checkpoint; the module that it should become."""
    module = make("llama", seed=seed, num_key_value_heads=2)
    c = module.config
    config = {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": c.hidden_size,
        "n_layers": c.num_hidden_layers,
        "n_heads": c.num_attention_heads,
        "n_kv_heads": c.num_key_value_heads,
        "mlp_hidden_size": c.intermediate_size,
        "vocab_size": VOCAB,
        "max_sequence_length": 128,
        "rms_norm_eps": c.rms_norm_eps,
        "weight_tying": False,
        "mask_token_id": MASK,
        "eos_token_id": END,
    }
    write(folder, {**config, **changes}, to_llada(module))
    return bidirectional(module)


def dream(folder: Path) -> nn.Module:
    """The same in Dream's layout."""
    module = make("qwen2")
    config = {**module.config.to_dict(), "model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": MASK}
    write(folder, config, dict(module.state_dict()))
    return bidirectional(module)


def write(folder: Path, config: dict[str, object], weights: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"mask_token": "[MASK]", "eos_token": "[END]"}))


@cache
def home(kind: str) -> Path:
    """The directory of a checkpoint, made once a session."""
    folder = Path(mkdtemp(prefix=f"planc-{kind}-"))
    {"llada": llada, "dream": dream}[kind](folder)
    return folder


def bert() -> nn.Module:
    """A BERT whose configuration names the mask token."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        mask_token_id=MASK,
        eos_token_id=END,
        initializer_range=0.4,
    )
    return transformers.BertForMaskedLM(config).eval()
