"""A profiler's trace between two times: what each stream and thread ran, and which copies no kernel covered."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from workbench.figures.style import BLUE, GREEN, GREY, ORANGE, PINK, VERMILLION, chart_text
from workbench.figures.timeline import HATCHED, framed
from workbench.intervals import Cover, busy_stretches, without
from workbench.profile import Kind, Profile, Track

COLOURS: dict[Kind, str] = {"kernels": BLUE, "copies": GREEN, "memory sets": PINK, "thread": ORANGE}
EXPOSED = "copy without any kernel"
MOST_TRACKS = 20  # streams first, then the busiest threads
# Spans drawn one by one, of a track and of all tracks; a track with more in sight is drawn by how busy each pixel is.
MOST_NAMED, ALL_NAMED = 150, 1200
MOST_ARROWS = 40
STRETCHES, PIXELS = 2000, 800  # of all tracks together, and of one
NAME_LENGTH = 48
THICKNESS = 0.72


def profile_chart(profile: Profile, start_s: float, end_s: float) -> go.Figure:
    """Streams and threads against milliseconds since the trace began. A column's thickness is how busy it was; where few
    spans are in sight each is drawn and named. Copies are hatched where no kernel of their device ran. At most 250 KB.
    """
    tracks = shown_tracks(profile)
    rows = {track.name: row for row, track in enumerate(tracks)}
    pixels, most_named = min(PIXELS, STRETCHES // len(tracks)), min(MOST_NAMED, ALL_NAMED // len(tracks))
    fig = go.Figure()
    for row, track in enumerate(tracks):
        seen = np.flatnonzero((track.end_s >= start_s) & (track.start_s <= end_s))
        if len(seen) <= most_named:
            _add_spans(fig, track, row, seen, start_s, end_s)
        else:
            _add_stretches(fig, track.kind, COLOURS[track.kind], row, track.cover, start_s, end_s, pixels)
        if track.kind == "copies":
            exposed = without(track.cover, profile.compute.get(track.device, (np.zeros(0), np.zeros(0))))
            _add_stretches(fig, EXPOSED, VERMILLION, row, exposed, start_s, end_s, pixels, {"fillpattern": HATCHED})
    _add_launches(fig, profile, rows, start_s, end_s)
    labels = [chart_text(_short(track.name)) for track in tracks]
    fig.update_layout(barmode="overlay", bargap=0, showlegend=False)
    fig.update_yaxes(tickvals=list(range(len(tracks))), ticktext=labels, range=[len(tracks) - 0.5, -0.5], showgrid=False)
    fig.update_xaxes(title="ms since the trace began", range=[1e3 * start_s, 1e3 * end_s])
    return framed(fig, f"{_short(profile.name)}: {copy_numbers(profile)}", _about(profile, len(tracks)), len(tracks))


def copy_numbers(profile: Profile) -> str:
    """How long all copies took, and how much of that compute hid; of threads alone, how long any was at work."""
    copies = [x for x in profile.overlaps if x.kind == "copies"]
    if not copies:
        return "no copies between host and device" if profile.compute else "host threads alone, no device in this trace"
    busy, hidden = (1e3 * sum(getattr(x, f) for x in copies) for f in ("busy_s", "hidden_s"))
    share = hidden / busy if busy else 0.0
    return f"copies {busy:.2f} ms = {hidden:.2f} ms under kernels ({share:.0%}) + {busy - hidden:.2f} ms exposed"


def shown_tracks(profile: Profile) -> list[Track]:
    """At most ``MOST_TRACKS``, in their own order: what ran on devices before threads, the busiest before the others."""
    ranked = sorted(zip(profile.tracks, profile.overlaps, strict=True), key=lambda x: (x[0].kind == "thread", -x[1].busy_s))
    kept = {id(track) for track, _ in ranked[:MOST_TRACKS]}
    return [track for track in profile.tracks if id(track) in kept]


def _about(profile: Profile, shown: int) -> str:
    parts = [f"recorded by a profiler on {profile.device}, imported"]
    if any(track.kind == "copies" for track in profile.tracks):
        parts.append("hatched: no kernel covered the copy")
    if profile.alignment:
        parts.append(str(profile.alignment))
    if shown < len(profile.tracks):
        parts.append(f"{len(profile.tracks) - shown} quieter tracks not drawn")
    return "; ".join(parts)


def _add_spans(fig: go.Figure, track: Track, row: int, seen: np.ndarray, start_s: float, end_s: float) -> None:
    """One bar a span, named by hovering; within a thread an inner call is thinner than the one that made it."""
    depth: list[int] = []
    under_way: list[float] = []
    for i in seen:
        while under_way and under_way[-1] <= track.start_s[i]:
            under_way.pop()
        depth.append(len(under_way))
        under_way.append(track.end_s[i])
    order = np.argsort(depth, kind="stable")  # outer calls first, so that inner ones are drawn over them
    thick = THICKNESS * 0.75 ** np.minimum(np.array(depth, float)[order], 5)
    start, end = 1e3 * track.start_s[seen][order], 1e3 * track.end_s[seen][order]  # ms
    left = np.maximum(start, 1e3 * start_s)
    about = [
        f"{chart_text(_short(track.names[i]))}<br>{a:.3f} to {b:.3f} ms, {b - a:.3f} ms"
        for i, a, b in zip(track.name_of[seen][order], start, end, strict=True)
    ]
    line = {"color": "#ffffff", "width": 0.5} if track.kind == "thread" else {"color": COLOURS[track.kind], "width": 1}
    fig.add_bar(
        name=track.kind, orientation="h", y=np.full(len(seen), row, np.int16), base=left.round(6),
        x=(np.minimum(end, 1e3 * end_s) - left).round(6), width=thick.round(3), hovertext=about, hoverinfo="text",
        marker={"color": COLOURS[track.kind], "line": line},
    )  # fmt: skip


def _add_stretches(
    fig: go.Figure, name: str, colour: str, row: int, cover: Cover, start_s: float, end_s: float, pixels: int,
    fill: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """All stretches of a track as one filled path: the page draws a thousand bars, above all hatched ones, in seconds."""
    start, length, share = busy_stretches(cover, start_s, end_s, pixels)
    left, right, half = 1e3 * start, 1e3 * (start + length), THICKNESS * share / 2
    gap = np.full(len(start), np.nan)
    fig.add_scatter(
        name=name, x=np.stack([left, right, right, left, gap], axis=1).ravel().astype(np.float32),
        y=np.stack([row - half, row - half, row + half, row + half, gap], axis=1).ravel().astype(np.float32),
        mode="lines", line={"width": 0}, fill="toself", fillcolor=colour, hoveron="fills",
        text=f"{name}: as thick as busy; zoom in for names", hoverinfo="text", **(fill or {}),
    )  # fmt: skip


def _add_launches(fig: go.Figure, profile: Profile, rows: dict[str, int], start_s: float, end_s: float) -> None:
    x: list[float | None] = []
    y: list[float | None] = []
    for thread, left, stream, began in profile.arrows(start_s, end_s, MOST_ARROWS):
        if thread in rows and stream in rows:
            x += [1e3 * left, 1e3 * began, None]
            y += [rows[thread], rows[stream], None]
    fig.add_scatter(
        name="launches", x=x, y=y, mode="lines+markers", hoverinfo="skip", line={"color": GREY, "width": 1},
        marker={"symbol": "arrow", "angleref": "previous", "size": [0, 8, 0] * (len(x) // 3), "color": GREY},
    )  # fmt: skip


def _short(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…"
