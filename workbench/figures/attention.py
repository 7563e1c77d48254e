"""Attention of one layer as pictures: tiles, thumbnails, one query as a chart, one cell in words.

Rows are query tokens, row 0 on top. Columns are what a query may look at, numbered through: 0..L-1 are tokens (each query
sees the last W of them, its sliding window), L..L+S-1 the layer's compressed entries. Only what a trace holds is touched
(window rows, kept entries), so memory grows with L, never with L x L.

One letter sizes: L tokens, S compressed entries, W window, H heads, K kept entries, E recorded entry columns.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from PIL import Image
from plotly.subplots import make_subplots

from workbench.errors import InputError
from workbench.figures import style
from workbench.trace import FULL_ROW_TOKENS, LayerTrace, Trace

Head = int | Literal["max", "mean"]
Range = tuple[int, int]  # (start, stop)

TILE_BYTES = 180_000  # a notebook keeps pictures as base64, a third larger, and a view has 250 KB
THUMBNAIL_BYTES, THUMBNAIL_PIXELS = 5_000, 56
MAX_CELL_PIXELS = 32
MAX_POINTS = 256  # bars of one kind in a chart; more are pooled by their maximum
TITLE_WIDTH = 54  # characters that fit a chart beside a map
CHUNK_VALUES = 1 << 22  # probabilities worked on at once


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """A max-pooled picture of attention and what its cells stand for.

    ``values`` [h, w] float32 holds the largest probability in each cell of ``pooling`` (rows, columns); a cell is drawn
    ``scale`` (rows, columns) pixels large. The colour is the square root of the probability, 0 to 1, so that small ones
    show; cells no query of theirs may look at are transparent, ``visible`` [h, w] is False there.
    """

    png: bytes
    values: np.ndarray
    visible: np.ndarray
    pooling: tuple[int, int]
    scale: tuple[int, int]
    row_range: Range
    column_range: Range
    layer: LayerTrace = field(repr=False)
    head: Head = "max"
    composite: bool = False

    def column_label(self, i: int) -> tuple[int, ...]:
        """The tokens that column ``i`` was made from, counted as in ``column_range``: one token, or all of an entry's."""
        if not self.column_range[0] <= i < self.column_range[1]:
            raise InputError(f"this tile has columns {self.column_range[0]}..{self.column_range[1] - 1}, got {i}")
        return column_tokens(self.layer, i)

    def cell(self, row: int, column: int) -> tuple[int, int]:
        """The cell, as an index into ``values``, that holds query ``row`` and ``column``."""
        for name, at, (start, stop) in (("row", row, self.row_range), ("column", column, self.column_range)):
            if not start <= at < stop:
                raise InputError(f"this tile has {name}s {start}..{stop - 1}, got {at}")
        return (row - self.row_range[0]) // self.pooling[0], (column - self.column_range[0]) // self.pooling[1]

    def strongest(self, i: int, j: int) -> tuple[int, int]:
        """Query and column of the largest probability in cell (i, j): what a pooled cell shows."""
        rows, columns = (
            (start + at * pool, min(start + (at + 1) * pool, stop))
            for at, pool, (start, stop) in zip((i, j), self.pooling, (self.row_range, self.column_range), strict=True)
        )
        exact = _pooled(self.layer, self.head, rows, columns, (1, 1), self.composite)
        if not exact.any():  # nothing is attended here: the pair in the middle stands for the cell
            return (rows[0] + rows[1] - 1) // 2, (columns[0] + columns[1] - 1) // 2
        row, column = divmod(int(exact.argmax()), exact.shape[1])
        return rows[0] + row, columns[0] + column


def column_tokens(layer: LayerTrace, column: int) -> tuple[int, ...]:
    """Source tokens of a column: the token itself, or those a compressed entry was made from."""
    if not 0 <= column < layer.length + layer.entries:
        raise InputError(
            f"layer {layer.layer} has {layer.length} token columns and {layer.entries} entry columns, got column {column}"
        )
    if column < layer.length:
        return (column,)
    first, last = layer.entry_tokens(column - layer.length)
    return tuple(range(first, last + 1))


