"""What a view says about one cell and one query, as lines of escaped HTML; records in, words out."""

from __future__ import annotations

import html
from typing import Any

from workbench.figures import style
from workbench.figures.attention import SELECTED, Head


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
