"""Text: equal to transformers on the same files, and streams that add up to the whole."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from planc.runtime.errors import ArtifactError, InputError
from planc.runtime.text import StreamDecoder, Text

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "Größe, naïve café, 東京 and Москва are words with more than ASCII.",
    "Emoji such as 🙂 and 👩‍👩‍👧 take several bytes; so does the sign €.",
    "def add(a, b):\n    return a + b\n",
]
TEMPLATE = """{% if messages %}
    {% set first = messages[0] %}
{% endif %}
{%- for message in messages %}
{%- if message.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role ' + message.role) }}{% endif %}
{%- if message.content == 'skip' %}{% continue %}{% endif %}
{{- '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}
{{- eos_token + '\n' }}
{%- endfor %}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
CHAT = [
    {"role": "user", "content": "Where is the <fox> & café?"},
    {"role": "assistant", "content": "Here 🙂"},
    {"role": "user", "content": "skip"},
]


@cache
def byte_level() -> str:
    """tokenizer.json of a byte-level BPE, as GPT-2 and Llama 3 have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|end|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.enable_truncation(4)  # what training scripts leave behind
    return str(tokenizer.to_str())


@cache
def byte_fallback() -> str:
    """tokenizer.json of a BPE with `<0x..>` fallback and a leading space that decoding strips, as Llama 2 and Gemma have."""
    letters = sorted(set("".join(SENTENCES[:1])) - {" "}) + ["▁"]
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + letters
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("o", "x"), ("a", "g"), ("ag", "a")]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces + [a + b for a, b in merges]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return str(tokenizer.to_str())


def save(directory: Path, tokenizer: str, *, template: str | None = TEMPLATE, **config: Any) -> Path:
    (directory / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory


@cache
def texts() -> tuple[Text, Text]:
    return Text(Tokenizer.from_str(byte_level())), Text(Tokenizer.from_str(byte_fallback()))


# ---- equality with transformers ----


@pytest.mark.parametrize(
    ("tokenizer", "config"),
    [
        (byte_level, {}),
        (byte_level, {"bos_token": "<|im_start|>", "add_bos_token": True}),
        (byte_level, {"bos_token": {"content": "<|im_start|>", "__type": "AddedToken"}, "add_bos_token": False, "add_eos_token": True}),
        (byte_fallback, {"eos_token": "</s>", "bos_token": "<s>"}),
    ],
)
def test_encode_and_decode_equal_transformers(tmp_path: Path, tokenizer: Any, config: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(save(tmp_path, tokenizer(), **config))
    ours = Text.load(tmp_path)
    for text in [*SENTENCES, "", " two  spaces ", "<|im_start|>user", "unseen: ξ₂"]:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert len(ours.encode(SENTENCES[0])) > 4, "truncation of the training script must be off"


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "f<1>", "parameters": {}}}]])
def test_chat_equals_transformers(tmp_path: Path, add_generation_prompt: bool, tools: Any) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(save(tmp_path, byte_level()))
    ours = Text.load(tmp_path)
    expected = theirs.apply_chat_template(CHAT, add_generation_prompt=add_generation_prompt, tools=tools)["input_ids"]
    assert ours.apply_chat(CHAT, add_generation_prompt, tools=tools) == expected
    assert ours.render_chat(CHAT, tools=tools).count("<fox> &") == 1, "prompts are not web pages: nothing is escaped"


def test_template_inside_the_tokenizer_config(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ messages[0].content }}!"}]
    save(tmp_path, byte_level(), template=None, chat_template=templates)
    assert Text.load(tmp_path).render_chat(CHAT) == "Where is the <fox> & café?!"


def test_end_ids(tmp_path: Path) -> None:
    save(tmp_path, byte_level())
    assert Text.load(tmp_path).eos_ids == (0,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 0, 5]}))
    assert Text.load(tmp_path).eos_ids == (5, 0)
    assert Text.load(tmp_path, eos_ids=(7,)).eos_ids == (7,)


# ---- refusals ----


def test_template_errors_are_ours(tmp_path: Path) -> None:
    text = Text.load(save(tmp_path, byte_level()))
    with pytest.raises(InputError, match="unknown role judge") as caught:
        text.apply_chat([{"role": "judge", "content": "x"}])
    assert caught.value.code == "chat-template"
    with pytest.raises(InputError, match="TextIOWrapper"):
        text.apply_chat([{"role": "user", "content": open(__file__)}])  # noqa: SIM115
    for wrong in ("hello", {"role": "user"}, [{"content": "x"}], ["x"]):
        with pytest.raises(InputError) as caught:
            text.apply_chat(wrong)  # type: ignore[arg-type]
        assert caught.value.code == "input-invalid"


@pytest.mark.parametrize("escape", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% if %}"])
def test_templates_stay_in_the_sandbox(escape: str) -> None:
    text = Text(texts()[0].tokenizer, chat_template=escape)
    with pytest.raises(InputError) as caught:
        text.render_chat([{"role": "user", "content": "x"}])
    assert caught.value.code == "chat-template"
    hidden = Text(texts()[0].tokenizer, chat_template="{{ raise_exception.__globals__ }}")
    assert hidden.render_chat([{"role": "user", "content": "x"}]) == ""


def test_no_tokenizer(tmp_path: Path) -> None:
    text = Text.load(tmp_path, eos_ids=[2])
    assert text.eos_ids == (2,)
    for call in (lambda: text.encode("x"), lambda: text.decode([1]), lambda: text.apply_chat([{"role": "user", "content": "x"}])):
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.code == "tokenizer-missing"
    stream = StreamDecoder(text)
    assert stream.push(3) + stream.finish() == ""


def test_broken_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        Text.load(tmp_path)


# ---- streaming ----


def stopped(whole: str, stops: list[str]) -> tuple[str, str | None]:
    """Where a reader who sees one character after another stops, and why."""
    for end in range(len(whole) + 1):
        found = [s for s in stops if whole[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return whole[: end - len(longest)], longest
    return whole, None


def stream(text: Text, ids: list[int], stops: list[str]) -> tuple[list[str], StreamDecoder]:
    decoder = StreamDecoder(text, stops)
    return [decoder.push(i) for i in ids] + [decoder.finish()], decoder


words = st.text(st.sampled_from("theoxag é€🙂東\ufffd\n"), max_size=20)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1), st.lists(st.integers(0, 345), max_size=30))
def test_stream_of_any_ids_is_the_decoded_text(which: int, ids: list[int]) -> None:
    text = texts()[which]  # random ids are mostly broken UTF-8: the hard case
    pieces, _ = stream(text, ids, [])
    assert "".join(pieces) == text.decode(ids)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1), words, st.lists(st.text(st.sampled_from("theoxag é€🙂"), min_size=1, max_size=4), max_size=3))
def test_stream_stops_where_a_reader_would(which: int, whole: str, stops: list[str]) -> None:
    text = texts()[which]
    ids = text.encode(whole)
    pieces, decoder = stream(text, ids, stops)
    assert ("".join(pieces), decoder.stop) == stopped(text.decode(ids), stops)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1), st.text(st.sampled_from("theoxag é€🙂東"), max_size=20))
def test_stream_never_breaks_a_character(which: int, whole: str) -> None:
    text = texts()[which]
    pieces, _ = stream(text, text.encode(whole), [])
    assert not any("\ufffd" in piece for piece in pieces)


def test_stream_is_prompt() -> None:
    """Text comes as soon as it is certain: a stop string that can no longer match lets go of what it held."""
    text = texts()[0]
    decoder = StreamDecoder(text, ["fox!"])
    ids = text.encode("a fo")
    assert "".join(decoder.push(i) for i in ids) == "a "
    assert "".join(decoder.push(i) for i in text.encode("g")) == "fog"


def test_of_stops_that_complete_together_the_longest_counts() -> None:
    text = texts()[0]
    pieces, decoder = stream(text, text.encode("abcd"), ["cd", "bcd", "d"])
    assert ("".join(pieces), decoder.stop) == ("a", "bcd")


def test_nothing_follows_a_stop_string() -> None:
    text = texts()[0]
    decoder = StreamDecoder(text, ["fox", "ox ju"])
    assert "".join(decoder.push(i) for i in text.encode(SENTENCES[0])) == "The quick brown "
    assert decoder.stop == "fox"
    assert decoder.finish() == ""
