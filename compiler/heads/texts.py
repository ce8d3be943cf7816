"""Conversations that a target wrote: what draft heads learn from. A head must guess this target's text, not somebody else's."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from planc.compiler.files import write
from planc.runtime.engine import Ints
from planc.runtime.errors import InputError
from planc.runtime.executable import Executable

TEMPERATURES = (0.0, 0.8, 0.8)  # of answers, in turn: a head is used greedily and for sampling
LANES = 32  #: conversations that a target writes at once
_BATCH = 64  # conversations in a file
_PROMPT = 320  # longest prompt, in tokens
_QUESTION = 64  # longest question of the target's own
_MARK = "\u0001"  # stands for a message in a chat template
_LOOP = 4  # how often four tokens in a row may come again before an answer counts as a loop, which is too easy to guess to learn from


@dataclass(frozen=True)
class Texts:
    """Token ids of conversations; the answer of conversation i begins at `starts[i]`."""

    tokens: tuple[Ints, ...]
    starts: tuple[int, ...]

    @property
    def written(self) -> int:
        """Tokens of all answers."""
        return sum(len(ids) - start for ids, start in zip(self.tokens, self.starts, strict=True))

    def part(self, which: Sequence[int]) -> Texts:
        """Some of the conversations."""
        return Texts(tuple(self.tokens[i] for i in which), tuple(self.starts[i] for i in which))

    def frequent(self, count: int, always: Sequence[int] = ()) -> Ints:
        """The `count` commonest tokens of the answers, ascending, lower ids first on ties; `always` are among them (papers/48)."""
        seen: Counter[int] = Counter()
        for ids, start in zip(self.tokens, self.starts, strict=True):
            seen.update(ids[start:].tolist())
        kept = sorted(set(always))
        for token, _ in sorted(seen.items(), key=lambda item: (-item[1], item[0])):
            if len(kept) >= count:
                break
            if token not in always:
                kept.append(token)
        return np.array(sorted(kept), dtype=np.int64)


def write_texts(
    exe: Executable,
    prompts: Sequence[str | Sequence[int]] | None,
    folder: Path,
    tokens: int,
    longest: int,
    progress: Callable[[int, int], None],
) -> Texts:
    """Let the target answer prompts, over and over with other noise, until it has written `tokens`.

    Without prompts it writes the questions, too: a model that was trained on conversations knows what a user's turn looks like ("Magpie: Alignment
    Data Synthesis from Scratch by Prompting Aligned LLMs with Nothing"). Every `_BATCH` answers are a file in `folder`; what lies there already
    counts, so that an interrupted run goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = read_texts(folder)
    chats = None if prompts is None else [_chat(exe, prompt) for prompt in prompts]
    number = len(list(folder.glob("texts-*.npz"))) * _BATCH
    while done.written < tokens:
        indices = range(number, number + _BATCH)
        asked = _own_chats(exe, indices) if chats is None else [chats[index % len(chats)] for index in indices]
        seeds = [index // len(chats) if chats else index for index in indices]
        warmth = [TEMPERATURES[index % len(TEMPERATURES)] for index in indices]
        answers = _write(exe, asked, longest, warmth, seeds)
        made = [([*ids, *answer], len(ids)) for ids, answer in zip(asked, answers, strict=True) if not loops(answer)]
        _save(folder / f"texts-{number:06}.npz", made)
        number += _BATCH
        if not made and number > 4 * len(chats or asked):
            raise InputError(
                "input-invalid", "the target's answers all loop, and nothing can be learned from them", fix="give other prompts"
            )
        done = read_texts(folder)
        progress(min(done.written, tokens), tokens)
    return done


def _write(exe: Executable, prompts: Sequence[list[int]], longest: int, warmth: Sequence[float], seeds: Sequence[int]) -> list[list[int]]:
    """What follows every prompt, in batches as large as the plan has."""
    capacity = min(exe.capacity, max(map(len, prompts)) + longest + 1)
    with exe.serve(capacity=capacity) as server:
        asked = [
            server.submit(ids, max_new_tokens=longest, temperature=temperature, top_p=0.95, seed=seed)
            for ids, temperature, seed in zip(prompts, warmth, seeds, strict=True)
        ]
    return [handle.result().ids for handle in asked]


def _own_chats(exe: Executable, indices: Sequence[int]) -> list[list[int]]:
    """Questions that the target writes where a user would; token ids up to where its answer begins."""
    text = exe.text
    if text.chat_template is None:
        raise InputError(
            "input-invalid", "the model has no chat template, so it cannot write questions of its own", fix="name prompts to learn from"
        )
    opening = text.encode(text.render_chat([{"role": "user", "content": _MARK}]).partition(_MARK)[0], special=False)
    drafts = _write(exe, [opening] * len(indices), _QUESTION, [1.0] * len(indices), list(indices))
    questions = (text.decode([token for token in ids if token not in exe.eos_ids]).strip() for ids in drafts)
    return [_chat(exe, question or "Hello!") for question in questions]


def loops(ids: Sequence[int]) -> bool:
    """Whether four tokens in a row come again too often."""
    seen = Counter(zip(ids, ids[1:], ids[2:], ids[3:], strict=False))
    return bool(seen) and max(seen.values()) > _LOOP


def read_texts(folder: Path) -> Texts:
    """All conversations that lie in a folder."""
    tokens, starts = list[Ints](), list[int]()
    for path in sorted(folder.glob("texts-*.npz")):
        with np.load(path, allow_pickle=False) as data:
            tokens += [np.asarray(ids, dtype=np.int64) for ids in np.split(data["tokens"], np.cumsum(data["lengths"])[:-1]) if len(ids)]
            starts += data["starts"].tolist()
    return Texts(tuple(tokens), tuple(starts))


def _chat(exe: Executable, prompt: str | Sequence[int]) -> list[int]:
    """Token ids of a prompt as a user's turn, where the model has a chat template; long ones are cut. Ids stay as they are."""
    if not isinstance(prompt, str):
        return list(prompt)
    if exe.text.chat_template is not None:
        frame = len(exe.text.apply_chat([{"role": "user", "content": ""}]))
        cut = exe.text.decode(exe.text.encode(prompt, special=False)[: _PROMPT - frame])
        return exe.text.apply_chat([{"role": "user", "content": cut}])
    return exe.text.encode(prompt)[:_PROMPT]


def _save(path: Path, made: Sequence[tuple[list[int], int]]) -> None:
    packed = io.BytesIO()
    np.savez(
        packed,
        tokens=np.array([token for ids, _ in made for token in ids], dtype=np.int32),
        lengths=np.array([len(ids) for ids, _ in made], dtype=np.int64),
        starts=np.array([start for _, start in made], dtype=np.int64),
    )
    write(path, packed.getvalue())
