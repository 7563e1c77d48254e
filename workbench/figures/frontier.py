"""The frontier: what small variants recall, against the bytes their KV caches hold and those one decoded symbol reads."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from statistics import mean
from typing import Any, Literal

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.errors import InputError
from workbench.figures.caches import size
from workbench.figures.style import BLUE, GREEN, GREY, ORANGE, PINK, SKY, VERMILLION, chart_text, styled
from workbench.frontier import HCA_RATIO, SCORED_LENGTH, Point, by_shape, pareto

Quality = Literal["recall", "text"]
QUALITIES = {
    "recall": ("recall", "records recalled (%)", 100.0),
    "text": ("text_loss", "loss on filler (nats a symbol; better is up)", 1.0),
}
_RATIO_COLOURS = {2: SKY, 4: BLUE, 8: GREEN, 16: ORANGE}
_SYMBOLS = {0.0: "circle", 0.5: "diamond", 1.0: "square"}
_PLACES = {1: "bottom right", 16: "top right"}  # of a label: what differs in top-k (or Engram) alone is often side by side
_PANELS = (("held", "bytes held"), ("read", "bytes read for one symbol"))


def frontier_chart(
    points: Sequence[Point],
    quality: Quality = "recall",
    length: int = SCORED_LENGTH,
    storage: str = "bf16",
    own: Collection[str] = (),
) -> go.Figure:
    """Two panels, bytes held and bytes read, on one quality; a marker is a variant, its bar the spread over seeds.

    Bytes are the formula's for ``length`` symbols in ``storage``; quality is what was measured. ``own`` names points drawn as
    the reader's. The line is the front: no variant on its left is as good. InputError without points, for an unknown quality,
    and for points that were not scored alike.
    """
    if not points:
        raise InputError("there are no points to draw; see wb.frontier_points")
    if quality not in QUALITIES:
        raise InputError(f"quality is one of {', '.join(QUALITIES)}, got {quality!r}")
    lengths = {point.scores.get("length") for point in points}
    if len(lengths) > 1:
        raise InputError(f"these points were scored on texts of different lengths ({sorted(map(str, lengths))}); sweep again")
    groups = list(by_shape(points).values())
    fig = make_subplots(rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.03)
    for column, (panel, axis) in enumerate(_PANELS, 1):
        places = [_place(group, panel, quality, length, storage) for group in groups]
        sign = -1 if quality == "text" else 1
        front = pareto([(place["x"], sign * place["y"]) for place in places])
        fig.add_scatter(
            x=[places[i]["x"] for i in front],
            y=[places[i]["y"] for i in front],
            name="front: nothing cheaper is as good",
            mode="lines",
            line={"color": GREY, "width": 2, "dash": "dot", "shape": "hv"},
            hoverinfo="skip",
            legendgroup="front",
            showlegend=column == 1,
            row=1,
            col=column,
        )
        for name, colour, chosen in _families(groups, own):
            fig.add_scatter(
                **_markers([groups[i] for i in chosen], [places[i] for i in chosen], name, colour),
                legendgroup=name,
                showlegend=column == 1,
                row=1,
                col=column,
            )
        ticks = _ticks([place["x"] for place in places])
        fig.update_xaxes(title=axis, tickvals=ticks, ticktext=[size(tick) for tick in ticks], row=1, col=column)
    for name, symbol in (("half HCA", "diamond"), ("HCA only", "square"), ("hollow: Engram", "circle-open")):
        marker = {"symbol": symbol, "color": GREY, "size": 11, "line": {"width": 2, "color": GREY}}
        fig.add_scatter(x=[None], y=[None], mode="markers", name=name, marker=marker, hoverinfo="skip")
    _floor(fig, points[0], quality)
    styled(fig, _title(points, quality, length, storage), height=530)
    fig.update_xaxes(type="log")
    fig.update_yaxes(title=QUALITIES[quality][1], row=1, col=1)
    if quality == "text":
        fig.update_yaxes(autorange="reversed")
    else:
        fig.update_yaxes(range=[-4, 106])
    below = {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom", "traceorder": "normal"}
    return fig.update_layout(legend=below, margin={"b": 140})


def _place(group: list[Point], panel: str, quality: Quality, length: int, storage: str) -> dict[str, Any]:
    """Where a variant stands: mean over its seeds, and how far the best and the worst are from it."""
    score, _, factor = QUALITIES[quality]
    values = [factor * point.scores[score] for point in group]
    middle = mean(values)
    held, read = group[0].held(length, storage), group[0].read(length, storage)
    seeds = ", ".join(str(point.variant.seed) for point in group)
    spread = f"{min(values):.3g} to {max(values):.3g}, seeds {seeds}" if len(group) > 1 else f"one seed ({seeds})"
    recalled, loss = (mean(point.scores[name] for point in group) for name in ("recall", "text_loss"))
    steps = group[0].variant.steps
    text = (
        f"{group[0].variant.label}<br>recalled {recalled:.1%}, loss on filler {loss:.3f}"
        f"<br>{'recall' if quality == 'recall' else 'loss'}: {spread}<br>held {size(held)}, read {size(read)} ({steps:,} steps)"
    )
    return {
        "x": held if panel == "held" else read,
        "y": middle,
        "up": max(values) - middle,
        "down": middle - min(values),
        "text": text,
    }


def _families(groups: list[list[Point]], own: Collection[str]) -> list[tuple[str, str, list[int]]]:
    """(name, colour, which groups): by symbols per CSA entry, HCA alone, and the reader's own on top."""
    mine = [i for i, group in enumerate(groups) if any(point.variant.name in own for point in group)]
    rest = [i for i in range(len(groups)) if i not in mine]
    families = []
    variants = [group[0].variant for group in groups]
    for ratio in sorted({variants[i].ratio for i in rest if variants[i].hca_share < 1}):
        chosen = [i for i in rest if variants[i].ratio == ratio and variants[i].hca_share < 1]
        families.append((f"{ratio} symbols an entry", _RATIO_COLOURS.get(ratio, GREY), chosen))
    alone = [i for i in rest if variants[i].hca_share == 1]
    if alone:
        families.append((f"HCA only, {HCA_RATIO} an entry", VERMILLION, alone))
    return families + ([("yours", PINK, mine)] if mine else [])


