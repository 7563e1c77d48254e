"""Does compute hide the lookup? Measured shares against the window, and the break-even table of published models."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from workbench.cost.fetch import PATHS, BreakEven, Setting, break_even_table
from workbench.devices import Drive, Link
from workbench.errors import InputError
from workbench.figures.style import BLUE, GREY, VERMILLION, chart_text, styled

if TYPE_CHECKING:
    from workbench.memory.overlap import OverlapResult

CURVE_POINTS = 61
_CSS = f"""<style>
.wb-hidden {{overflow-x: auto; line-height: 1.4; color: var(--jp-content-font-color1, inherit)}}
.wb-hidden table {{border-collapse: collapse; font-variant-numeric: tabular-nums}}
.wb-hidden caption {{text-align: left; padding: 4px 0}}
.wb-hidden th, .wb-hidden td {{padding: 3px 9px; text-align: right; vertical-align: top; border-bottom: 1px solid #8886;
  font-weight: normal}}
.wb-hidden thead th {{vertical-align: bottom}} .wb-hidden tbody th {{text-align: left; white-space: nowrap}}
.wb-hidden .stalls {{background: color-mix(in srgb, {VERMILLION} calc(var(--a) * 1%), transparent)}}
.wb-hidden small {{display: block; opacity: 0.85; white-space: nowrap}}
</style>"""
STRONGEST = 55  # percent of colour behind a cell; text stays readable on it, in both themes


def hidden_by_window(results: Sequence[OverlapResult]) -> go.Figure:
    """The share of a lookup that was hidden, in percent, against the compute before its layer: points beside the formula.

    ``results`` of ``wb.overlap_experiment`` with one Engram layer and the same rows, and different windows. The line is what
    the durations alone foretell, window / lookup up to the whole, with the median over all runs of the lookup alone.
    InputError without results, and for those that are not alike.
    """
    alike = {(r.executor, r.rows_per_lookup, r.layers, r.table) for r in results}
    if len(alike) != 1 or len(results[0].layers) != 1:
        raise InputError(f"give results of one executor, table, number of rows and one Engram layer, got {len(alike)} kinds")
    first = results[0]
    lookup_ms = statistics.median(ms for r in results for ms in r.totals_ms["lookup-only"])
    windows = [r.window_ms * first.layers[0] for r in results]
    furthest = 1.15 * max(*windows, lookup_ms)
    line = [furthest * i / (CURVE_POINTS - 1) for i in range(CURVE_POINTS)]
    fig = go.Figure()
    fig.add_scatter(
        name="window / lookup, at most all (modelled from the lookup alone)",
        x=line,
        y=[100 * min(1.0, x / lookup_ms) for x in line],
        mode="lines",
        line={"color": GREY, "width": 2, "dash": "dash"},
        hovertemplate="%{y:.0f} % at %{x:.1f} ms<extra></extra>",
    )
    origin = first.timelines["prefetched"].origin
    fig.add_scatter(
        name=f"prefetched runs, {origin}",
        x=windows,
        y=[100 * r.hidden_fraction for r in results],
        mode="markers",
        marker={"color": BLUE, "size": 11, "symbol": "circle"},
        hovertemplate="%{y:.1f} % hidden, window %{x:.1f} ms<extra></extra>",
    )
    device, rounds = first.timelines["prefetched"].device, len(first.totals_ms["serial"])
    where = chart_text(f"{origin} on {device}, median of {rounds} rounds a point; the line is modelled")
    title = f"A lookup of {first.rows_per_lookup:,} rows takes {lookup_ms:.1f} ms alone: how much of it is hidden?<br>{where}"
    styled(fig, title, height=380)
    fig.update_xaxes(title="compute before the layer (ms)", rangemode="tozero")
    fig.update_yaxes(title="hidden (%)", rangemode="tozero")
    below = {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"}
    return fig.update_layout(legend=below, margin={"b": 92})


def break_even_html(
    prefill: Setting, decode: Setting, ways: Sequence[Link | Drive], chunks: Sequence[int], batches: Sequence[int]
) -> str:
    """One line for each Engram layer and number of tokens, prefill before decode, one column a link or drive.

    A column's head has what the link or drive gives, a cell the share hidden and the stall, the last column what the copy alone
    would need. Colour repeats the share that is not hidden. Each layer has the queue to itself. InputError
    for a setting that cannot be.
    """
    head = "".join(f"<th scope='col'>{escape(way.title)}<small>{_rate(way)}</small></th>" for way in ways)
    body = ""
    for setting, tokens, what in ((prefill, chunks, "chunk of"), (decode, batches, "batch of")):
        lines = {(line.link, line.layer, line.tokens): line for line in _lines(setting, ways, tokens)}
        for layer in setting.engram_layers:
            for n in tokens:
                row = [lines[way.title, layer, n] for way in ways]
                cells = "".join(map(_cell, row))
                needed = f"{row[0].required_bytes_per_s / 1e9:,.2f} GB/s"
                name = f"{setting.phase}, {what} {n:,}, layer {layer}"
                body += f"<tr><th scope='row'>{escape(name)}</th><td>{_ms(row[0].window_s)}</td>{cells}<td>{needed}</td></tr>"
    cards = "" if prefill.cards == 1 else f"{prefill.cards} × "
    threads = "" if prefill.path == "uva" else f" ({prefill.threads} thread{'s' if prefill.threads > 1 else ''})"
    where = f"{prefill.model.title} on {cards}{prefill.device.title}; {PATHS[prefill.path]}{threads}"
    caption = f"Modelled, nothing was measured: {where}. Share of the fetch that is hidden, and the stall that is left."
    return (
        f"{_CSS}<div class='wb-hidden'><table><caption>{escape(caption)}</caption><thead><tr><th></th>"
        f"<th scope='col'>compute before it</th>{head}<th scope='col'>the copy alone needs</th></tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _lines(setting: Setting, ways: Sequence[Link | Drive], tokens: Sequence[int]) -> list[BreakEven]:
    """A drive is read by the host, whoever fetches otherwise."""
    links, drives = [w for w in ways if isinstance(w, Link)], [w for w in ways if isinstance(w, Drive)]
    host = replace(setting, path="staged") if setting.path == "uva" else setting
    return break_even_table(setting, setting.engram_layers, tokens, links) + break_even_table(
        host, setting.engram_layers, tokens, drives
    )


def _rate(way: Link | Drive) -> str:
    """What a large copy is taken to get of a link, or how many pages a drive reads."""
    if isinstance(way, Link):
        return f"{way.effective_bytes_per_s / 1e9:,.0f} GB/s"
    return f"{way.reads_per_s / 1e6:,.1f} M reads/s"


def _cell(line: BreakEven) -> str:
    hidden = max(0.0, line.hidden_fraction) if not math.isnan(line.hidden_fraction) else 1.0
    stall = f"stall {_ms(line.stall_s)}" if line.stall_s else "no stall"
    hover = f"fetch {_ms(line.fetch_s)}, {_ms(line.window_s)} of compute before it"
    # Rounded down, so that "100 %" means that nothing is left.
    return (
        f"<td class='stalls' style='--a:{round(STRONGEST * (1 - hidden))}' title='{hover}'>"
        f"{math.floor(100 * hidden + 1e-9)} %<small>{stall}</small></td>"
    )


def _ms(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:,.1f} ms" if ms >= 10 else f"{ms:.2f} ms" if ms >= 0.1 else f"{ms:.3f} ms"
