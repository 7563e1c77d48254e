"""What an edited choice of entries changes, as charts and as a row of entries to press. Records in, pictures out.

The records are those of ``workbench.microscope`` and ``workbench.ways_to_choose``; nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from html import escape
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.errors import InputError
from workbench.figures import style
from workbench.figures.attention import describe_layer
from workbench.figures.query import TITLE_WIDTH
from workbench.trace import Trace

if TYPE_CHECKING:
    from workbench.microscope import Change, Choice

SHOWN_TOKENS, SHOWN_LEFT_OUT, ENTRY_TEXT, SHOWN_POINTS = 8, 20, 34, 300
LEAST = 1e-6  # probabilities below are drawn as this: an axis of powers has no zero
NAMES = {"indexer": "the indexer's choice", "mass": "oracle: most attention mass", "random": "at random"}
LOOKS = {
    "indexer": (style.BLUE, "solid", "circle"),
    "mass": (style.GREEN, "dash", "diamond"),
    "random": (style.VERMILLION, "dot", "square"),
}
_CSS = """<style>
.wb-entries {font: 12px var(--jp-ui-font-family, sans-serif); color: var(--jp-ui-font-color1, inherit); line-height: 1.5}
.wb-entries p {margin: 4px 0 2px}
.wb-entries div {display: flex; flex-wrap: wrap; gap: 5px}
.wb-entries button {font: inherit; color: inherit; background: none; border: 2px solid var(--jp-border-color1, grey);
  border-radius: 4px; padding: 1px 6px; cursor: pointer; text-align: left; max-width: 100%; overflow-wrap: anywhere}
