"""A reader's guess beside what came out, in a chart of its own or drawn over another."""

from __future__ import annotations

import plotly.graph_objects as go

from workbench.errors import InputError
from workbench.figures.style import BLUE, ORANGE, chart_text, styled

GUESS = "your guess"


def with_guess(fig: go.Figure, guess: float, unit: str = "", *, across: str = "y") -> go.Figure:
    """``fig`` with a line at the guess, over its first trace's categories or numbers; marked, named and in the legend.

    ``across`` says which axis the guess is a value of: "y" for upright bars and curves, "x" for bars that lie. A scatter, not a
    shape, because shapes and notes take their logarithm on different occasions. InputError for a chart without data.
    """
    if across not in ("x", "y"):
        raise InputError(f"a guess is a value of the x or the y axis, got {across!r}")
    drawn = [list(places) for data in fig.data if (places := data.x if across == "y" else data.y) is not None and len(places)]
    if not drawn:
        raise InputError("the chart has no data to draw a guess over")
    places = list(dict.fromkeys(place for own in drawn for place in own))
    ends = [places[0], places[-1]] if len(places) > 1 else places
    values = [guess] * len(ends)
    name = f"{GUESS}: {number(guess)}{_after(unit)}"
    return fig.add_scatter(
        x=ends if across == "y" else values,
        y=values if across == "y" else ends,
        name=chart_text(name),
        mode="lines" if len(ends) > 1 else "markers",  # a mark on the first and last bar would look like a guess about these
        line={"color": ORANGE, "width": 2, "dash": "dash"},
        marker={"symbol": "star", "size": 14, "color": ORANGE, "line": {"color": "#222222", "width": 1}},
        hovertemplate=chart_text(name) + "<extra></extra>",
        showlegend=True,
    )


def guess_and_result(question: str, guess: float, result: float, unit: str = "", *, log: bool = False) -> go.Figure:
    """Two bars that lie: what was guessed and what came out."""
    fig = go.Figure()
    for name, value, colour, ink in ((GUESS, guess, ORANGE, "#222222"), ("result", result, BLUE, "#ffffff")):
        fig.add_bar(
            y=[name],
            x=[value],
            orientation="h",
            name=name,
            text=[f"{number(value)}{_after(unit)}"],
            textposition="auto",
            insidetextfont={"color": ink},
            marker={"color": colour},
        )
    styled(fig, chart_text(question), height=200)
    fig.update_xaxes(title=chart_text(unit), type="log" if log else "linear")
    fig.update_yaxes(autorange="reversed")
    return fig.update_layout(showlegend=False)


def number(value: float) -> str:
    """Three significant digits, thousands apart, no trailing zeros: 0.758, 12, 9.55, 50,400."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _after(unit: str) -> str:
    return f" {unit}" if unit else ""
