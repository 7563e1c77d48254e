"""FP8 and FP4 in pictures: one row as it was and as it is stored, and which kept entries rounded keys leave in place."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.errors import InputError
from workbench.figures.style import BLUE, GREY, ORANGE, VERMILLION, chart_text, styled
from workbench.rounding import FORMATS, Selections, StoredRows

_BELOW = {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"}
LAYER_LOOKS = ((BLUE, ""), (ORANGE, "/"), (VERMILLION, "x"), (GREY, "."))
MOST_LEVELS = 32  # per value; FP8 has too many to draw
_CSS = (
    "<style>.wb-bytes{overflow-x:auto;line-height:1.4;color:var(--jp-content-font-color1,inherit)}"
    ".wb-bytes table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    ".wb-bytes th,.wb-bytes td{padding:3px 10px;text-align:right;font-weight:normal;border-bottom:1px solid #8886}"
    ".wb-bytes tbody th{text-align:left}</style>"
)


def rounded_row(rows: StoredRows, row: int) -> go.Figure:
    """One row, channel by channel: what went in, what is stored, and below the error of each value.

    Vertical lines part the blocks that share a scale, which stands above; few enough levels are drawn as ticks. InputError for
    a row there is not.
    """
    if not 0 <= row < len(rows.values):
        raise InputError(f"there are rows 0..{len(rows.values) - 1}, got {row}")
    values, stored = rows.values[row], rows.stored[row]
    width = len(values)
    channels = list(range(width))
    fig = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.66, 0.34], vertical_spacing=0.07)
    x, y = _levels_drawn(rows, row)
    if x:
        fig.add_scatter(
            name="what a code can mean", x=x, y=y, mode="markers", hoverinfo="skip", row=1, col=1,
            marker={"symbol": "line-ew", "size": 7, "color": GREY, "opacity": 0.6, "line": {"width": 1, "color": GREY}},
        )  # fmt: skip
    fig.add_scatter(
        name="live value", x=channels, y=values.tolist(), mode="markers", row=1, col=1,
        marker={"color": BLUE, "size": 8, "symbol": "circle"}, hovertemplate="channel %{x}: %{y:.4g}<extra>live</extra>",
    )  # fmt: skip
    fig.add_scatter(
        name="as stored", x=channels, y=stored.tolist(), mode="markers", row=1, col=1,
        marker={"color": VERMILLION, "size": 8, "symbol": "x-thin", "line": {"width": 2, "color": VERMILLION}},
        hovertemplate="channel %{x}: %{y:.4g}<extra>stored</extra>",
    )  # fmt: skip
    fig.add_bar(
        name="stored - live", x=channels, y=(stored - values).tolist(), marker={"color": VERMILLION}, row=2, col=1,
        hovertemplate="channel %{x}: %{y:+.3g}<extra>error</extra>",
    )  # fmt: skip
    for block, scale in enumerate(rows.scales[row]):
        start, end = block * rows.block, min((block + 1) * rows.block, rows.coded)
        fig.add_vline(x=end - 0.5, line={"color": GREY, "width": 1, "dash": "dot"})
        text = f"scale {scale:g}"
        fig.add_annotation(text=text, x=(start + end - 1) / 2, y=1.0, xref="x", yref="paper", yanchor="bottom", showarrow=False)
    if rows.coded < width:
        fig.add_annotation(
            text="BF16", x=(rows.coded + width - 1) / 2, y=1.0, xref="x", yref="paper", yanchor="bottom", showarrow=False
        )
    error = float(np.abs(stored - values).max())
    rotated = ", rotated" if rows.rotated else ""
    what = (
        f"Row {row} of the {rows.name} of layer {rows.layer}{rotated}: {FORMATS[rows.codes]}, a scale each {rows.block} values"
    )
    title = f"{chart_text(f'{what}; largest error {error:.2g}')}<br>{chart_text(rows.label)}"
    styled(fig, title, height=460)
    fig.update_xaxes(title="channel", row=2, col=1)
    fig.update_yaxes(title="value", row=1, col=1)
    fig.update_yaxes(title="error", row=2, col=1)
    return fig.update_layout(legend=_BELOW, margin={"b": 96, "t": 92})


def _levels_drawn(rows: StoredRows, row: int) -> tuple[list[int], list[float]]:
    """Places and heights of the levels within the range of the row's values."""
    if len(rows.levels) > MOST_LEVELS:
        return [], []
    x: list[int] = []
    y: list[float] = []
    for channel in range(rows.coded):
        heights = rows.levels * rows.scales[row][channel // rows.block]
        x += [channel] * len(heights)
        y += heights.tolist()
    return x, y


def row_bytes_html(stored: Sequence[StoredRows]) -> str:
    """What the bytes of a row are, beside float32 and BF16, and the relative error of all rows together."""
    if not stored:
        raise InputError("give at least one kind of rows, see wb.stored_rows")
    kinds = list(dict.fromkeys(kind for rows in stored for kind in rows.nbytes))
    head = "".join(f"<th scope='col'>{escape(x)}</th>" for x in ("in FP32", "in BF16", "as released", *kinds, "relative error"))
    body = ""
    for rows in stored:
        width = rows.values.shape[1]
        numbers = [4 * width, 2 * width, sum(rows.nbytes.values()), *(rows.nbytes.get(kind, 0) for kind in kinds)]
        cells = "".join(f"<td>{number:,} B</td>" for number in numbers) + f"<td>{100 * rows.relative_error:.2f} %</td>"
        name = f"{rows.name}, {FORMATS[rows.codes]}"
        body += f"<tr><th scope='row'>{escape(name)}</th>{cells}</tr>"
    return (
        f"{_CSS}<div class='wb-bytes'><p>{escape(stored[0].label)}; error: root mean square over that of the values, coded"
        f" channels</p><table><thead><tr><th>one row</th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def kept_by_rank(selections: Selections) -> go.Figure:
    """For each rank of a kept entry, in how many percent of the queries it is still kept when keys are rounded."""
    fig = go.Figure()
    ranks = list(range(1, selections.topk + 1))
    for (layer, _), (colour, shape) in zip(selections.exact.items(), LAYER_LOOKS, strict=False):
        shares = 100 * selections.share_by_rank(layer)
        fig.add_bar(
            name=f"layer {layer}",
            x=ranks,
            y=shares.tolist(),
            marker={"color": colour, "pattern": {"shape": shape, "fgcolor": "#ffffff", "bgcolor": colour, "solidity": 0.2}},
            hovertemplate=f"layer {layer}, rank %{{x}}: still kept in %{{y:.1f}} %<extra></extra>",
        )
    queries = int(selections.choosing.sum())
    title = (
        f"Entries still kept when index keys are stored in FP4, by their rank with exact keys; {queries:,} queries<br>"
        f"{chart_text(selections.label)}"
    )
    styled(fig, title, height=360)
    fig.update_xaxes(title="rank by exact index score", dtick=1)
    fig.update_yaxes(title="still kept (%)", range=[0, 103])
    return fig.update_layout(barmode="group", legend=_BELOW, margin={"b": 92})
