"""When each lane works: one step's compute, lookup, transfer and stall on one axis, and two runs above each other."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from textwrap import wrap
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.figures.style import BLUE, GREEN, GREY, ORANGE, PINK, SKY, VERMILLION, chart_text, styled
from workbench.intervals import busy_stretches, union
from workbench.trace import Origin, Span, Timeline

# A stall is hatched too, so that it can be told without colour.
LANE_COLOURS = {"ids": SKY, "compute": BLUE, "lookup": ORANGE, "transfer": GREEN, "stall": VERMILLION}
HATCHED = {"shape": "/", "fillmode": "overlay", "fgcolor": "#ffffff", "solidity": 0.3}
OTHER_COLOUR = PINK  # the streams of an imported trace
ALWAYS = ("compute", "lookup", "stall")  # lanes drawn even when empty: that nothing stalled is worth seeing
LANE_HEIGHT, LINE_HEIGHT, STEPS_HEIGHT, STEPS_GAP = 46, 17, 80, 76  # pixels
CUT = 4  # times the median step: what is longer, a prompt as a rule, would press all others flat
HOVER = {"bgcolor": "#ffffff", "font": {"color": "#222222"}}
TITLE_WIDTH = 88  # characters that fit a narrow notebook's column
# Beyond these a chart would be slow and large: a lane is drawn by how busy each pixel is, arrows and shades are left out.
MOST_SPANS, MOST_ARROWS, MOST_SHADES, PIXELS = 400, 300, 100, 800


def overlap_timeline(timeline: Timeline, step: int, name: str = "", *, chosen: str = "") -> go.Figure:
    """One step, or what ``name`` calls it: compute, lookup, transfer and stall against milliseconds since the step began.

    Bars are named by hovering, arrows run to a span from what it had to wait for, and the title says how much of
    the lookup compute hid. Measured and modelled spans never share a lane. A step without spans gives a chart that says so.
    With ``chosen``, words for this step, all steps of the run stand below with it marked; spans and steps then have the number
    of their step as ``customdata``.
    """
    return go.Figure(overlap_chart(timeline, step, name, chosen=chosen))


def overlap_chart(timeline: Timeline, step: int, name: str = "", *, chosen: str = "") -> dict[str, Any]:
    """``overlap_timeline`` as plain values, {"data", "layout"}: a live run draws it again and again, and checking every
    attribute of a figure takes many times as long as working out what it shows."""
    shown = timeline.of_step(step)
    lanes = _lanes(shown)
    count = len(lanes.yaxis["categoryarray"])
    lengths = step_lengths(timeline) if chosen else []
    layout = deepcopy(_frame())
    layout |= {"barmode": "overlay", "showlegend": False, "shapes": lanes.shapes, "annotations": []}
    grid_x, grid_y = layout.pop("xaxis"), layout.pop("yaxis")
    layout["xaxis"] = grid_x | {"anchor": "y", "title": {"text": "ms since the step began"}}
    layout["yaxis"] = grid_y | {"anchor": "x"} | lanes.yaxis
    if not shown.spans:
        middle = {"x": 0.5, "y": 0.5, "xref": "x domain", "yref": "y domain", "showarrow": False}
        layout["annotations"].append({"text": f"nothing was timed in step {step}"} | middle)
    if chosen:
        for bar in lanes.data:
            bar |= {"customdata": [step] * len(bar["x"])} if bar["type"] == "bar" else {}
    more = 0
    if len(lengths) > 1:
        more = STEPS_GAP + STEPS_HEIGHT
        high = LANE_HEIGHT * count + more
        steps = _steps(lengths, step, chosen, timeline.origin)
        layout["yaxis"]["domain"] = [more / high, 1]
        layout["xaxis2"] = grid_x | {"anchor": "y2"} | steps.xaxis
        layout["yaxis2"] = grid_y | {"anchor": "x2", "domain": [0, STEPS_HEIGHT / high]} | steps.yaxis
        layout["shapes"] += steps.shapes
        layout["annotations"] += steps.annotations
        lanes.data.extend(steps.data)
    title = f"{name or f'Step {step}'}: {overlap_numbers(shown)}"
    framing = _framing(title, _where(timeline), count, more)
    layout["title"] |= framing.pop("title")
    layout["margin"] |= framing.pop("margin")
    return {"data": lanes.data, "layout": layout | framing}


@cache
def _frame() -> dict[str, Any]:
    """The layout of the chart, without what differs from one to the next."""
    fig = styled(go.Figure(), "title", height=LANE_HEIGHT)
    fig.update_layout(hoverlabel=HOVER)
    return fig.to_plotly_json()["layout"]


@dataclass(slots=True)
class _Part:
    """What one row of a chart is made of, as plotly takes it."""

    data: list[dict[str, Any]]
    shapes: list[dict[str, Any]]
    yaxis: dict[str, Any]
    xaxis: dict[str, Any] = field(default_factory=dict)
    annotations: list[dict[str, Any]] = field(default_factory=list)


def step_lengths(timeline: Timeline) -> list[tuple[int, float, float]]:
    """(step, seconds from its first span's start to its last one's end, seconds of stall in it) of every step that was timed.

    Counted are spans of the timeline's own origin: a modelled stall does not lengthen a measured step.
    """
    ends: dict[int, list[float]] = {}
    for span, origin in zip(timeline.spans, timeline.origins(), strict=True):
        if origin == timeline.origin:
            found = ends.setdefault(span.step, [span.start_s, span.end_s, 0.0])
            found[0], found[1] = min(found[0], span.start_s), max(found[1], span.end_s)
            found[2] += span.end_s - span.start_s if span.lane == "stall" else 0.0
    return [(step, end - start, min(stall, end - start)) for step, (start, end, stall) in sorted(ends.items())]


def overlap_comparison(serial: Timeline, prefetched: Timeline) -> go.Figure:
    """The same work twice on one time axis, looked up when needed and looked up ahead, each with its totals."""
    runs = {"serial": serial, "prefetched": prefetched}
    totals = {name: 1e3 * _total_s(timeline) for name, timeline in runs.items()}
    titles = [f"{name}: {totals[name]:.2f} ms in all; {overlap_numbers(timeline)}" for name, timeline in runs.items()]
    fig = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.12, subplot_titles=titles)
    fig.update_annotations(x=0, xanchor="left", font_size=13)
    lanes = 0
    for row, timeline in enumerate(runs.values(), start=1):
        part = _lanes(timeline, str(row) if row > 1 else "")
        lanes += len(part.yaxis["categoryarray"])
        fig.add_traces(part.data)
        fig.update_layout(shapes=[*fig.layout.shapes, *part.shapes])
        fig.update_yaxes(part.yaxis, row=row)
    fig.update_layout(barmode="overlay", showlegend=False)
    fig.update_xaxes(title="ms since the run began", row=2)
    saved = totals["serial"] - totals["prefetched"]
    spared = 1e3 * (serial.stall_s - prefetched.stall_s)
    title = f"Looking up ahead {'saves' if saved >= 0 else 'costs'} {abs(saved):.2f} ms of {totals['serial']:.2f} ms"
    if serial.origin != "modelled":  # no two measurements take equally long
        title += f"; of that {spared:.2f} ms are stall it spared, the difference is noise and sharing of cores"
    same = (serial.origin, serial.device) == (prefetched.origin, prefetched.device)
    notes = _where(prefetched) if same else f"serial {_where(serial)} / prefetched {_where(prefetched)}"
    return framed(fig, title, notes, lanes + 1)


def overlap_numbers(timeline: Timeline) -> str:
    """How long the lookup took, how much of it compute hid, and how much was exposed as a stall."""
    fetch, stall = 1e3 * timeline.fetch_s, 1e3 * timeline.stall_s
    what = "lookup and copy" if any(s.lane == "transfer" for s in timeline.spans) else "lookup"
    if fetch == 0:
        return "no lookup"
    if stall > fetch * (1 + 1e-9):
        return f"{what} {fetch:.2f} ms, none of it hidden: {stall:.2f} ms of stall, handing the rows over included"
    hidden = fetch - stall
    return f"{what} {fetch:.2f} ms = {hidden:.2f} ms hidden ({hidden / fetch:.0%}) + {stall:.2f} ms exposed as stall"


def framed(fig: go.Figure, title: str, note: str, lanes: int) -> go.Figure:
    """The common frame, as high as its lanes; the note is wrapped, for a chart's title never is."""
    framing = _framing(title, note, lanes)
    styled(fig, framing["title"].pop("text"), height=framing.pop("height"))
    return fig.update_layout(hoverlabel=HOVER, **framing)


