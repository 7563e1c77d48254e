"""Attention of one layer as pictures: tiles and thumbnails, and what their columns are.

Rows are query tokens, row 0 on top. Columns are what a query may look at, numbered through. In layers with a sliding window
0..L-1 are tokens (each query sees the last W of them) and L..L+S-1 the layer's compressed entries; in layers without one
(MLA, GQA, MHA and V3.2's selection) an entry is a token, and columns 0..L-1 are these. Only what a trace holds is touched
(window rows, kept entries, pooled rows), so memory grows with L, never with L x L.

One letter sizes: L tokens, S compressed entries, W window, H heads, K kept entries, E recorded entry columns.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL import Image

from workbench.errors import InputError
from workbench.figures import style
from workbench.trace import LayerTrace, Trace

Head = int | Literal["max", "mean"]
Range = tuple[int, int]  # (start, stop)

TILE_BYTES = 180_000  # a notebook keeps pictures as base64, a third larger, and a view has 250 KB
THUMBNAIL_BYTES, THUMBNAIL_PIXELS = 5_000, 56
MAX_CELL_PIXELS = 32
CHUNK_VALUES = 1 << 22  # probabilities worked on at once
SELECTED = "selected (no probabilities in a capture)"
THUMBNAIL_QUERIES = 8  # of a capture, looked at for each row of a thumbnail's cells; the large map looks at all
LAYER_NAMES = {
    "csa": "CSA",
    "hca": "HCA",
    "csa2-full": "CSA2 full",
    "csa2-reindex": "CSA2 reindex",
    "csa2-reuse": "CSA2 reuse",
    "mla-dsa": "MLA + DSA",
    "mla": "MLA",
    "gqa": "GQA",
    "mha": "MHA",
}


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """A max-pooled picture of attention and what its cells stand for.

    ``values`` [h, w] float32 holds the largest probability in each cell of ``pooling`` (rows, columns); a cell is drawn
    ``scale`` (rows, columns) pixels large. The colour is the square root of the probability, 0 to 1, so that small ones
    show; cells no query of theirs may look at are transparent, ``visible`` [h, w] is False there.
    Of a layer of which only the selection is known, ``values`` holds the share of the cell's pairs (query, column it may look
    at) that were selected: 1 or 0 where a cell is one pair.
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
        if self.layer.selection_only:
            exact = _shares(self.layer, rows, columns, (1, 1), self.composite)
        else:
            exact = largest_probs(self.layer, self.head, rows, columns, (1, 1), self.composite)
        if not exact.any():  # nothing is attended here: the pair in the middle stands for the cell
            return (rows[0] + rows[1] - 1) // 2, (columns[0] + columns[1] - 1) // 2
        row, column = divmod(int(exact.argmax()), exact.shape[1])
        return rows[0] + row, columns[0] + column


def window_columns(layer: LayerTrace) -> int:
    """How many columns stand for window tokens; the column of entry 0."""
    return layer.length if layer.window else 0


def column_count(layer: LayerTrace) -> int:
    return window_columns(layer) + layer.entries


def column_tokens(layer: LayerTrace, column: int) -> tuple[int, ...]:
    """Source tokens of a column: the token itself, or those a compressed entry was made from."""
    tokens = window_columns(layer)
    if not 0 <= column < column_count(layer):
        raise InputError(f"layer {layer.layer} has {tokens} window and {layer.entries} entry columns, got column {column}")
    if column < tokens:
        return (column,)
    first, last = layer.entry_tokens(column - tokens)
    return tuple(range(first, last + 1))


def entry_name(layer: LayerTrace) -> str:
    """What an entry of this layer is called: a token, where it is no more than that."""
    return "token" if layer.of_tokens else "compressed entry"


def describe_layer(layer: LayerTrace) -> str:
    """A layer's kind in the reports' words, with what a query may look at."""
    if not layer.ratio:
        return f"sliding window of {layer.window}"
    name = LAYER_NAMES.get(layer.kind, layer.kind)
    if layer.of_tokens:
        return f"{name}, {'chosen tokens' if layer.selects else 'every token'}"
    return f"{name}, {tokens_each(layer)} per entry"


def tokens_each(layer: LayerTrace) -> str:
    return f"{layer.ratio} token{'s' if layer.ratio > 1 else ''}"


def token_columns(layer: LayerTrace) -> int:
    """How many columns, from the left, are tokens: those of the window, or all where entries are tokens."""
    return layer.length if layer.of_tokens else window_columns(layer)


