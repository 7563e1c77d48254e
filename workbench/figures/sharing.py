"""What V4.1's layers share, which entries each of them chose, and what a replayed prompt saves and changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.errors import InputError
from workbench.figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, chart_text, styled, visible_text
from workbench.sharing import SharedLayer, shared_layers
from workbench.trace import Trace

KIND_LOOKS = {
    "window": ("window only", GREY, "circle-open"),
    "csa2-full": ("Full", VERMILLION, "square"),
    "csa2-reindex": ("Reindex", ORANGE, "diamond"),
    "csa2-reuse": ("Reuse", BLUE, "circle"),
}
LANES = ("layer", "reads entries of", "chosen by", "from a pool of", "Engram")
MODE_LOOKS = {"exact": (GREY, "circle", "dash"), "replay": (BLUE, "square", "solid")}


def sharing_chart(config: Any, title: str) -> go.Figure:
    """A lane a question, a place a layer: its kind, whose entries it reads, who chose them, from whose pool, where Engram is.

    InputError for a configuration whose layers share nothing.
    """
    layers = shared_layers(config)
    fig = go.Figure()
    for kind, (name, colour, symbol) in KIND_LOOKS.items():
        own = [shared.layer for shared in layers if shared.kind == kind]
        marker = {"symbol": symbol, "color": colour, "size": 9, "line": {"width": 1, "color": colour}}
        fig.add_scatter(
            x=own, y=[LANES[0]] * len(own), mode="markers", name=name, marker=marker, hovertemplate=f"layer %{{x}}: {name}"
        )
    lanes: tuple[tuple[str, str, Callable[[SharedLayer], int | None]], ...] = (
        (LANES[1], VERMILLION, lambda shared: shared.stream_of),
        (LANES[2], ORANGE, lambda shared: shared.choice_of),
        (LANES[3], GREEN, lambda shared: shared.pool_of),
    )
    for lane, colour, source_of in lanes:
        runs = _runs(layers, source_of)
        fig.add_bar(
            y=[lane] * len(runs),
            base=[first - 0.45 for _, first, _ in runs],
            x=[last - first + 0.9 for _, first, last in runs],
            orientation="h",
            marker={"color": colour},
            text=[f"{source}" for source, _, _ in runs],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            insidetextfont={"color": "#111111"},
            showlegend=False,
            hovertext=[f"layers {first} to {last}: layer {source}" for source, first, last in runs],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    memory = list(config.engram.layer_ids) if config.engram else []
    star = {"symbol": "star", "color": SKY, "size": 11, "line": {"width": 1, "color": GREY}}
    fig.add_scatter(
        x=memory, y=[LANES[4]] * len(memory), mode="markers", name="Engram", marker=star, hovertemplate="before layer %{x}"
    )
    styled(fig, f"Who shares what with whom: {chart_text(title)}<br>numbers in the bars are layers", height=320)
    fig.update_xaxes(title="layer", range=[-0.7, len(layers) - 0.3])
    fig.update_yaxes(categoryorder="array", categoryarray=LANES[::-1])
    return fig.update_layout(barmode="overlay", bargap=0.35, legend=_below(), margin={"b": 92})


def _runs(layers: Sequence[SharedLayer], source_of: Callable[[SharedLayer], int | None]) -> list[tuple[int, int, int]]:
    """Source, first and last of the layers in a row that have the same one."""
    runs: list[tuple[int, int, int]] = []
    for shared in layers:
        source = source_of(shared)
        if source is None:
            continue
        if runs and runs[-1][0] == source and runs[-1][2] == shared.layer - 1:
            runs[-1] = (source, runs[-1][1], shared.layer)
        else:
            runs.append((source, shared.layer, shared.layer))
    return runs


def choices_chart(trace: Trace, token: int) -> go.Figure:
    """Where in the text the entries lie that each layer attends to for one token; a needle's place is marked.

    InputError for a token the recording does not have, and where no layer chooses.
    """
    if not 0 <= token < trace.length:
        raise InputError(f"the recording has tokens 0..{trace.length - 1}, got {token}")
    fig = go.Figure()
    shown: set[str] = set()
    for record in trace.layers:
        if record.selected is None:
            continue
        name, colour, symbol = KIND_LOOKS.get(record.kind, (record.kind, PURPLE, "triangle-up"))
        entries = sorted(int(e) for e in record.selected[token] if e >= 0)
        places = [e * record.ratio for e in entries]
        fig.add_scatter(
            x=places,
            y=[f"layer {record.layer}, {name}"] * len(places),
            name=name,
            legendgroup=name,
            showlegend=name not in shown,
            mode="markers",
            marker={"symbol": symbol, "size": 9, "color": colour, "line": {"width": 1, "color": GREY}},
            customdata=[[e, chart_text(visible_text(trace.token_texts[e * record.ratio]))] for e in entries],
            hovertemplate="entry %{customdata[0]}, begins at token %{x}: %{customdata[1]}<extra></extra>",
        )
        shown.add(name)
    if not fig.data:
        raise InputError("no layer of this recording chooses entries; give one of a model with an indexer")
    needle = trace.notes.get("needle")
    if isinstance(needle, dict) and "position" in needle:
        note = {"text": "the needle", "font": {"color": GREY}, "yanchor": "bottom"}
        fig.add_vline(x=needle["position"], line={"color": GREY, "width": 1.5, "dash": "dot"}, annotation=note)
    title = f"Entries attended to by token {token:,}<br>{chart_text(trace.label)}"
    styled(fig, title, height=170 + 40 * len(fig.data))
    fig.update_xaxes(title="place in the text (token)", range=[-0.02 * trace.length, 1.02 * trace.length])
    fig.update_yaxes(autorange="reversed")
    return fig.update_layout(legend=_below(), margin={"t": 92, "b": 96})


def replay_chart(found: Sequence[Any]) -> go.Figure:
    """Two panels against tokens: milliseconds of a prefill both ways, measured, and replay's share of the work, counted.

    ``found`` are `workbench.prefills.Prefills`. InputError without any.
    """
    if not found:
        raise InputError("there is nothing to draw; see wb.compare_prefills")
    found = sorted(found, key=lambda each: each.tokens)
    tokens = [each.tokens for each in found]
    panels = ("prefill (ms, measured)", "work of replay, of exact (counted)")
    fig = make_subplots(rows=1, cols=2, subplot_titles=panels, horizontal_spacing=0.12)
    for mode, (colour, symbol, dash) in MODE_LOOKS.items():
        fig.add_scatter(
            x=tokens,
            y=[1e3 * each.seconds[mode] for each in found],
            name=mode,
            mode="lines+markers",
            line={"color": colour, "dash": dash, "width": 2},
            marker={"symbol": symbol, "size": 8},
            hovertemplate="%{x:,} tokens: %{y:.3g} ms",
            row=1,
            col=1,
        )
    fig.add_scatter(
        x=tokens,
        y=[each.work_share for each in found],
        mode="lines+markers",
        line={"color": BLUE, "width": 2},
        marker={"symbol": "square", "size": 8},
        showlegend=False,
        hovertemplate="%{x:,} tokens: %{y:.1%}<extra></extra>",
        row=1,
        col=2,
    )
    styled(fig, f"Exact prefill and bounded replay<br>{chart_text(found[0].label)}", height=380)
    fig.update_xaxes(title="tokens in the prompt", exponentformat="SI", rangemode="tozero")
    fig.update_yaxes(rangemode="tozero", row=1, col=1)
    fig.update_yaxes(tickformat=".0%", range=[0, 1.05], row=1, col=2)
    return fig.update_layout(legend=_below(), margin={"t": 96, "b": 96})


def _below() -> dict[str, Any]:
    return {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom", "traceorder": "normal"}
