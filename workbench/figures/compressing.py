"""What an entry is made of, where attention goes, and what turning the output back undoes, as charts and as coloured text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.errors import InputError
from workbench.figures.style import (
    BLUE,
    ENTRY_COLOUR,
    GREY,
    SINK_COLOUR,
    VERMILLION,
    WINDOW_COLOUR,
    chart_text,
    styled,
    visible_text,
)
from workbench.figures.text import escaped

if TYPE_CHECKING:
    from workbench.compressing import GateWeights, Moved, Split

SHOWN_TEXTS = 32  # rows up to which each token's text stands at its row
PLACES = (("window", WINDOW_COLOUR, ""), ("entries", ENTRY_COLOUR, "/"), ("sink", SINK_COLOUR, "x"))
LINES = ((VERMILLION, "solid"), (BLUE, "dash"), (SINK_COLOUR, "dot"), (GREY, "dashdot"))
BELOW = {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom", "traceorder": "normal"}
MOST_TEXT = 700  # tokens
STRONGEST = 70  # percent of colour behind a token; text stays readable on it
_CSS = f"""<style>
.wb-received {{color: var(--jp-content-font-color1, inherit); direction: ltr; text-align: left; line-height: 1.75;
  font-family: var(--jp-code-font-family, monospace); font-size: 13px; overflow-wrap: anywhere; max-height: 420px;
  overflow-y: auto}}
.wb-received p {{font-family: var(--jp-ui-font-family, sans-serif); font-size: 12px; margin: 0 0 6px}}
.wb-received bdi {{white-space: pre-wrap; border-radius: 2px;
  background: color-mix(in srgb, {VERMILLION} calc(var(--a) * 1%), transparent)}}