def _markers(groups: list[list[Point]], places: list[dict[str, Any]], name: str, colour: str) -> dict[str, Any]:
    variants = [group[0].variant for group in groups]
    bars = {"type": "data", "symmetric": False, "thickness": 2, "width": 0, "color": colour}
    symbols = [_SYMBOLS[v.hca_share] + ("-open" if v.engram else "") for v in variants]
    return {
        "x": [place["x"] for place in places],
        "y": [place["y"] for place in places],
        "error_y": bars | {"array": [place["up"] for place in places], "arrayminus": [place["down"] for place in places]},
        "name": name,
        "mode": "markers+text",
        "text": [f"k{v.topk}" if v.hca_share < 1 else "" for v in variants],
        "textposition": ["middle left" if v.engram else _PLACES.get(v.topk, "middle right") for v in variants],
        "textfont": {"size": 10, "color": GREY},
        "marker": {
            "symbol": symbols,
            "color": colour,
            "size": 17 if name == "yours" else 12,
            "line": {"width": 2, "color": colour},
        },
        "hovertext": [place["text"] for place in places],
        "hovertemplate": "%{hovertext}<extra></extra>",
    }


def _ticks(values: Sequence[float]) -> list[int]:
    """1, 2 and 5 times powers of ten from a little below the least to a little above the most."""
    powers = range(int(math.log10(min(values))), int(math.log10(max(values))) + 2)
    return [m * 10**p for p in powers for m in (1, 2, 5) if min(values) / 2 <= m * 10**p <= 2 * max(values)]


def _floor(fig: go.Figure, point: Point, quality: Quality) -> None:
    """What guessing gives, or what nobody can beat."""
    if quality == "recall":
        level, name = 100 * point.scores["chance"], f"by chance {point.scores['chance']:.1%}"
    else:
        level, name = point.scores.get("text_loss_best", 0.0), "knowing every rule"
    fig.add_hline(y=level, line={"color": GREY, "width": 1, "dash": "dash"}, row="all", col="all")  # type: ignore[arg-type]
    fig.add_annotation(
        text=name, x=1, xref="x2 domain", y=level, yref="y2", showarrow=False, xanchor="right", yanchor="bottom",
        font={"size": 10, "color": GREY},
    )  # fmt: skip


def _title(points: Sequence[Point], quality: Quality, length: int, storage: str) -> str:
    scores = points[0].scores
    symbols = f"{int(scores.get('length', 0)):,} symbols"
    asked = f"{int(scores['questions']):,} questions, records more than {int(scores.get('beyond', 0))} symbols back"
    what = f"Recall ({asked}" if quality == "recall" else f"Loss on filler ({int(scores.get('text_symbols', 0)):,} symbols"
    devices = sorted({str(point.trained_with.get("device", "an unnamed device")) for point in points})
    trained = f"toys, trained and measured on {devices[0]}{' and others' if devices[1:] else ''}, in texts of {symbols}"
    counted = f"bytes by formula at {length:,} symbols, {storage}"
    return chart_text(f"{what}) against KV bytes; kN keeps N entries") + "<br>" + chart_text(f"{trained}; {counted}")
