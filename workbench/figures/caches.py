"""Caches side by side: bytes held beside bytes read, what the reading consists of, and what each step adds and frees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.caches import CacheUse
from workbench.errors import InputError
from workbench.figures.memory import PART_COLOURS, PART_ORDER, PART_PATTERNS
from workbench.figures.style import BLUE, GREY, ORANGE, chart_text, styled
from workbench.trace import Trace

ROW_PX, FRAME_PX = 34, 150
KV_NAME = "kv (a row per token)"
UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB"))
MOST_STEPS = 400


def held_and_read(uses: Sequence[CacheUse]) -> go.Figure:
    """Two panels on one logarithmic scale: what each cache holds, and what one decoded token reads of it.

    InputError without caches.
    """
    if not uses:
        raise InputError("give at least one cache, see wb.measured_cache and wb.modelled_cache")
    names = [chart_text(use.name) for use in uses]
    fig = make_subplots(rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.04)
    held, read = [use.held for use in uses], [use.read for use in uses]
    panels = ((1, "held", BLUE, "#ffffff", held), (2, "read for one token", ORANGE, "#222222", read))
    for column, name, colour, ink, counted in panels:
        totals = [sum(parts.values()) for parts in counted]
        fig.add_bar(
            y=names,
            x=[total or None for total in totals],  # no logarithm of nothing
            orientation="h",
            name=name,
            text=[size(total) for total in totals],
            textposition="auto",
            insidetextanchor="end",
            insidetextfont={"color": ink},
            marker={"color": colour},
            hovertext=[_parts_text(parts) for parts in counted],
            hovertemplate="%{hovertext}<extra></extra>",
            row=1,
            col=column,
        )
        fig.update_xaxes(title=f"bytes {name}", row=1, col=column)
    lowest = min(max(1, use.read_bytes) for use in uses)
    highest = max(2, *(use.held_bytes for use in uses))
    styled(fig, f"Held, and read for one token{_of_all(uses)}", height=FRAME_PX + ROW_PX * len(uses))
    ends = [math.log10(lowest) - 0.3, math.log10(highest) + 0.3]
    fig.update_xaxes(type="log", exponentformat="SI", dtick=1, range=ends)
    fig.update_yaxes(autorange="reversed")
    return fig.update_layout(showlegend=False, bargap=0.25)


def read_shares(uses: Sequence[CacheUse]) -> go.Figure:
    """What one decoded token reads, part by part, each cache's whole being 100 %. InputError without caches."""
    if not uses:
        raise InputError("give at least one cache, see wb.measured_cache and wb.modelled_cache")
    fig = go.Figure()
    names = [chart_text(use.name) for use in uses]
    for part in (part for part in PART_ORDER if any(use.read.get(part) for use in uses)):
        fig.add_bar(
            y=names,
            x=[100 * use.read.get(part, 0) / (use.read_bytes or 1) for use in uses],
            orientation="h",
            name=KV_NAME if part == "kv" else part,
            marker={"color": PART_COLOURS[part], "pattern": _pattern(part)},
            customdata=[size(use.read.get(part, 0)) for use in uses],
            hovertemplate=f"{part}: %{{x:.1f}} %, %{{customdata}}<extra></extra>",
        )
    styled(fig, f"What one decoded token reads{_of_all(uses)}", height=FRAME_PX + 40 + ROW_PX * len(uses))
    fig.update_xaxes(title="share of the bytes read (%)", range=[0, 101])
    fig.update_yaxes(autorange="reversed")
    return fig.update_layout(barmode="stack", bargap=0.25, legend=_below(), margin={"b": 100})


def kv_changes(trace: Trace, first: int = 0, last: int | None = None) -> go.Figure:
    """Bytes that each decoded token adds to each part, and frees; steps of several tokens are left out.

    ``first``, ``last``: tokens in the cache between which to look. InputError if no single token was decoded there.
    """
    stop = trace.length if last is None else last
    steps = [s for s in _decode_steps(trace) if first <= trace.step_end(s) <= stop][:MOST_STEPS]
    if not steps:
        raise InputError(f"no token was decoded alone between {first} and {stop} tokens; give a trace of a run that decodes")
    tokens = [trace.step_end(s) for s in steps]
    fig = go.Figure()
    total = [0] * len(steps)
    for part in (p for p in PART_ORDER if p in trace.cache_bytes and trace.cache_bytes[p].any()):
        held = trace.cache_bytes[part]
        change = [int(held[s]) - int(held[s - 1]) for s in steps]
        total = [a + b for a, b in zip(total, change, strict=True)]
        if any(change):
            marker = {"color": PART_COLOURS.get(part, GREY), "line": {"width": 0}}
            fig.add_bar(x=tokens, y=change, name=part, marker=marker, hovertemplate="%{y:+,} B")
    dots = {"color": GREY, "size": 5}
    fig.add_scatter(x=tokens, y=total, name="sum", mode="markers", marker=dots, hovertemplate="%{y:+,} B")
    falls = sum(change < 0 for change in total)
    title = f"Bytes each decoded token adds and frees: the sum falls at {falls} of {len(steps)}<br>{chart_text(trace.label)}"
    styled(fig, title, height=380)
    fig.update_xaxes(title="tokens in the cache")
    fig.update_yaxes(title="change (B)", exponentformat="SI", zeroline=True, zerolinecolor=GREY)
    return fig.update_layout(
        barmode="relative", bargap=0.05, hovermode="x unified", legend=_below(), margin={"b": 110}
    ).update_layout(hoverlabel={"bgcolor": "#ffffff", "font": {"color": "#222222"}})


def falling_steps(trace: Trace) -> int:
    """At how many decoded tokens the cache got smaller."""
    held = [sum(int(of_part[s]) for of_part in trace.cache_bytes.values()) for s in range(trace.steps)]
    return sum(held[s] < held[s - 1] for s in _decode_steps(trace))


def _decode_steps(trace: Trace) -> list[int]:
    """Steps of a single token that came after another step."""
    return [s for s in range(1, trace.steps) if trace.step_end(s) - trace.step_end(s - 1) == 1]


def size(nbytes: float) -> str:
    """ "50.4 GB", "131 KB", "12 B": three digits."""
    for unit, name in UNITS:
        if nbytes >= unit:
            return f"{nbytes / unit:.3g} {name}" if nbytes < 999.5 * unit else f"{nbytes / unit:,.0f} {name}"
    return f"{nbytes:,.0f} B"


def _of_all(uses: Sequence[CacheUse]) -> str:
    tokens = " and ".join(f"{n:,}" for n in dict.fromkeys(use.tokens for use in uses))
    stored = " and ".join(dict.fromkeys(use.storage for use in uses))
    said = "; ".join(dict.fromkeys(f"{use.what}, {use.origin}" for use in uses))
    return f", at {tokens} tokens, stored as {stored}<br>{chart_text(said)}"


def _parts_text(parts: dict[str, int]) -> str:
    return "<br>".join(f"{part}: {size(nbytes)}" for part, nbytes in parts.items() if nbytes) or "nothing"


def _pattern(part: str) -> dict[str, Any]:
    """Of a bar: a pattern without a ground of its own would leave the bar empty."""
    return {"shape": PART_PATTERNS.get(part, ""), "bgcolor": PART_COLOURS[part], "fgcolor": "#ffffff", "solidity": 0.2}


def _below() -> dict[str, Any]:
    return {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom", "traceorder": "normal"}