.wb-received bdi.m {{outline: 2px solid var(--jp-content-font-color1, currentColor)}}
.wb-received i {{font-style: normal; opacity: 0.72}}
</style>"""


def entry_weights(gates: GateWeights, entry: int, texts: Sequence[str]) -> go.Figure:
    """How one entry is made: the weight of each token it reads in every channel, and beside it the mean of each token.

    Row 0 on top is the earliest token. In CSA the rows above the line are the block before, read through series a, those below
    the entry's own, through series b. Rows before the text have no weight. InputError for an entry there is not.
    """
    if not 0 <= entry < len(gates.weights):
        raise InputError(f"layer {gates.layer} has entries 0..{len(gates.weights) - 1}, got {entry}")
    weights, tokens = gates.weights[entry], gates.tokens[entry]
    rows, mean = len(tokens), gates.by_token[entry]
    shown = [f"{t} {visible_text(texts[t], 14)}" if t >= 0 else f"before the text {i}" for i, t in enumerate(tokens)]
    names = [chart_text(name) for name in shown]  # token numbers make them different
    half = rows // 2 if gates.kind == "csa" else 0
    fig = make_subplots(rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.03, column_widths=[0.62, 0.38])
    percent = np.round(100 * weights).astype(np.uint8)
    parts = [(half, rows, "own block (series b)" if half else "own block", VERMILLION, "")]
    if half:
        parts.insert(0, (0, half, "block before (series a)", BLUE, "/"))
    for first, stop, name, colour, pattern in parts:
        clear = f"rgba({','.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))},0)"
        z: np.ndarray = percent
        if half:  # all rows in both maps, with gaps: plotly cannot draw two with different rows on an axis of names
            z = np.full(weights.shape, np.nan, np.float32)
            z[first:stop] = percent[first:stop]
        fig.add_heatmap(
            z=z, y=names, zmin=0, zmax=int(percent.max()), showscale=False, hoverongaps=False,
            colorscale=[[0, clear], [1, colour]], name=name,
            hovertemplate="token %{y}<br>channel %{x}: weight %{z} %<extra></extra>", row=1, col=1,
        )  # fmt: skip
        fig.add_bar(
            y=names[first:stop], x=100 * mean[first:stop], orientation="h", name=name, marker=_marker(colour, pattern),
            hovertemplate="token %{y}: mean weight %{x:.1f} %<extra></extra>", row=1, col=2,
        )  # fmt: skip
    even = 100 / max(1, int((tokens >= 0).sum()))
    fig.add_scatter(
        x=[even, even], y=[names[0], names[-1]], mode="lines", name="all alike", hoverinfo="skip",
        line={"color": GREY, "dash": "dot", "width": 2}, row=1, col=2,
    )  # fmt: skip
    first, last = int(tokens[tokens >= 0][0]), int(tokens[-1])
    title = f"Entry {entry} of layer {gates.layer} ({gates.kind}): one vector of {weights.shape[1]} channels from tokens"
    step = 1 if rows <= SHOWN_TEXTS else rows // 16
    styled(fig, f"{title} {first}–{last}<br>{chart_text(gates.label)}", height=170 + (24 * rows if step == 1 else 4 * rows))
    if half:
        fig.add_hline(half - 0.5, line={"color": GREY, "width": 2})
    fig.update_yaxes(
        range=[rows - 0.5, -0.5], tickmode="array", tickvals=names[::step],
        gridcolor="rgba(0,0,0,0)",
    )  # fmt: skip
    fig.update_xaxes(title="channel", gridcolor="rgba(0,0,0,0)", row=1, col=1)
    fig.update_xaxes(title="mean weight over the channels (%)", rangemode="tozero", row=1, col=2)
    return fig.update_layout(bargap=0.2, legend=BELOW, margin={"b": 96})


def effective_tokens_chart(gates: Sequence[GateWeights]) -> go.Figure:
    """How many tokens count in a channel of an entry: how often, by layer, on a logarithmic axis.

    Entries with nothing before their block are left out. InputError without layers.
    """
    if not gates:
        raise InputError("give at least one of wb.gate_weights' results")
    fig = go.Figure()
    most = max(one.weights.shape[1] for one in gates)
    edges = np.geomspace(1.0, most, 33)
    middles = np.sqrt(edges[1:] * edges[:-1])
    for one, (colour, dash) in zip(gates, LINES, strict=False):
        later = one.tokens[:, 0] >= 0
        counts = np.histogram(one.effective_tokens[later], edges)[0]
        fig.add_scatter(
            x=middles, y=100 * counts / max(1, counts.sum()), mode="lines",
            name=f"layer {one.layer} ({one.kind}, {one.weights.shape[1]} rows)",
            line={"color": colour, "dash": dash, "width": 2},
            hovertemplate="about %{x:.1f} tokens: %{y:.1f} % of channels<extra></extra>",
        )  # fmt: skip
    styled(fig, f"Tokens that count in a channel of an entry<br>{chart_text(gates[0].label)}", height=360)
    ticks = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n <= most]
    fig.update_xaxes(title="effective tokens (exp of the entropy)", type="log", tickmode="array", tickvals=ticks)
    fig.update_yaxes(title="share of the channels (%)", rangemode="tozero")
    return fig.update_layout(legend=BELOW, margin={"b": 100}, showlegend=True)


def received_weights(gates: GateWeights, texts: Sequence[str], marked: Sequence[int] = ()) -> str:
    """The text as HTML, each token coloured by the weight it has in all entries of the layer together; ``marked`` are framed.

    Full colour is the largest weight there is, none is zero. Only the first 700 tokens are shown. Safe for any text.
    """
    length = min(len(texts), MOST_TEXT)
    received = gates.received(len(texts))
    most = float(received.max()) or 1.0
    spans = []
    for t in range(length):
        frame = ' class="m"' if t in marked else ""
        strength = round(STRONGEST * received[t] / most)
        spans.append(
            f'<bdi{frame} style="--a:{strength}" title="token {t}: weight {received[t]:.2f}">{escaped(texts[t])}</bdi>'
        )
    cut = f" (the first {length} tokens)" if length < len(texts) else ""
    said = f"Layer {gates.layer} ({gates.kind}): weight of each token in all entries together, up to {most:.2f}{cut}."
    return f"{_CSS}<div class='wb-received'><p>{said} {chart_text(gates.label)}</p>{''.join(spans)}</div>"


def attention_split_chart(splits: Sequence[Split]) -> go.Figure:
    """Where each head's attention goes, one panel for each token: window, entries and sink, together 100 %.

    InputError without any.
    """
    if not splits:
        raise InputError("give at least one of wb.attention_split's results")
    tokens = list(dict.fromkeys(split.token for split in splits))
    titles = [f"token {t} “{visible_text(next(s.text for s in splits if s.token == t), 12)}”" for t in tokens]
    fig = make_subplots(
        rows=1, cols=len(tokens), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=[chart_text(t) for t in titles]
    )
    for column, token in enumerate(tokens, start=1):
        mine = [split for split in splits if split.token == token]
        rows = [f"layer {s.layer} {s.kind}, head {h}" for s in mine for h in range(len(s.shares))]
        shares = np.concatenate([split.shares for split in mine])
        for place, (name, colour, pattern) in enumerate(PLACES):
            fig.add_bar(
                y=rows, x=100 * shares[:, place], orientation="h", name=name, legendgroup=name, showlegend=column == 1,
                marker=_marker(colour, pattern),
                hovertemplate=f"%{{y}}: {name} %{{x:.1f}} %<extra></extra>", row=1, col=column,
            )  # fmt: skip
        fig.update_xaxes(title="share (%)", range=[0, 101], row=1, col=column)
    most = max(sum(len(s.shares) for s in splits if s.token == t) for t in tokens)
    styled(fig, f"One softmax: where each head's attention goes<br>{chart_text(splits[0].label)}", height=190 + 20 * most)
    fig.update_yaxes(autorange="reversed", row=1, col=1)
    fig.update_annotations(font={"size": 12, "color": GREY})
    return fig.update_layout(barmode="stack", bargap=0.15, legend=BELOW, margin={"t": 84, "b": 100})


def moved_chart(moved: Moved, head: int = 0, pair: int = 0) -> go.Figure:
    """One rotary pair of the last token's output as the text is moved, before and after turning back; and the logits' change.

    ``pair`` 0 turns fastest. InputError for a head or pair there is not.
    """
    heads, pairs = moved.before.shape[1:3]
    if not 0 <= head < heads or not 0 <= pair < pairs:
        raise InputError(f"there are heads 0..{heads - 1} and pairs 0..{pairs - 1}, got {head} and {pair}")
    fig = make_subplots(
        rows=1, cols=2, horizontal_spacing=0.14, column_widths=[0.45, 0.55],
        subplot_titles=("one pair of output channels", "largest change of a logit"),
    )  # fmt: skip
    far = [f"{by:,}" for by in moved.by]
    looks: tuple[tuple[str, Any, str, str, int], ...] = (
        ("as summed", moved.before, BLUE, "circle-open", 10),
        ("turned back", moved.after, VERMILLION, "diamond", 12),
    )
    for name, points, colour, symbol, size in looks:
        at = points[:, head, pair]
        fig.add_scatter(
            x=at[:, 0], y=at[:, 1], mode="markers", name=name, customdata=far,
            marker={"symbol": symbol, "size": size, "color": colour, "line": {"width": 2, "color": colour}},
            hovertemplate=f"moved by %{{customdata}}: %{{x:.3f}}, %{{y:.3f}}<extra>{name}</extra>", row=1, col=1,
        )  # fmt: skip
    reach = 1.15 * float(np.abs(np.stack([moved.before, moved.after])[:, :, head, pair]).max())
    tiny = 1e-7  # nothing has no place on a logarithmic axis
    lines: tuple[tuple[str, np.ndarray, str, str], ...] = (
        ("logits if outputs were left as summed", moved.left_turned, BLUE, "circle-open"),
        ("logits of the model as it is", moved.turned_back, VERMILLION, "diamond"),
    )
    for name, change, colour, symbol in lines:
        fig.add_scatter(
            x=far, y=np.maximum(change, tiny), mode="lines+markers", name=name, line={"color": colour, "width": 2},
            marker={"symbol": symbol, "size": 9, "color": colour},
            hovertemplate="moved by %{x}: %{y:.2g}<extra></extra>", row=1, col=2,
        )  # fmt: skip
    title = f"The whole text moved to later positions: layer {moved.layer} ({moved.kind}), head {head}, pair {pair}"
    styled(fig, f"{title}<br>{chart_text(moved.label)}", height=440)
    fig.update_xaxes(range=[-reach, reach], zeroline=True, zerolinecolor=GREY, row=1, col=1)
    fig.update_yaxes(range=[-reach, reach], zeroline=True, zerolinecolor=GREY, scaleanchor="x", row=1, col=1)
    fig.update_xaxes(type="category", title="tokens the text is moved by", row=1, col=2)
    fig.update_yaxes(type="log", exponentformat="power", row=1, col=2)
    fig.update_annotations(font={"size": 12, "color": GREY})
    return fig.update_layout(legend=BELOW, margin={"t": 84, "b": 110})


def _marker(colour: str, pattern: str) -> dict[str, Any]:
    """Of a bar: a pattern without a ground of its own would leave the bar empty."""
    ground = {"shape": pattern, "bgcolor": colour, "fgcolor": "#ffffff", "solidity": 0.2}
    return {"color": colour, "line": {"width": 0}, "pattern": ground}
