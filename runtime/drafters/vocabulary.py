"""Between the ids of a target and those of a draft model that was trained with another tokenizer.

Tokens are equal when they stand for the same bytes of text, however their tokenizers write them. A target token that the draft model does
not have is fed to it as the tokens that its own tokenizer makes of the text; a token that only the draft model has is never guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

from planc.runtime.engine import Floats, Ints
from planc.runtime.errors import PlanError
from planc.runtime.text import Text

SHARED = 0.5  #: least share of the smaller vocabulary that must be common: unrelated vocabularies share far less, related ones far more

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_FIX = "draft with a model of the same family, or with `passes` on the target itself"


class Vocabulary:
    """Ids of the target [V] by ids of the draft model, and back."""

    def __init__(self, ids: Ints, text: dict[int, bytes], tokenizer: Tokenizer | None = None, unknown: int = 0) -> None:
        """`ids` [V]: the draft's id of every target id, -1 for none; `text` and `tokenizer` (the draft's) spell those that have none."""
        self.ids = ids
        self._pieces: dict[int, tuple[int, ...]] = {}  # target ids that were spelled
        self._text, self._tokenizer, self._unknown = text, tokenizer, unknown
        self._known = np.flatnonzero(ids >= 0)  # target ids with a counterpart
        self._columns = ids[self._known]

    def feed(self, tokens: Sequence[int]) -> list[int]:
        """The draft model's ids for target ids; never fewer than one for each."""
        return [i for token in tokens for i in self.pieces(token)]

    def pieces(self, token: int) -> tuple[int, ...]:
        """The draft model's ids for one target id."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._spell(token)
        return found

    def _spell(self, token: int) -> tuple[int, ...]:
        if self.ids[token] >= 0:
            return (int(self.ids[token]),)
        text = self._text.get(token, b"").decode(errors="replace")
        spelled = self._tokenizer.encode(text, add_special_tokens=False).ids if self._tokenizer is not None and text else []
        return tuple(spelled) or (self._unknown,)

    def logits(self, floats: Floats) -> Floats:
        """Logits [n, V] of the target's ids from those of the draft model [n, V']; -inf where it has no such token."""
        wide = np.full((len(floats), len(self.ids)), -np.inf, dtype=np.float32)
        wide[:, self._known] = floats[:, self._columns]
        return wide


def vocabulary(target: Text, draft: Text, target_size: int, draft_size: int) -> Vocabulary | None:
    """How to translate, or None where both have the same ids. Sizes are those of the models' logits.

    Raises PlanError[draft-mismatch] when the models share less than half of the smaller vocabulary, or cannot be compared.
    """
    if target.tokenizer is None or draft.tokenizer is None:
        if target.tokenizer is None and draft.tokenizer is None and target_size == draft_size:
            return None  # two models of bare ids
        message = f"without both tokenizers, vocabularies of {target_size} and {draft_size} tokens cannot be matched"
        raise PlanError("draft-mismatch", message, fix="compile both models with their tokenizers")
    same = target.tokenizer.get_vocab() == draft.tokenizer.get_vocab()
    if same and target_size == draft_size:
        return None
    ids = np.full(target_size, -1, dtype=np.int64)
    if same:  # heads padded to different widths
        ids[: min(target_size, draft_size)] = np.arange(min(target_size, draft_size))
        return Vocabulary(ids, {})
    ours = {i: text for i, text in _bytes_of(target.tokenizer) if i < target_size}
    theirs = {text: i for i, text in _bytes_of(draft.tokenizer) if i < draft_size}
    for i, text in ours.items():
        ids[i] = theirs.get(text, -1)
    for end in target.eos_ids[: len(draft.eos_ids)]:  # whatever it is called, the end of the text is the end of the text
        if ids[end] < 0:
            ids[end] = draft.eos_ids[0]
    common, smaller = int((ids >= 0).sum()), min(len(ours), len(theirs))
    if common < SHARED * smaller:
        message = f"the draft model shares {common} tokens with the target, of {smaller} in the smaller vocabulary"
        raise PlanError("draft-mismatch", message, fix=_FIX)
    return Vocabulary(ids, ours, draft.tokenizer, draft.eos_ids[0] if draft.eos_ids else 0)


def _bytes_of(tokenizer: Tokenizer) -> Iterator[tuple[int, bytes]]:
    """Id and text of every token; added tokens are written as they are, all others in the manner of the tokenizer's decoder."""
    kinds = set(re.findall(r'"type":\s*"(\w+)"', json.dumps(json.loads(tokenizer.to_str())["decoder"])))
    added = tokenizer.get_added_tokens_decoder()
    characters = _byte_characters() if "ByteLevel" in kinds else {}
    for token, i in tokenizer.get_vocab().items():
        if i in added:
            yield i, added[i].content.encode()
        elif characters and all(c in characters for c in token):
            yield i, bytes(characters[c] for c in token)
        elif match := _BYTE.fullmatch(token):
            yield i, bytes([int(match[1], 16)])
        else:
            yield i, token.replace("\u2581", " ").encode()  # sentencepiece writes a space as a low line


def _byte_characters() -> dict[str, int]:
    """Byte by the printable character that byte-level tokenizers write for it: itself where it has one, else one from 256 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
