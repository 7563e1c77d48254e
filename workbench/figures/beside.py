"""Dense attention beside the sparse one as pictures, what was missed along the text, what reusing a choice saves and costs."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench import cost
from workbench.errors import InputError
from workbench.figures.attention import (
    LAYER_NAMES,
    Head,
    check_head,
    composite_tile,
    describe_head,
    describe_layer,
    tile_png,
)
from workbench.figures.difference import TABLE_CSS
from workbench.figures.picture_axes import picture_chart
from workbench.figures.style import BLUE, GREEN, GREY, ORANGE, PINK, PURPLE, SKY, VERMILLION, chart_text, styled
from workbench.presets import presets

if TYPE_CHECKING:
    from workbench.beside import Beside, Reuse

MAP_BYTES = 80_000  # of each of two pictures in one view of 250 KB
MOST_POINTS = 400  # of a line along the text; more tokens are averaged
TABLE_LAGS = (1, 8, 64)  # the chart has more
PUBLISHED = {"csa": "v4-pro", "mla-dsa": "v3.2"}  # V4.1's layers reuse choices as it is
MOST_HEADS = 8  # lines of their own
LAYER_COLOURS = (VERMILLION, BLUE, GREEN, ORANGE, PINK, SKY, PURPLE)
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
BELOW = {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom", "traceorder": "normal"}


def dense_cells(found: Beside, layer: int, head: Head = "max") -> np.ndarray:
    """[P, P]: the largest probability per cell with nothing left out; "mean" and "max" are over the heads."""
    dense, record = found.layer(layer), found.trace.layer(layer)
    check_head(record, head)
    return np.asarray(dense.mean if head == "mean" else dense.most.max(0) if head == "max" else dense.most[head])


def beside_maps(found: Beside, layer: int, head: Head = "max") -> go.Figure:
    """What a layer attends to, and beside it what it would with nothing left out: one scale, one pair of axes.

    Columns are tokens; an entry is painted over all tokens it was made from. InputError for a layer or head that is not there.
    """
    record = found.trace.layer(layer)
    dense = dense_cells(found, layer, head)
    tile = composite_tile(found.trace, layer, head, max_pixels=found.pixels)
    whole = (0, record.length)
    both = tile.values, np.where(tile.visible, dense, 0.0)
    shown = [tile_png(values, tile.visible, tile.scale, MAP_BYTES) for values in both]
    pooled = "" if tile.pooling == (1, 1) else f"; a cell is the largest of {tile.pooling[0]} × {tile.pooling[1]}"
    what = f"layer {layer} ({describe_layer(record)}), {describe_head(record, head)}{pooled}"
    colour = "brighter is more: colour is the square root of the probability, 0 to 1"
    names = (f"sparse: {found.topk} entries kept, as it ran", "dense: the same weights, every entry kept")
    title = f"{chart_text(what)}<br>{chart_text(found.trace.label)}<br>{colour}"
    return picture_chart(list(zip(names, shown, strict=True)), whole, whole, title)


def missed_chart(found: Beside, layer: int) -> go.Figure:
    """Along the text, the attention that entries left out would get: each head, and their mean. InputError for other layers."""
    dense, record = found.layer(layer), found.trace.layer(layer)
    each = -(-record.length // MOST_POINTS)
    starts = np.arange(0, record.length, each)
    counts = np.diff(np.append(starts, record.length))[:, None]
    missed = 100 * np.add.reduceat(dense.missed.astype(np.float64), starts, axis=0) / counts  # [points, H]
    whole = 100 * dense.missed.mean(0)
    fig = go.Figure()
    x = starts + (counts[:, 0] - 1) / 2
    for head in range(missed.shape[1]) if missed.shape[1] <= MOST_HEADS else ():
        fig.add_scatter(
            x=x, y=missed[:, head], mode="lines", name=f"head {head}: {whole[head]:.1f} %", opacity=0.8,
            line={"width": 1.2, "color": LAYER_COLOURS[1:][head % 6], "dash": DASHES[head % 4]},
            hovertemplate=f"head {head}, token %{{x:.0f}}: %{{y:.1f}} %<extra></extra>",
        )  # fmt: skip
    fig.add_scatter(
        x=x, y=missed.mean(1), mode="lines", name=f"mean over heads: {whole.mean():.1f} %",
        line={"width": 3, "color": VERMILLION}, hovertemplate="mean, token %{x:.0f}: %{y:.1f} %<extra></extra>",
    )  # fmt: skip
    averaged = f", each point a mean of {each} queries" if each > 1 else ""
    title = (
        f"Attention that entries left out would get, layer {layer} ({describe_layer(record)}), top-{found.topk}{averaged}<br>"
        f"{chart_text(found.trace.label)}"
    )
    styled(fig, title, 330)
    fig.update_xaxes(title="query token (position)", range=[-0.5, record.length - 0.5])
    fig.update_yaxes(title="missed (% of the attention)", range=[0, 101])
    return fig.update_layout(legend=BELOW, margin={"b": 110})


def reuse_chart(found: Beside) -> go.Figure:
    """How far a choice agrees with one made earlier: by layer (left, bars), and by itself some tokens before (right, lines).

    InputError where the text was too short to leave anything out.
    """
    if not found.step_reuse and not found.layer_reuse:
        raise InputError("no query of this text left an entry out; take a longer text or a smaller topk")
    fig = make_subplots(
        rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.06, column_widths=[0.5, 0.5],
        subplot_titles=("another layer, the same query", "the same layer, so many tokens before"),
    )  # fmt: skip
    pairs = [f"{x.source} to {x.layer}" for x in found.layer_reuse]
    marks = ["model does it" if x.same_choice else "" for x in found.layer_reuse]
    fig.add_bar(
        x=pairs, y=[100 * x.overlap for x in found.layer_reuse], name="kept by both", marker={"color": SKY}, text=marks,
        textposition="inside", textangle=-90, insidetextfont={"color": "#222222"},
        hovertemplate="layers %{x}: %{y:.1f} %<extra></extra>", row=1, col=1,
    )  # fmt: skip
    fig.add_scatter(
        x=pairs, y=[100 * x.by_chance for x in found.layer_reuse], name="by chance", mode="markers",
        marker={"symbol": "diamond", "size": 12, "color": ORANGE, "line": {"width": 1, "color": "#222222"}},
        hovertemplate="layers %{x} by chance: %{y:.1f} %<extra></extra>", row=1, col=1,
    )  # fmt: skip
    for number, layer in enumerate(sorted({x.layer for x in found.step_reuse})):
        mine = [x for x in found.step_reuse if x.layer == layer]
        colour, symbol = LAYER_COLOURS[number % 7], SYMBOLS[number % 7]
        fig.add_scatter(
            x=[x.lag for x in mine], y=[100 * x.overlap for x in mine], name=f"layer {layer}", mode="lines+markers",
            line={"color": colour, "width": 2}, marker={"symbol": symbol, "size": 8},
            hovertemplate=f"layer {layer}, %{{x}} tokens before: %{{y:.1f}} %<extra></extra>", row=1, col=2,
        )  # fmt: skip
        fig.add_scatter(
            x=[x.lag for x in mine], y=[100 * x.by_chance for x in mine], name=f"layer {layer} by chance", mode="lines",
            line={"color": colour, "width": 1, "dash": "dot"}, opacity=0.8, showlegend=False,
            hovertemplate=f"layer {layer} by chance, %{{x}} tokens before: %{{y:.1f}} %<extra></extra>", row=1, col=2,
        )  # fmt: skip
    title = (
        f"Kept entries that an earlier choice had kept too, top-{found.topk}, {found.trace.length:,} tokens; dotted: by chance"
    )
    styled(fig, f"{title}<br>{chart_text(found.trace.label)}", 400)
    lags = sorted({x.lag for x in found.step_reuse})
    fig.update_xaxes(title="from the earlier layer to the later", type="category", row=1, col=1)
    fig.update_xaxes(title="tokens before", type="log", tickvals=lags, ticktext=[str(lag) for lag in lags], row=1, col=2)
    fig.update_yaxes(range=[0, 103])
    fig.update_yaxes(title="share of kept entries (%)", row=1, col=1)
    fig.update_annotations(font={"size": 12, "color": GREY})
    return fig.update_layout(legend=BELOW, margin={"t": 92, "b": 104}, bargap=0.4)


def reuse_html(found: Beside) -> str:
    """One table: what each reuse of an earlier choice would save in index keys read, and what attention it would miss."""
    rows = []
    for x in found.layer_reuse:
        rows.append((_name(found, x.layer), f"that of layer {x.source}", *_shares(x), _saved(found, x)))
    for x in found.step_reuse:
        if x.lag in TABLE_LAGS:
            tokens = f"{x.lag} token{'s' if x.lag > 1 else ''}"
            rows.append((_name(found, x.layer), f"its own, {tokens} before", *_shares(x), _saved(found, x)))
    head = ("layer", "choice reused", "kept by both", "by chance", "attention missed as it is", "missed when reused",
            "index keys not read for that token")  # fmt: skip
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    cells = "".join(f"<th scope='col'>{escape(name)}</th>" for name in head)
    read = f"{found.bytes_read:,} bytes" if found.bytes_read else "an unknown number of bytes"
    said = (
        f"{found.trace.label}. For the token after these {found.trace.length:,} the cache ({found.trace.storage}) handed out "
        f"{read}, of which {sum(found.index_bytes.values()):,} were index keys: counted by the cache, measured. Attention "
        "missed is what entries the choice leaves out would get with nothing left out, mean over heads and over queries that "
        "leave something out; a choice made some tokens before cannot hold entries that were finished since."
    )
    return (
        f"{TABLE_CSS}<div class='wb-beside'><p>{escape(said)}</p>"
        f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table><p>{escape(_published(found))}</p></div>"
    )


def _published(found: Beside, length: int = 2**20) -> str:
    """What reuse by every second choosing layer would save in the published model of this kind, by formula; "" if it reuses."""
    kind = next(iter(found.dense.values())).kind
    if kind not in PUBLISHED:
        return ""
    preset = presets[PUBLISHED[kind]]
    layers, read = preset.layer_kinds.count(kind), cost.decode_bytes(preset, length)
    saved = read["index"] * (layers // 2) / layers
    return (
        f"At published size, modelled by formula: at {length:,} tokens {preset.title} reads {read['total'] / 1e6:,.0f} MB of "
        f"its cache for one token, {read['index'] / 1e6:,.0f} MB of it index keys of {layers} layers. If every second of them "
        f"took the choice of the one before it, {saved / 1e6:,.0f} MB ({saved / read['total']:.0%}) would not be read."
    )


def _name(found: Beside, layer: int) -> str:
    kind = found.trace.layer(layer).kind
    return f"{layer} ({LAYER_NAMES.get(kind, kind)})"


def _shares(x: Reuse) -> tuple[str, ...]:
    return tuple(f"{share:.1%}" for share in (x.overlap, x.by_chance, x.missed, x.missed_reusing))


def _saved(found: Beside, x: Reuse) -> str:
    """Bytes of index keys that the layer reads for one token, and their share of all that the token reads."""
    saved: Any = found.index_bytes.get(x.layer, 0)
    if x.same_choice or not saved:
        return "none: it reads none"
    return f"{saved:,} B ({saved / found.bytes_read:.0%} of all)"
