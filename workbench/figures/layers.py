"""What one true-size layer costs as its context grows: bytes held, bytes read and time per decoded token."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.errors import InputError
from workbench.figures.style import BLUE, GREEN, ORANGE, PINK, SKY, VERMILLION, chart_text, styled
from workbench.measurements import LayerMeasurement

# Told apart by colour, marker and, for the floor, dash, so that no line relies on its colour alone.
LOOKS = tuple(
    zip(
        (BLUE, VERMILLION, GREEN, ORANGE, PINK, SKY),
        ("circle", "square", "diamond", "triangle-up", "x", "triangle-down"),
        strict=True,
    )
)
PANELS = ("cache held (B)", "cache read per token (B)", "ms per token")


def layer_costs(measurements: Sequence[LayerMeasurement]) -> go.Figure:
    """Three panels against tokens in the cache, all axes logarithmic: bytes held, bytes read, and ms per decoded token.

    Dotted in the last panel: reading those bytes and the layer's weights at the measured copy bandwidth. One line for each
    preset, kind and storage; the title says whether it is one layer or a total, and on what it was measured. InputError for
    nothing to draw, and for one layer and totals in one chart.
    """
    if not measurements:
        raise InputError("there is no measurement to draw; fill a layer with measure_at=(8192, ...) first")
    totals = {m.layers > 1 for m in measurements}
    if len(totals) > 1:
        raise InputError("measurements of one layer and totals over layers do not belong in one chart; draw them apart")
    lines: dict[str, list[LayerMeasurement]] = {}
    for m in measurements:
        lines.setdefault(f"{m.preset} {m.kind}, {m.storage}" + (f", x {m.layers}" if m.layers > 1 else ""), []).append(m)
    fig = make_subplots(rows=1, cols=3, subplot_titles=PANELS, horizontal_spacing=0.08)
    for i, (name, points) in enumerate(lines.items()):
        colour, symbol = LOOKS[i % len(LOOKS)]
        points.sort(key=lambda m: m.length)
        tokens = [m.length for m in points]
        panels = (
            ([m.held_bytes or None for m in points], "%{y:,} B"),
            ([m.read_bytes or None for m in points], "%{y:,} B"),
            ([1e3 * m.step_s for m in points], "%{y:.3g} ms"),
        )
        for column, (values, shown) in enumerate(panels, start=1):
            fig.add_scatter(
                x=tokens,
                y=values,
                name=chart_text(name),
                legendgroup=name,
                showlegend=column == 1,
                mode="lines+markers",
                line={"color": colour, "width": 2},
                marker={"symbol": symbol, "size": 8},
                hovertemplate=f"%{{x:,}} tokens<br>{shown}",
                row=1,
                col=column,
            )
        fig.add_scatter(
            x=tokens,
            y=[1e3 * m.floor_s for m in points],
            name="cache and weights read / bandwidth",
            legendgroup="floor",
            legendrank=2000,
            showlegend=i == 0,
            mode="lines",
            line={"color": colour, "width": 1.5, "dash": "dot"},
            hovertemplate="%{y:.3g} ms to read cache and weights",
            row=1,
            col=3,
        )
    devices = ", ".join(sorted({m.device for m in measurements}))
    label = "measured per layer x layers" if totals == {True} else measurements[0].label
    origin = " and ".join(sorted({m.origin for m in measurements}))
    title = f"Decoding at true size, random weights: {label}<br>{origin} on {chart_text(devices)}"
    styled(fig, title, height=440)
    fig.update_xaxes(type="log", title="tokens in the cache", exponentformat="SI", nticks=5)
    fig.update_yaxes(type="log", exponentformat="SI")
    below = {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"}
    return fig.update_layout(legend=below, margin={"t": 96, "b": 120})
