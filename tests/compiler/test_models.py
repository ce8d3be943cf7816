"""Models: by name from a registry of our own, from GGUF files, directories and modules. Only the last test reaches the real registry."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, GgufConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from planc.compiler import models
from planc.compiler.downloads import KnownModel, Wheel, fetch, sha256_of
from planc.compiler.models import LoadedModel, load_model
from planc.runtime.errors import ModelError

VOCAB = 300
ENDS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A cache of the test's own, except where the real model is wanted."""
    path = tmp_path / "cache"
    if "smollm2" not in request.fixturenames:
        monkeypatch.setenv("PLANC_CACHE", str(path))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return path


def vocabulary() -> list[str]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*ENDS, *letters, "ĊĊ", *(f"<extra_{i}>" for i in range(VOCAB - len(ENDS) - len(letters) - 1))]


def tokenizer() -> Tokenizer:
    made = Tokenizer(BPE(vocab={token: i for i, token in enumerate(vocabulary())}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(ENDS))
    return made


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=77, eos_token_id=[5, 0], tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "tiny")
    tokenizer().save(str(tmp_path / "tiny" / "tokenizer.json"))
    (tmp_path / "tiny" / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<extra_7>"}}))
    return tmp_path / "tiny"


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """A Llama of two layers with float weights and the pre-tokenizer of SmolLM."""
    from gguf import GGUFWriter

    path = tmp_path / "tiny.gguf"
    out = GGUFWriter(str(path), "llama")
    out.add_name("Tiny")
    out.add_context_length(64)
    out.add_embedding_length(32)
    out.add_block_count(2)
    out.add_feed_forward_length(64)
    out.add_head_count(4)
    out.add_head_count_kv(2)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(VOCAB)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(vocabulary())
    out.add_token_types([3] * len(ENDS) + [1] * (VOCAB - len(ENDS)))
    out.add_token_merges(["Ċ Ċ"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    rng = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> None:
        out.add_tensor(name, rng.standard_normal(shape).astype(np.float32) * 0.1)

    tensor("token_embd.weight", VOCAB, 32)
    tensor("output_norm.weight", 32)
    for i in range(2):
        for name, shape in {
            "attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32),
            "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64),
        }.items():  # fmt: skip
            tensor(f"blk.{i}.{name}.weight", *shape)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# ---- directories and modules -------------------------------------------------------------------------------------------------------


def test_directory(directory: Path) -> None:
    loaded = load_model(directory)
    assert same_weights(loaded.module, llama())
    assert not loaded.module.training
    assert (loaded.vocab_size, loaded.max_length, loaded.gguf) == (VOCAB, 77, None)
    # the configuration's two, the tokenizer's own, and the chat formats' that the vocabulary holds
    assert loaded.eos_ids == (5, 0, vocabulary().index("<extra_7>"), 2)
    assert loaded.tokenizer_files["tokenizer.json"] == directory / "tokenizer.json"
    assert "chat_template.jinja" not in loaded.tokenizer_files


def test_dtype(directory: Path) -> None:
    assert load_model(str(directory), dtype=torch.bfloat16).module.dtype is torch.bfloat16


def test_module_is_taken_as_it_is(directory: Path) -> None:
    module = llama().to(torch.bfloat16)
    loaded = load_model(module, tokenizer=directory)
    assert loaded.module is module
    assert (module.dtype, loaded.name, loaded.eos_ids[:2]) == (torch.bfloat16, "LlamaForCausalLM", (5, 0))
    assert loaded.tokenizer_files["tokenizer.json"] == directory / "tokenizer.json"
    plain = load_model(torch.nn.Linear(2, 3))
    assert (plain.vocab_size, plain.max_length, plain.eos_ids, plain.tokenizer_files, plain.config) == (0, models.UNLIMITED, (), {}, None)


def test_tokenizer_object_is_stored_once_by_content(directory: Path, cache: Path) -> None:
    given = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), eos_token="<extra_9>")
    for _ in range(2):
        loaded = load_model(llama(), tokenizer=given)
        assert loaded.tokenizer_files["tokenizer.json"].is_relative_to(cache)
        assert vocabulary().index("<extra_9>") in loaded.eos_ids
    assert len(list((cache / "tokenizers").iterdir())) == 1
    assert load_model(llama(), tokenizer=directory / "tokenizer.json").tokenizer_files == {"tokenizer.json": directory / "tokenizer.json"}


def test_other_architectures_load_as_what_their_configuration_names(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=40, num_labels=3)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    assert isinstance(load_model(tmp_path / "bert").module, BertForSequenceClassification)


# ---- GGUF --------------------------------------------------------------------------------------------------------------------------


def test_gguf_is_converted_once_and_equals_what_transformers_reads(gguf_file: Path, cache: Path) -> None:
    left = cache / "converted" / f"{models._converted_dir(sha256_of(gguf_file)).name}.part-killed"
    left.mkdir(parents=True)
    loaded = load_model(gguf_file)
    expected = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    assert same_weights(loaded.module, expected)
    assert (loaded.gguf, loaded.vocab_size, loaded.max_length, loaded.eos_ids) == (gguf_file, VOCAB, 64, (2, 0))
    [home] = [path for path in (cache / "converted").iterdir() if path.is_dir()]  # and what a killed process left is gone
    before = (home / "model.safetensors").stat().st_mtime_ns
    assert same_weights(load_model(str(gguf_file)).module, expected)
    assert (home / "model.safetensors").stat().st_mtime_ns == before


def test_gguf_tokenizer_splits_digits_as_the_file_says(gguf_file: Path) -> None:
    made = Tokenizer.from_file(str(load_model(gguf_file).tokenizer_files["tokenizer.json"]))
    assert made.encode("a\n\n1").tokens == ["a", "ĊĊ", "1"]
    assert made.encode("<|im_start|>12<|im_end|>").tokens == ["<|im_start|>", "1", "2", "<|im_end|>"]


def test_gguf_that_is_none_or_cut_short(tmp_path: Path, gguf_file: Path, cache: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        load_model(tmp_path / "text.gguf")
    (tmp_path / "cut.gguf").write_bytes(gguf_file.read_bytes()[:5000])
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path / "cut.gguf")
    assert caught.value.code == "model-load"
    assert not [path for path in (cache / "converted").iterdir() if path.is_dir()]


# ---- names -------------------------------------------------------------------------------------------------------------------------


def test_unknown_names_get_a_suggestion_and_the_list(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_model("smollm2-135")
    assert caught.value.code == "model-not-found"
    assert caught.value.fix is not None
    assert caught.value.fix.startswith("did you mean smollm2-135m? known: smollm2-135m, gemma3-270m, ")
    for name in ("nobody/nothing", "./missing.gguf", "", "a b", str(tmp_path)):
        with pytest.raises(ModelError) as caught:
            load_model(name)
        assert caught.value.code == "model-not-found"
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        load_model("nobody/nothing")


def test_directory_with_broken_weights(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ModelError) as caught:
        load_model(directory)
    assert caught.value.code == "model-load"


# ---- downloads: pip itself, from a folder instead of the registry ------------------------------------------------------------------


def wheel(folder: Path, project: str, content: bytes) -> Wheel:
    """A wheel with the member `PROJECT/data.bin`, and its record."""
    path, package, info = folder / f"{project}-1.0-py3-none-any.whl", project, f"{project}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{package}/data.bin", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\nRequires-Dist: never-installed\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return Wheel(project, "1.0", sha256_of(path), path.stat().st_size, f"{package}/data.bin")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def known(*wheels: Wheel, content: bytes) -> KnownModel:
    return KnownModel("pieces", "whole.bin", hashlib.sha256(content).hexdigest(), wheels, "none", "a test")


def left_over(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models" / "pieces").iterdir() if not path.name.endswith(".lock"))


def test_fetch_joins_the_pieces_and_leaves_nothing_else(registry: Path, cache: Path) -> None:
    model = known(wheel(registry, "piece1", b"abc"), wheel(registry, "piece2", b"def"), content=b"abcdef")
    left = cache / "models" / "pieces" / "part-killed"
    left.mkdir(parents=True)
    assert fetch(model, cache).read_bytes() == b"abcdef"
    assert left_over(cache) == ["whole.bin"]
    for path in registry.iterdir():
        path.unlink()
    assert fetch(model, cache).read_bytes() == b"abcdef"  # from the cache


def test_fetch_refuses_another_file_than_the_pinned_one(registry: Path, cache: Path) -> None:
    good, bad = wheel(registry, "piece1", b"abc"), wheel(registry, "piece2", b"def")
    wheel(registry, "piece2", b"dEf")
    with pytest.raises(ModelError) as caught:
        fetch(known(good, bad, content=b"abcdef"), cache)
    assert caught.value.code == "model-hash"
    assert left_over(cache) == [f"{good.sha256[:16]}.whl"]  # the good piece is kept for the next attempt, the bad one is gone
    with pytest.raises(ModelError) as caught:
        fetch(known(good, content=b"something else"), cache)
    assert caught.value.code == "model-hash"
    assert "whole.bin" not in left_over(cache)


def test_fetch_goes_on_where_it_was_interrupted(registry: Path, cache: Path) -> None:
    first, second = wheel(registry, "piece1", b"abc"), wheel(registry, "piece2", b"def")
    kept = (registry / "piece2-1.0-py3-none-any.whl").rename(registry.parent / "aside.whl")
    with pytest.raises(ModelError) as caught:
        fetch(known(first, second, content=b"abcdef"), cache)
    assert caught.value.code == "model-download"
    assert "piece2 1.0 could not be downloaded" in caught.value.message
    (registry / "piece1-1.0-py3-none-any.whl").unlink()
    kept.rename(registry / "piece2-1.0-py3-none-any.whl")
    assert fetch(known(first, second, content=b"abcdef"), cache).read_bytes() == b"abcdef"


def test_fetch_by_two_at_once(registry: Path, cache: Path) -> None:
    model, results = known(wheel(registry, "piece1", b"abc"), content=b"abc"), []
    threads = [threading.Thread(target=lambda: results.append(fetch(model, cache).read_bytes())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [b"abc", b"abc"]
    assert left_over(cache) == ["whole.bin"]


def test_models_table_tells_what_the_cache_holds(registry: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, gguf_file: Path) -> None:
    content = gguf_file.read_bytes()
    model = known(wheel(registry, "piece1", content), content=content)
    monkeypatch.setattr(models, "KNOWN", {"pieces": model})
    monkeypatch.setattr(models, "IMAGE_MODELS", {})
    assert [(info.name, info.state) for info in models.models()] == [("pieces", "available")]
    fetch(model, cache)
    assert models.models()[0].state == "downloaded"
    assert load_model("pieces").gguf == model.path(cache)
    assert models.models()[0].state == "ready"


@pytest.mark.network
def test_smollm2_from_the_registry(smollm2: LoadedModel) -> None:
    assert (smollm2.vocab_size, smollm2.max_length, smollm2.eos_ids) == (49152, 8192, (2, 0))
    assert smollm2.gguf is not None
    assert sha256_of(smollm2.gguf) == models.KNOWN["smollm2-135m"].sha256
    made = Tokenizer.from_file(str(smollm2.tokenizer_files["tokenizer.json"]))
    prompt = made.encode("The capital of France is").ids
    with torch.no_grad():
        best = smollm2.module(torch.tensor([prompt])).logits[0, -1].argmax()
    assert made.decode([int(best)]) == " Paris"
