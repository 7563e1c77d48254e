"""Charts as still pictures, SVG or PNG, without a browser: what a page shows where neither kernel nor plotly's script is.

Draws the part of plotly that our charts use: bars, curves, areas, markers, images, labels, lines and shades, linear,
logarithmic and category axes, subplots, legends. Anything else is refused rather than drawn wrongly. Sizes are pixels, y
downwards.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from html import unescape
from itertools import pairwise
from textwrap import wrap
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from workbench.errors import InputError
from workbench.figures.axes import Axis, ticks
from workbench.figures.marks import PNG, Box, Mark, Picture, Point, arrow, corners, hatching, polygon
from workbench.figures.style import BLUE, GREEN, GREY, GRID, ORANGE, PINK, SKY, VERMILLION

WIDTH = 760
COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PINK, SKY, GREY)  # of traces that say none
DASHES = {"dash": (9, 6), "dot": (2, 4), "dashdot": (9, 4, 2, 4), "longdash": (14, 6), "longdashdot": (14, 4, 2, 4)}
DRAWN = ("bar", "scatter")
LETTER = 0.56  # mean width of a letter, as a share of its size
LEGEND_ROW = 19
MOST_TIPS = 200  # of a trace
_COLOUR = re.compile(r"#[0-9a-fA-F]{3,8}|rgba?\([\d.,% ]+\)|[a-z]{3,20}")


def picture(chart: go.Figure | Mapping[str, Any], width: int = WIDTH) -> Picture:
    """``chart``, a figure or its JSON, drawn ``width`` pixels wide. InputError for traces that are neither bars nor curves."""
    plain = chart.to_plotly_json() if isinstance(chart, go.Figure) else chart
    if not isinstance(plain, Mapping) or not isinstance(plain.get("data", ()), list | tuple):
        raise InputError(f"a chart is a plotly figure or its JSON, got {type(chart).__name__}")
    try:
        return _Drawing(list(plain.get("data", ())), dict(plain.get("layout") or {}), width).picture
    except InputError:
        raise
    except Exception as error:  # whatever a damaged or foreign chart provokes
        raise InputError(f"the chart could not be drawn ({type(error).__name__}: {str(error):.80})") from None


def lines_of(text: Any) -> list[str]:
    """A chart's text line by line, its markup taken off. Not yet escaped."""
    return [unescape(re.sub(r"<[^>]*>", "", line)) for line in re.split(r"<br ?/?>", str(text or ""))]


def values_of(given: Any) -> list[Any]:
    """The values of a trace's field: a list, an array, one value, or an array as plotly packs it into JSON."""
    if isinstance(given, Mapping) and "bdata" in given:
        return np.frombuffer(base64.b64decode(given["bdata"]), np.dtype(str(given["dtype"]))).tolist()
    if isinstance(given, np.ndarray):
        return given.ravel().tolist()
    return [] if given is None else list(given) if isinstance(given, list | tuple | range) else [given]


