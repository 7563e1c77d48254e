"""One recording's attention minus another's, on one token axis, and what it comes to layer by layer.

Colour carries the sign in its hue and the size in its opacity, so no change is the page itself in both themes. Only a block of
queries is worked out at once, never L x L. One letter sizes: L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import numpy as np
import plotly.graph_objects as go

from workbench.differences import Comparison, check_alike, settings_label
from workbench.errors import InputError
from workbench.figures.attention import (
    LAYER_NAMES,
    TILE_BYTES,
    Head,
    Levels,
    Range,
    cells_of,
    check_head,
    checked_range,
    describe_head,
    describe_layer,
    fitting_png,
    visible_cells,
)
from workbench.figures.picture_axes import picture_chart
from workbench.figures.signed_pooling import largest_change
from workbench.figures.style import BLUE, GREY, VERMILLION, chart_text
from workbench.trace import LayerTrace, Trace

FAINT = 26  # of 255, how opaque a place without a change is


@dataclass(frozen=True, slots=True, eq=False)
class DifferenceTile:
    """Probability in ``b`` minus that in ``a``, columns being tokens; an entry is painted over all tokens it was made from.

    ``values`` [h, w] float32: in each cell of ``pooling`` (rows, columns) the difference that is largest whatever its sign. Red
    is more in ``b``, blue is less, ``limit`` the full colour, of a square root so that small ones show. Clear where no query of
    the cell may look (``visible`` is False).
    """

    png: bytes
    values: np.ndarray
    visible: np.ndarray
    pooling: tuple[int, int]
    scale: tuple[int, int]
    row_range: Range
    column_range: Range
    limit: float
    layer: LayerTrace
    head: Head
    labels: tuple[str, str]


def difference_tile(
    a: Trace,
    b: Trace,
    layer: int,
    head: Head = "mean",
    rows: Range | None = None,
    columns: Range | None = None,
    max_pixels: int = 520,
    limit: float | None = None,
) -> DifferenceTile:
    """What ``layer`` attends to in ``b`` minus what it does in ``a``: two recordings of the same tokens.

    ``head`` is a number, or "mean" or "max" over the heads, taken before subtracting; ``rows`` and ``columns`` are (start,
    stop) tokens and default to all; ``limit`` is the difference that has the full colour, the largest there is unless given.
    Raises InputError, saying what differs, for recordings of other tokens or layers, and for what they do not have.
    """
    check_alike(a, b)
    one, other = a.layer(layer), b.layer(layer)
    check_head(one, head)
    if limit is not None and not (isinstance(limit, int | float) and 0 < limit <= 1):
        raise InputError(f"limit is a difference of probabilities, above 0 and at most 1, got {limit!r:.40}")
    rows, columns = checked_range("rows", rows, one.length), checked_range("columns", columns, one.length)
    sides = [cells_of(stop - start, max_pixels) for start, stop in (rows, columns)]
    pooling, scale = (sides[0][1], sides[1][1]), (sides[0][2], sides[1][2])
    values = largest_change((one, other), head, rows, columns, pooling)
    visible = visible_cells(one, rows, columns, pooling, True) | visible_cells(other, rows, columns, pooling, True)
    values[~visible] = 0.0
    full = float(np.abs(values).max()) if limit is None else limit
    png = _signed_png(values, visible, full, scale)
    labels = (settings_label(a), settings_label(b))
    return DifferenceTile(png, values, visible, pooling, scale, rows, columns, full, one, head, labels)


def _signed_png(values: np.ndarray, visible: np.ndarray, limit: float, scale: tuple[int, int]) -> bytes:
    """A palette PNG within ``TILE_BYTES``; a noisy picture gives up shades of colour to fit."""
    root = np.sign(values) * np.sqrt(np.clip(np.abs(values) / (limit or 1.0), 0.0, 1.0))

    def drawn(shades: int) -> Levels:
        colours, alpha = bytearray(3), bytearray(1)
        for strength in np.arange(-shades, shades + 1) / shades:
            hue = bytes.fromhex((VERMILLION if strength > 0 else BLUE if strength < 0 else GREY)[1:])
            colours += hue
            alpha.append(round(FAINT + (255 - FAINT) * abs(strength)))
        level = np.where(visible, np.round(root * shades) + shades + 1, 0)  # 0 is clear
        return level, bytes(colours), bytes(alpha)

    return fitting_png(map(drawn, (127, 31, 15, 7, 3, 1)), scale, TILE_BYTES)


def difference_map(tile: DifferenceTile, names: tuple[str, str] = ("", "")) -> go.Figure:
    """The tile with its axes in tokens, what was subtracted from what, and what the colours are.

    ``names`` say of A and B what their recordings do not, such as that Engram was off.
    """
    told = [f"{label}{f' ({name})' if name else ''}" for label, name in zip(tile.labels, names, strict=True)]
    a, b = (chart_text(label) for label in told)
    rows, columns = tile.pooling
    pooled = "" if tile.pooling == (1, 1) else f"; a cell is the largest of {rows} × {columns}, its sign kept"
    what = f"layer {tile.layer.layer} ({describe_layer(tile.layer)}), {describe_head(tile.layer, tile.head)}{pooled}"
    title = f"Attention of B minus A: {what}<br>A: {a}<br>B: {b}"
    fig = picture_chart([("", tile.png)], tile.row_range, tile.column_range, title)
    bounds = (("B attends more", VERMILLION, "square", tile.limit), ("B attends less", BLUE, "square", -tile.limit))
    for name, colour, symbol, value in bounds:
        fig.add_scatter(
            x=[None], y=[None], mode="markers", name=f"{name} (full colour: {value:+.2g})",
            marker={"symbol": symbol, "size": 12, "color": colour}, showlegend=True,
        )  # fmt: skip
    return fig


def difference_html(found: Comparison) -> str:
    """One table: how far each layer's attention moved and what its choice has in common; the next token's KL above it."""
    head = ("layer", "attention moved", "mean |B − A| of a place", "largest", "A's kept entries that B keeps")
    body = "".join(
        f"<tr><td>{x.layer}: {escape(LAYER_NAMES.get(x.kind, x.kind))}</td><td>{x.moved:.2%}</td><td>{x.mean_abs:.2e}</td>"
        f"<td>{x.largest:.3f}</td><td>{'–' if x.common is None else f'{x.common:.1%}'}</td></tr>"
        for x in found.layers
    )
    if found.kl_nats is None:
        kl = "No guesses for the next token were recorded."
    else:
        where = f"{found.kl_tokens:,} token{'s' if found.kl_tokens != 1 else ''}"
        how = f", over {where}" + (", from the likeliest guesses that were recorded" if found.kl_at_least else "")
        kl = f"Next token: KL(A || B) {'at least ' if found.kl_at_least else ''}{found.kl_nats:.3g} nats on average{how}."
    cells = "".join(f"<th scope='col'>{escape(name)}</th>" for name in head)
    return (
        f"{TABLE_CSS}<div class='wb-beside'><p>{escape(kl)}</p>"
        f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"
    )


TABLE_CSS = (
    "<style>.wb-beside{overflow-x:auto;line-height:1.4}.wb-beside table{border-collapse:collapse;"
    "font-variant-numeric:tabular-nums}.wb-beside th,.wb-beside td{padding:2px 10px;text-align:left;vertical-align:top;"
    "border-bottom:1px solid #8886}.wb-beside td:nth-child(-n+2){white-space:nowrap}</style>"
)
