"""From what a caller may pass as a prompt to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from planc.runtime.errors import InputError
from planc.runtime.text import Message, Text

Prompt = str | Sequence[Message] | Sequence[int]

_FORMS = "a string, a list of messages {'role': ..., 'content': ...}, a list of token ids, or a list of these"


def read_prompts(text: Text, prompt: Any, chat: bool | None = None) -> tuple[list[list[int]], bool]:
    """Token ids of every prompt, and whether it was a single one rather than a batch.

    `chat`: None writes a string as a user message where there is a chat template; False takes it as it is; True insists on the template.
    """
    prompt = _as_list(prompt)
    if isinstance(prompt, str) or _is_chat(prompt) or _is_ids(prompt):
        return [_ids(text, prompt, chat)], True
    if not isinstance(prompt, list):
        raise _unknown(prompt)
    if not prompt:
        raise InputError("prompt-empty", "the prompt is an empty list", fix=f"pass {_FORMS}")
    return [_ids(text, _as_list(one), chat) for one in prompt], False


def _ids(text: Text, prompt: Any, chat: bool | None) -> list[int]:
    if isinstance(prompt, str):
        if not prompt:
            raise InputError("prompt-empty", "the prompt is an empty string")
        wrapped = chat if chat is not None else text.chat_template is not None
        ids = text.apply_chat([{"role": "user", "content": prompt}]) if wrapped else text.encode(prompt)
    elif _is_chat(prompt):
        if chat is False:
            raise InputError("input-invalid", "messages need the chat template", fix="leave out chat=False, or pass the text")
        ids = text.apply_chat(prompt)
    elif _is_ids(prompt):
        ids = [int(token) for token in prompt]
    elif prompt == []:
        ids = []
    else:
        raise _unknown(prompt)
    if not ids:
        raise InputError("prompt-empty", "the prompt has no tokens", fix="start it with the model's begin-of-text token")
    return ids


def _as_list(prompt: Any) -> Any:
    """Arrays and tuples as lists; everything else as it is."""
    if isinstance(prompt, np.ndarray) or (hasattr(prompt, "tolist") and hasattr(prompt, "shape")):  # numpy, and tensors of any library
        return prompt.tolist()
    return list(prompt) if isinstance(prompt, tuple) else prompt


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(message, Mapping) for message in prompt)


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(i, Integral) and not isinstance(i, bool) for i in prompt)


def _unknown(prompt: Any) -> InputError:
    found = type(prompt).__name__
    if isinstance(prompt, list):
        found = f"a list of {', '.join(sorted({type(item).__name__ for item in prompt}))}"
    return InputError("input-invalid", f"a prompt cannot be {found}", fix=f"pass {_FORMS}")