class _Drawing:
    """Margins, axes, traces, legend and title of one chart, in the order in which they are painted."""

    def __init__(self, data: list[Any], layout: dict[str, Any], width: int) -> None:
        self.layout = layout
        self.traces = [t for t in data if t.get("visible", True) is True]
        strange = sorted({str(t.get("type", "scatter")) for t in self.traces} - set(DRAWN))
        if strange:
            raise InputError(f"a still picture shows bars and curves, not {', '.join(strange)}; open the chart in a notebook")
        spec = layout.get("title") or {}
        given = [line for line in lines_of(spec.get("text")) if line]
        room = int((width - 90) / (LETTER * float((spec.get("font") or {}).get("size") or 14)))
        self.title = [part for line in given for part in wrap(line, room)]
        self.more_lines = len(self.title) - len(given)  # a page's chart would cut them off
        height = int(layout.get("height") or 450) + 17 * self.more_lines
        self.picture = Picture(width, height, " ".join(given) or "chart")
        self.axes = self._axes()
        self.stacks: dict[Any, float] = {}
        self.bars = [self._bars(t) if t.get("type") == "bar" else None for t in self.traces]
        self.curves = [self._curve(t) if t.get("type") != "bar" else [] for t in self.traces]
        for axis in self.axes.values():
            axis.settle([other for other in self.axes.values() if other.group == axis.group])
        self._place()
        for name, axis in self.axes.items():
            self._grid(name, axis)
        self._images()
        self._shapes(below=True)
        for i, trace in enumerate(self.traces):
            colour = COLOURS[i % len(COLOURS)]
            (self._draw_bars if trace.get("type") == "bar" else self._draw_curve)(i, trace, colour)
        self._shapes(below=False)
        for note in layout.get("annotations") or ():
            self._note(note)
        self._legend()
        self._title()

    # -- axes and margins --------------------------------------------------------------------------------------------------

    def _axes(self) -> dict[str, Axis]:
        names = {trace.get("xaxis", "x") for trace in self.traces} | {trace.get("yaxis", "y") for trace in self.traces}
        axes = {}
        for name in sorted(names | {"x", "y"}):
            spec = self.layout.get(f"{name[0]}axis{name[1:]}") or {}
            own = [v for t in self.traces if t.get(f"{name[0]}axis", name[0]) == name for v in values_of(t.get(name[0]))]
            axes[name] = Axis(name, spec, own)
        return axes

    def _pair(self, trace: Mapping[str, Any]) -> tuple[Axis, Axis]:
        return self.axes[trace.get("xaxis", "x")], self.axes[trace.get("yaxis", "y")]

    def _place(self) -> None:
        """Where the plot areas lie: margins as asked for, wider where labels or a legend need it."""
        margin: dict[str, float] = {"l": 80, "r": 80, "t": 100, "b": 80} | (self.layout.get("margin") or {})
        margin["t"] += 17 * self.more_lines
        for axis in self.axes.values():
            if axis.letter == "y" and axis.domain[0] < 0.02 and axis.on_edge(self.axes):
                titled = 18 if axis.title else 0
                margin["l"] = max(margin["l"], 14 + titled + LETTER * 12 * max(map(len, axis.labels()), default=0))
        self.rows = self._legend_rows(self.picture.width - margin["l"] - margin["r"])
        spec = self.layout.get("legend") or {}
        self.legend_below = spec.get("yref") == "container" or float(spec.get("y", 1)) <= 0
        need = LEGEND_ROW * len(self.rows)
        if self.rows and self.legend_below:
            margin["b"] = max(margin["b"], 52 + need)
        elif self.rows and need > LEGEND_ROW:  # above the plot area, under the title
            margin["t"] = max(margin["t"], 16 + 17 * len(self.title) + need)
        self.area: Box = (margin["l"], margin["t"], self.picture.width - margin["r"], self.picture.height - margin["b"])
        if self.area[3] - self.area[1] < 60:  # the legend took it all
            self.picture.height += int(60 - (self.area[3] - self.area[1]))
            self.area = (*self.area[:3], self.picture.height - margin["b"])
        left, top, right, bottom = self.area
        for axis in self.axes.values():
            a, b = axis.domain
            if axis.letter == "x":
                axis.between(left + a * (right - left), left + b * (right - left))
            else:
                axis.between(bottom - a * (bottom - top), bottom - b * (bottom - top))
        self.clip_of: dict[tuple[str, str], int] = {}

    def _clip(self, x: Axis, y: Axis) -> int:
        key = (x.name, y.name)
        if key not in self.clip_of:
            self.clip_of[key] = len(self.picture.clips)
            self.picture.clips.append((min(x.ends), min(y.ends), max(x.ends), max(y.ends)))
        return self.clip_of[key]

    def _add(self, shape: Any, points: Iterable[Point], **look: Any) -> None:
        look = {name: value for name, value in look.items() if value is not None}
        for name in ("colour", "edge"):
            if name in look:
                look[name] = look[name] if _COLOUR.fullmatch(str(look[name])) else GREY
        self.picture.marks.append(Mark(shape, tuple(points), **look))

    def _grid(self, name: str, axis: Axis) -> None:
        across = self.axes.get(str(axis.spec.get("anchor") or ("y" if axis.letter == "x" else "x")))
        if across is None or not axis.spec.get("visible", True):
            return
        start, end = across.ends
        for value, label in ticks(axis):
            at = axis.at(value)
            if axis.letter == "x":
                line, place, anchor = ((at, start), (at, end)), (at, max(start, end) + 16), "middle"
            else:
                line, place, anchor = ((start, at), (end, at)), (min(start, end) - 7, at + 4), "end"
            if axis.spec.get("showgrid", True) and axis.kind != "category":
                zero = axis.spec.get("zeroline") and value == 0
                self._add("line", line, colour=axis.spec.get("zerolinecolor") if zero else GRID)
            if axis.spec.get("showticklabels", True):
                self._add("text", (place,), text=label, anchor=anchor)
        for text in lines_of(axis.title)[:1] if axis.title else ():
            middle = sum(axis.ends) / 2
            if axis.letter == "x":
                self._add("text", ((middle, max(start, end) + 36),), text=text, anchor="middle", size=13.0)
            else:
                widest = max((len(label) for _, label in ticks(axis)), default=0)
                self._add(
                    "text", ((min(start, end) - 20 - LETTER * 12 * widest, middle),), text=text, anchor="middle", angle=-90,
                    size=13.0,
                )  # fmt: skip

    def _images(self) -> None:
        """PNG images that lie on the axes, each from its left upper corner on."""
        for spec in self.layout.get("images") or ():
            x, y = self.axes.get(str(spec.get("xref"))), self.axes.get(str(spec.get("yref")))
            source = str(spec.get("source") or "")
            if x is None or y is None or not source.startswith(PNG):
                raise InputError("a still picture shows PNG images that lie on axes; open the chart in a notebook")
            left, top = float(spec["x"]), float(spec["y"])
            down = 1 if y.high < y.low else -1  # the axis of a map counts downwards
            ends = ((x.px(left), y.px(top)), (x.px(left + spec["sizex"]), y.px(top + down * spec["sizey"])))
            self._add("image", ends, png=base64.b64decode(source[len(PNG) :]), clip=self._clip(x, y))

    # -- traces ------------------------------------------------------------------------------------------------------------

    def _bars(self, trace: Mapping[str, Any]) -> list[tuple[float, float, float, float]]:
        """Every bar as (middle, thickness, from, to) along its axes, told to them; stacked on what came before."""
        flat = trace.get("orientation") == "h"
        x, y = self._pair(trace)
        along, across = (x, y) if flat else (y, x)
        lengths = [_number(v) for v in values_of(trace.get("x" if flat else "y"))]
        given = values_of(trace.get("y" if flat else "x"))
        places = [across.number(v) for v in given] if given else [float(i) for i in range(len(lengths))]
        bases, widths = values_of(trace.get("base")), values_of(trace.get("width"))
        mode = self.layout.get("barmode", "group")
        together = [t for t in self.traces if t.get("type") == "bar" and self._pair(t) == (x, y)]
        shares = len(together) if mode == "group" and not widths else 1
        room = (1 - float(self.layout.get("bargap", 0.2))) * _gap([p for p in places if p is not None])
        bars = []
        for i, (place, length) in enumerate(zip(places, lengths, strict=False)):
            if place is None or length is None:
                continue
            start = float(_item(bases, i) or 0.0)
            if not bases and mode in ("stack", "relative"):
                key = (x.name, y.name, place, length < 0)
                start = self.stacks.get(key, 0.0)
                self.stacks[key] = start + length
            width = float(_item(widths, i) or room / shares)
            middle = place if shares == 1 else place + (together.index(trace) - (shares - 1) / 2) * room / shares
            bars.append((middle, width, start, start + length))
            across.reach(middle - width / 2, middle + width / 2, pad=False)
            for end in (start, start + length):
                if along.kind != "log" or end > 0:
                    along.reach(math.log10(end) if along.kind == "log" else end, pad=end != 0)
        if not bases and bars and along.kind == "linear":
            along.reach(0.0, pad=False)
        return bars

    def _draw_bars(self, i: int, trace: Mapping[str, Any], default: str) -> None:
        flat = trace.get("orientation") == "h"
        x, y = self._pair(trace)
        along, across = (x, y) if flat else (y, x)
        look, clip = trace.get("marker") or {}, self._clip(x, y)
        edge, pattern = look.get("line") or {}, look.get("pattern") or {}
        opacity = float(trace.get("opacity") or 1) * float(look.get("opacity") or 1)
        texts, tips = values_of(trace.get("text")), self._tips(trace, [end - start for _, _, start, end in self.bars[i] or ()])
        for n, (middle, width, start, end) in enumerate(self.bars[i] or ()):
            a, b = across.px(middle - width / 2), across.px(middle + width / 2)
            low = along.ends[0] if along.kind == "log" and start <= 0 else along.at(start)
            high = along.at(end) if along.kind != "log" or end > 0 else low
            box = (min(low, high), min(a, b), max(low, high), max(a, b)) if flat else (min(a, b), min(low, high), max(a, b),
                                                                                       max(low, high))  # fmt: skip
            outline = float(edge.get("width") or 0)
            self._add(
                "area", corners(box), colour=_item(values_of(look.get("color")), n) or default, opacity=opacity, clip=clip,
                edge=edge.get("color") if outline and isinstance(edge.get("color"), str) else None, width=outline,
                tip=tips[n] if n < len(tips) else None,
            )  # fmt: skip
            for line in hatching(str(_item(values_of(pattern.get("shape")), n) or ""), box):
                self._add("line", line, colour=pattern.get("fgcolor") or "#ffffff", width=1.2, clip=clip)
            if texts and trace.get("textposition") != "none" and (text := lines_of(_item(texts, n))[0]):
                inside = trace.get("textposition") != "outside" and LETTER * 12 * len(text) + 8 < box[2] - box[0]
                ink = (trace.get("insidetextfont") or {}).get("color") or "#ffffff" if inside else GREY
                place = (box[2] - 5 if inside else box[2] + 5, (box[1] + box[3]) / 2 + 4)
                self._add("text", (place,), text=text, colour=ink, anchor="end" if inside else "start")

    def _tips(self, trace: Mapping[str, Any], values: Sequence[float]) -> list[str]:
        """What the pointer tells of every bar or point: its own text, or name and number; nothing where there are too many."""
        if len(values) > MOST_TIPS:
            return []
        own, name = values_of(trace.get("hovertext")), lines_of(trace.get("name"))[0]
        if len(own) == len(values):
            return ["; ".join(lines_of(text)) for text in own]
        return [f"{name}: {value:,.4g}" if name else f"{value:,.4g}" for value in values]

    def _curve(self, trace: Mapping[str, Any]) -> list[tuple[float, float, float] | None]:
        """Points as (x, y, ground under it) along the axes, None for a gap; areas stand on those before them."""
        x, y = self._pair(trace)
        xs, ys = values_of(trace.get("x")), values_of(trace.get("y"))
        xs = xs or list(range(len(ys)))
        points: list[tuple[float, float, float] | None] = []
        group = trace.get("stackgroup")
        for a, b in zip(xs, ys, strict=False):
            px, py = x.number(a), y.number(b)
            if px is None or py is None:
                points.append(None)
                continue
            ground = 0.0
            if group:
                ground = self.stacks.get((group, px), 0.0)
                py = self.stacks[(group, px)] = ground + py
            points.append((px, py, ground))
            marked = "markers" in str(trace.get("mode", ""))
            x.reach(px, pad=marked)
            y.reach(py)
        y.reach(*(end for _, *ends in self._errors(trace) for end in ends))
        return points

    def _draw_curve(self, i: int, trace: Mapping[str, Any], default: str) -> None:
        x, y = self._pair(trace)
        points, clip, mode = self.curves[i], self._clip(x, y), str(trace.get("mode", "lines"))
        line, look = trace.get("line") or {}, trace.get("marker") or {}
        colour = line.get("color") or (look.get("color") if isinstance(look.get("color"), str) else None) or default
        opacity = float(trace.get("opacity") or 1)
        self._draw_errors(trace, colour)
        for run in _runs(points):
            path = [(x.px(a), y.px(b)) for a, b, _ in run]
            if line.get("shape") == "hv":  # sideways first, then up or down
                path = path[:1] + [at for (_, low), end in pairwise(path) for at in ((end[0], low), end)]
            if trace.get("stackgroup") or trace.get("fill") in ("tozeroy", "tonexty"):
                below = [(x.px(a), y.px(ground)) for a, _, ground in reversed(run)]
                self._add("area", [*path, *below], colour=trace.get("fillcolor") or colour, clip=clip, opacity=opacity)
            elif trace.get("fill") == "toself":
                self._add("area", path, colour=trace.get("fillcolor") or colour, clip=clip, opacity=opacity)
                shape = str((trace.get("fillpattern") or {}).get("shape") or "")
                box = (min(p[0] for p in path), min(p[1] for p in path), max(p[0] for p in path), max(p[1] for p in path))
                for stroke in hatching(shape, box):
                    self._add("line", stroke, colour="#ffffff", width=1.2, clip=clip)
            width = float(line.get("width", 2))
            if "lines" in mode and width and len(path) > 1:
                self._add("line", path, colour=colour, width=width, dash=DASHES.get(str(line.get("dash")), ()), clip=clip,
                          opacity=opacity)  # fmt: skip
        texts, ys = values_of(trace.get("text")), values_of(trace.get("y"))
        numbers = [v for v in ys if isinstance(v, int | float)]
        tips = self._tips(trace, numbers) if len(numbers) == len(points) and trace.get("hoverinfo") != "skip" else []
        before: Point | None = None
        for n, point in enumerate(points):
            if point is None:
                before = None
                continue
            at = (x.px(point[0]), y.px(point[1]))
            if "markers" in mode:
                first = len(self.picture.marks)
                self._marker(at, before, look, n, colour, clip)
                if tips and len(self.picture.marks) > first:
                    self.picture.marks[first] = replace(self.picture.marks[first], tip=tips[n])
            if "text" in mode and texts:
                position = str(_item(values_of(trace.get("textposition")), n) or "")
                right, lower = "right" in position, -9 if "top" in position else 14 if "bottom" in position else 4
                font = float((trace.get("textfont") or {}).get("size") or 12)
                place = (at[0] + (6 if right else 0), at[1] + lower)
                said = lines_of(_item(texts, n))[0]
                self._add("text", (place,), text=said, anchor="start" if right else "middle", size=font)
            before = at

    def _errors(self, trace: Mapping[str, Any]) -> list[tuple[float, float, float]]:
        """Every point that says how far it may be off, as (x, lower end, upper end) along the axes."""
        error = trace.get("error_y") or {}
        up, x, y = values_of(error.get("array")), *self._pair(trace)
        down = values_of(error["arrayminus"]) if error.get("arrayminus") is not None else up
        ys = values_of(trace.get("y")) if up else []
        ends = []
        for n, (a, b) in enumerate(zip(values_of(trace.get("x")) or range(len(ys)), ys, strict=False)):
            if _number(b) is not None and (_item(up, n) or _item(down, n)):
                low, high = y.number(b - (_item(down, n) or 0)), y.number(b + (_item(up, n) or 0))
                place = x.number(a), y.number(b) if low is None else low, high  # a logarithmic axis has no place below 0
                ends += [place] if None not in place else []
        return ends  # type: ignore[return-value]

    def _draw_errors(self, trace: Mapping[str, Any], default: str) -> None:
        error, (x, y) = trace.get("error_y") or {}, self._pair(trace)
        ink, thick = error.get("color") or default, float(error.get("thickness") or 2)
        half = float(error.get("width", 4))
        for at, low, high in self._errors(trace):
            place, ends = x.px(at), (y.px(low), y.px(high))
            self._add("line", [(place, end) for end in ends], colour=ink, width=thick, clip=self._clip(x, y))
            for end in ends if half else ():
                self._add("line", ((place - half, end), (place + half, end)), colour=ink, width=thick, clip=self._clip(x, y))

    def _marker(self, at: Point, before: Point | None, look: Mapping[str, Any], n: int, colour: str, clip: int) -> None:
        size = float(_item(values_of(look.get("size", 6)), n) or 0)
        if not size:
            return
        symbol = str(_item(values_of(look.get("symbol")), n) or "circle")
        colour = _item(values_of(look.get("color")), n) or colour
        edge = look.get("line") or {}
        self._symbol(symbol, at, size, colour, edge, clip, before)

    def _symbol(
        self, symbol: str, at: Point, size: float, colour: str, edge: Mapping[str, Any], clip: int, before: Point | None = None
    ) -> None:
        (x, y), r = at, size / 2
        outline = {"edge": edge.get("color") if edge.get("width") else None, "width": float(edge.get("width") or 1)}
        if symbol.endswith("-open"):
            symbol, colour, outline = symbol.removesuffix("-open"), "none", {"edge": colour, "width": 1.6}
        if symbol == "line-ns":
            self._add("line", ((x, y - r), (x, y + r)), colour=edge.get("color") or colour, width=outline["width"], clip=clip)
        elif symbol in ("x", "cross"):
            tilt = 0.8 * r if symbol == "x" else 0.0
            for a, b in ((tilt, tilt), (-tilt, tilt)) if tilt else ((r, 0), (0, r)):
                self._add("line", ((x - a, y - b), (x + a, y + b)), colour=colour, width=max(2.0, size / 3.5), clip=clip)
        elif symbol == "arrow" and before is not None:
            self._add("area", arrow(before, at, size), colour=colour, clip=clip)
        elif symbol in ("square", "diamond", "star"):
            self._add("area", polygon(symbol, at, r), colour=colour, clip=clip, **outline)
        else:
            self._add("dot", (at,), radius=r, colour=colour, clip=clip, **outline)

    # -- what stands around and over it --------------------------------------------------------------------------------------

    def _ref(self, ref: Any, value: Any, letter: str) -> float:
        """Pixels of a place on an axis, on an axis's domain, or on the paper."""
        name = str(ref or letter)
        if name == "paper" or name.partition(" ")[0] not in self.axes:
            left, top, right, bottom = self.area
            return left + float(value) * (right - left) if letter == "x" else bottom - float(value) * (bottom - top)
        axis = self.axes[name.partition(" ")[0]]
        if name.endswith("domain"):
            return axis.ends[0] + float(value) * (axis.ends[1] - axis.ends[0])
        number = axis.number(value)
        return axis.px(number if number is not None else 0.0)

    def _shapes(self, below: bool) -> None:
        for shape in self.layout.get("shapes") or ():
            if (shape.get("layer") == "below") != below:
                continue
            x = [self._ref(shape.get("xref"), shape.get(end), "x") for end in ("x0", "x1")]
            y = [self._ref(shape.get("yref"), shape.get(end), "y") for end in ("y0", "y1")]
            line = shape.get("line") or {}
            if shape.get("type") == "rect":
                box = (min(x), min(y), max(x), max(y))
                self._add("area", corners(box), colour=shape.get("fillcolor"), opacity=float(shape.get("opacity") or 1))
            else:
                self._add("line", zip(x, y, strict=True), colour=line.get("color"), width=float(line.get("width") or 1),
                          dash=DASHES.get(str(line.get("dash")), ()))  # fmt: skip

    def _note(self, note: Mapping[str, Any]) -> None:
        x = self._ref(note.get("xref"), note.get("x", 0.5), "x") + float(note.get("xshift") or 0)
        y = self._ref(note.get("yref"), note.get("y", 0.5), "y") - float(note.get("yshift") or 0)
        font = note.get("font") or {}
        lines, size = lines_of(note.get("text")), float(font.get("size") or 12)
        anchors: dict[Any, Literal["start", "middle", "end"]] = {"left": "start", "right": "end"}
        anchor = anchors.get(note.get("xanchor"), "middle")
        wide = LETTER * size * max(map(len, lines), default=0)
        if anchor != "end" and x + wide / (1 if anchor == "start" else 2) > self.picture.width:
            x, anchor = min(x, self.picture.width - 4), "end"  # a page's chart would cut it off
        first = {"bottom": -(len(lines) - 1) * 16 - 4, "top": size}.get(str(note.get("yanchor")), 4.0)
        for n, text in enumerate(lines):
            self._add("text", ((x, y + first + 16 * n),), text=text, size=size, colour=font.get("color"), anchor=anchor)

    def _legend_rows(self, room: float) -> list[list[int]]:
        """Numbers of the traces in the legend, as many a row as fit."""
        named = [i for i, t in enumerate(self.traces) if t.get("showlegend", True) and t.get("name")]
        wanted = self.layout.get("showlegend")
        if wanted is False or (wanted is None and len(named) < 2 and not any(t.get("showlegend") for t in self.traces)):
            return []
        rows: list[list[int]] = []
        left = 0.0
        for i in named:
            width = self._entry_width(i)
            if not rows or left < width:
                rows.append([])
                left = room
            rows[-1].append(i)
            left -= width
        return rows

    def _entry_width(self, i: int) -> float:
        return 46 + LETTER * 12 * len(lines_of(self.traces[i].get("name"))[0])

    def _legend(self) -> None:
        if not self.rows:
            return
        need = LEGEND_ROW * len(self.rows)
        y = self.picture.height - need + 6 if self.legend_below else self.area[1] - need + 6
        for row in self.rows:
            x = self.area[0]
            for i in row:
                trace, default = self.traces[i], COLOURS[i % len(COLOURS)]
                line, look = trace.get("line") or {}, trace.get("marker") or {}
                filled = trace.get("type") == "bar" or trace.get("stackgroup") or trace.get("fill") == "toself"
                colour = trace.get("fillcolor") if filled and trace.get("type") != "bar" else None
                colour = colour or line.get("color") or _item(values_of(look.get("color")), 0) or default
                if filled:
                    box = (x, y - 6, x + 22, y + 6)
                    self._add("area", corners(box), colour=colour)
                    shape = (look.get("pattern") or trace.get("fillpattern") or {}).get("shape")
                    for stroke in hatching(str(_item(values_of(shape), 0) or ""), box):
                        self._add("line", stroke, colour="#ffffff", width=1.2)
                else:
                    mode = str(trace.get("mode", "lines"))
                    if "lines" in mode:
                        dash = DASHES.get(str(line.get("dash")), ())
                        self._add("line", ((x, y), (x + 26, y)), colour=colour, width=float(line.get("width", 2)), dash=dash)
                    if "markers" in mode:
                        symbol = str(_item(values_of(look.get("symbol")), 0) or "circle")
                        size = min(12.0, max((float(s) for s in values_of(look.get("size", 6)) if s), default=6.0))
                        ink = _item(values_of(look.get("color")), 0) or colour
                        self._symbol(symbol, (x + 13, y), size, ink, look.get("line") or {}, -1, (x, y))
                self._add("text", ((x + 32, y + 4),), text=lines_of(trace.get("name"))[0])
                x += self._entry_width(i)
            y += LEGEND_ROW

    def _title(self) -> None:
        spec = self.layout.get("title") or {}
        left = self.area[0] if spec.get("xref") == "paper" else 8.0
        size = float((spec.get("font") or {}).get("size") or 14)
        for n, text in enumerate(self.title):
            self._add("text", ((left, 22 + 17 * n),), text=text, size=size, colour=(spec.get("font") or {}).get("color"))


def _runs(points: Sequence[Any]) -> list[list[Any]]:
    runs: list[list[Any]] = [[]]
    for point in points:
        if point is None:
            runs.append([])
        else:
            runs[-1].append(point)
    return [run for run in runs if run]


def _gap(places: Sequence[float]) -> float:
    ordered = sorted(set(places))
    return min((b - a for a, b in zip(ordered, ordered[1:], strict=False)), default=1.0)


def _item(values: Sequence[Any], i: int) -> Any:
    """The i-th of several, or the one there is."""
    return None if not values else values[0] if len(values) == 1 else values[i] if i < len(values) else None


def _number(value: Any) -> float | None:
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None