.wb-entries button:hover, .wb-entries button:focus-visible {outline: 2px solid var(--jp-brand-color1, #0072b2)}
.wb-entries button.kept {border-color: #d55e00}
.wb-entries button.dropped {border-style: dashed; border-color: #d55e00; text-decoration: line-through; opacity: .75}
.wb-entries button.forced {border-color: #009e73; border-style: double; border-width: 3px; padding: 0 5px}
.wb-entries i {font-style: normal; opacity: .8; font-variant-numeric: tabular-nums}
</style>"""


def entries_html(trace: Trace, choice: Choice, change: Change, named: Collection[int] = ()) -> str:
    """The kept entries and the best of those left out, each a button with ``data-token`` of its number; text escaped.

    An entry shows its source text and the attention it gets (mean over heads): with the edit where it is attended to, beside
    all others where it is left out. ``named`` entries are among those shown in any case.
    """
    record = trace.layer(choice.layer)
    gets = dict(zip(change.kept, change.mass.tolist(), strict=True))
    dropped, forced = change.edit.drop, change.edit.force
    rank = {int(e): n + 1 for n, e in enumerate(np.argsort(-choice.scores, kind="stable"))}

    def button(entry: int) -> str:
        first, last = record.entry_tokens(entry)
        text = "".join(trace.token_texts[first : last + 1])
        shown = escape(style.visible_text(text, ENTRY_TEXT, " ").strip() or "␣")
        state = "dropped" if entry in dropped else "forced" if entry in forced else "kept" if entry in gets else "out"
        does = {"dropped": "put back", "forced": "leave out again", "kept": "drop", "out": "force in"}[state]
        mass = gets.get(entry, float(choice.mass[entry]))
        where = f"token {first}" if first == last else f"tokens {first}–{last}"
        told = f"{does} entry {entry}: {where}, index score {choice.scores[entry]:.4g}, rank {rank[entry]} of {choice.visible}"
        return (
            f"<button class='{state}' data-token='{entry}' title='{told}' aria-label='{told}'>"
            f"{entry} “<bdi>{shown}</bdi>” <i>{mass:.1%}</i></button>"
        )

    kept = [*choice.kept, *(e for e in forced if e not in choice.kept)]
    out = [e for e in choice.best_left_out(SHOWN_LEFT_OUT) if e not in forced]
    out += [e for e in named if e not in out and e not in kept]
    many = choice.visible - len(choice.kept)
    lines = [f"<p><b>Attended to</b> ({len(change.kept)} of {choice.visible} entries): press one to drop it</p>"]
    lines.append(f"<div>{''.join(map(button, kept)) or 'none yet: no entry was complete before this query'}</div>")
    if many:
        would = f"{choice.missed_mass:.1%} of this layer's attention, if nothing were left out"
        lines.append(f"<p><b>Left out</b> ({many}, which would get {would}): press one to force it in</p>")
        lines.append(f"<div>{''.join(map(button, out))}</div>")
    else:
        lines.append("<p>Nothing is left out here; choose a later query.</p>")
    return f"{_CSS}<div class='wb-entries'>{''.join(lines)}</div>"


def change_chart(trace: Trace, change: Change, text_of: Callable[[int], str], followed_by: int | None = None) -> go.Figure:
    """The likeliest next tokens without and with the edit, side by side; ``followed_by`` is the token that came in the text."""
    ids = change.likeliest(SHOWN_TOKENS)
    if followed_by is not None and followed_by not in ids:
        ids[-1] = followed_by
    ids = ids[::-1]  # the likeliest on top
    names = [f"“{style.visible_text(text_of(i), 16)}”" + (" (came next)" if i == followed_by else "") for i in ids]
    fig = go.Figure()
    for name, probs, colour in (("with the edit", change.after, style.ORANGE), ("as it was", change.before, style.BLUE)):
        values = np.maximum(probs[ids], LEAST)
        hover = "%{y}: %{customdata:.3g}<extra>" + name + "</extra>"
        bar = go.Bar(y=list(range(len(ids))), x=values, customdata=probs[ids], name=name, orientation="h", hovertemplate=hover)
        fig.add_trace(bar.update(marker_color=colour))
    edit, record = change.edit, trace.layer(change.edit.layer)
    what = [f"{word} {', '.join(map(str, es[:6]))}{'…' if len(es) > 6 else ''}" for word, es in
            (("drop", edit.drop), ("force in", edit.force)) if es]  # fmt: skip
    heading = f"layer {edit.layer} ({describe_layer(record)}), query {edit.query}: {' and '.join(what) or 'nothing edited'}"
    told = f"KL {change.kl_nats:.3g} nats after token {change.read_at}"
    lines = [line for part in (trace.label, heading, told) for line in wrap(part, TITLE_WIDTH)]
    above = 14 + 17 * len(lines) + 30  # the title and the legend
    style.styled(fig, "<br>".join(map(style.chart_text, lines)), above + 300)
    fig.update_layout(bargap=0.25, bargroupgap=0, legend_traceorder="reversed", margin_t=above)
    fig.update_xaxes(type="log", range=[np.log10(LEAST), 0.02], dtick=1, exponentformat="power")
    fig.update_xaxes(title="probability of the next token")
    return fig.update_yaxes(tickvals=list(range(len(ids))), ticktext=[style.chart_text(name) for name in names])


def choice_chart(trace: Trace, choice: Choice) -> go.Figure:
    """Index score against the attention each entry would get if nothing were left out: an indexer that chose by mass would keep
    the highest points. Of many entries the most attended and the best scored are drawn.
    """
    kept = np.zeros(choice.visible, bool)
    kept[list(choice.kept)] = True
    best = np.argsort(-choice.mass, kind="stable")
    shown = kept.copy()
    shown[best[:SHOWN_POINTS]] = shown[np.argsort(-choice.scores, kind="stable")[:SHOWN_POINTS]] = True
    fig = go.Figure()
    for name, which, colour, symbol in (
        ("left out", shown & ~kept, style.GREY, "circle-open"),
        ("kept", kept, style.ENTRY_COLOUR, "diamond"),
    ):
        entries = np.flatnonzero(which)
        hover = "entry %{customdata}<br>index score %{x:.4g}<br>attention %{y:.3g}<extra>" + name + "</extra>"
        mark = {"color": colour, "symbol": symbol, "size": 8}
        masses = np.maximum(choice.mass[entries], LEAST)
        look = {"name": name, "marker": mark, "hovertemplate": hover, "customdata": entries.astype(np.int32)}
        fig.add_scatter(x=choice.scores[entries], y=masses, mode="markers", **look)
    k = len(choice.kept)
    agreed = len(set(best[:k].tolist()) & set(choice.kept))
    recall = (
        f"the {k} kept are {agreed} of the {k} with most attention (recall@{k} {agreed / k:.0%})" if k else "nothing is kept"
    )
    told = f"if nothing were left out; {recall}; what is left out would get {choice.missed_mass:.1%}"
    where = f"layer {choice.layer} ({describe_layer(trace.layer(choice.layer))}), query {choice.query}"
    lines = [line for part in (trace.label, where, told) for line in wrap(part, TITLE_WIDTH)]
    above = 14 + 17 * len(lines) + 30
    style.styled(fig, "<br>".join(map(style.chart_text, lines)), above + 280)
    fig.update_layout(margin_t=above, showlegend=True)
    fig.update_xaxes(title="index score")
    return fig.update_yaxes(title="attention, mean over heads", type="log", dtick=1, exponentformat="power")


def selection_chart(curve: Mapping[str, Any]) -> go.Figure:
    """Of ``wb.selection_curve``: nats lost against keeping everything, per token and per entry left out, at each k.

    Points are means over the lines (and draws), bars their standard deviation. Raises InputError for something else.
    """
    if not {"ks", "lost", "left_out", "label"} <= set(curve):
        raise InputError("selection_chart draws what wb.selection_curve returned")
    ks, left = [str(k) for k in curve["ks"]], np.array(curve["left_out"])
    fig = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.09)
    for method, (colour, dash, symbol) in LOOKS.items():
        lost = np.asarray(curve["lost"][method])  # [k, N]
        for row, scale in ((1, np.ones(len(ks))), (2, np.where(left > 0, left, np.nan))):
            mean, spread = lost.mean(1) / scale, lost.std(1) / scale
            line = go.Scatter(x=ks, y=mean, name=NAMES[method], mode="lines+markers", legendgroup=method, showlegend=row == 1)
            line.update(line={"color": colour, "dash": dash, "width": 2}, marker={"symbol": symbol, "size": 9, "color": colour})
            line.update(error_y={"type": "data", "array": spread, "thickness": 1, "width": 4, "color": colour})
            unit = "nats a token" if row == 1 else "nats a token and missed entry"
            line.hovertemplate = f"{NAMES[method]}, top-%{{x}}: %{{y:.3g}} {unit}<extra></extra>"
            fig.add_trace(line, row=row, col=1)
    counted = f"{curve['text']}: {curve['tokens']:,} tokens counted in {curve['lines']} lines, {curve['draws']} random draws"
    titles = [str(curve["label"]), counted, "points are means, bars standard deviations over lines (and draws)"]
    style.styled(fig, "<br>".join(map(style.chart_text, titles)), 560)
    fig.update_layout(margin_t=112)
    fig.update_xaxes(type="category", categoryorder="array", categoryarray=ks[::-1])
    missed = [f"{k}<br>{m:.0f} missed" for k, m in zip(ks, left, strict=True)]
    fig.update_xaxes(title="entries a choosing layer keeps (top-k), and misses on average", row=2, col=1)
    fig.update_xaxes(tickvals=ks, ticktext=missed, row=2, col=1)
    fig.update_yaxes(title="nats lost per token", row=1, col=1)
    return fig.update_yaxes(title="per missed entry", row=2, col=1)


def curve_table(curve: Mapping[str, Any]) -> Sequence[Mapping[str, float]]:
    """The same numbers as rows: k, missed entries, recall@k, missed mass, and for each way to choose mean nats lost and per
    missed entry."""
    rows = []
    for i, k in enumerate(curve["ks"]):
        row = {"k": k, "missed entries": curve["left_out"][i], "recall@k": curve["recall"][i]}
        row["missed mass"] = curve["missed_mass"][i]
        for method in LOOKS:
            lost = float(np.mean(curve["lost"][method][i]))
            row[f"{method}: nats"] = lost
            row[f"{method}: nats per missed entry"] = lost / curve["left_out"][i] if curve["left_out"][i] else float("nan")
        rows.append(row)
    return rows
