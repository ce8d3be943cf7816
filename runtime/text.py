"""Text in and out: tokenizer, chat template, and a decoder that turns a stream of ids into a stream of sound text.

Encoding follows `AutoTokenizer` of transformers on the same files, without importing it: the post-processor of `tokenizer.json` decides
which special tokens are added, `add_bos_token` and the like beside it do not. Chat templates come from model repositories and
are untrusted: they run in jinja2's immutable sandbox and see plain JSON data only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer

from planc.runtime.errors import ArtifactError, InputError

TOKENIZER = "tokenizer.json"
#: Files that `Text.load` reads; a backend copies those that exist into the artifact.
TEXT_FILES = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json", "config.json")

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")

Message = Mapping[str, Any]


class Text:
    """A tokenizer with its chat template; without a tokenizer it still carries the end ids and refuses text with a clear error."""

    def __init__(
        self,
        tokenizer: Tokenizer | None = None,
        *,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        eos_ids: Iterable[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template if tokenizer is not None else None
        self.special_tokens = dict(special_tokens or {})  # bos_token, eos_token ...: what a chat template may use
        self.eos_ids = tuple(dict.fromkeys(int(i) for i in eos_ids))
        if tokenizer is not None:  # what a training script left in the file must not cut or pad prompts
            tokenizer.no_truncation()
            tokenizer.no_padding()
            tokenizer.encode_special_tokens = False

    @classmethod
    def load(cls, directory: Path, *, eos_ids: Iterable[int] | None = None) -> Self:
        """Read `TEXT_FILES` of a directory. `eos_ids=None` takes the end ids from the same files (`generation_config.json` first)."""
        directory = Path(directory)
        path, config = directory / TOKENIZER, _json(directory / "tokenizer_config.json")
        special = _special_tokens({**_json(directory / "special_tokens_map.json"), **config})
        tokenizer = None
        if path.is_file():
            try:
                tokenizer = Tokenizer.from_file(str(path))
            except Exception as error:  # the library raises plain Exception for whatever is wrong with the file
                raise ArtifactError("artifact-corrupt", f"{TOKENIZER} cannot be read: {error}", where=str(path)) from error
            tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in dict.fromkeys(special.values())])
        if eos_ids is None:
            eos_ids = _eos_ids(directory, tokenizer, special)
        return cls(tokenizer, chat_template=_chat_template(directory, config), special_tokens=special, eos_ids=eos_ids)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text; `special` lets the tokenizer add its own first and last tokens."""
        ids: list[int] = self._need("text cannot be encoded").encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens left out."""
        text: str = self._need("ids cannot be decoded").decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    def apply_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any) -> list[int]:
        """Ids of a conversation; `variables` (tools, documents, whatever the template knows) are handed to the template."""
        return self.encode(self.render_chat(messages, add_generation_prompt, **variables), special=False)

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The conversation as the chat template writes it."""
        self._need("messages cannot be written as text")
        if self.chat_template is None:
            raise InputError("chat-template", "the model has no chat template", fix="pass the prompt as text with chat=False, or as ids")
        plain = [{k: v for k, v in _plain(message, "messages").items() if v is not None} for message in _checked(messages)]
        values = {"tools": None, "documents": None, **self.special_tokens, **_plain(variables, "variables")}
        try:
            return self._template.render(messages=plain, add_generation_prompt=add_generation_prompt, **values)
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise InputError("chat-template", f"the chat template refused the messages: {error}") from error

    @cached_property
    def _template(self) -> jinja2.Template:
        assert self.chat_template is not None
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        return environment.from_string(self.chat_template)

    @cached_property
    def silent_ids(self) -> frozenset[int]:
        """Ids that never show in text: special tokens."""
        if self.tokenizer is None:
            return frozenset()
        return frozenset(i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special)

    def _need(self, consequence: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(
                "tokenizer-missing",
                f"the model has no tokenizer, so {consequence}",
                fix="pass prompts as lists of token ids and read `ids`, or compile with a tokenizer",
            )
        return self.tokenizer


class StreamDecoder:
    """Incremental decoding of one sequence.

    `push` returns the text that is certain by now: no half UTF-8 character, nothing that a stop string may still claim. The pieces and
    `finish()` together equal the decoded ids, up to the stop string that completes first (`stop` then tells which one).
    """

    def __init__(self, text: Text, stop: Sequence[str] = ()) -> None:
        self._text, self._tokenizer = text, text.tokenizer
        self._stops = tuple(stop)
        self.stop: str | None = None
        self._context: list[int] = []  # ids that have been shown; decoders treat the first id of a text specially
        self._shown = ""  # the context decoded
        self._new: list[int] = []  # ids whose characters may still be incomplete
        self._held = ""  # decoded, but perhaps the start of a stop string

    def push(self, token: int) -> str:
        """Add one id, get the text that became certain. After a stop string was found there is no more text."""
        if self.stop is not None or self._tokenizer is None:
            return ""
        piece = None if token in self._text.silent_ids else self._tokenizer.id_to_token(token)
        if piece is None:  # special or unknown ids have no text
            return ""
        self._new.append(token)
        window: str = self._tokenizer.decode(self._context + self._new, skip_special_tokens=True)
        if window.endswith(_REPLACEMENT) or _BYTE_TOKEN.fullmatch(piece):
            return ""  # more bytes may follow; a run of byte tokens is decoded as a whole
        return self._release(window)

    def finish(self) -> str:
        """The text held back, at the end of the sequence."""
        if self.stop is not None or self._tokenizer is None:
            return ""
        shown = ""
        if self._new:
            shown = self._release(self._tokenizer.decode(self._context + self._new, skip_special_tokens=True))
        rest, self._held = ("", "") if self.stop is not None else (self._held, "")
        return shown + rest

    def _release(self, window: str) -> str:
        fresh = window[len(self._shown) :]
        self._context, self._new = self._new, []
        self._shown = self._tokenizer.decode(self._context, skip_special_tokens=True) if self._tokenizer is not None else ""
        if not self._stops:
            return fresh
        self._held += fresh
        found = min(((self._held.find(s) + len(s), -len(s), s) for s in self._stops if s in self._held), default=None)
        if found is not None:  # the one that completes first; of several, the longest
            end, _, self.stop = found
            certain, self._held = self._held[: end - len(self.stop)], ""
            return certain
        keep = max((_overlap(self._held, s) for s in self._stops), default=0)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper start of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


# ---- reading the files ----


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError("artifact-corrupt", f"{path.name} cannot be read: {error}", where=str(path)) from error
    return data if isinstance(data, dict) else {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Named special tokens; older files write each as an object with `content`."""
    found: dict[str, str] = {}
    for name in _NAMED_TOKENS:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _eos_ids(directory: Path, tokenizer: Tokenizer | None, special: Mapping[str, str]) -> tuple[int, ...]:
    """End ids: those of generation_config.json, else config.json, else the tokenizer's eos token."""
    for name in ("generation_config.json", "config.json"):
        value = _json(directory / name).get("eos_token_id")
        if value is not None:
            return tuple(value) if isinstance(value, list) else (int(value),)
    if tokenizer is not None and "eos_token" in special:
        found = tokenizer.token_to_id(special["eos_token"])
        return () if found is None else (found,)
    return ()


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    value = config.get("chat_template")
    if isinstance(value, list):  # several, by name
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default") or next(iter(named.values()), None)
    return value if isinstance(value, str) else None


# ---- what templates see ----


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; when rendering a prompt it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002 - templates may name the argument
    return datetime.now().strftime(format)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
) -> str:
    """JSON without the HTML escapes of jinja2's own filter: prompts are not web pages."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _checked(messages: Any) -> list[Message]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InputError("input-invalid", "a conversation is a list of messages, each with `role` and `content`")
    if not messages:
        raise InputError("prompt-empty", "the conversation has no messages")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(
                "input-invalid", f"message {number} is not a mapping with a `role`, such as {{'role': 'user', 'content': 'Hi'}}"
            )
    return list(messages)


def _plain(value: Any, where: str) -> Any:
    """A copy made of JSON types only: objects with methods of their own could lead a template out of the sandbox."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bool | int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise InputError(
        "input-invalid", f"{where} holds a {type(value).__name__}; only text, numbers, lists and mappings can be used in a chat"
    )