def describe_head(layer: LayerTrace, head: Head) -> str:
    """What a value of this layer is: whose probability, or in a capture no more than a mark."""
    if layer.selection_only:
        return SELECTED
    return f"{head} over heads" if isinstance(head, str) else f"head {head}"


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
    ``step`` keeps the rows one step processed. Where rows over all entries were recorded pooled, a value covers the entries
    it is the maximum of. Raises InputError for a layer, head, step or range the trace does not have.
    """
    record = trace.layer(layer)
    return _tile(trace, record, head, rows, columns, column_count(record), max_pixels, step, TILE_BYTES, False)


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
    (CSA) the larger one shows; so a row of this picture does not sum to one. Of a layer of which only the selection is known
    an entry is drawn over its own block of tokens alone.
    """
    record = trace.layer(layer)
    return _tile(trace, record, head, rows, columns, record.length, max_pixels, step, TILE_BYTES, True)


def thumbnails(trace: Trace, layer: int) -> list[tuple[Head, bytes]]:
    """A small composite picture of the maximum over heads and of each head, as (head, png) of at most 5 KB each."""
    record = trace.layer(layer)
    heads: list[Head] = ["max", *range(record.heads)]  # a capture has one selection for all heads
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
    rows = checked_range("rows", rows, record.length)
    if step is not None:
        if not 0 <= step < trace.steps:
            raise InputError(f"the trace has steps 0..{trace.steps - 1}, got {step}")
        rows = max(rows[0], int(trace.step_starts[step])), min(rows[1], trace.step_end(step))
        if rows[0] >= rows[1]:
            raise InputError(f"step {step} processed no token in the rows asked for; leave out rows or step")
    columns = checked_range("columns", columns, width)
    shape = rows[1] - rows[0], columns[1] - columns[0]
    pooling = -(-shape[0] // max_pixels), -(-shape[1] // max_pixels)
    if record.selection_only:
        every = max(1, pooling[0] // THUMBNAIL_QUERIES) if budget == THUMBNAIL_BYTES else 1
        values = _shares(record, rows, columns, pooling, composite, every)
    else:
        values = largest_probs(record, head, rows, columns, pooling, composite)
    visible = visible_cells(record, rows, columns, pooling, composite)
    values[~visible] = 0.0  # the end of a row recorded pooled may reach past its last visible entry
    height, width = values.shape
    scale = min(MAX_CELL_PIXELS, max_pixels // height), min(MAX_CELL_PIXELS, max_pixels // width)
    png = tile_png(values, visible, scale, budget)
    return Tile(png, values, visible, pooling, scale, rows, columns, record, head, composite)


def check_head(record: LayerTrace, head: Head) -> None:
    """Raise InputError unless the layer has this head."""
    if head in ("max", "mean") or (isinstance(head, int) and not isinstance(head, bool) and 0 <= head < record.heads):
        return
    if record.selection_only:
        raise InputError(f"layer {record.layer} comes from a capture, which has one selection for all heads; got head {head!r}")
    raise InputError(f"layer {record.layer} has heads 0..{record.heads - 1}, or 'max' or 'mean' over them, got {head!r}")


def checked_range(name: str, given: Range | None, size: int) -> Range:
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


def largest_probs(
    record: LayerTrace, head: Head, rows: Range, columns: Range, pooling: tuple[int, int], composite: bool
) -> np.ndarray:
    """The largest probability per cell, [h, w] float32, gathered chunk by chunk of rows.

    Numbers of one size are compared as integers, which keeps the order of half-precision floats from 0 up and is many times
    faster than comparing those; what is negative counts as 0.
    """
    height, width = (-(-(stop - start) // pool) for (start, stop), pool in zip((rows, columns), pooling, strict=True))
    grid = np.zeros((height, width), np.float32 if head == "mean" else np.int16)

    def scatter(cells: np.ndarray, column: np.ndarray, value: np.ndarray) -> None:
        """Put value [n, m] at column [n, m] into the cells of rows [n]."""
        flat = (column - columns[0]) // pooling[1] + (cells * width)[:, None]
        inside = (value > 0) & (column >= columns[0]) & (column < columns[1])
        np.maximum.at(grid.reshape(-1), flat[inside], value[inside])

    first, last = columns[0], columns[1] + record.window - 1  # no other query has a window over these columns
    for start, stop in _chunks(record, (max(rows[0], first), min(rows[1], last))) if record.window else ():
        t = np.arange(start, stop)
        scatter((t - rows[0]) // pooling[0], *_window_runs(record, head, t, columns, pooling[1]))
    for start, stop in _chunks(record, rows) if record.ratio else ():
        t = np.arange(start, stop)
        cells = (t - rows[0]) // pooling[0]
        if record.selected is not None and record.selected_probs is not None:
            kept, value = record.selected[start:stop], comparable(record.selected_probs[start:stop], head)
            value = np.where(kept >= 0, value, value.dtype.type(0))
            if composite:
                one, reach = np.maximum(0, kept * record.ratio - record.look_back), (kept + 1) * record.ratio - 1
                scatter(cells, one, value)
                whose, which = np.nonzero((one - columns[0]) // pooling[1] != (reach - columns[0]) // pooling[1])
                cells, one, reach, value = cells[whose], one[whose, which], reach[whose, which], value[whose, which]
                while len(one):  # one token in every further cell that the sources touch
                    one = np.minimum(one + pooling[1], reach)
                    scatter(cells, one[:, None], value[:, None])
                    more = one < reach
                    cells, one, reach, value = cells[more], one[more], reach[more], value[more]
            else:
                scatter(cells, window_columns(record) + kept, value)
        if record.entry_probs is not None and record.entries:
            edges = np.flatnonzero(np.diff(cells, prepend=-1))  # where a new row of cells begins
            recorded = record.entry_probs[start:stop]
            if head == "max":  # of rows, then of heads: the same, and nothing is copied
                band = most_of_heads(np.maximum.reduceat(recorded.view(np.int16), edges, axis=0))
            else:
                band = np.maximum.reduceat(comparable(recorded, head), edges, axis=0)  # [h', E]
            spread = _spread(record, band, columns, pooling[1], record.entry_pooling(start), composite)
            grid[cells[edges]] = np.maximum(grid[cells[edges]], spread)
    return grid if head == "mean" else grid.view(np.float16).astype(np.float32)


def comparable(probs: np.ndarray, head: Head) -> np.ndarray:
    """float16 [..., H, N] -> [..., N] of one head or the maximum over heads, as int16 in the same order, or float32 means."""
    if head == "mean":
        total = probs[..., 0, :].astype(np.float32)
        for one in range(1, probs.shape[-2]):
            total += probs[..., one, :]
        return total / np.float32(probs.shape[-2])
    bits = probs.view(np.int16)
    return most_of_heads(bits) if head == "max" else bits[..., head, :]


def most_of_heads(bits: np.ndarray) -> np.ndarray:
    """[..., H, N] -> [..., N]: the maximum, half of the heads against the other half, whose rows are neighbours in memory."""
    while (heads := bits.shape[-2]) > 1:
        half = heads // 2
        most = np.maximum(bits[..., :half, :], bits[..., half : 2 * half, :])
        if heads % 2:
            np.maximum(most[..., :1, :], bits[..., -1:, :], out=most[..., :1, :])
        bits = most
    return bits[..., 0, :]


def _window_runs(record: LayerTrace, head: Head, t: np.ndarray, columns: Range, pool: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows of queries t [n] pooled to at most one value a cell: columns [n, m] and values [n, m].

    A window's columns are neighbours, so those of one cell are a run of a row; m is about W / pool + 1.
    """
    value = comparable(record.window_probs[t[0] : t[-1] + 1], head)
    oldest = t - record.window + 1
    over = max(0, columns[1] - int(t[0]))  # queries from here on also see columns beyond the last
    if over < len(t):
        value = value.copy()
        seen = oldest[over:, None] + np.arange(record.window)
        value[over:][seen >= columns[1]] = 0
    next_cell = -(oldest - columns[0]) % pool  # where a window goes on into another cell
    runs = np.minimum(next_cell[:, None] + pool * np.arange(-(-record.window // pool)), record.window - 1)
    runs = np.concatenate([np.zeros((len(t), 1), np.int64), runs], axis=1)
    flat = np.ascontiguousarray(value).reshape(-1)
    most = np.maximum.reduceat(flat, (record.window * np.arange(len(t))[:, None] + runs).reshape(-1)).reshape(runs.shape)
    return oldest[:, None] + runs, most


def _shares(
    record: LayerTrace, rows: Range, columns: Range, pooling: tuple[int, int], composite: bool, every: int = 1
) -> np.ndarray:
    """Of each cell's pairs of a query and a column it may look at, the share that was selected, [h, w] float32.

    ``every`` looks at each so manyth query only.
    """
    assert record.selected is not None
    height, width = (-(-(stop - start) // pool) for (start, stop), pool in zip((rows, columns), pooling, strict=True))
    each = record.ratio if composite else 1  # columns that an entry is drawn over
    left = columns[0] + pooling[1] * np.arange(width)
    right = np.minimum(left + pooling[1], columns[1])
    bins = record.entries + 1  # the first for -1
    kept_pairs, pairs = np.zeros((height, width), np.int64), np.zeros((height, width), np.int64)
    size = every * max(1, CHUNK_VALUES // max(record.selected.shape[1], width))
    for start in range(rows[0], rows[1], size):
        t = np.arange(start, min(start + size, rows[1]), every)
        cells = (t - rows[0]) // pooling[0]
        edges = np.flatnonzero(np.diff(cells, prepend=-1))  # where a new row of cells begins
        at = cells[edges]
        first_bin = np.searchsorted(at, cells) * bins + 1
        flat = first_bin[:, None] + record.selected[t[0] : t[-1] + 1 : every]
        counts = np.bincount(flat.reshape(-1), minlength=len(at) * bins).reshape(len(at), bins)
        counts[:, 0] = 0
        sums = np.cumsum(counts, axis=1)
        before = []  # columns before a cell's left and right edge: of whole entries, and of the one that the edge cuts
        for edge in (left, right):
            whole = np.minimum(edge // each, record.entries)
            cut = np.where(whole < record.entries, edge % each, 0)
            before.append(sums[:, whole] * each + counts[:, np.minimum(whole + 1, record.entries)] * cut)
        kept_pairs[at] += before[1] - before[0]
        seen = np.clip(np.minimum(right, each * ((t + 1) // record.ratio)[:, None]) - left, 0, None)
        pairs[at] += np.add.reduceat(seen, edges, axis=0)
    return (kept_pairs / np.maximum(pairs, 1)).astype(np.float32)


def _chunks(record: LayerTrace, rows: Range) -> Iterator[Range]:
    """Split ``rows`` so that a chunk is small and, where rows are over all entries, recorded with one entry pooling."""
    width = record.window
    for probs in (record.selected_probs, record.entry_probs):
        width += 0 if probs is None else probs.shape[-1]
    size = max(1, CHUNK_VALUES // max(1, record.heads * width))
    start = rows[0]
    while start < rows[1]:
        stop = min(start + size, rows[1])
        if record.entry_probs is not None:
            stop = min(stop, record.pooled_alike_until(start))
        yield start, stop
        start = stop


def _spread(
    record: LayerTrace, band: np.ndarray, columns: Range, pool: int, recorded_pooling: int, composite: bool
) -> np.ndarray:
    """Rows over all entries [h', E] -> [h', w]: a cell takes the maximum of the recorded columns its entries fall into."""
    low = np.arange(columns[0], columns[1], pool)
    high = np.minimum(low + pool, columns[1])
    if composite:
        low, high = low // record.ratio, (high - 1) // record.ratio + 1
    else:
        low, high = np.maximum(low - window_columns(record), 0), high - window_columns(record)
    high = np.minimum(high, record.entries)
    empty = high <= low
    most = band.shape[1]
    low, high = np.minimum(low // recorded_pooling, most), np.minimum(-(-high // recorded_pooling), most)
    bounds = np.stack([low, np.maximum(high, 0)], axis=1).reshape(-1)
    padded = np.pad(band, ((0, 0), (0, 1)))  # so that the end of the last column is a valid index
    if pool == 1:  # each cell lies in one recorded column
        return np.where(empty, 0.0, np.take(padded, bounds[::2], axis=1))
    return np.where(empty, 0.0, np.maximum.reduceat(padded, bounds, axis=1)[:, ::2])


def visible_cells(record: LayerTrace, rows: Range, columns: Range, pooling: tuple[int, int], composite: bool) -> np.ndarray:
    """[h, w] bool: may any query of the cell look at any column of it?"""
    top = np.arange(rows[0], rows[1], pooling[0])[:, None]
    bottom = np.minimum(top + pooling[0], rows[1]) - 1
    left = np.arange(columns[0], columns[1], pooling[1])
    right = np.minimum(left + pooling[1], columns[1]) - 1
    tokens = window_columns(record)
    seen = (left <= bottom) & (np.minimum(right, tokens - 1) > top - record.window) & (left < tokens)
    if record.ratio:
        closed = (bottom + 1) // record.ratio
        if composite:
            return seen | (left < closed * record.ratio)
        return seen | ((right >= tokens) & (np.maximum(left - tokens, 0) < closed))
    return seen


def tile_png(values: np.ndarray, visible: np.ndarray, scale: tuple[int, int], budget: int) -> bytes:
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
