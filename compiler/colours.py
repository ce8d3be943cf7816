"""Who wrote what: an answer in the terminal with the accepted guesses in their drafter's colour, and every pass with what it rejected.

Where there are no colours (no terminal, `NO_COLOR`, `TERM=dumb`) nothing but text is written, and signs take their place where they matter.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style

from planc.runtime.executable import Chunk, GenerationStats
from planc.runtime.text import Text
from planc.runtime.trees import Draft

_COLOURS = ("green", "cyan", "magenta", "yellow", "blue", "red")
_REJECTED, _SEVERAL = Style(dim=True, strike=True), Style(underline=True)


class Painter:
    """Paints for one console; colours belong to the drafters in the order of the plan."""

    def __init__(self, drafters: Sequence[str], console: Console) -> None:
        self.styles = {name: Style(color=_COLOURS[i % len(_COLOURS)]) for i, name in enumerate(dict.fromkeys(drafters))}
        self._system = ColorSystem.STANDARD if console.color_system is not None and not console.no_color else None

    @property
    def coloured(self) -> bool:
        """May escape codes be written?"""
        return self._system is not None

    def legend(self) -> str:
        """What the colours mean; empty where there are none."""
        if not self.coloured:
            return ""
        names = " ".join(self._paint(name, style) for name, style in self.styles.items())
        several = f", {self._paint('several', _SEVERAL)}" if len(self.styles) > 1 else ""
        return f"guessed by {names}{several}; the rest is the model's own"

    def answer(self, chunk: Chunk) -> str:
        """The chunk's text, each piece in the colour of the token that made it certain: a character of several tokens has its last one's."""
        guessed = list(chunk.rows[1:])
        rows = [guessed[i] if i < len(guessed) else 0 for i in range(len(chunk.pieces))]
        return "".join(self._guess(piece, chunk.draft, row) for piece, row in zip(chunk.pieces, rows, strict=True))

    def round(self, number: int, chunk: Chunk, text: Text) -> str:
        """A line for a pass: how many guesses were accepted of how many, the tokens committed, and in ~ ~ the guesses rejected."""
        draft = chunk.draft
        kept = list(chunk.rows[1:]) if draft is not None else []
        shown = "".join(self._guess(_quoted(text, [token]), draft, row) for token, row in zip(chunk.ids, [*kept, 0], strict=False))
        rejected = [_quoted(text, path) for path in _rejected(draft, {0, *kept})] if draft is not None else []
        crossed = " ".join(self._paint(path, _REJECTED) if self.coloured else f"~{path}~" for path in rejected)
        most = len(draft) - 1 if draft is not None else 0
        return f"{number:>4} {len(kept):>2}/{most:<2} {shown}  {crossed}".rstrip()

    def tally(self, stats: GenerationStats) -> str:
        """Guesses accepted of each drafter's, and the tokens that nobody guessed."""
        parts = [
            self._paint(f"{name} {stats.accepted_by.get(name, 0)} of {stats.drafted_by.get(name, 0)} guesses", style)
            for name, style in self.styles.items()
        ]
        guessed = sum(count * times for count, times in stats.accepted.items())
        return " | ".join([*parts, f"the model's own {stats.tokens - guessed} of {stats.tokens} tokens"])

    def _guess(self, text: str, draft: Draft | None, row: int) -> str:
        """Text of a token that was guessed in this row of the draft; row 0 is nobody's guess."""
        if draft is None or not row or not text:
            return text
        names = draft.sources(row)
        style = self.styles[names[0]] + (_SEVERAL if len(names) > 1 else Style.null())
        return self._paint(text, style)

    def _paint(self, text: str, style: Style) -> str:
        return style.render(text, color_system=self._system) if self._system is not None and text else text


def _quoted(text: Text, ids: Sequence[int]) -> str:
    """Tokens on one line: what would break it is escaped, an incomplete character is a replacement character, silent tokens have their names."""
    if text.tokenizer is None:
        return "".join(f"<{i}>" for i in ids)
    shown = text.tokenizer.decode(list(ids), skip_special_tokens=False)
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in shown)


def _rejected(draft: Draft, kept: set[int]) -> list[list[int]]:
    """The paths that left the committed one: tokens from the first rejected guess down to each leaf."""
    paths = []
    for leaf in range(1, len(draft)):
        if leaf not in kept and not draft.children[leaf]:
            row, path = leaf, list[int]()
            while row not in kept:
                path.append(draft.tokens[row])
                row = draft.parents[row]
            paths.append(path[::-1])
    return paths
