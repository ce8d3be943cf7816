"""The front of a search as a picture: divergence against what the budget counts."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from planc.runtime.errors import InputError

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 960, 640, 90, 60, 30, 70
_GREY, _BLUE, _BLACK, _LINE = "#c9ced6", "#1f5fbf", "#222222", "#e3e6ea"


@dataclass(frozen=True)
class Front:
    """What is drawn: all points that were tried, and the best of each budget with a label; costs in the unit of `axis`."""

    title: str
    axis: str
    tried: Sequence[tuple[float, float]]
    best: Sequence[tuple[float, float, str]]
    upwards: str = "KL to the model in nats per token"


def png(front: Front) -> bytes:
    """A PNG. Raises InputError[backend-missing] without Pillow."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise InputError("backend-missing", "a picture needs Pillow", where="--png", fix="pip install pillow") from None
    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    draw.font = ImageFont.load_default(16)
    best = sorted(front.best)
    xs = [x for x, _ in front.tried] + [x for x, _, _ in best]
    # a few wild starts would flatten the rest: the axis ends at three times the best plan's divergence, and they are drawn on its edge
    ys = [y for _, y, _ in best] or [y for _, y in front.tried]
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(0.0, 3 * max(ys) or 1.0)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = min(1.0, (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]))
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    for x in x_ticks:
        draw.line([place(x, y_ticks[0]), place(x, y_ticks[-1])], _LINE)
        draw.text((place(x, 0)[0], _HEIGHT - _BOTTOM + 8), f"{x:g}", _BLACK, anchor="ma")
    for y in y_ticks:
        draw.line([place(x_ticks[0], y), place(x_ticks[-1], y)], _LINE)
        draw.text((_LEFT - 8, place(x_ticks[0], y)[1]), f"{y:g}", _BLACK, anchor="rm")
    draw.text((_WIDTH / 2, 16), front.title, _BLACK, anchor="ma")
    draw.text((_WIDTH / 2, _HEIGHT - 16), f"{front.axis}; {front.upwards} upwards", _BLACK, anchor="ms")
    for x, y in front.tried:
        _dot(draw, place(x, y), 3, _GREY)
    draw.line([place(x, y) for x, y, _ in best], _BLUE, 2)
    for x, y, label in best:
        _dot(draw, place(x, y), 5, _BLUE)
        right = place(x, y)[0] > _WIDTH / 2
        draw.text((place(x, y)[0] + (-9 if right else 9), place(x, y)[1] - 9), label, _BLACK, anchor="rs" if right else "ls")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _dot(draw: ImageDraw, centre: tuple[float, float], radius: int, colour: str) -> None:
    x, y = centre
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], colour)


def _ticks(low: float, high: float) -> list[float]:
    """About six round numbers that enclose the range."""
    span = (high - low) or abs(high) or 1.0
    raw = span / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw)
    first, last = math.floor(low / step), math.ceil((high if high > low else low + step) / step)
    return [round(step * i, 12) for i in range(first, last + 1)]
