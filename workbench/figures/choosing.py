"""What an indexer chose, how much attention its choice keeps, what more entries are worth and what a miss costs, as charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench import cost
from workbench.errors import InputError
from workbench.figures.style import BLUE, GREEN, GREY, ORANGE, PINK, SKY, VERMILLION, chart_text, styled, visible_text
from workbench.presets import presets
from workbench.trace import Trace

if TYPE_CHECKING:
    from workbench.choosing import MassKept, Outcome, ScoredEntries

REST = "other text"
GROUP_COLOURS = (VERMILLION, BLUE, GREEN, PINK)
MOST_POINTS = 2048  # of one chart
LEAST_MASS = 1e-5  # smaller ones are drawn there: zero has no place on a logarithmic axis
BELOW = {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom", "traceorder": "normal"}
WORK_COLOURS = {"indexer": SKY, "core": VERMILLION, "projections": BLUE}
WORK_NAMES = {"indexer": "indexer: choosing", "core": "attention: reading what was chosen", "projections": "all weights"}
WORK_PATTERNS = {"indexer": "/", "core": "", "projections": "x"}


def index_choice(trace: Trace, layer: int, token: int, groups: Mapping[str, Sequence[int]] | None = None) -> go.Figure:
    """Index scores of one query over all entries along the text: kept ones filled, the others open.

    ``groups``: name -> tokens; entries that hold one of them get the group's colour, the first that fits. InputError for a
    layer without an indexer, a token the trace does not have, one that sees no entry, and too many groups.
    """
    record = trace.layer(layer)
    if not 0 <= token < trace.length:
        raise InputError(f"the trace has tokens 0..{trace.length - 1}, got {token}")
    if groups and len(groups) > len(GROUP_COLOURS):
        raise InputError(f"at most {len(GROUP_COLOURS)} groups have a colour, got {len(groups)}")
    scores = record.index_scores(token)
    if not len(scores):
        raise InputError(f"token {token} sees no entry of layer {layer} yet; choose a later one")
    assert record.selected is not None
    kept = np.isin(np.arange(len(scores)), record.selected[token])
    group = np.full(len(scores), -1)
    for number, tokens in reversed(list(enumerate((groups or {}).values()))):
        group[[e for t in tokens for e in record.entries_of(t) if e < len(scores)]] = number
    fig = go.Figure()
    names = [*(groups or {}), REST if groups else ""]
    colours = [*GROUP_COLOURS[: len(names) - 1], GREY]
    for number, (name, colour) in enumerate(zip(names, colours, strict=True)):
        mine = group == (number if number < len(names) - 1 else -1)
        for chosen, symbol in ((False, "circle-open"), (True, "diamond")):
            entries = np.flatnonzero(mine & (kept == chosen))
            entries = entries[np.argsort(-scores[entries], kind="stable")[:MOST_POINTS]]
            said = f"{name}: {'kept' if chosen else 'left out'}" if name else ("kept" if chosen else "left out")
            if not len(entries) and number == len(names) - 1 and chosen:
                continue
            spans = [record.entry_tokens(int(e)) for e in entries]
            fig.add_scatter(
                x=record.ratio * entries,
                y=scores[entries],
                customdata=[[int(e), first, last] for e, (first, last) in zip(entries, spans, strict=True)],
                mode="markers",
                name=chart_text(f"{said} ({len(entries)})"),
                marker={"symbol": symbol, "size": 11 if chosen else 7, "color": colour},
                hovertemplate="entry %{customdata[0]}, tokens %{customdata[1]}–%{customdata[2]}<br>"
                "score %{y:.3g}<extra></extra>",
            )
    text = chart_text(visible_text(trace.token_texts[token]))
    title = f"Index scores of query token {token} “{text}”, layer {layer}: {int(kept.sum())} of {len(scores)} entries kept"
    styled(fig, f"{title}<br>{chart_text(trace.label)}", height=420)
    fig.update_xaxes(title="first token of the entry's block")
    fig.update_yaxes(title="index score")
    return fig.update_layout(legend=BELOW, margin={"b": 120})


def score_against_mass(seen: ScoredEntries) -> go.Figure:
    """Each entry of one query: its index score against the attention it got when nothing was left out (logarithmic)."""
    fig = go.Figure()
    shown = np.maximum(seen.masses, LEAST_MASS)
    for chosen, symbol, colour in ((False, "circle-open", GREY), (True, "diamond", VERMILLION)):
        entries = np.flatnonzero(seen.kept == chosen)
        entries = entries[np.argsort(-seen.masses[entries], kind="stable")[:MOST_POINTS]]
        fig.add_scatter(
            x=seen.scores[entries],
            y=shown[entries],
            customdata=np.stack([entries, seen.masses[entries]], axis=1),
            mode="markers",
            name=f"top-k would {'keep' if chosen else 'leave out'} ({len(entries)})",
            marker={"symbol": symbol, "size": 10 if chosen else 7, "color": colour},
            hovertemplate="entry %{customdata[0]:.0f}: score %{x:.3g}, mass %{customdata[1]:.3g}<extra></extra>",
        )
    text = chart_text(visible_text(seen.text))
    title = f"Score against attention: layer {seen.layer}, query token {seen.token} “{text}”, nothing left out"
    styled(fig, f"{title}<br>{chart_text(seen.label)}", height=380)
    fig.update_xaxes(title="index score")
    fig.update_yaxes(title=f"attention mass, at least {LEAST_MASS:g}", type="log", exponentformat="power", dtick=1)
    return fig.update_layout(legend=BELOW, margin={"b": 100})


def mass_kept_chart(found: Mapping[str, MassKept]) -> go.Figure:
    """One panel each: share of the attention on entries kept by k of them, by index score, by attention itself, at random.

    InputError without anything to draw.
    """
    if not found:
        raise InputError("give at least one result of wb.mass_kept")
    fig = make_subplots(
        rows=1, cols=len(found), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=[chart_text(n) for n in found]
    )
    lines = (
        ("k best by attention itself", "oracle", GREY, "solid", 6),
        ("k best by index score", "indexer", VERMILLION, "solid", 3),
        ("k at random", "random", BLUE, "dot", 2),
    )
    for column, one in enumerate(found.values(), start=1):
        for name, field, colour, dash, width in lines:
            fig.add_scatter(
                x=one.k, y=100 * getattr(one, field), name=name, legendgroup=name, showlegend=column == 1, mode="lines",
                line={"color": colour, "dash": dash, "width": width},
                hovertemplate=f"top-%{{x}} {name[2:]}: %{{y:.1f}} %<extra></extra>", row=1, col=column,
            )  # fmt: skip
        own = min(one.topk, len(one.k))
        fig.add_scatter(
            x=[own], y=[100 * one.indexer[own - 1]], name="the model's own k", legendgroup="own", showlegend=column == 1,
            mode="markers", marker={"symbol": "diamond", "size": 12, "color": VERMILLION},
            hovertemplate="own top-%{x}: %{y:.1f} %<extra></extra>", row=1, col=column,
        )  # fmt: skip
        fig.update_xaxes(title="entries kept (k)", row=1, col=column)
    labels = list(dict.fromkeys(chart_text(one.label) for one in found.values()))
    styled(fig, "Attention on entries that k of them hold<br>" + "<br>".join(labels), height=400 + 16 * len(labels))
    fig.update_yaxes(range=[0, 102])
    fig.update_yaxes(title="share of the mass (%)", row=1, col=1)
    fig.update_annotations(font={"size": 12, "color": GREY})
    return fig.update_layout(legend=BELOW, margin={"t": 66 + 17 * len(labels), "b": 100})


def topk_curve(outcomes: Mapping[int, Outcome], guesses: Mapping[int, float], label: str, most: int) -> go.Figure:
    """Share of questions answered right by entries kept, for those tried; top-k 0 are the windows alone. Guesses are stars.

    A bar is the Wilson interval of 95 %: the questions are a sample.
    """
    fig = go.Figure()
    tried = sorted(outcomes)
    shares = [outcomes[k].share_right for k in tried]
    spans = [wilson(outcomes[k].right) for k in tried]
    fig.add_scatter(
        x=tried, y=[100 * share for share in shares], name="answered right", mode="lines+markers",
        error_y={
            "type": "data",
            "array": [100 * (high - share) for share, (_, high) in zip(shares, spans, strict=True)],
            "arrayminus": [100 * (share - low) for share, (low, _) in zip(shares, spans, strict=True)],
            "color": BLUE,
            "thickness": 1,
        },
        line={"color": BLUE, "width": 2}, marker={"size": 9}, hovertemplate="top-%{x}: %{y:.0f} %<extra></extra>",
    )  # fmt: skip
    fig.add_scatter(
        x=sorted(guesses), y=[guesses[k] for k in sorted(guesses)], name="your guess", mode="markers",
        marker={"symbol": "star", "size": 15, "color": ORANGE, "line": {"color": "#222222", "width": 1}},
        hovertemplate="top-%{x}: guessed %{y:.0f} %<extra></extra>",
    )  # fmt: skip
    asked = len(next(iter(outcomes.values())).right) if outcomes else 0
    said = f"{asked} questions a point" if asked else "nothing tried yet"
    styled(fig, f"Most frequent value named, by entries kept: {said}<br>{chart_text(label)}", height=380)
    ticks = list(range(0, most + 1, 1 if most <= 20 else 4))
    fig.update_xaxes(
        title="entries a choosing layer keeps", range=[-0.6, most + 0.6], tickmode="array", tickvals=ticks,
        ticktext=["windows<br>alone" if k == 0 else str(k) for k in ticks],
    )  # fmt: skip
    fig.update_yaxes(title="share of questions (%)", range=[-4, 106])
    return fig.update_layout(legend=BELOW, margin={"b": 116}, showlegend=True)


def wilson(right: np.ndarray, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval for a share, 95 % unless told: low, high."""
    n, p = len(right), float(np.mean(right))
    middle, spread = p + z * z / (2 * n), z * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5
    scale = 1 + z * z / n
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def outcome_bars(outcomes: Sequence[Outcome], guess_among: int | None = None) -> go.Figure:
    """What the right answer cost under each condition, in nats; each bar says how many answers were right.

    ``guess_among``: how many answers there are to choose from, for a line at the price of a blind guess among them. InputError
    without outcomes.
    """
    if not outcomes:
        raise InputError("give at least one outcome, see wb.miss_cost")
    names = [chart_text(outcome.condition) for outcome in outcomes]
    nats = [outcome.mean_nats for outcome in outcomes]
    fig = go.Figure()
    fig.add_bar(
        y=names, x=nats, orientation="h", name="mean", marker={"color": SKY},
        text=[f"{price:.3g} nats, {outcome.share_right:.0%} right" for price, outcome in zip(nats, outcomes, strict=True)],
        textposition="auto", insidetextfont={"color": "#222222"}, insidetextanchor="start",
        hovertemplate="%{y}: %{x:.3g} nats<extra></extra>",
    )  # fmt: skip
    if guess_among:
        price = float(np.log(guess_among))
        fig.add_scatter(
            x=[price, price], y=[names[0], names[-1]], mode="lines",
            name=f"a blind guess among {guess_among}: {price:.2g} nats",
            line={"color": ORANGE, "dash": "dash", "width": 2}, hoverinfo="skip",
        )  # fmt: skip
    title = f"Nats of the right answer, {len(outcomes[0].nats)} questions each"
    styled(fig, f"{title}<br>{chart_text(outcomes[0].label)}", height=150 + 36 * len(outcomes) + (40 if guess_among else 0))
    fig.update_xaxes(title="nats: −ln of the probability the answer got", rangemode="tozero")
    fig.update_yaxes(autorange="reversed")
    legend: dict[str, Any] = {"showlegend": bool(guess_among), "legend": BELOW, "margin": {"b": 100 if guess_among else 52}}
    return fig.update_layout(bargap=0.25, **legend)