def _framing(title: str, note: str, lanes: int, more: int = 0) -> dict[str, Any]:
    """Title, margin and height of a chart of so many lanes with ``more`` pixels below them."""
    lines = [*wrap(title, TITLE_WIDTH), *wrap(note, TITLE_WIDTH)]
    above, below = 44 + LINE_HEIGHT * len(lines), 48
    at_top = {"y": 1.0, "yanchor": "top", "x": 0, "xref": "container", "pad": {"t": 20, "l": 4}}
    return {
        "title": {"text": "<br>".join(map(chart_text, lines))} | at_top,
        "margin": {"t": above, "b": below},
        "height": above + LANE_HEIGHT * lanes + more + below,
    }


def _lanes(timeline: Timeline, axis: str = "") -> _Part:
    """The lanes of ``timeline`` on the axes "x" and "y" with ``axis`` behind: "" or a number."""
    on = {"xaxis": f"x{axis}", "yaxis": f"y{axis}"}
    data: list[dict[str, Any]] = []
    began = min((s.start_s for s in timeline.spans), default=0.0)
    origins, labels = _labelled(timeline)
    used = set(labels.values())
    lanes: dict[str, list[Span]] = {lane: [] for lane in LANE_COLOURS if lane in used or lane in ALWAYS}
    for span in timeline.spans:
        lanes.setdefault(labels[id(span)], []).append(span)
    for label, spans in lanes.items():
        name = spans[0].lane if spans else label
        colour = LANE_COLOURS.get(name, OTHER_COLOUR)
        bars: dict[str, Any] = {
            "base": [1e3 * (s.start_s - began) for s in spans],
            "x": [1e3 * (s.end_s - s.start_s) for s in spans],
            "width": 0.6,
            "hovertext": [_hover(s, began, origins[id(s)]) for s in spans],
        }
        if len(spans) > MOST_SPANS:
            bars = _busy(spans, began, max(s.end_s for s in timeline.spans), origins[id(spans[0])])
        marker = {
            "color": colour,
            "line": {"color": colour, "width": 1},  # keeps the shortest spans visible
            "pattern": HATCHED if name == "stall" else _dotted(spans),
        }
        bar = {"type": "bar", "name": label, "y": [chart_text(label)] * len(bars["x"]), "orientation": "h", "hoverinfo": "text"}
        data.append(bar | {"marker": marker} | bars | on)
    stalls = [s for s in timeline.spans if s.lane == "stall"]
    shade = {"type": "rect", "fillcolor": LANE_COLOURS["stall"], "opacity": 0.15, "line": {"width": 0}, "layer": "below"}
    shade |= {"xref": on["xaxis"], "yref": f"{on['yaxis']} domain", "y0": 0, "y1": 1}
    shapes = [
        shade | {"x0": 1e3 * (span.start_s - began), "x1": 1e3 * (span.end_s - began)}
        for span in (stalls if len(stalls) <= MOST_SHADES else ())
    ]
    data.append(_arrows(timeline, labels, began) | on)
    order = [chart_text(label) for label in lanes]
    return _Part(data, shapes, {"categoryorder": "array", "categoryarray": order, "range": [len(lanes) - 0.5, -0.5]})


