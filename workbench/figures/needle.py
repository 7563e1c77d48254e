"""How often a needle is found as fewer entries are kept: recall and the indexer's hit rate, each beside its chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from workbench.errors import InputError
from workbench.figures.style import BLUE, GREEN, GREY, ORANGE, PINK, VERMILLION, chart_text, styled

EVERYTHING = "every token"
COLOURS = (BLUE, VERMILLION, GREEN, PINK)


def needle_chart(rates: Mapping[str, Sequence[Mapping[str, Any]]], guess: float | None = None) -> go.Figure:
    """Results of ``needle_rates`` by name, one per top-k: recall (filled) and one indexer's hit rate (open), in percent.

    That indexer is the layer and query where the first selecting model's finds most, for every model that has it the same. A
    model that attends to every token has one recall, drawn across. ``guess`` is a reader's prediction, in percent, of the first
    model's recall at the smallest top-k. Raises InputError without results.
    """
    if not rates or not all(rates.values()):
        raise InputError("give at least one result of needle_rates for each name")
    fig = go.Figure()
    selecting = [results for results in rates.values() if results[0]["hits"]]
    first = selecting[0] if selecting else next(iter(rates.values()))
    hits = first[0]["hits"]
    best = max(hits, key=lambda look: sum(result["hits"][look] for result in first), default=None)  # the same for all models
    ks = [result["topk"] or EVERYTHING for result in first]
    for (name, results), colour in zip(rates.items(), COLOURS, strict=False):
        if results[0]["topk"] is None:
            label = f"{name}, seeing every token: answered right"
            _add_line(fig, ks, [results[0]["recall"]] * len(ks), label, colour, "dashdot", "square")
            continue
        own = [result["topk"] for result in results]
        _add_line(fig, own, [r["recall"] for r in results], f"{name}: answered right", colour, "solid", "circle")
        if best is not None and best in results[0]["hits"]:
            label = f"{name}: layer {best.replace(' ', ', at the ')}, keeps it"
            _add_line(fig, own, [r["hits"][best] for r in results], label, colour, "dash", "circle-open")
    if selecting:
        _add_line(fig, ks, [r["hit_chance"] for r in first], "chance to keep it by luck", GREY, "dash", "circle-open")
    _add_line(fig, ks, [r["recall_chance"] for r in first], "chance to answer right", GREY, "dot", "circle")
    if guess is not None:
        fig.add_scatter(
            x=[str(min(ks, key=lambda k: k if k != EVERYTHING else 0))], y=[guess], name="your guess", mode="markers",
            marker={"symbol": "star", "size": 16, "color": ORANGE, "line": {"color": "#222222", "width": 1}},
        )  # fmt: skip
    questions = " and ".join(str(n) for n in sorted({r["questions"] for results in rates.values() for r in results}))
    labels = [chart_text(str(results[0]["model"])) for results in rates.values()]
    title = f"Needles beyond the window, {questions} questions a point<br>" + "<br>".join(labels)
    styled(fig, title, height=420)
    fig.update_xaxes(title="entries a choosing layer keeps (top-k)", type="category", categoryorder="array",
                     categoryarray=[str(k) for k in (sorted(ks, reverse=True) if selecting else ks)])  # fmt: skip
    fig.update_yaxes(title="share of questions (%)", range=[-4, 104])
    below = {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"}
    return fig.update_layout(legend=below, margin={"t": 40 + 17 * len(labels), "b": 120})


def _add_line(
    fig: go.Figure, ks: Sequence[int | str], shares: Sequence[float], name: str, colour: str, dash: str, symbol: str
) -> None:
    fig.add_scatter(
        x=[str(k) for k in ks],
        y=[100 * share for share in shares],
        name=name,
        mode="lines+markers",
        line={"color": colour, "dash": dash, "width": 2},
        marker={"symbol": symbol, "size": 9},
        hovertemplate="top-%{x}: %{y:.0f} %",
    )
