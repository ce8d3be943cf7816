"""Who wrote what: painted text is the text, guesses have their drafter's colour, and without colours there is no escape code."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from planc.compiler.colours import Painter
from planc.runtime.executable import Chunk, GenerationStats, pieces_of
from planc.runtime.text import StreamDecoder, Text
from planc.runtime.trees import Draft

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # every byte is a token: most characters below are several
GREEN, CYAN, DIM_STRUCK = "\x1b[32m", "\x1b[36m", "\x1b[2;9m"


def painter(colours: bool = True) -> Painter:
    return Painter(
        ["lookup", "recycling"], Console(file=io.StringIO(), force_terminal=colours, color_system="truecolor" if colours else None)
    )


def side() -> Text:
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(ALPHABET)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return Text(tokenizer)


def chunk(ids: list[int], pieces: tuple[str, ...], draft: Draft | None = None, rows: tuple[int, ...] = ()) -> Chunk:
    return Chunk("".join(pieces), ids, pieces=pieces, draft=draft, rows=rows)


def plain(painted: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", painted)


def draft_of(ids: list[int]) -> Draft:
    """A chain behind token 0: the first guess by both, the others by the second drafter."""
    draft, row = Draft(0), 0
    for i, token in enumerate(ids):
        row = draft.add(row, token, ("recycling", i), 0.5)
        if not i:
            draft.add(0, token, ("lookup", 1), 0.5)
    return draft


@given(st.text(max_size=12), st.lists(st.integers(1, 4), min_size=48, max_size=48))
def test_painted_text_is_the_text(string: str, sizes: list[int]) -> None:
    """However the tokens of a character fall into passes, and whichever of them were guessed."""
    text = side()
    ids, decoder, shown = text.encode(string), StreamDecoder(text), {True: "", False: ""}
    while ids:
        part, ids = ids[: sizes[-1]], ids[sizes.pop() :]
        pieces = pieces_of([decoder.push(token) for token in part], len(part), "" if ids else decoder.finish())
        for colours in shown:
            shown[colours] += painter(colours).answer(chunk(part, pieces, draft_of(part), tuple(range(len(part)))))
    assert plain(shown[True]) == shown[False] == string


def test_colours_say_who_guessed() -> None:
    draft = draft_of([1, 2, 3, 4])
    made = painter().answer(chunk([1, 2, 9], ("a", "b", "c"), draft, (0, 1, 2)))
    assert made == "\x1b[4;36ma\x1b[0m" + f"{CYAN}b\x1b[0m" + "c"
    assert painter().answer(chunk([1], ("a",))) == "a", "a pass without guesses"
    assert GREEN in painter().legend() and CYAN in painter().legend()
    assert painter(False).legend() == ""


def test_a_line_of_a_pass() -> None:
    text = side()
    ids = {letter: text.encode(letter)[0] for letter in "abcdexy\n"}
    draft = Draft(0)
    first = draft.add(0, ids["a"], ("lookup", 1), 0.5)
    draft.add(0, ids["x"], ("recycling", 1), 0.5)
    second = draft.add(first, ids["b"], ("lookup", 1), 0.5)
    draft.add(draft.add(first, ids["y"], ("recycling", 1), 0.5), ids["\n"], ("recycling", 1), 0.5)
    verified = chunk([ids["a"], ids["b"], ids["c"]], ("a", "b", "c"), draft, (0, first, second))
    assert painter(False).round(7, verified, text) == "   7  2/5  abc  ~x~ ~y\\n~"
    painted = painter().round(7, verified, text)
    assert f"{GREEN}a\x1b[0m{GREEN}b\x1b[0mc" in painted and f"{DIM_STRUCK}x\x1b[0m" in painted
    assert plain(painted) == "   7  2/5  abc  x y\\n"
    assert painter().round(0, chunk([ids["e"]], ("e",)), text) == "   0  0/0  e"


def test_tally() -> None:
    stats: dict[str, Any] = {"accepted": {0: 2, 3: 1}, "drafted_by": {"lookup": 9}, "accepted_by": {"lookup": 3}}
    line = painter(False).tally(GenerationStats(7, 1.0, 1.0, 3, 9, 2.0, 0.1, **stats))
    assert line == "lookup 3 of 9 guesses | recycling 0 of 0 guesses | the model's own 4 of 7 tokens"


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1", "FORCE_COLOR": "1"}, {"TERM": "dumb", "FORCE_COLOR": "1"}, {}])
def test_no_escape_codes_where_there_are_no_colours(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert not Painter(["lookup"], Console(file=io.StringIO())).coloured