def work_shares(models: Sequence[str], length: int) -> go.Figure:
    """What the FLOPs of one decoded token go to, each model's whole being 100 %, by formula. InputError without models."""
    if not models:
        raise InputError("give at least one of wb.presets")
    work = [cost.decode_flops(name, length) for name in models]
    names = [chart_text(presets[name].title) for name in models]
    fig = go.Figure()
    for part, colour in WORK_COLOURS.items():
        fig.add_bar(
            y=names, x=[100 * one[part] / one["total"] for one in work], orientation="h", name=WORK_NAMES[part],
            marker={
                "color": colour,
                "pattern": {"shape": WORK_PATTERNS[part], "bgcolor": colour, "fgcolor": "#ffffff", "solidity": 0.2},
            },
            customdata=[one[part] / 1e9 for one in work],
            hovertemplate=f"{part}: %{{x:.1f}} %, %{{customdata:,.4g}} GFLOPs<extra></extra>",
        )  # fmt: skip
    title = f"What the FLOPs of one decoded token go to, at {length:,} tokens<br>published sizes, modelled (formula)"
    styled(fig, title, height=190 + 34 * len(models))
    fig.update_xaxes(title="share of the FLOPs (%)", range=[0, 101])
    fig.update_yaxes(autorange="reversed")
    return fig.update_layout(barmode="stack", bargap=0.25, legend=BELOW, margin={"b": 100})
