"""One query of one layer: what it does with a column, where it looks most, and all of it as a chart along the text.

Columns are counted as in ``workbench.figures.attention``. One letter sizes: L tokens, S entries, W window, H heads.
"""

from __future__ import annotations

import json
from functools import cache
from textwrap import wrap
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.errors import InputError, whole_number
from workbench.figures import style
from workbench.figures.attention import (
    Head,
    check_head,
    column_tokens,
    describe_head,
    describe_layer,
    entry_name,
    layer_of,
    window_columns,
)
from workbench.figures.pooling import of_head
from workbench.trace import LayerTrace, Trace

MAX_POINTS = 200  # bars of one kind in a chart; more are pooled by their maximum (a strip has 10 KB)
TITLE_WIDTH = 54  # characters that fit a chart beside a map


def describe(trace: Trace, layer: int, head: Head, row: int, column: int) -> dict[str, Any]:
    """What one query does with one column, as plain values.

    Keys: ``query``, ``query_text``; ``column``, ``column_kind`` ("window token", "compressed entry", or "token" where entries
    are tokens), ``entry`` or None, ``sources`` and ``source_texts``; ``visible``; ``probability`` of the head, over ``pooled``
    entries where rows were recorded pooled, None where only the selection is known. Where entries are chosen also
    ``index_score`` and ``rank`` (1 is best) among ``visible_entries``, ``selected``, ``runner_up`` (the best one not kept) and
    ``chosen_by``, the layer whose indexer it was; None elsewhere. Texts are not escaped.
    """
    record = layer_of(trace, layer)
    check_head(record, head)
    _check_token(record, row)
    sources = column_tokens(record, column)
    tokens = window_columns(record)
    entry = column - tokens if column >= tokens else None
    closed = record.visible_entries(row)
    out: dict[str, Any] = {
        "layer": layer,
        "layer_kind": record.kind,
        "head": head,
        "query": row,
        "query_text": trace.token_text(row),
        "column": column,
        "column_kind": "window token" if entry is None else entry_name(record),
        "entry": entry,
        "sources": sources,
        "source_texts": tuple(trace.token_text(t) for t in sources),
        "visible": row - record.window < column <= row if entry is None else entry < closed,
        "visible_entries": closed,
        "probability": None if record.selection_only else 0.0,
        "pooled": 1,
        "index_score": None,
        "rank": None,
        "selected": None,
        "runner_up": None,
        "chosen_by": None,
    }
    if not out["visible"]:
        return out
    if entry is None:
        out["probability"] = float(of_head(record.window_probs[row], head)[column - row + record.window - 1])
    elif record.selection_only:
        out |= _describe_selection(record, None, row, entry)
    elif record.selected is not None and record.selected_probs is not None:
        out |= _describe_selection(record, trace.chooser(layer), row, entry)
        if out["selected"]:
            at = int(np.flatnonzero(record.selected[row] == entry)[0])
            out["probability"] = float(of_head(record.selected_probs[row], head)[at])
    elif record.entry_probs is not None:
        out["pooled"] = record.entry_pooling(row)
        out["probability"] = float(of_head(record.entry_probs[row], head)[entry // out["pooled"]])
    return out


def _describe_selection(record: LayerTrace, chooser: LayerTrace | None, row: int, entry: int) -> dict[str, Any]:
    """Score, rank and fate of a visible entry. Kept entries rank before all others, however scores were rounded."""
    assert record.selected is not None
    kept = record.selected[row][record.selected[row] >= 0]
    found: dict[str, Any] = {"selected": entry in kept, "runner_up": False, "index_score": None, "rank": None}
    if chooser is None:
        return found
    found["chosen_by"], found["runner_up"] = chooser.layer, _runner_up(chooser, row) == entry
    scores = chooser.index_scores(row)
    found["index_score"] = float(scores[entry])
    if found["selected"]:
        found["rank"] = int(np.flatnonzero(kept == entry)[0]) + 1
    else:
        others = np.setdiff1d(np.arange(len(scores)), kept)
        before = (scores[others] > scores[entry]) | ((scores[others] == scores[entry]) & (others < entry))
        found["rank"] = len(kept) + int(before.sum()) + 1
    return found


def _runner_up(chooser: LayerTrace, token: int) -> int:
    """The best entry that was not kept, -1 if there is none."""
    return -1 if chooser.runner_up is None else int(chooser.runner_up[token])


def source_probs(record: LayerTrace, head: Head, token: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every column query ``token`` attends to: columns [N], probabilities [N], entries each stands for [N], 1 if not pooled.

    Where only the selection is known, a kept column has 1: a mark, and no probability.
    """
    tokens = window_columns(record)
    columns = token - record.window + 1 + np.arange(record.window)
    probs = np.zeros(0, np.float32) if record.selection_only else of_head(record.window_probs[token], head)
    stands_for = np.ones(record.window, np.int64)
    if record.selection_only:
        assert record.selected is not None
        entry_columns = np.asarray(record.selected[token]).astype(np.int64)
        entry_probs, each = (entry_columns >= 0).astype(np.float32), np.ones(len(entry_columns), np.int64)
    elif record.selected is not None and record.selected_probs is not None:
        kept = record.selected[token]
        entry_columns, entry_probs = np.where(kept >= 0, tokens + kept, -1), of_head(record.selected_probs[token], head)
        each = np.ones(len(kept), np.int64)
    elif record.entry_probs is not None:
        pooling, entry_probs = record.entry_pooling(token), of_head(record.entry_probs[token], head)
        first = pooling * np.arange(len(entry_probs))
        entry_columns, each = tokens + first, np.clip(record.visible_entries(token) - first, 1, pooling)
    else:
        entry_columns, entry_probs, each = np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.int64)
    columns = np.concatenate([columns, entry_columns])
    probs, stands_for = np.concatenate([probs, entry_probs]), np.concatenate([stands_for, each])
    seen = (columns >= 0) & (probs > 0)
    return columns[seen], probs[seen], stands_for[seen]


def top_sources(trace: Trace, layer: int, head: Head, token: int, k: int) -> list[dict[str, Any]]:
    """The ``k`` columns query ``token`` attends to most, best first, each as ``describe`` tells it.

    Where only the selection is known, the first ones in the server's order.
    """
    record = layer_of(trace, layer)
    check_head(record, head)
    _check_token(record, token)
    if whole_number("k", k) < 1:
        raise InputError(f"k must be at least 1, got {k}")
    columns, probs, _ = source_probs(record, head, token)
    best = np.argsort(-probs, kind="stable")[:k]
    return [describe(trace, layer, head, token, int(columns[i])) for i in best]


def _check_token(record: LayerTrace, token: int) -> None:
    if not 0 <= whole_number("a token", token) < record.length:
        raise InputError(f"the trace has tokens 0..{record.length - 1}, got {token}")


def query_facts(trace: Trace, layer: int, token: int, head: Head = "max") -> dict[str, Any]:
    """Where one query's attention goes as a whole, and how much of its choice others share, as plain values.

    "window", "entries" and "sink" are their shares of the head's probability (of "max", each head's largest, so of the mean
    instead), None where the layer lacks the place. Where entries are chosen: "kept" of "visible" entries; "before", how many of
    them the query before kept as well, None for the first; "layers", for each other layer of this kind whose entries have the
    same ratio, how many of them it kept too.
    """
    record = layer_of(trace, layer)
    check_head(record, head)
    _check_token(record, token)
    one: Head = "mean" if head == "max" else head
    entry_probs = record.selected_probs if record.selected_probs is not None else record.entry_probs
    facts: dict[str, Any] = {"window": None, "entries": None, "sink": None, "kept": None, "visible": None, "before": None}
    for name, probs in (("window", record.window_probs), ("entries", entry_probs), ("sink", record.sink_probs[..., None])):
        if probs is not None and (name != "window" or record.window) and (name != "sink" or record.has_sink_at(token)):
            facts[name] = float(of_head(probs[token], one).sum())
    if record.selected is None and entry_probs is not None and record.entry_pooling(token) > 1:
        facts["entries"] = None  # recorded as maxima of several entries, which have no sum
    facts["layers"] = {}
    if record.selected is not None:
        mine = _kept_by(record, token)
        facts |= {"kept": len(mine), "visible": record.visible_entries(token)}
        facts["before"] = len(mine & _kept_by(record, token - 1)) if token else None
        for other in trace.layers:
            if (
                other is not record
                and other.selected is not None
                and (other.ratio, other.kind[:4]) == (record.ratio, record.kind[:4])
            ):
                facts["layers"][other.layer] = len(mine & _kept_by(other, token))
    return facts


def _kept_by(record: LayerTrace, token: int) -> set[int]:
    assert record.selected is not None
    return set(record.selected[token][record.selected[token] >= 0].tolist())


def query_strip(trace: Trace, layer: int, token: int, head: Head = "max") -> go.Figure:
    """One query along the text: index scores of the visible entries with the kept ones marked, and where attention went.

    The first row (only where entries are chosen) has one bar per visible entry with the score of the indexer that chose, the
    second one bar per window token, attended entry and the sink, of those the layer has. An entry's bar covers its own block of
    tokens. More than a few hundred bars are pooled by maximum. Where only the selection is known, one row shows which entries
    were selected, or of how large a share where there are too many to draw each.
    """
    return go.Figure(strip_chart(trace, layer, token, head))


def strip_chart(trace: Trace, layer: int, token: int, head: Head = "max") -> dict[str, Any]:
    """``query_strip`` as plain values and arrays, {"data", "layout"}: a slider draws it anew with each move, and checking every
    attribute of a figure takes many times as long as working out what it shows."""
    record = layer_of(trace, layer)
    check_head(record, head)
    _check_token(record, token)
    chooser = trace.chooser(layer)
    indexed = chooser is not None and record.visible_entries(token) > 0
    layout = json.loads(_strip_frame(2 if indexed else 1))
    data = _score_bars(record, chooser, token, layout) if chooser is not None and indexed else []
    if record.selection_only:
        data += _selected_bars(record, token, layout)
    else:
        data += _prob_bars(record, token, head, layout, "2" if indexed else "")
    text = style.visible_text(trace.token_text(token))
    heading = f"layer {layer} ({describe_layer(record)}), {describe_head(record, head)}: query token {token} “{text}”"
    lines = [*wrap(trace.label, TITLE_WIDTH), *wrap(heading, TITLE_WIDTH)]
    above = 14 + 17 * len(lines) + 62  # the title and three lines of legend
    layout["title"]["text"] = "<br>".join(map(style.chart_text, lines))
    layout["height"], layout["margin"]["t"] = above + (310 if indexed else 170), above
    return {"data": data, "layout": layout}


@cache
def _strip_frame(rows: int) -> str:
    """The layout of a strip of one or two rows as JSON, without what differs from query to query."""
    fig = make_subplots(rows=rows, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    style.styled(fig, "strip", 300)
    fig.update_layout(bargap=0, barmode="overlay", showlegend=True)  # also of one kind of bars
    fig.update_xaxes(title_text="token position", row=rows, col=1)
    return fig.layout.to_json()


def _score_bars(record: LayerTrace, chooser: LayerTrace, token: int, layout: dict[str, Any]) -> list[dict[str, Any]]:
    scores, name_of_one = chooser.index_scores(token), "token" if record.of_tokens else "entry"
    kept = record.selected[token] if record.selected is not None else np.zeros(0, np.int32)
    kept = np.unique(kept[kept >= 0])
    low, high = float(scores.min()), float(scores.max())
    floor = min(0.0, low - 0.05 * (high - low))  # bars stand on it: the higher, the better, also below zero
    data: list[dict[str, Any]] = []
    for name, bars, colour, symbol in (
        ("not kept", _bars_without(record, scores, kept), style.GREY, None),
        ("kept", _bars(record, kept, scores[kept]), style.ENTRY_COLOUR, "diamond"),
    ):
        x, y, width, first = bars
        hover = name_of_one + " %{customdata[0]:.0f}<br>index score %{customdata[1]:.4g}<extra>" + name + "</extra>"
        told = np.stack([first.astype(np.float32), y], axis=1)
        bar = _bar(x, y - floor, width, name, colour, hover, told)
        data.append(bar | {"base": floor, "showlegend": symbol is None, "xaxis": "x", "yaxis": "y"})
        if symbol:
            mark = {
                "type": "scatter",
                "x": x,
                "y": y,
                "mode": "markers",
                "name": f"{name} ({len(kept)} of {len(scores)})",
            }
            mark |= {"hoverinfo": "skip", "marker": {"color": colour, "symbol": symbol, "size": 8}}
            data.append(mark | {"xaxis": "x", "yaxis": "y"})
    runner = _runner_up(chooser, token)
    if runner >= 0:
        x, y, _, _ = _bars(record, np.array([runner]), scores[[runner]])
        hover = f"{name_of_one} {runner}, best one not kept<br>index score %{{y:.4g}}<extra></extra>"
        mark = {"type": "scatter", "x": x, "y": y, "mode": "markers", "name": "runner-up", "hovertemplate": hover}
        data.append(mark | {"marker": {"color": style.PINK, "symbol": "x", "size": 8}, "xaxis": "x", "yaxis": "y"})
    whose = "" if chooser is record else f" of layer {chooser.layer}"
    layout["yaxis"]["title"] = {"text": f"index score{whose}"}
    return data


def _prob_bars(record: LayerTrace, token: int, head: Head, layout: dict[str, Any], axis: str) -> list[dict[str, Any]]:
    columns, probs, stands_for = source_probs(record, head, token)
    is_entry = columns >= window_columns(record)
    entries, entry_probs = columns[is_entry] - window_columns(record), probs[is_entry]
    order = np.argsort(entries)
    pooled = int(stands_for[is_entry].max(initial=1))
    data = []
    if record.ratio:
        x, y, width, first = _bars(record, entries[order], entry_probs[order], pooled)
        name = "tokens" if record.of_tokens else "compressed entries"
        name += f" (maximum of {pooled})" if pooled > 1 else ""
        hover = ("token" if record.of_tokens else "entry") + " %{customdata}<br>probability %{y:.3g}<extra></extra>"
        data.append(_bar(x, y, width, name, style.ENTRY_COLOUR, hover, first.astype(np.int32)))
    if record.window:
        hover = "token %{x}<br>probability %{y:.3g}<extra></extra>"
        near = columns[~is_entry].astype(np.int32)
        data.append(_bar(near, probs[~is_entry], 1, "window tokens", style.WINDOW_COLOUR, hover))
    start = -0.5
    if record.has_sink_at(token):
        sink = float(of_head(record.sink_probs[token][:, None], head)[0])
        unit = 0.02 * record.length  # the sink has no position: its bar stands before token 0
        start = -3.5 * unit
        hover = "sink<br>probability %{y:.3g}<extra></extra>"
        data.append(_bar([-2 * unit], [sink], unit, f"sink ({sink:.2g})", style.SINK_COLOUR, hover))
    layout[f"xaxis{axis}"]["range"] = [start, record.length]
    layout[f"yaxis{axis}"] |= {"title": {"text": "probability"}, "rangemode": "tozero"}
    return [bar | {"xaxis": f"x{axis}", "yaxis": f"y{axis}"} for bar in data]


def _bar(x: Any, y: Any, width: Any, name: str, colour: str, hover: str, customdata: Any = None) -> dict[str, Any]:
    bar = {"type": "bar", "x": x, "y": y, "width": width, "name": name, "hovertemplate": hover}
    bar["marker"] = {"color": colour, "line": {"width": 0}}
    return bar if customdata is None else bar | {"customdata": customdata}


def _selected_bars(record: LayerTrace, token: int, layout: dict[str, Any]) -> list[dict[str, Any]]:
    """Which visible entries were selected: a mark for each, or shares of groups of neighbours."""
    assert record.selected is not None
    entries = record.visible_entries(token)
    kept = np.asarray(record.selected[token])
    mark = np.zeros(entries, np.int64)
    mark[kept[kept >= 0]] = 1
    group = -(-entries // MAX_POINTS) if entries else 1
    first = np.arange(0, entries, group)
    counts = np.add.reduceat(mark, first) if entries else mark
    last = np.minimum(first + group, entries)
    shown = counts > 0
    x = (first + last)[shown] * record.ratio / 2 - 0.5
    told = np.stack([first, last - 1, counts, last - first], axis=1)[shown]
    name = "token" if record.of_tokens else "entry"
    hover = name + " %{customdata[0]}–%{customdata[1]}<br>%{customdata[2]} of %{customdata[3]} selected<extra></extra>"
    label = f"selected ({int(mark.sum()):,} of {entries:,} {'tokens' if record.of_tokens else 'compressed entries'})"
    layout["xaxis"]["range"] = [-0.5, record.length]
    if group == 1:
        layout["yaxis"] |= {"title": {"text": "selected"}, "tickvals": [0, 1], "ticktext": ["no", "yes"]}
    else:
        layout["yaxis"] |= {"title": {"text": f"share selected of {group} neighbours"}}
    layout["yaxis"]["range"] = [0, 1.05]
    width = ((last - first) * record.ratio)[shown]
    return [_bar(x, (counts / (last - first))[shown], width, label, style.ENTRY_COLOUR, hover, told)]


def _bars(record: LayerTrace, entries: np.ndarray, heights: np.ndarray, each: int = 1) -> tuple[np.ndarray, ...]:
    """Centre, height, width in tokens, and first entry of at most MAX_POINTS bars, for ascending entries.

    ``each`` entries are covered by one given value already.
    """
    group = -(-len(entries) // MAX_POINTS) if len(entries) else 1
    starts = np.arange(0, len(entries), group)
    high = np.maximum.reduceat(heights, starts) if len(entries) else heights
    return _placed(record, entries[starts], entries[np.minimum(starts + group, len(entries)) - 1] + each - 1, high)


def _bars_without(record: LayerTrace, scores: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, ...]:
    """``_bars`` of the scores of all entries but the ``kept`` ones (ascending), of which there may be hundreds of thousands:
    none of these is moved or named one by one."""
    others = len(scores) - len(kept)
    group = max(1, -(-others // MAX_POINTS))
    starts = np.arange(0, others, group)
    before = kept - np.arange(len(kept))  # how many others come before each kept one

    def entry(nth: np.ndarray) -> np.ndarray:
        return nth + np.searchsorted(before, nth, side="right")

    first = entry(starts)
    rest = scores.copy()
    rest[kept] = -np.inf
    high = np.maximum.reduceat(rest, first) if others else rest[:0]
    return _placed(record, first, entry(np.minimum(starts + group, others) - 1), high)


def _placed(record: LayerTrace, first: np.ndarray, last: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, ...]:
    width = (last - first + 1) * record.ratio
    centre = (first * record.ratio + (width - 1) / 2).astype(np.float32)
    return centre, high, width.astype(np.int32), first


def painted_column(record: LayerTrace, head: Head, row: int, token: int) -> int:
    """The column behind a token of the composite view: the token itself, or an entry made from it that got more."""
    if record.selection_only:
        return token // record.ratio  # drawn over its own block alone; perhaps not complete yet
    columns, probs, stands_for = source_probs(record, head, row)
    best, most, tokens = token, 0.0, window_columns(record)
    for column, prob, count in zip(columns.tolist(), probs.tolist(), stands_for.tolist(), strict=True):
        first = last = column
        if column >= tokens:
            first = record.entry_tokens(column - tokens)[0]
            last = record.entry_tokens(column - tokens + count - 1)[1]
        if first <= token <= last and prob > most:
            own = tokens + token // record.ratio if count > 1 else column  # recorded pooled: the entry it lies in
            best, most = own, prob
    return best