def _steps(lengths: list[tuple[int, float, float]], step: int, chosen: str, origin: Origin) -> _Part:
    """How long every step took and how much of it was stall; unseen bars as high as the axis take the pointer."""
    each = -(-len(lengths) // PIXELS)  # steps a bar, which shows the longest of them
    bars = [max(lengths[i : i + each], key=lambda one: one[1]) for i in range(0, len(lengths), each)]
    number = [n for n, _, _ in bars]
    total, stall = ([round(1e3 * bar[i], 4) for bar in bars] for i in (1, 2))  # ms
    rest = [round(a - b, 4) for a, b in zip(total, stall, strict=True)]
    middle = [lengths[i][0] + (min(each, len(lengths) - i) - 1) / 2 for i in range(0, len(lengths), each)]
    longest, usual = max(total), sorted(total)[len(total) // 2]
    top = min(longest, CUT * usual) or 1.0
    told = [
        f"step {n}: {a:.2f} ms" + (f", {b:.2f} ms of it stall" if b else "")
        for n, a, b in zip(number, total, stall, strict=True)
    ]
    plain, hatched = ({"color": c, "line": {"width": 0}} for c in (GREY, LANE_COLOURS["stall"]))
    unseen = {"color": "rgba(0,0,0,0)", "line": {"width": 0}}
    bar = {"type": "bar", "x": middle, "width": each, "xaxis": "x2", "yaxis": "y2", "hoverinfo": "skip"}
    data = [
        bar | {"name": "the rest of a step", "y": rest, "marker": plain},
        bar | {"name": "stall in a step", "y": stall, "base": rest, "marker": hatched | {"pattern": HATCHED}},
        bar | {"name": f"a step, {origin}", "y": [top] * len(bars), "marker": unseen, "customdata": number}
        | {"hoverinfo": "text", "hovertext": told},
    ]  # fmt: skip
    first, last = lengths[0][0], lengths[-1][0]
    on = {"xref": "x2", "yref": "y2 domain"}
    line = {"type": "line", "x0": step, "x1": step, "y0": 0, "y1": 1, "line": {"color": PINK, "width": 2, "dash": "dash"}}
    side = "right" if 2 * step > first + last else "left"  # so that it is not cut off
    said = {
        "text": chosen,
        "x": step,
        "y": 1,
        "xanchor": side,
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"color": GREY},
    }
    cut = f"; higher than {CUT} times the median is cut off" if longest > top else ""
    xaxis = {"title": {"text": f"step of the run{cut}"}, "range": [first - 0.5, last + 0.5]}
    yaxis = {"title": {"text": "ms"}, "range": [0, top], "nticks": 4}
    return _Part(data, [line | on], yaxis, xaxis | ({"dtick": 1} if last - first < 12 else {}), [said | on])


def _dotted(spans: list[Span]) -> dict[str, Any]:
    """Hashing is dotted, so that it can be told from the gathering after it."""
    if len(spans) > MOST_SPANS:
        return {"shape": ""}
    shapes = ["." if span.name.endswith(" hash") else "" for span in spans]
    return {"shape": shapes, "fillmode": "overlay", "fgcolor": "#ffffff", "size": 5}


def _busy(spans: list[Span], began: float, ended: float, origin: Origin) -> dict[str, Any]:
    """Bars of a lane with too many spans: a column is as thick as it was busy."""
    cover = union(np.array([s.start_s for s in spans]), np.array([s.end_s for s in spans]))
    start, length, share = busy_stretches(cover, began, ended, PIXELS)
    text = [f"busy {part:.0%}, one of {len(spans):,} spans or several, {origin}" for part in share]
    return {"base": 1e3 * (start - began), "x": 1e3 * length, "width": 0.6 * share, "hovertext": text}


def _arrows(timeline: Timeline, labels: dict[int, str], began: float) -> dict[str, Any]:
    """A thin arrow from the end of each span to those that had to wait for it."""
    x: list[float | None] = []
    y: list[str | None] = []
    pairs = timeline.dependencies()
    for cause, span in pairs if len(pairs) <= MOST_ARROWS else ():
        if labels[id(cause)] != labels[id(span)]:  # within a lane the order is plain
            until = min(max(span.start_s, cause.end_s), span.end_s)  # a stall ends, rather than starts, with its cause
            x += [1e3 * (cause.end_s - began), 1e3 * (until - began), None]
            y += [chart_text(labels[id(cause)]), chart_text(labels[id(span)]), None]
    head = {"symbol": "arrow", "angleref": "previous", "size": [0, 9, 0] * (len(x) // 3), "color": GREY}
    line = {"color": GREY, "width": 1}
    look = {"mode": "lines+markers", "hoverinfo": "skip", "line": line, "marker": head}
    return {"type": "scatter", "name": "waits for", "x": x, "y": y} | look


def _labelled(timeline: Timeline) -> tuple[dict[int, Origin], dict[int, str]]:
    """Origin and lane of each span, by id(span); spans of another origin than the timeline's have lanes that say so."""
    origins = {id(span): origin for span, origin in zip(timeline.spans, timeline.origins(), strict=True)}
    own = timeline.origin
    labels = {id(s): s.lane if origins[id(s)] == own else f"{s.lane} ({origins[id(s)]})" for s in timeline.spans}
    return origins, labels


def _hover(span: Span, began: float, origin: str) -> str:
    times = f"{1e3 * (span.start_s - began):.3f} to {1e3 * (span.end_s - began):.3f} ms"
    waited = f"<br>after {chart_text(', '.join(span.after))}" if span.after else ""
    return f"{chart_text(span.name)}<br>{times}, {1e3 * (span.end_s - span.start_s):.3f} ms, {origin}{waited}"


def _total_s(timeline: Timeline) -> float:
    starts, ends = [s.start_s for s in timeline.spans], [s.end_s for s in timeline.spans]
    return max(ends) - min(starts) if timeline.spans else 0.0


def _where(timeline: Timeline) -> str:
    where = timeline.origin + (f" on {timeline.device}" if timeline.device else "")
    return f"{where}; {timeline.note}" if timeline.note else where
