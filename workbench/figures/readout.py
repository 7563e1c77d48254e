"""What a view says about one cell and one query, as lines of escaped HTML; records in, words out."""

from __future__ import annotations

import html
from typing import Any

from workbench.figures import style
from workbench.figures.attention import SELECTED, Head, Tile, describe_head, describe_layer
from workbench.trace import LayerTrace


def readout(told: dict[str, Any]) -> str:
    """One escaped line about a cell, from ``describe``."""

    def quoted(text: str) -> str:
        return f"“<bdi>{html.escape(style.visible_text(text, 60))}</bdi>”"

    sources = told["sources"]
    where = f"token {sources[0]}" if len(sources) == 1 else f"tokens {sources[0]}–{sources[-1]}"
    if told["column_kind"] != "token":  # where entries are tokens, there is but one kind
        where = f"{'window' if told['entry'] is None else 'compressed entry ' + str(told['entry'])}, {where}"
    line = f"Query {told['query']} {quoted(told['query_text'])} → {where} {quoted(''.join(told['source_texts']))}: "
    if not told["visible"]:
        why = "outside its window" if sources[-1] <= told["query"] and told["entry"] is None else "in its future"
        return f"{line}<b>not visible</b>, {why}."
    many = "tokens" if told["column_kind"] == "token" else "entries"
    maximum = f" (maximum of {told['pooled']} {many})" if told["pooled"] > 1 else ""
    if told["probability"] is None:
        return f"{line}<b>{SELECTED if told['selected'] else 'not selected'}</b>."
    line += f"<b>probability {told['probability']:.3g}</b>{maximum}"
    if told["selected"] is None:
        return line + "."
    fate = "kept" if told["selected"] else "best one not kept" if told["runner_up"] else "not kept"
    if told["index_score"] is None:
        return f"{line}; {fate}."
    whose = "" if told["chosen_by"] == told["layer"] else f" in layer {told['chosen_by']}"
    return f"{line}; index score{whose} {told['index_score']:.4g}, rank {told['rank']} of {told['visible_entries']}, {fate}."


def facts_line(facts: dict[str, Any], head: Head) -> str:
    """One line about a query, from ``query_facts``."""
    names = {"window": "window", "entries": "entries", "sink": "sink"}
    shares = [f"{name} {facts[key]:.1%}" for key, name in names.items() if facts[key] is not None]
    line = f"Attention of this query ({'mean over heads' if head in ('max', 'mean') else f'head {head}'}): {', '.join(shares)}."
    if facts["kept"] is None:
        return line
    line += f" It keeps {facts['kept']} of {facts['visible']} entries"
    also = [f"the query before kept {facts['before']} of them, too"] if facts["before"] is not None else []
    also += [f"layer {layer} keeps {count} of them, too" for layer, count in facts["layers"].items()]
    return f"{line}{'; ' if also else ''}{'; '.join(also)}."


def map_words(tile: Tile, *, mean_asked: bool, no_mean: str, no_entries: bool) -> str:
    """What an attention map shows: layer, head, what a cell of several stands for. Not yet escaped.

    ``no_mean`` says why there is no mean of cells, "" if there is one; ``no_entries``: entries were asked for, there are none.
    """
    record = tile.layer
    words = f"layer {record.layer} ({describe_layer(record)}), {describe_head(record, tile.head)}"
    if tile.pooling != (1, 1):
        of_cell = "share selected" if record.selection_only else "mean" if tile.pool == "mean" else "maximum"
        words += f"; a cell is the {of_cell} of {tile.pooling[0]} queries x {tile.pooling[1]} columns"
        if mean_asked and no_mean and not record.selection_only:
            words += f", as there is no mean: {no_mean}"
    return words + ("; no compressed entry here, so the window is shown" if no_entries else "")


def colour_bar(record: LayerTrace) -> str:
    stops = ", ".join(f"rgb({r} {g} {b})" for r, g, b in style.colour_map(9).tolist())
    bar = f"<span style='display:inline-block;width:120px;height:10px;background:linear-gradient(90deg,{stops})'></span>"
    what = "share selected" if record.selection_only else "probability"
    return f"{what} 0 {bar} 1 (colour is its square root; blank: not visible)"