def attention_tile(
    trace: Trace,
    layer: int,
    head: Head = "max",
    rows: Range | None = None,
    columns: Range | None = None,
    max_pixels: int = 800,
    step: int | None = None,
) -> Tile:
    """Attention probabilities of ``layer`` as one PNG of at most ``max_pixels`` a side and 250 KB, whatever the length.

    ``head`` is a number, or "max" or "mean" over the heads; ``rows`` and ``columns`` are (start, stop) and default to all;
    ``step`` keeps the rows one step processed. Where HCA rows were recorded pooled, a value covers the entries it is the
    maximum of. Raises InputError for a layer, head, step or range the trace does not have.
    """
    record = trace.layer(layer)
    return _tile(trace, record, head, rows, columns, record.length + record.entries, max_pixels, step, TILE_BYTES, False)


def composite_tile(
    trace: Trace,
    layer: int,
    head: Head = "max",
    rows: Range | None = None,
    columns: Range | None = None,
    max_pixels: int = 800,
    step: int | None = None,
) -> Tile:
    """Window and compressed attention on one token axis: columns are tokens 0..L-1.

    An entry's probability is *painted* over every token it was made from, not divided among them, and where sources overlap
    (CSA) the larger one shows; so a row of this picture does not sum to one.
    """
    record = trace.layer(layer)
    return _tile(trace, record, head, rows, columns, record.length, max_pixels, step, TILE_BYTES, True)


def thumbnails(trace: Trace, layer: int) -> list[tuple[Head, bytes]]:
    """A small composite picture of the maximum over heads and of each head, as (head, png) of at most 5 KB each."""
    record = trace.layer(layer)
    heads: list[Head] = ["max", *range(record.heads)]
    return [(head, _thumbnail(trace, record, head)) for head in heads]


def layer_thumbnails(trace: Trace) -> list[tuple[int, bytes]]:
    """A small composite picture of each recorded layer, as (layer, png) of at most 5 KB each."""
    return [(record.layer, _thumbnail(trace, record, "max")) for record in trace.layers]


def _thumbnail(trace: Trace, record: LayerTrace, head: Head) -> bytes:
    return _tile(trace, record, head, None, None, record.length, THUMBNAIL_PIXELS, None, THUMBNAIL_BYTES, True).png


