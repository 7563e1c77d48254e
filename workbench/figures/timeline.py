"""When each lane works: one step's compute, lookup, transfer and stall on one axis, and two runs above each other."""

from __future__ import annotations

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
LANE_HEIGHT, LINE_HEIGHT = 46, 17  # pixels
TITLE_WIDTH = 88  # characters that fit a narrow notebook's column
# Beyond these a chart would be slow and large: a lane is drawn by how busy each pixel is, arrows and shades are left out.
MOST_SPANS, MOST_ARROWS, MOST_SHADES, PIXELS = 400, 300, 100, 800


def overlap_timeline(timeline: Timeline, step: int, name: str = "") -> go.Figure:
    """One step, or what ``name`` calls it: compute, lookup, transfer and stall against milliseconds since the step began.

    Bars are named by hovering, arrows run to a span from what it had to wait for, and the title says how much of
    the lookup compute hid. Measured and modelled spans never share a lane. A step without spans gives a chart that says so.
    """
    shown = timeline.of_step(step)
    fig = make_subplots(rows=1, cols=1)
    lanes = _draw(fig, shown, row=1)
    if not shown.spans:
        fig.add_annotation(text=f"nothing was timed in step {step}", showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper")
    fig.update_xaxes(title="ms since the step began")
    return framed(fig, f"{name or f'Step {step}'}: {overlap_numbers(shown)}", _where(timeline), lanes)


def overlap_comparison(serial: Timeline, prefetched: Timeline) -> go.Figure:
    """The same work twice on one time axis, looked up when needed and looked up ahead, each with its totals."""
    runs = {"serial": serial, "prefetched": prefetched}
    totals = {name: 1e3 * _total_s(timeline) for name, timeline in runs.items()}
    titles = [f"{name}: {totals[name]:.2f} ms in all; {overlap_numbers(timeline)}" for name, timeline in runs.items()]
    fig = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.12, subplot_titles=titles)
    fig.update_annotations(x=0, xanchor="left", font_size=13)
    lanes = sum(_draw(fig, timeline, row) for row, timeline in enumerate(runs.values(), start=1))
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
    lines = [*wrap(title, TITLE_WIDTH), *wrap(note, TITLE_WIDTH)]
    above, below = 44 + LINE_HEIGHT * len(lines), 48
    styled(fig, "<br>".join(map(chart_text, lines)), height=above + LANE_HEIGHT * lanes + below)
    at_top = {"y": 1.0, "yanchor": "top", "x": 0, "xref": "container", "pad": {"t": 20, "l": 4}}
    return fig.update_layout(
        title=at_top, margin={"t": above, "b": below}, hoverlabel={"bgcolor": "#ffffff", "font": {"color": "#222222"}}
    )


def _draw(fig: go.Figure, timeline: Timeline, row: int) -> int:
    """Put the lanes of ``timeline`` into one row of ``fig``; returns how many there are."""
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
        fig.add_bar(
            name=label,
            y=[chart_text(label)] * len(bars["x"]),
            orientation="h",
            hoverinfo="text",
            marker={
                "color": colour,
                "line": {"color": colour, "width": 1},  # keeps the shortest spans visible
                "pattern": HATCHED if name == "stall" else _dotted(spans),
            },
            **bars,
            row=row,
            col=1,
        )
    stalls = [s for s in timeline.spans if s.lane == "stall"]
    for span in stalls if len(stalls) <= MOST_SHADES else ():
        fig.add_vrect(
            x0=1e3 * (span.start_s - began), x1=1e3 * (span.end_s - began), fillcolor=LANE_COLOURS["stall"], opacity=0.15,
            line_width=0, layer="below", row=row, col=1,
        )  # fmt: skip
    _add_arrows(fig, timeline, labels, began, row)
    order = [chart_text(label) for label in lanes]
    fig.update_yaxes(categoryorder="array", categoryarray=order, range=[len(lanes) - 0.5, -0.5], row=row, col=1)
    fig.update_layout(barmode="overlay", showlegend=False)
    return len(lanes)


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


def _add_arrows(fig: go.Figure, timeline: Timeline, labels: dict[int, str], began: float, row: int) -> None:
    """A thin arrow from the end of each span to those that had to wait for it."""
    x: list[float | None] = []
    y: list[str | None] = []
    pairs = timeline.dependencies()
    for cause, span in pairs if len(pairs) <= MOST_ARROWS else ():
        if labels[id(cause)] != labels[id(span)]:  # within a lane the order is plain
            until = min(max(span.start_s, cause.end_s), span.end_s)  # a stall ends, rather than starts, with its cause
            x += [1e3 * (cause.end_s - began), 1e3 * (until - began), None]
            y += [chart_text(labels[id(cause)]), chart_text(labels[id(span)]), None]
    fig.add_scatter(
        name="waits for", x=x, y=y, mode="lines+markers", hoverinfo="skip", line={"color": GREY, "width": 1},
        marker={"symbol": "arrow", "angleref": "previous", "size": [0, 9, 0] * (len(x) // 3), "color": GREY}, row=row, col=1,
    )  # fmt: skip


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
