"""When each lane works: one step's compute, lookup, transfer and stall on one axis, and two runs above each other."""

from __future__ import annotations

from textwrap import wrap

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.figures.style import BLUE, GREEN, GREY, ORANGE, PINK, VERMILLION, chart_text, styled
from workbench.trace import Span, Timeline

# A stall is hatched too, so that it can be told without colour.
LANE_COLOURS = {"compute": BLUE, "lookup": ORANGE, "transfer": GREEN, "stall": VERMILLION}
OTHER_COLOUR = PINK  # the streams of an imported trace
ALWAYS = ("compute", "lookup", "stall")  # lanes drawn even when empty: that nothing stalled is worth seeing
LANE_HEIGHT, LINE_HEIGHT = 46, 17  # pixels
TITLE_WIDTH = 110  # characters that fit a notebook's column


def overlap_timeline(timeline: Timeline, step: int) -> go.Figure:
    """One step: compute, lookup, transfer and stall against milliseconds since the step began.

    Bars are named by hovering, arrows run to a span from what it had to wait for, and the title says how much of
    the lookup compute hid. Measured and modelled spans never share a lane. A step without spans gives a chart that says so.
    """
    shown = timeline.of_step(step)
    fig = make_subplots(rows=1, cols=1)
    lanes = _draw(fig, shown, row=1)
    if not shown.spans:
        fig.add_annotation(text=f"nothing was timed in step {step}", showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper")
    fig.update_xaxes(title="ms since the step began")
    return _framed(fig, f"Step {step}: {overlap_numbers(shown)}", _where(timeline), lanes)


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
    return _framed(fig, title, notes, lanes + 1)


def overlap_numbers(timeline: Timeline) -> str:
    """How long the lookup took, how much of it compute hid, and how much was exposed as a stall."""
    lookup, stall = 1e3 * timeline.lookup_s, 1e3 * timeline.stall_s
    if lookup == 0:
        return "no lookup"
    if stall > lookup:
        return f"lookup {lookup:.2f} ms, none of it hidden: {stall:.2f} ms of stall, handing the rows over included"
    hidden = lookup - stall
    return f"lookup {lookup:.2f} ms = {hidden:.2f} ms hidden ({hidden / lookup:.0%}) + {stall:.2f} ms exposed as stall"


def _framed(fig: go.Figure, title: str, note: str, lanes: int) -> go.Figure:
    """The common frame, as high as its lanes; the note is wrapped, for a chart's title never is."""
    lines = [*wrap(title, TITLE_WIDTH), *wrap(note, TITLE_WIDTH)]
    above, below = 44 + LINE_HEIGHT * len(lines), 48
    styled(fig, "<br>".join(map(chart_text, lines)), height=above + LANE_HEIGHT * lanes + below)
    at_top = {"y": 1.0, "yanchor": "top", "pad": {"t": 20}}
    return fig.update_layout(
        title=at_top, margin={"t": above, "b": below}, hoverlabel={"bgcolor": "#ffffff", "font": {"color": "#222222"}}
    )


def _draw(fig: go.Figure, timeline: Timeline, row: int) -> int:
    """Put the lanes of ``timeline`` into one row of ``fig``; returns how many there are."""
    began = min((s.start_s for s in timeline.spans), default=0.0)
    used = {_lane(span, timeline) for span in timeline.spans}
    lanes: dict[str, list[Span]] = {lane: [] for lane in LANE_COLOURS if lane in used or lane in ALWAYS}
    for span in timeline.spans:
        lanes.setdefault(_lane(span, timeline), []).append(span)
    for label, spans in lanes.items():
        name = spans[0].lane if spans else label
        colour = LANE_COLOURS.get(name, OTHER_COLOUR)
        fig.add_bar(
            name=label,
            y=[label] * len(spans),
            base=[1e3 * (s.start_s - began) for s in spans],
            x=[1e3 * (s.end_s - s.start_s) for s in spans],
            orientation="h",
            width=0.6,
            hovertext=[_hover(s, began, _origin(s, timeline)) for s in spans],
            hoverinfo="text",
            marker={
                "color": colour,
                "line": {"color": colour, "width": 1},  # keeps the shortest spans visible
                "pattern": {
                    "shape": "/" if name == "stall" else "",
                    "fillmode": "overlay",
                    "fgcolor": "#ffffff",
                    "solidity": 0.3,
                },
            },
            row=row,
            col=1,
        )
    for span in (s for s in timeline.spans if s.lane == "stall"):
        fig.add_vrect(
            x0=1e3 * (span.start_s - began), x1=1e3 * (span.end_s - began), fillcolor=LANE_COLOURS["stall"], opacity=0.15,
            line_width=0, layer="below", row=row, col=1,
        )  # fmt: skip
    _add_arrows(fig, timeline, began, row)
    fig.update_yaxes(categoryorder="array", categoryarray=list(lanes), range=[len(lanes) - 0.5, -0.5], row=row, col=1)
    fig.update_layout(barmode="overlay", showlegend=False)
    return len(lanes)


def _add_arrows(fig: go.Figure, timeline: Timeline, began: float, row: int) -> None:
    """A thin arrow from the end of each span to those that had to wait for it."""
    x: list[float | None] = []
    y: list[str | None] = []
    for span in timeline.spans:
        for name in span.after:
            earlier = [s for s in timeline.spans if s.name == name and s.start_s <= span.start_s]
            cause = max(earlier, key=lambda s: s.start_s, default=None)  # none: it belongs to another step
            if cause is not None and _lane(cause, timeline) != _lane(span, timeline):  # within a lane the order is plain
                until = min(max(span.start_s, cause.end_s), span.end_s)  # a stall ends, rather than starts, with its cause
                x += [1e3 * (cause.end_s - began), 1e3 * (until - began), None]
                y += [_lane(cause, timeline), _lane(span, timeline), None]
    fig.add_scatter(
        name="waits for", x=x, y=y, mode="lines+markers", hoverinfo="skip", line={"color": GREY, "width": 1},
        marker={"symbol": "arrow", "angleref": "previous", "size": [0, 9, 0] * (len(x) // 3), "color": GREY}, row=row, col=1,
    )  # fmt: skip


def _origin(span: Span, timeline: Timeline) -> str:
    """Where a span comes from; "measured" is what a span says by default, so if none says more, the timeline speaks for all."""
    return timeline.origin if all(s.origin == "measured" for s in timeline.spans) else span.origin


def _lane(span: Span, timeline: Timeline) -> str:
    """A lane's name; spans of another origin than the timeline's get a lane of their own that says so."""
    origin = _origin(span, timeline)
    return span.lane if origin == timeline.origin else f"{span.lane} ({origin})"


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
