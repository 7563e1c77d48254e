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
LANE_HEIGHT, LINE_HEIGHT, STEPS_HEIGHT, STEPS_GAP = 46, 17, 80, 76  # pixels
CUT = 4  # times the median step: what is longer, a prompt as a rule, would press all others flat
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
    shown = timeline.of_step(step)
    lengths = step_lengths(timeline) if chosen else []
    rows = 2 if len(lengths) > 1 else 1
    fig = make_subplots(rows=rows, cols=1)
    lanes = _draw(fig, shown, row=1)
    if not shown.spans:
        middle = {"x": 0.5, "y": 0.5, "xref": "x domain", "yref": "y domain"}
        fig.add_annotation(text=f"nothing was timed in step {step}", showarrow=False, **middle)
    fig.update_xaxes(title="ms since the step began", row=1)
    if chosen:
        for bar in fig.select_traces({"type": "bar"}):
            bar.customdata = [step] * len(bar.x)
    if rows == 2:
        _draw_steps(fig, lengths, step, chosen, timeline.origin)
        high, gap = LANE_HEIGHT * lanes, STEPS_GAP / (LANE_HEIGHT * lanes + STEPS_GAP + STEPS_HEIGHT)
        share = (1 - gap) * high / (high + STEPS_HEIGHT)
        fig.update_yaxes(domain=[1 - share, 1], row=1)
        fig.update_yaxes(domain=[0, 1 - share - gap], row=2)
    title = f"{name or f'Step {step}'}: {overlap_numbers(shown)}"
    return framed(fig, title, _where(timeline), lanes, more=STEPS_GAP + STEPS_HEIGHT if rows == 2 else 0)


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


def framed(fig: go.Figure, title: str, note: str, lanes: int, more: int = 0) -> go.Figure:
    """The common frame, as high as its lanes and ``more`` pixels; the note is wrapped, for a chart's title never is."""
    lines = [*wrap(title, TITLE_WIDTH), *wrap(note, TITLE_WIDTH)]
    above, below = 44 + LINE_HEIGHT * len(lines), 48
    styled(fig, "<br>".join(map(chart_text, lines)), height=above + LANE_HEIGHT * lanes + more + below)
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


def _draw_steps(fig: go.Figure, lengths: list[tuple[int, float, float]], step: int, chosen: str, origin: Origin) -> None:
    """How long every step took and how much of it was stall, in the second row; an unseen bar above each takes the pointer."""
    each = -(-len(lengths) // PIXELS)  # steps a bar, which shows the longest of them
    bars = [max(lengths[i : i + each], key=lambda one: one[1]) for i in range(0, len(lengths), each)]
    number, total, stall = ([row[i] for row in bars] for i in range(3))
    middle = [lengths[i][0] + (min(each, len(lengths) - i) - 1) / 2 for i in range(0, len(lengths), each)]
    total, stall = [1e3 * s for s in total], [1e3 * s for s in stall]
    longest, usual = max(total), sorted(total)[len(total) // 2]
    top = min(longest, CUT * usual) or 1.0
    common: dict[str, Any] = {"x": middle, "width": each, "row": 2, "col": 1}
    for name, base, height, colour in (
        ("the rest of a step", [0.0] * len(bars), [a - b for a, b in zip(total, stall, strict=True)], GREY),
        ("stall in a step", [a - b for a, b in zip(total, stall, strict=True)], stall, LANE_COLOURS["stall"]),
    ):
        look = {"color": colour, "line": {"width": 0}, "pattern": HATCHED if base[-1] or any(base) else {"shape": ""}}
        fig.add_bar(name=name, base=base, y=height, hoverinfo="skip", marker=look, **common)
    told = [
        f"step {n}: {a:.2f} ms" + (f", {b:.2f} ms of it stall" if b else "")
        for n, a, b in zip(number, total, stall, strict=True)
    ]
    fig.add_bar(
        name=f"a step, {origin}", y=[top] * len(bars), customdata=number, hovertext=told, hoverinfo="text",
        marker={"color": "rgba(0,0,0,0)", "line": {"width": 0}}, **common,
    )  # fmt: skip
    mark = {"xref": "x2", "yref": "y2 domain"}
    fig.add_shape(type="line", x0=step, x1=step, y0=0, y1=1, line={"color": PINK, "width": 2, "dash": "dash"}, **mark)
    first, last = lengths[0][0], lengths[-1][0]
    side = "right" if 2 * step > first + last else "left"  # so that it is not cut off
    fig.add_annotation(text=chosen, x=step, y=1, xanchor=side, yanchor="bottom", showarrow=False, font={"color": GREY}, **mark)
    ticks = {"dtick": 1} if last - first < 12 else {}
    cut = f"; higher than {CUT} times the median is cut off" if longest > top else ""
    fig.update_xaxes(title=f"step of the run{cut}", range=[first - 0.5, last + 0.5], row=2, **ticks)
    fig.update_yaxes(title="ms", range=[0, top], nticks=4, row=2)


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
