"""An answer with who guessed each token, for the page of `planc explain`."""

from __future__ import annotations

from dataclasses import dataclass

from planc.runtime.executable import Executable


@dataclass(frozen=True)
class Piece:
    """Text that one token made certain."""

    text: str
    drafters: tuple[str, ...]  # that had guessed the token; none: the model's own
    turn: int  # the pass, counted from 0


@dataclass(frozen=True)
class Told:
    """An answer, and where it came from."""

    prompt: str
    pieces: tuple[Piece, ...]
    turns: tuple[tuple[int, int], ...]  # of every pass: guesses that it checked, and those it accepted
    tokens: int
    drafters: tuple[str, ...]
    drafted: dict[str, int]  # drafter -> guesses checked
    accepted: dict[str, int]


def tell(exe: Executable, prompt: str, max_new_tokens: int | None = None) -> Told:
    """Answer a prompt and keep the book."""
    speculative = exe.decode.speculative
    drafters = tuple(dict.fromkeys(part.key for part in speculative.drafter)) if speculative is not None else ()
    pieces, turns, stats = list[Piece](), list[tuple[int, int]](), None
    for turn, chunk in enumerate(exe.stream(prompt, max_new_tokens=max_new_tokens)):
        rows = list(chunk.rows[1:]) if chunk.draft is not None else []
        for i, text in enumerate(chunk.pieces):
            names = tuple(chunk.draft.sources(rows[i])) if chunk.draft is not None and i < len(rows) else ()
            pieces.append(Piece(text, names, turn))
        turns.append((len(chunk.draft) - 1 if chunk.draft is not None else 0, len(rows)))
        if chunk.generation is not None:
            stats = chunk.generation.stats
    assert stats is not None
    return Told(prompt, tuple(pieces), tuple(turns), stats.tokens, drafters, dict(stats.drafted_by), dict(stats.accepted_by))
