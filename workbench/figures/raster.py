"""A still picture as PNG, drawn by Pillow; letters are of the font it brings along."""

from __future__ import annotations

import io
import re
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageColor, ImageDraw, ImageFont

if TYPE_CHECKING:
    from workbench.figures.marks import Mark, Picture

SMOOTH = 2  # drawn larger by this and then scaled down, which smooths edges


def raster(drawn: Picture, scale: int) -> bytes:
    """PNG bytes, ``scale`` picture elements a pixel, on white."""
    grow = scale * SMOOTH
    size = (drawn.width * grow, drawn.height * grow)
    image = Image.new("RGB", size, "white")
    layer, inside = image, -1
    for mark in drawn.marks:
        if mark.clip != inside:
            _merge(image, layer, drawn, inside, grow)
            inside = mark.clip
            layer = image.copy() if inside >= 0 else image
        if mark.shape == "image":
            _place(layer, mark, grow)
        else:
            _paint(ImageDraw.Draw(layer, "RGBA"), mark, grow)
    _merge(image, layer, drawn, inside, grow)
    small = image.resize((drawn.width * scale, drawn.height * scale), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.quantize(128).save(out, "PNG", optimize=True)
    return out.getvalue()


def _merge(image: Image.Image, layer: Image.Image, drawn: Picture, clip: int, grow: int) -> None:
    """What was drawn beyond its plot area is left behind."""
    if clip >= 0:
        x0, y0, x1, y1 = (round(side * grow) for side in drawn.clips[clip])
        if x1 > x0 and y1 > y0:
            image.paste(layer.crop((x0, y0, x1, y1)), (x0, y0))


def _place(layer: Any, mark: Mark, grow: int) -> None:
    """An image of its own, stretched without smoothing, so that cells keep their edges."""
    (x0, y0), (x1, y1) = mark.points
    size = max(1, round((x1 - x0) * grow)), max(1, round((y1 - y0) * grow))
    own = Image.open(io.BytesIO(mark.png)).convert("RGBA").resize(size, Image.Resampling.NEAREST)
    layer.paste(own, (round(x0 * grow), round(y0 * grow)), own)


def _paint(pen: Any, mark: Mark, grow: int) -> None:
    points = [(x * grow, y * grow) for x, y in mark.points]
    ink = _ink(mark.colour, mark.opacity)
    edge = _ink(mark.edge, mark.opacity) if mark.edge else None
    width = max(1, round(mark.width * grow))
    if mark.shape == "text":
        _letters(pen, mark, points[0], ink, grow)
    elif mark.shape == "dot":
        (x, y), r = points[0], mark.radius * grow
        pen.ellipse((x - r, y - r, x + r, y + r), fill=ink, outline=edge, width=width)
    elif mark.shape == "area":
        if len(points) > 2:
            pen.polygon(points, fill=ink, outline=edge, width=width)
    elif mark.dash:
        for start, end in _dashes(points, [d * grow for d in mark.dash]):
            pen.line((start, end), fill=ink, width=width)
    else:
        pen.line(points, fill=ink, width=width, joint="curve")


def _letters(pen: Any, mark: Mark, at: tuple[float, float], ink: Any, grow: int) -> None:
    font = _font(round(mark.size * grow))
    anchor = {"start": "ls", "middle": "ms", "end": "rs"}[mark.anchor]
    text = mark.text.replace("\u2212", "-")
    if not mark.angle:
        pen.text(at, text, fill=ink, font=font, anchor=anchor)
        return
    wide = round(font.getlength(text)) + 4
    high = round(1.6 * mark.size * grow)
    own = Image.new("L", (wide, high), 0)
    ImageDraw.Draw(own).text((2, round(0.75 * high)), text, fill=255, font=font, anchor="ls")
    turned = own.rotate(90, expand=True)
    pen.bitmap((round(at[0] - 0.75 * high), round(at[1] - wide / 2)), turned, fill=ink)


@lru_cache(maxsize=16)
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _ink(colour: str, opacity: float) -> tuple[int, int, int, int] | None:
    if colour in ("none", "transparent"):
        return None
    alpha = 1.0
    if found := re.fullmatch(r"rgba\(([^)]*),([^),]*)\)", colour):
        colour, alpha = f"rgb({found[1]})", float(found[2])
    try:
        red, green, blue, *_ = ImageColor.getrgb(colour)
    except ValueError:
        red = green = blue = 125
    return red, green, blue, round(255 * alpha * opacity)


def _dashes(points: list[tuple[float, float]], dash: list[float]) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """The pieces of a broken line; the pattern runs on around its corners."""
    pieces = []
    part, left = 0, dash[0]
    for (x0, y0), (x1, y1) in pairwise(points):
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        gone = 0.0
        while length - gone > 1e-9:
            step = min(left, length - gone)
            if part % 2 == 0:
                a, b = gone / length, (gone + step) / length
                pieces.append(((x0 + a * (x1 - x0), y0 + a * (y1 - y0)), (x0 + b * (x1 - x0), y0 + b * (y1 - y0))))
            gone, left = gone + step, left - step
            if left <= 1e-9:
                part += 1
                left = dash[part % len(dash)]
    return pieces