def _tile(
    trace: Trace,
    record: LayerTrace,
    head: Head,
    rows: Range | None,
    columns: Range | None,
    width: int,
    max_pixels: int,
    step: int | None,
    budget: int,
    composite: bool,
) -> Tile:
    check_head(record, head)
    if max_pixels < 1:
        raise InputError(f"max_pixels must be at least 1, got {max_pixels}")
    rows = _range("rows", rows, record.length)
    if step is not None:
        if not 0 <= step < trace.steps:
            raise InputError(f"the trace has steps 0..{trace.steps - 1}, got {step}")
        rows = max(rows[0], int(trace.step_starts[step])), min(rows[1], trace.step_end(step))
        if rows[0] >= rows[1]:
            raise InputError(f"step {step} processed no token in the rows asked for; leave out rows or step")
    columns = _range("columns", columns, width)
    shape = rows[1] - rows[0], columns[1] - columns[0]
    pooling = -(-shape[0] // max_pixels), -(-shape[1] // max_pixels)
    values = _pooled(record, head, rows, columns, pooling, composite)
    visible = _visible(record, rows, columns, pooling, composite)
    values[~visible] = 0.0  # the end of a pooled HCA row may reach past its last visible entry
    height, width = values.shape
    scale = min(MAX_CELL_PIXELS, max_pixels // height), min(MAX_CELL_PIXELS, max_pixels // width)
    png = _png(values, visible, scale, budget)
    return Tile(png, values, visible, pooling, scale, rows, columns, record, head, composite)


def check_head(record: LayerTrace, head: Head) -> None:
    """Raise InputError unless the layer has this head."""
    if head in ("max", "mean") or (isinstance(head, int) and not isinstance(head, bool) and 0 <= head < record.heads):
        return
    raise InputError(f"layer {record.layer} has heads 0..{record.heads - 1}, or 'max' or 'mean' over them, got {head!r}")


def _range(name: str, given: Range | None, size: int) -> Range:
    if size < 1:
        raise InputError("the trace has no token yet; wait for the first step")
    start, stop = (0, size) if given is None else given
    if not 0 <= start < stop <= size:
        raise InputError(f"{name} must be a non-empty (start, stop) within 0..{size}, got ({start}, {stop})")
    return int(start), int(stop)


def of_head(probs: np.ndarray, head: Head) -> np.ndarray:
    """[..., H, N] -> [..., N] float32: one head, or the maximum or mean over the heads."""
    if head == "max":
        return probs.max(axis=-2).astype(np.float32)
    if head == "mean":
        return probs.mean(axis=-2, dtype=np.float32)
    return probs[..., head, :].astype(np.float32)


def _pooled(
    record: LayerTrace, head: Head, rows: Range, columns: Range, pooling: tuple[int, int], composite: bool
) -> np.ndarray:
    """The largest probability per cell, [h, w] float32, gathered chunk by chunk of rows."""
    height, width = (-(-(stop - start) // pool) for (start, stop), pool in zip((rows, columns), pooling, strict=True))
    grid = np.zeros((height, width), np.float32)

    def scatter(cells: np.ndarray, column: np.ndarray, value: np.ndarray) -> None:
        inside = (value > 0) & (column >= columns[0]) & (column < columns[1])
        flat = cells[:, None] * width + (column - columns[0]) // pooling[1]
        np.maximum.at(grid.reshape(-1), flat[inside], value[inside])

    for start, stop in _chunks(record, rows):
        t = np.arange(start, stop)
        cells = (t - rows[0]) // pooling[0]
        window = t[:, None] - record.window + 1 + np.arange(record.window)
        scatter(cells, window, of_head(record.window_probs[start:stop], head))
        if record.selected is not None and record.selected_probs is not None:
            kept, value = record.selected[start:stop].astype(np.int64), of_head(record.selected_probs[start:stop], head)
            value = np.where(kept >= 0, value, 0.0)
            if composite:
                first, last = _sources(record, kept)
                reach = 2 * record.ratio - 1  # tokens from an entry's first source to its last
                for offset in range(0, reach + pooling[1], pooling[1]):  # one token in every cell the sources touch
                    scatter(cells, np.minimum(first + offset, last), value)
            else:
                scatter(cells, record.length + kept, value)
        if record.entry_probs is not None and record.entries:
            recorded = of_head(record.entry_probs[start:stop], head)
            edges = np.flatnonzero(np.diff(cells, prepend=-1))  # where a new row of cells begins
            band = np.maximum.reduceat(recorded, edges, axis=0)  # [h', E]
            spread = _spread(record, band, columns, pooling[1], record.entry_pooling(start), composite)
            grid[cells[edges]] = np.maximum(grid[cells[edges]], spread)
    return grid


def _chunks(record: LayerTrace, rows: Range) -> Iterator[Range]:
    """Split ``rows`` so that a chunk is small and, in an HCA layer, recorded with one entry pooling."""
    width = record.window
    for probs in (record.selected_probs, record.entry_probs):
        width += 0 if probs is None else probs.shape[-1]
    size = max(1, CHUNK_VALUES // (record.heads * width))
    start = rows[0]
    while start < rows[1]:
        stop = min(start + size, rows[1])
        if record.entry_probs is not None:
            stop = min(stop, FULL_ROW_TOKENS * record.entry_pooling(start))
        yield start, stop
        start = stop


def _sources(record: LayerTrace, entry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``LayerTrace.entry_tokens`` of many entries at once."""
    first = entry * record.ratio
    return np.maximum(0, first - record.ratio) if record.kind == "csa" else first, first + record.ratio - 1


def _spread(
    record: LayerTrace, band: np.ndarray, columns: Range, pool: int, recorded_pooling: int, composite: bool
) -> np.ndarray:
    """HCA rows [h', E] -> [h', w]: each cell takes the maximum over the recorded columns its entries fall into."""
    low = np.arange(columns[0], columns[1], pool)
    high = np.minimum(low + pool, columns[1])
    if composite:
        low, high = low // record.ratio, (high - 1) // record.ratio + 1
    else:
        low, high = np.maximum(low - record.length, 0), high - record.length
    high = np.minimum(high, record.entries)
    empty = high <= low
    most = band.shape[1]
    low, high = np.minimum(low // recorded_pooling, most), np.minimum(-(-high // recorded_pooling), most)
    bounds = np.stack([low, np.maximum(high, 0)], axis=1).reshape(-1)
    padded = np.pad(band, ((0, 0), (0, 1)))  # so that the end of the last column is a valid index
    spread = np.maximum.reduceat(padded, bounds, axis=1)[:, ::2]
    return np.where(empty, 0.0, spread)


def _visible(record: LayerTrace, rows: Range, columns: Range, pooling: tuple[int, int], composite: bool) -> np.ndarray:
    """[h, w] bool: may any query of the cell look at any column of it?"""
    top = np.arange(rows[0], rows[1], pooling[0])[:, None]
    bottom = np.minimum(top + pooling[0], rows[1]) - 1
    left = np.arange(columns[0], columns[1], pooling[1])
    right = np.minimum(left + pooling[1], columns[1]) - 1
    seen = (left <= bottom) & (np.minimum(right, record.length - 1) > top - record.window) & (left < record.length)
    if record.ratio:
        closed = (bottom + 1) // record.ratio
        if composite:
            return seen | (left < closed * record.ratio)
        first = np.maximum(left - record.length, 0)
        return seen | ((right >= record.length) & (first < closed))
    return seen


def _png(values: np.ndarray, visible: np.ndarray, scale: tuple[int, int], budget: int) -> bytes:
    """A palette PNG within ``budget`` bytes; a noisy picture gives up shades of colour to fit."""
    root = np.sqrt(np.clip(values, 0.0, 1.0))
    png = b""
    for shades in (255, 63, 31, 15, 7, 3):
        level = np.where(visible, 1 + np.ceil(root * (shades - 1)), 0).astype(np.uint8)  # 0 is transparent, 1 is zero
        picture = Image.fromarray(level.repeat(scale[0], axis=0).repeat(scale[1], axis=1))
        picture.putpalette(bytes(3) + style.colour_map(shades).tobytes())
        out = io.BytesIO()
        picture.save(out, format="png", transparency=0)
        png = out.getvalue()
        if len(png) <= budget:
            break
    return png


def describe(trace: Trace, layer: int, head: Head, row: int, column: int) -> dict[str, Any]:
    """What one query does with one column, as plain values.

    Keys: ``query``, ``query_text``; ``column``, ``column_kind`` ("window token" or "compressed entry"), ``entry`` or None,
    ``sources`` and ``source_texts``; ``visible``; ``probability`` of the head, over ``pooled`` entries where HCA rows were
    recorded pooled. For a CSA entry also ``index_score`` and ``rank`` (1 is best) among ``visible_entries``, ``selected``
    and ``runner_up`` (the best one not kept); None elsewhere. Texts are not escaped.
    """
    record = trace.layer(layer)
    check_head(record, head)
    _check_token(record, row)
    sources = column_tokens(record, column)
    entry = column - record.length if column >= record.length else None
    closed = record.visible_entries(row)
    out: dict[str, Any] = {
        "layer": layer,
        "layer_kind": record.kind,
        "head": head,
        "query": row,
        "query_text": trace.token_texts[row],
        "column": column,
        "column_kind": "window token" if entry is None else "compressed entry",
        "entry": entry,
        "sources": sources,
        "source_texts": tuple(trace.token_texts[t] for t in sources),
        "visible": row - record.window < column <= row if entry is None else entry < closed,
        "visible_entries": closed,
        "probability": 0.0,
        "pooled": 1,
        "index_score": None,
        "rank": None,
        "selected": None,
        "runner_up": None,
    }
    if not out["visible"]:
        return out
    if entry is None:
        out["probability"] = float(of_head(record.window_probs[row], head)[column - row + record.window - 1])
    elif record.selected is not None and record.selected_probs is not None:
        out |= _describe_selection(record, row, entry)
        if out["selected"]:
            at = int(np.flatnonzero(record.selected[row] == entry)[0])
            out["probability"] = float(of_head(record.selected_probs[row], head)[at])
    elif record.entry_probs is not None:
        out["pooled"] = record.entry_pooling(row)
        out["probability"] = float(of_head(record.entry_probs[row], head)[entry // out["pooled"]])
    return out


def _describe_selection(record: LayerTrace, row: int, entry: int) -> dict[str, Any]:
    """Score, rank and fate of a visible CSA entry. Kept entries rank before all others, however scores were rounded."""
    assert record.selected is not None
    kept = record.selected[row][record.selected[row] >= 0]
    found: dict[str, Any] = {"selected": entry in kept, "runner_up": False, "index_score": None, "rank": None}
    if record.runner_up is not None:
        found["runner_up"] = bool(record.runner_up[row] == entry)
    if record.index_queries is None:
        return found
    scores = record.index_scores(row)
    found["index_score"] = float(scores[entry])
    if found["selected"]:
        found["rank"] = int(np.flatnonzero(kept == entry)[0]) + 1
    else:
        others = np.setdiff1d(np.arange(len(scores)), kept)
        before = (scores[others] > scores[entry]) | ((scores[others] == scores[entry]) & (others < entry))
        found["rank"] = len(kept) + int(before.sum()) + 1
    return found


def source_probs(record: LayerTrace, head: Head, token: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every column query ``token`` attends to: columns [N], probabilities [N], entries each stands for [N] (1 but in HCA)."""
    columns = token - record.window + 1 + np.arange(record.window)
    probs, stands_for = of_head(record.window_probs[token], head), np.ones(record.window, np.int64)
    if record.selected is not None and record.selected_probs is not None:
        kept = record.selected[token]
        entry_columns, entry_probs = np.where(kept >= 0, record.length + kept, -1), of_head(record.selected_probs[token], head)
        each = np.ones(len(kept), np.int64)
    elif record.entry_probs is not None:
        pooling, entry_probs = record.entry_pooling(token), of_head(record.entry_probs[token], head)
        first = pooling * np.arange(len(entry_probs))
        entry_columns, each = record.length + first, np.clip(record.visible_entries(token) - first, 1, pooling)
    else:
        entry_columns, entry_probs, each = np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.int64)
    columns = np.concatenate([columns, entry_columns])
    probs, stands_for = np.concatenate([probs, entry_probs]), np.concatenate([stands_for, each])
    seen = (columns >= 0) & (probs > 0)
    return columns[seen], probs[seen], stands_for[seen]


def top_sources(trace: Trace, layer: int, head: Head, token: int, k: int) -> list[dict[str, Any]]:
    """The ``k`` columns query ``token`` attends to most, best first, each as ``describe`` tells it."""
    record = trace.layer(layer)
    check_head(record, head)
    _check_token(record, token)
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    columns, probs, _ = source_probs(record, head, token)
    best = np.argsort(-probs, kind="stable")[:k]
    return [describe(trace, layer, head, token, int(columns[i])) for i in best]


def _check_token(record: LayerTrace, token: int) -> None:
    if not 0 <= token < record.length:
        raise InputError(f"the trace has tokens 0..{record.length - 1}, got {token}")


def query_strip(trace: Trace, layer: int, token: int, head: Head = "max") -> go.Figure:
    """One query along the text: index scores of the visible entries with the kept ones marked, and where attention went.

    The first row (CSA layers only) has one bar per visible compressed entry, the second one bar per window token, attended
    entry and the sink. An entry's bar covers its own block of tokens. More than a few hundred bars are pooled by maximum.
    """
    record = trace.layer(layer)
    check_head(record, head)
    _check_token(record, token)
    indexed = record.index_queries is not None and record.visible_entries(token) > 0
    fig = make_subplots(rows=2 if indexed else 1, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    if indexed:
        _add_scores(fig, record, token)
    _add_probs(fig, record, token, head, 2 if indexed else 1)
    text = style.visible_text(trace.token_texts[token])
    heading = f"layer {layer} ({describe_layer(record)}), {describe_head(head)}: query token {token} “{text}”"
    lines = [*wrap(trace.label, TITLE_WIDTH), *wrap(heading, TITLE_WIDTH)]
    above = 14 + 17 * len(lines) + 62  # the title and three lines of legend
    style.styled(fig, "<br>".join(map(style.chart_text, lines)), above + (310 if indexed else 170))
    fig.update_layout(bargap=0, barmode="overlay", margin_t=above)
    fig.update_xaxes(title_text="token position", row=2 if indexed else 1, col=1)
    return fig


def describe_layer(record: LayerTrace) -> str:
    """A layer's kind in the reports' words, with its ratio."""
    if not record.ratio:
        return f"sliding window of {record.window}"
    return f"{record.kind.upper()}, {record.ratio} tokens per entry"


def describe_head(head: Head) -> str:
    return f"{head} over heads" if isinstance(head, str) else f"head {head}"


def _add_scores(fig: go.Figure, record: LayerTrace, token: int) -> None:
    scores = record.index_scores(token)
    entries = np.arange(len(scores))
    kept = record.selected[token] if record.selected is not None else np.zeros(0, np.int32)
    is_kept = np.isin(entries, kept[kept >= 0])
    floor = min(0.0, float(scores.min() - 0.05 * np.ptp(scores)))  # bars stand on it: the higher, the better, also below zero
    for name, mask, colour, symbol in (
        ("not kept", ~is_kept, style.GREY, None),
        ("kept", is_kept, style.ENTRY_COLOUR, "diamond"),
    ):
        x, y, width, first = _bars(record, entries[mask], scores[mask])
        hover = "entry %{customdata[0]:.0f}<br>index score %{customdata[1]:.4g}<extra>" + name + "</extra>"
        told = np.stack([first, y], axis=1)
        bar = go.Bar(x=x, y=y - floor, base=floor, width=width, customdata=told, name=name, hovertemplate=hover)
        bar.marker.color = colour
        fig.add_trace(bar.update(opacity=0.55 if symbol else 0.8, showlegend=symbol is None, marker_line_width=0), row=1, col=1)
        if symbol:
            mark = go.Scatter(x=x, y=y, mode="markers", name=f"{name} ({int(mask.sum())} of {len(scores)})", hoverinfo="skip")
            fig.add_trace(mark.update(marker={"color": colour, "symbol": symbol, "size": 8}), row=1, col=1)
    runner = -1 if record.runner_up is None else int(record.runner_up[token])
    if runner >= 0:
        x, y, _, first = _bars(record, np.array([runner]), scores[[runner]])
        hover = f"entry {runner}, best one not kept<br>index score %{{y:.4g}}<extra></extra>"
        mark = go.Scatter(x=x, y=y, mode="markers", name="runner-up", hovertemplate=hover)
        fig.add_trace(mark.update(marker={"color": style.PINK, "symbol": "x", "size": 8}), row=1, col=1)
    fig.update_yaxes(title_text="index score", row=1, col=1)


def _add_probs(fig: go.Figure, record: LayerTrace, token: int, head: Head, row: int) -> None:
    columns, probs, stands_for = source_probs(record, head, token)
    is_entry = columns >= record.length
    entries, entry_probs = columns[is_entry] - record.length, probs[is_entry]
    order = np.argsort(entries)
    pooled = int(stands_for[is_entry].max(initial=1))
    x, y, width, first = _bars(record, entries[order], entry_probs[order], pooled)
    name = "compressed entries" if pooled == 1 else f"compressed entries (maximum of {pooled})"
    hover = "entry %{customdata}<br>probability %{y:.3g}<extra></extra>"
    bars = [
        go.Bar(x=x, y=y, width=width, customdata=first, name=name, marker_color=style.ENTRY_COLOUR, hovertemplate=hover)
        if record.ratio
        else None,
        go.Bar(
            x=columns[~is_entry],
            y=probs[~is_entry],
            width=1,
            name="window tokens",
            marker_color=style.WINDOW_COLOUR,
            hovertemplate="token %{x}<br>probability %{y:.3g}<extra></extra>",
        ),
    ]
    sink = float(of_head(record.sink_probs[token][:, None], head)[0])
    unit = 0.02 * record.length  # the sink has no position: its bar stands before token 0
    place = {"x": [-2 * unit], "y": [sink], "width": unit, "marker_color": style.SINK_COLOUR}
    bars.append(go.Bar(**place, name=f"sink ({sink:.2g})", hovertemplate="sink<br>probability %{y:.3g}<extra></extra>"))
    for bar in bars:
        if bar is not None:
            fig.add_trace(bar.update(opacity=0.85, marker_line_width=0), row=row, col=1)
    fig.update_xaxes(range=[-3.5 * unit, record.length])
    fig.update_yaxes(title_text="probability", rangemode="tozero", row=row, col=1)


def _bars(record: LayerTrace, entries: np.ndarray, heights: np.ndarray, each: int = 1) -> tuple[np.ndarray, ...]:
    """Centre, height, width in tokens, and first entry of at most MAX_POINTS bars, for ascending entries.

    ``each`` entries are covered by one given value already.
    """
    group = -(-len(entries) // MAX_POINTS) if len(entries) else 1
    starts = np.arange(0, len(entries), group)
    high = np.maximum.reduceat(heights, starts) if len(entries) else heights
    first = entries[starts]
    last = entries[np.minimum(starts + group, len(entries)) - 1] + each - 1
    width = (last - first + 1) * record.ratio
    return first * record.ratio + (width - 1) / 2, high, width, first
