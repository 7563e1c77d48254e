"""mHC in pictures: gain through depth beside unconstrained matrices, one matrix with its sums, and what Sinkhorn leaves."""

from __future__ import annotations

from html import escape

import numpy as np
import plotly.graph_objects as go

from workbench.errors import InputError
from workbench.figures.style import BLUE, GREY, ORANGE, PINK, VERMILLION, chart_text, styled
from workbench.mixing import (
    EXP,
    ITERATION_STEPS,
    MEASURES,
    MHC,
    SIGNS,
    SOFTMAX,
    Measure,
    Mixing,
    compared,
    gains,
    stacked,
    sum_errors,
)

LOOKS = {MHC: (BLUE, "solid"), SOFTMAX: (ORANGE, "dashdot"), SIGNS: (VERMILLION, "dash"), EXP: (PINK, "dot")}
_BELOW = {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"}
STRONGEST = 70  # percent of colour behind a number; text stays readable on it, in both themes
_CSS = f"""<style>
.wb-mixing {{overflow-x: auto; color: var(--jp-content-font-color1, inherit); line-height: 1.4}}
.wb-mixing table {{border-collapse: collapse; font-variant-numeric: tabular-nums}}
.wb-mixing caption {{text-align: left; padding: 4px 0}}
.wb-mixing th, .wb-mixing td {{padding: 3px 10px; text-align: right; font-weight: normal}}
.wb-mixing .p {{background: color-mix(in srgb, {BLUE} calc(var(--a) * 1%), transparent)}}
.wb-mixing .sum {{border-left: 2px solid #8888; font-style: italic}}
.wb-mixing tfoot td, .wb-mixing tfoot th {{border-top: 2px solid #8888; font-style: italic}}
</style>"""


def stream_gain(
    mixing: Mixing, measure: Measure = "energy", *, depth: int | None = None, names: tuple[str, ...] = (MHC, SOFTMAX, SIGNS)
) -> go.Figure:
    """The largest gain over all tokens after each sublayer, on a logarithmic axis, one line for each of ``names``.

    ``depth``: of a modelled stack whose matrices are drawn from the recorded ones; as recorded unless given. Unnormalised
    ``EXP`` is there only as recorded: deeper it leaves the range of numbers. InputError for an unknown measure or name.
    """
    if depth is not None and EXP in names:
        raise InputError("the gain of exp without normalisation overflows in a deep stack; leave it out, or leave depth out")
    if unknown := [name for name in names if name not in LOOKS]:
        raise InputError(f"names must be among {list(LOOKS)}, got {unknown}")
    fig = go.Figure()
    for name, matrices in compared(mixing).items():
        if name not in names:
            continue
        found = gains(matrices if depth is None else stacked(matrices, depth), measure)
        colour, dash = LOOKS[name]
        fig.add_scatter(
            name=name,
            x=list(range(1, len(found) + 1)),
            y=found.max(axis=1).tolist(),
            mode="lines+markers" if len(found) <= 20 else "lines",
            line={"color": colour, "dash": dash, "width": 2},
            customdata=np.median(found, axis=1).tolist(),
            hovertemplate=f"{chart_text(name)}: ×%{{y:.3g}} at most, ×%{{customdata:.3g}} in the median<extra></extra>",
        )
    what = f"Largest gain of {len(mixing.token_texts)} tokens, by {MEASURES[measure]}"
    if depth is not None:
        what = f"Modelled: {depth} sublayers drawn at random from those recorded, {MEASURES[measure]}"
    styled(fig, f"{chart_text(what)}<br>{chart_text(mixing.label)}", height=420)
    fig.update_xaxes(title="sublayers passed")
    fig.update_yaxes(title="gain", type="log", exponentformat="power")
    return fig.update_layout(legend=_BELOW, margin={"b": 116})


def sum_error_chart(mixing: Mixing, iterations: int) -> go.Figure:
    """How far sums miss one against Sinkhorn iterations, over all recorded matrices; a line marks ``iterations``."""
    steps = list(range(max(ITERATION_STEPS, iterations) + 1))
    rows, mean, columns = [], [], []
    for number in steps:
        row, column = sum_errors(mixing.balanced(number))
        rows.append(float(row.max()))
        mean.append(float(row.mean()))
        columns.append(float(column.max()))
    fig = go.Figure()
    lines = (
        ("rows, the worst", rows, VERMILLION, "solid"),
        ("rows, on average", mean, ORANGE, "dash"),
        ("columns, the worst", columns, BLUE, "dot"),
    )
    for name, values, colour, dash in lines:
        fig.add_scatter(
            name=name,
            x=steps,
            y=values,
            mode="lines+markers",
            line={"color": colour, "dash": dash, "width": 2},
            marker={"size": 5},
            hovertemplate=f"{name}: %{{y:.2g}} from one after %{{x}}<extra></extra>",
        )
    fig.add_vline(x=iterations, line={"color": GREY, "width": 2, "dash": "dash"})
    count = int(np.prod(mixing.mix.shape[:2]))
    title = f"How far the sums of {count:,} live matrices miss one<br>{chart_text(mixing.label)}"
    styled(fig, title, height=340)
    fig.update_xaxes(title="Sinkhorn iterations (0: row softmax alone)")
    fig.update_yaxes(title="distance from one", type="log", exponentformat="power")
    return fig.update_layout(legend=_BELOW, margin={"b": 92})


def matrix_html(matrix: np.ndarray, caption: str) -> str:
    """One mixing matrix as a table with the sum of each row beside it and of each column below."""
    size = len(matrix)
    head = "".join(f"<th scope='col'>to {k}</th>" for k in range(size))
    body = "".join(
        f"<tr><th scope='row'>from stream {j}</th>{''.join(map(_cell, row))}<td class='sum'>{row.sum():.4f}</td></tr>"
        for j, row in enumerate(matrix)
    )
    feet = "".join(f"<td>{total:.4f}</td>" for total in matrix.sum(axis=0))
    return (
        f"{_CSS}<div class='wb-mixing'><table><caption>{escape(caption)}</caption><thead><tr><th></th>{head}"
        f"<th scope='col' class='sum'>row sum</th></tr></thead><tbody>{body}</tbody>"
        f"<tfoot><tr><th scope='row'>column sum</th>{feet}<td class='sum'></td></tr></tfoot></table></div>"
    )


def _cell(x: float) -> str:
    return f"<td class='p' style='--a:{round(STRONGEST * min(1.0, max(0.0, x)))}'>{x:.4f}</td>"
