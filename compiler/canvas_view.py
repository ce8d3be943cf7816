"""How a canvas was filled, for people: lines in a terminal as it happens, and a picture of when every slot was written and how surely."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from planc.runtime.errors import InputError
from planc.runtime.filler import Filled
from planc.runtime.masked import Canvas, Commit
from planc.runtime.text import Text as Tokenizer

HIDDEN = "·"
_CELL, _MARGIN = 14, 28  # pixels
_SHADES = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], float)  # viridis, from unsure to sure


def words_of(text: Tokenizer, ends: Sequence[int]) -> Callable[[int], str]:
    """Token -> what is shown for it."""
    known: dict[int, str] = {}

    def word(token: int) -> str:
        if token not in known:
            known[token] = "¶" if token in ends else text.decode([token]).strip() or "␣" if text.tokenizer is not None else str(token)
        return known[token]

    return word


def line(canvas: Canvas, word: Callable[[int], str]) -> Text:
    """A canvas after its latest pass: what that pass wrote stands out."""
    fresh = {slot for commit in canvas.trace if commit.step == canvas.step for slot in commit.slots}
    shown = Text(f"{canvas.step:>4}  ", style="dim")
    for slot in range(canvas.prompt, canvas.length):
        token = int(canvas.tokens[slot])
        if token == canvas.mask_id:
            shown.append(f"{HIDDEN} ", style="dim")
        else:
            shown.append(f"{word(token)} ", style="bold green" if slot in fresh else "")
    return shown


def _states(filled: Filled) -> list[tuple[np.ndarray, set[int]]]:
    """After every step the confidence of each slot of the field, NaN where it was not written, and what that step wrote."""
    slots, state, states = len(filled.canvas) - filled.prompt_tokens, {}, []
    by_step: dict[int, list[Commit]] = {}
    for commit in filled.trace:
        by_step.setdefault(commit.step, []).append(commit)
    for step in range(max(by_step, default=0) + 1):
        fresh = set[int]()
        for commit in by_step.get(step, []):
            for slot, sure in zip(commit.slots, commit.confidence, strict=True):
                if (at := slot - filled.prompt_tokens) < slots:  # else it was cut off later
                    state[at] = sure
                    fresh.add(at)
        states.append((np.array([state.get(i, np.nan) for i in range(slots)]), fresh))
    return states[1:] if len(states) > 1 and not states[0][1] else states


def _shade(confidence: float) -> tuple[int, int, int]:
    place = min(max(confidence, 0.0), 1.0) * (len(_SHADES) - 1)
    low = min(int(place), len(_SHADES) - 2)
    red, green, blue = _SHADES[low] + (place - low) * (_SHADES[low + 1] - _SHADES[low])
    return int(red), int(green), int(blue)


def _draw(states: Sequence[tuple[np.ndarray, set[int]]], steps: int, title: str) -> Any:
    """A row per step, a column per slot: the colour is the confidence with which it was written, an outline the step that did."""
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise InputError("backend-missing", "pictures need Pillow, which is not installed", fix="pip install 'planc[vision]'") from error
    slots = len(states[0][0])
    image = Image.new("RGB", (_MARGIN + slots * _CELL + 8, _MARGIN + steps * _CELL + 8), (18, 18, 24))
    pen = ImageDraw.Draw(image)
    pen.text((4, 6), title, fill=(220, 220, 220))
    for row, (confidence, fresh) in enumerate(states):
        top = _MARGIN + row * _CELL
        pen.text((4, top), str(row + 1), fill=(150, 150, 150))
        for column, sure in enumerate(confidence):
            left = _MARGIN + column * _CELL
            fill = (44, 44, 54) if np.isnan(sure) else _shade(float(sure))
            outline = (255, 255, 255) if column in fresh else None
            pen.rectangle((left, top, left + _CELL - 2, top + _CELL - 2), fill=fill, outline=outline)
    return image


def write_picture(filled: Filled, path: Path, title: str = "") -> None:
    """The whole course as one picture (PNG), or as a film of its steps (GIF), by the name of the file."""
    states = _states(filled)
    if path.suffix.lower() != ".gif":
        _draw(states, len(states), title).save(path)
        return
    frames = [_draw(states[: count + 1], len(states), title) for count in range(len(states))]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[300] * (len(frames) - 1) + [2000], loop=0)
