"""Pictures whose cells are tokens by tokens, side by side as one chart with shared axes: zooming into one zooms into all."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.figures.attention import Range
from workbench.figures.style import GREY, chart_text, styled

SIDE_PIXELS = 400  # of a picture's height


def picture_chart(pictures: Sequence[tuple[str, bytes]], rows: Range, columns: Range, title: str) -> go.Figure:
    """(name, png) side by side, all of the same ``rows`` (query tokens, the first on top) and ``columns`` (tokens)."""
    names = [chart_text(name) for name, _ in pictures]
    fig = make_subplots(rows=1, cols=len(pictures), shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=names)
    lines = title.count("<br>") + 1
    for number, (_, png) in enumerate(pictures, start=1):
        fig.add_scatter(x=[], y=[], mode="markers", showlegend=False, row=1, col=number)  # an axis without data is not drawn
        source = "data:image/png;base64," + base64.b64encode(png).decode()
        fig.add_layout_image(
            source=source, x=columns[0] - 0.5, y=rows[0] - 0.5, sizex=columns[1] - columns[0], sizey=rows[1] - rows[0],
            xanchor="left", yanchor="top", sizing="stretch", layer="below", row=1, col=number,
        )  # fmt: skip
    above = 20 + 17 * lines + (18 if any(names) else 0)
    styled(fig, title, above + SIDE_PIXELS + 92)
    fig.update_xaxes(title="token position", range=[columns[0] - 0.5, columns[1] - 0.5], showgrid=False, matches="x")
    fig.update_yaxes(range=[rows[1] - 0.5, rows[0] - 0.5], showgrid=False, matches="y")
    fig.update_yaxes(title="query token (position)", row=1, col=1)
    fig.update_annotations(font={"size": 12, "color": GREY})
    below = {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom", "traceorder": "normal"}
    width = {} if len(pictures) > 1 else {"width": SIDE_PIXELS + 320, "autosize": False}  # else it fills the page
    return fig.update_layout(margin={"t": above, "b": 92}, legend=below, **width)
