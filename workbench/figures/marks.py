"""What a still picture is made of: lines, areas, dots, letters and images, and SVG as one way to write them."""

from __future__ import annotations

import math
from base64 import b64encode
from dataclasses import dataclass, field
from html import escape
from typing import Literal

import numpy as np

from workbench.figures.style import GREY

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom
PNG = "data:image/png;base64,"


@dataclass(frozen=True, slots=True)
class Mark:
    """One thing to draw; ``clip`` is the number of the plot area it stays within, -1 for none."""

    shape: Literal["line", "area", "dot", "text", "image"]
    points: tuple[Point, ...]
    colour: str = GREY  # of the line, the area's ground, the dot or the letters
    edge: str = ""  # colour of an outline
    width: float = 1.0  # of a line or outline
    dash: tuple[float, ...] = ()
    opacity: float = 1.0
    clip: int = -1
    radius: float = 0.0
    text: str = ""
    size: float = 12.0
    anchor: Literal["start", "middle", "end"] = "start"
    angle: int = 0  # of letters, clockwise: 0 or -90
    bold: bool = False
    tip: str = ""  # shown under the pointer
    png: bytes = b""  # of an image, stretched between its two points


@dataclass(slots=True)
class Picture:
    """What was drawn; ``svg()`` and ``png()`` write it. ``title`` is its text for those who do not see it."""

    width: int
    height: int
    title: str
    clips: list[Box] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    def svg(self) -> str:
        """A whole SVG document without script, font or anything else from outside; all text is escaped."""
        parts: list[str] = []
        inside = -1
        for mark in self.marks:
            if mark.clip != inside:
                parts.append("</svg>" if inside >= 0 else "")
                parts.append(_opening(*self.clips[mark.clip]) if mark.clip >= 0 else "")
                inside = mark.clip
            parts.append(_svg(mark))
        parts.append("</svg>" if inside >= 0 else "")
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" font-family="sans-serif" role="img"><title>{escape(self.title)}</title>'
            f"{''.join(parts)}</svg>"
        )

    def png(self, scale: int = 2) -> bytes:
        """On white, ``scale`` picture elements a pixel."""
        from workbench.figures.raster import raster

        return raster(self, scale)


def hatching(shape: str, box: Box) -> list[tuple[Point, Point]]:
    """Strokes of a pattern ("/", "x", "." or none) that lie within ``box``."""
    x0, y0, x1, y1 = box
    if not shape or x1 - x0 < 1 or y1 - y0 < 1:
        return []
    if shape == ".":
        return [((x, y), (x + 1.5, y)) for x in np.arange(x0 + 2, x1 - 1, 5.0) for y in np.arange(y0 + 3, y1, 5.0)]
    width, height = x1 - x0, y1 - y0
    strokes: list[tuple[Point, Point]] = []
    for offset in np.arange(4.0, width + height, 8.0):
        rising = (
            (x0 + max(0.0, offset - height), y0 + min(height, offset)),
            (x0 + min(width, offset), y0 + max(0.0, offset - width)),
        )
        strokes.append(rising)
        if shape == "x":
            strokes.append(tuple((x0 + x1 - x, y) for x, y in rising))  # type: ignore[arg-type]
    return strokes


def corners(box: Box) -> tuple[Point, ...]:
    x0, y0, x1, y1 = box
    return ((x0, y0), (x1, y0), (x1, y1), (x0, y1))


def polygon(symbol: str, at: Point, r: float) -> list[Point]:
    x, y = at
    if symbol == "square":
        return list(corners((x - r, y - r, x + r, y + r)))
    count, start = (4, 0.0) if symbol == "diamond" else (10, -math.pi / 2)
    turns = [start + 2 * math.pi * k / count for k in range(count)]
    reach = [1.2 * r if symbol == "diamond" or k % 2 == 0 else 0.5 * r for k in range(count)]
    return [(x + d * math.cos(t), y + d * math.sin(t)) for t, d in zip(turns, reach, strict=True)]


def arrow(before: Point, at: Point, size: float) -> list[Point]:
    turn = math.atan2(at[1] - before[1], at[0] - before[0])
    sides = [turn + math.pi - 0.4, turn + math.pi + 0.4]
    return [at, *((at[0] + size * math.cos(t), at[1] + size * math.sin(t)) for t in sides)]


def _opening(x0: float, y0: float, x1: float, y1: float) -> str:
    """A drawing within the drawing cuts off what is outside, without an id that another picture of the page might have, too."""
    width, height = max(0.0, x1 - x0), max(0.0, y1 - y0)
    place = f'x="{x0:.1f}" y="{y0:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<svg {place} viewBox="{x0:.1f} {y0:.1f} {width:.1f} {height:.1f}">'


def _svg(mark: Mark) -> str:
    see = f' opacity="{mark.opacity:g}"' if mark.opacity != 1 else ""
    if mark.shape == "text":
        x, y = mark.points[0]
        turned = f' transform="rotate({mark.angle} {x:.1f} {y:.1f})"' if mark.angle else ""
        weight = ' font-weight="bold"' if mark.bold else ""
        return (
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{mark.size:g}" fill="{mark.colour}" text-anchor="{mark.anchor}"'
            f"{turned}{weight}{see}>{escape(mark.text)}</text>"
        )
    if mark.shape == "image":
        (x0, y0), (x1, y1) = mark.points
        return (
            f'<image x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}" preserveAspectRatio="none" '
            f'style="image-rendering:pixelated" href="{PNG}{b64encode(mark.png).decode()}"/>'
        )
    tip = f"<title>{escape(mark.tip)}</title>" if mark.tip else ""
    edge = f' stroke="{mark.edge}" stroke-width="{mark.width:g}"' if mark.edge else ""
    if mark.shape == "dot":
        x, y = mark.points[0]
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{mark.radius:g}" fill="{mark.colour}"{edge}{see}>{tip}</circle>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in mark.points)
    if mark.shape == "area":
        return f'<polygon points="{path}" fill="{mark.colour}"{edge}{see}>{tip}</polygon>'
    dash = f' stroke-dasharray="{" ".join(f"{d:g}" for d in mark.dash)}"' if mark.dash else ""
    return f'<polyline points="{path}" fill="none" stroke="{mark.colour}" stroke-width="{mark.width:g}"{dash}{see}/>'
