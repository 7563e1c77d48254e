"""What a KV cache holds: bytes by part against tokens, and a panel that holds the live cache against the formula."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache, lru_cache
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from workbench import cost
from workbench.config import DenseConfig, HybridConfig, SharedStreamConfig, read_config
from workbench.errors import InputError
from workbench.figures.style import BLUE, CHART_CSS, GREEN, GREY, ORANGE, PINK, PURPLE, SKY, VERMILLION, chart_text, styled
from workbench.trace import Trace

PART_COLOURS = {"window": BLUE, "compressed": ORANGE, "index": GREEN, "tail": PINK, "engram": SKY, cost.KV_PART: PURPLE}
PART_PATTERNS = {cost.KV_PART: "/"}  # a row for every token: hatched, so that it can be told without colour
MODELLED_POINTS = 200  # of a formula's curve; enough to show where the window fills
MEASURED_POINTS = 400  # steps drawn of a longer run, which keeps the chart well under its byte budget
PART_ORDER = (cost.KV_PART, *cost.PARTS)
GQA_HEADS = 8
HEADROOM = 1.5  # height of the linear axis over what was held at most


def kv_growth(trace: Trace, step: int | None = None, *, log: bool = False, token: int | None = None) -> go.Figure:
    """Bytes held after each step, part upon part, against tokens; beside them what dense caches would hold.

    The areas are what ``trace.cache_bytes`` counted; the lines marked "formula" come from ``workbench.cost`` and start at
    token 1, also for a prompt read in one step. The linear axis ends a little above what was held, so that parts can be told
    apart; dense caches soon leave it. ``log`` shows them whole and draws parts as lines, because areas stacked on a logarithmic
    axis mislead. A vertical line marks ``step``, and another ``token`` if it is not the last of that step. InputError for a
    step the trace does not have.
    """
    return go.Figure(kv_growth_chart(trace, step, log=log, token=token))


def kv_growth_chart(trace: Trace, step: int | None = None, *, log: bool = False, token: int | None = None) -> dict[str, Any]:
    """``kv_growth`` as plain values, {"data", "layout"}: a live run draws it several times a second, and checking every
    attribute of a figure takes many times as long as working out what it shows."""
    steps = sorted({round(i * (trace.steps - 1) / MEASURED_POINTS) for i in range(MEASURED_POINTS + 1)} if trace.steps else [])
    tokens = [trace.step_end(s) for s in steps]
    layout = deepcopy(_frame())
    data: list[dict[str, Any]] = []
    parts = _parts(trace)
    for part in parts:
        held = trace.cache_bytes[part][steps].tolist()
        line = {
            "type": "scatter",
            "x": tokens,
            "y": [n or None for n in held] if log else held,  # no logarithm of nothing
            "name": part,
            "mode": "lines+markers" if len(tokens) < 3 else "lines",  # a single step is a point, not an area
            "line": {"color": PART_COLOURS.get(part), "width": 2 if log else 0.5},
            "hovertemplate": "%{y:,} B",
        }
        if not log:
            pattern = {"shape": PART_PATTERNS.get(part, ""), "fgcolor": "#ffffff", "solidity": 0.2}
            line |= {"stackgroup": "held", "fillcolor": PART_COLOURS.get(part), "fillpattern": pattern}
        data.append(line)
    total = sum((trace.cache_bytes[part][steps] for part in parts), np.zeros(len(steps), np.int64))
    reserved = trace.cache_reserved[steps] if len(trace.cache_reserved) else np.zeros(len(steps), np.int64)
    if reserved.any():
        data.append(_line(tokens, (total + reserved).tolist(), "held + room reserved", GREY, "dash"))
    config = _config(trace)
    if config is not None and tokens:
        data += _modelled(config, trace.storage, tokens)
    if step is not None:
        end = trace.step_end(_checked(trace, step))
        said = f"step {step}: {end:,} tokens"
        layout["shapes"] = [_VLINE | {"x0": end, "x1": end}]
        if token is not None and token + 1 != end:
            said += f"; token {token:,} chosen"
            layout["shapes"].append(_VLINE | {"x0": token + 1, "x1": token + 1, "line": _CHOSEN})
        side = "right" if 2 * end > trace.length else "left"  # so that it is not cut off
        layout["annotations"] = [_VLINE_LABEL | {"x": end, "text": said, "xanchor": side}]
    title = f"KV cache of one sequence, stored as {trace.storage}<br>{chart_text(trace.label)}"
    if baselines := _baselines(config):
        shapes = " and ".join(dict.fromkeys(name.split(" =")[0] for name in baselines))
        title += f"<br>{shapes}: as many layers, query heads and dimensions a head"
        title += "" if log else "; cut where this axis ends"
    layout["title"]["text"] = title
    layout["yaxis"]["type"] = "log" if log else "linear"
    if not log and steps:  # the dense caches would press the parts flat: here they leave at the top
        layout["yaxis"]["range"] = [0, HEADROOM * float((total + reserved).max())]
    return {"data": data, "layout": layout}


_VLINE = {"type": "line", "xref": "x", "yref": "y domain", "y0": 0, "y1": 1, "line": {"color": GREY, "width": 1.5}}
_CHOSEN = {"color": PINK, "width": 2, "dash": "dash"}  # as on the attention map
_VLINE_LABEL = {"xref": "x", "yref": "y domain", "y": 1, "xanchor": "left", "yanchor": "bottom", "showarrow": False}
_VLINE_LABEL |= {"font": {"color": GREY}}


@cache
def _frame() -> dict[str, Any]:
    """The layout of the chart, without what differs from one to the next."""
    fig = styled(go.Figure(), "title", height=540)
    fig.update_xaxes(title="tokens in the cache", rangemode="tozero")
    fig.update_yaxes(title="bytes (B)", exponentformat="SI")
    below = {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom", "traceorder": "normal"}
    fig.update_layout(
        hovermode="x unified",
        legend=below,
        margin={"t": 100, "b": 150},
        hoverlabel={"bgcolor": "#ffffff", "font": {"color": "#222222"}},
    )
    return fig.to_plotly_json()["layout"]


def kv_panel_html(trace: Trace, step: int) -> str:
    """A table for one step: per part the formula, its numbers and result, what the live cache held, and whether they agree.

    Room reserved beyond the held bytes is shown apart. InputError for a step the trace does not have.
    """
    _checked(trace, step)
    length, config = trace.step_end(step), _config(trace)
    terms = cost.terms(config, length, trace.storage) if config else ()
    expected = cost.kv_bytes(config, length, trace.storage) if config else {}
    parts = [part for part in PART_ORDER if any(t.part == part for t in terms)]
    parts += [part for part in _parts(trace) if part not in parts]
    rows = []
    for part in parts:
        own = [t for t in terms if t.part == part]
        sums = [f"{'+ ' if i else ''}{escape(t.symbols)} <b>= {escape(t.numbers)}</b>" for i, t in enumerate(own)]
        live = int(trace.cache_bytes[part][step]) if part in trace.cache_bytes else 0
        rows.append(_row(part, "<br>".join(sums), expected.get(part), live))
    rows.append(_row("total", "", expected.get("total"), _held(trace, step)))
    reserved = int(trace.cache_reserved[step]) if len(trace.cache_reserved) > step else 0
    unit = cost.units(config, trace.storage) if config else "There is no formula for this kind of model."
    head = "".join(
        f"<th scope='col'>{name}</th>" for name in ("part", "live cache, B", "formula, B", "check", "formula and its numbers")
    )
    return (
        f"{_CSS}<div class='wb-kv'><p>After step {step}: L = {length:,} tokens, {escape(trace.label)}.<br>{escape(unit)}</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        f"<p>Room reserved beyond these bytes and not yet filled: {reserved:,} B</p></div>"
    )


_CSS = (
    "<style>.wb-kv{overflow-x:auto;line-height:1.4}.wb-kv table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    ".wb-kv th,.wb-kv td{padding:2px 10px;text-align:left;vertical-align:top;white-space:nowrap;border-bottom:1px solid #8886}"
    ".wb-kv td.sum{white-space:normal;min-width:20em}"
    ".wb-kv .n{text-align:right}.wb-kv .bad{background:#d55e00;color:#000;font-weight:bold}" + CHART_CSS + "</style>"
)


def _row(part: str, sums: str, expected: int | None, live: int) -> str:
    if expected is None:
        mark, style, shown = "no formula", "", "–"
    elif expected == live:
        mark, style, shown = "= equal", "good", f"{expected:,}"
    else:
        mark, style, shown = f"≠ NOT EQUAL by {live - expected:+,}", "bad", f"{expected:,}"
    counts = f"<td class='n'>{live:,}</td><td class='n'>{shown}</td><td class='{style}'>{mark}</td>"
    return f"<tr><th scope='row'>{escape(part)}</th>{counts}<td class='sum'>{sums}</td></tr>"


def _modelled(config: Any, storage: str, tokens: list[int]) -> list[dict[str, Any]]:
    marks = sorted({1, *tokens, *(max(1, round(i * tokens[-1] / MODELLED_POINTS)) for i in range(MODELLED_POINTS + 1))})
    own = _total(config, storage)
    lines = [_line(marks, [own(n) for n in marks], "this model, modelled (formula)", GREY, "dot")]
    for (name, kv_heads), dash in zip(_baselines(config).items(), ("longdash", "solid"), strict=False):
        dense = _dense_total(config, kv_heads, storage)
        lines.append(_line(marks, [dense(n) for n in marks], f"{name}, modelled (formula)", VERMILLION, dash))
    return lines


# Of a config a function of the length, as finding a config in a cache takes longer than finding a number in one.


@lru_cache(maxsize=64)
def _total(config: Any, storage: str) -> Callable[[int], int]:
    return lru_cache(maxsize=2**14)(lambda length: cost.kv_bytes(config, length, storage)["total"])


@lru_cache(maxsize=64)
def _dense_total(config: Any, kv_heads: int, storage: str) -> Callable[[int], int]:
    return lru_cache(maxsize=2**14)(lambda length: cost.dense_kv_bytes(config, length, kv_heads, storage))


def _baselines(config: Any) -> dict[str, int]:
    """Dense caches to compare with, name -> KV heads: none where heads have no one width (MLA) or the cache is one itself."""
    if not isinstance(config, HybridConfig | SharedStreamConfig | DenseConfig):
        return {}
    heads = config.num_attention_heads
    bases = {"GQA-8": GQA_HEADS, "MHA": heads} if heads > GQA_HEADS else {f"MHA = GQA-8, min(8, {heads}) KV heads": heads}
    own = config.num_key_value_heads if isinstance(config, DenseConfig) else 0
    if 0 < own < heads <= GQA_HEADS:
        bases = {"MHA": heads}
    return {name: kv_heads for name, kv_heads in bases.items() if kv_heads > own}


def _line(x: list[int], y: list[int], name: str, colour: str, dash: str) -> dict[str, Any]:
    line = {"color": colour, "dash": dash, "width": 1.5}
    return {"type": "scatter", "x": x, "y": y, "name": name, "mode": "lines", "line": line, "hovertemplate": "%{y:,} B"}


def _parts(trace: Trace) -> list[str]:
    """The parts this run ever held, in the usual order; unknown ones of a foreign trace come last."""
    known = [part for part in PART_ORDER if part in trace.cache_bytes]
    return [p for p in (*known, *sorted(set(trace.cache_bytes) - set(known))) if p != "total" and trace.cache_bytes[p].any()]


def _held(trace: Trace, step: int) -> int:
    return sum(int(trace.cache_bytes[part][step]) for part in _parts(trace))


def _config(trace: Trace) -> Any:
    """The configuration ``cost`` needs, or None for a run of a model it has no formula for."""
    try:
        config = read_config(trace.config)
        cost.kv_bytes(config, 0, trace.storage)
    except InputError:
        return None
    return config


def _checked(trace: Trace, step: int) -> int:
    if not 0 <= step < trace.steps:
        raise InputError(f"trace has {trace.steps} steps counted from 0, got step {step}")
    return step
