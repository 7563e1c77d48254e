"""Attention of one layer as pictures: tiles and thumbnails, and what their columns are.

Rows are query tokens, row 0 on top. Columns are what a query may look at, numbered through. In layers with a sliding window
0..L-1 are tokens (each query sees the last W of them) and L..L+S-1 the layer's compressed entries; in layers without one
(MLA, GQA, MHA and V3.2's selection) an entry is a token, and columns 0..L-1 are these. Only what a trace holds is touched
(window rows, kept entries, pooled rows), so memory grows with L, never with L x L.

One letter sizes: L tokens, S compressed entries, W window, H heads, K kept entries, E recorded entry columns.
"""

from __future__ import annotations

import io
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL import Image

from workbench.errors import InputError, whole_number
from workbench.figures import style
from workbench.figures.pooling import (
    Head,
    Range,
    column_count,
    largest_probs,
    mean_probs,
    selected_shares,
    visible_cells,
    window_columns,
)
from workbench.trace import LayerTrace, Trace

TILE_BYTES = 180_000  # a notebook keeps pictures as base64, a third larger, and a view has 250 KB
THUMBNAIL_BYTES, THUMBNAIL_PIXELS = 5_000, 56
MAX_CELL_PIXELS = 32
MOST_PIXELS = 4096  # a side that may be asked for; the cells of larger ones would fill the memory
Pool = Literal["max", "mean"]
Levels = tuple[np.ndarray, bytes, bytes]
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
    """A pooled picture of attention and what its cells stand for.

    ``values`` [h, w] float32 holds the largest probability in each cell of ``pooling`` (rows, columns), or with ``pool``
    "mean" the mean over the pairs of it that may see each other; a cell is drawn ``scale`` (rows, columns) pixels large. The
    colour is the square root of the probability, 0 to 1, so that small ones show; cells no query of theirs may look at are
    transparent, ``visible`` [h, w] is False there.
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
    pool: Pool = "max"

    def column_label(self, i: int) -> tuple[int, ...]:
        """The tokens that column ``i`` was made from, counted as in ``column_range``: one token, or all of an entry's."""
        i = whole_number("a column", i)
        if not self.column_range[0] <= i < self.column_range[1]:
            raise InputError(f"this tile has columns {self.column_range[0]}..{self.column_range[1] - 1}, got {i}")
        return column_tokens(self.layer, i)

    def cell(self, row: int, column: int) -> tuple[int, int]:
        """The cell, as an index into ``values``, that holds query ``row`` and ``column``."""
        for name, at, (start, stop) in (("row", row, self.row_range), ("column", column, self.column_range)):
            if not start <= whole_number(f"a {name}", at) < stop:
                raise InputError(f"this tile has {name}s {start}..{stop - 1}, got {at}")
        return (row - self.row_range[0]) // self.pooling[0], (column - self.column_range[0]) // self.pooling[1]

    def strongest(self, i: int, j: int) -> tuple[int, int]:
        """Query and column of the largest probability in cell (i, j): what a pooled cell shows."""
        rows, columns = (
            (start + at * pool, min(start + (at + 1) * pool, stop))
            for at, pool, (start, stop) in zip((i, j), self.pooling, (self.row_range, self.column_range), strict=True)
        )
        if self.layer.selection_only:
            exact = selected_shares(self.layer, rows, columns, (1, 1), self.composite)
        else:
            exact = largest_probs(self.layer, self.head, rows, columns, (1, 1), self.composite)
        if not exact.any():  # nothing is attended here: the pair in the middle stands for the cell
            return (rows[0] + rows[1] - 1) // 2, (columns[0] + columns[1] - 1) // 2
        row, column = divmod(int(exact.argmax()), exact.shape[1])
        return rows[0] + row, columns[0] + column


def column_tokens(layer: LayerTrace, column: int) -> tuple[int, ...]:
    """Source tokens of a column: the token itself, or those a compressed entry was made from."""
    tokens = window_columns(layer)
    if not 0 <= whole_number("a column", column) < column_count(layer):
        raise InputError(f"layer {layer.layer} has {tokens} window and {layer.entries} entry columns, got column {column}")
    if column < tokens:
        return (column,)
    first, last = layer.entry_tokens(column - tokens)
    return tuple(range(first, last + 1))


def cells_of(size: int, max_pixels: int) -> tuple[int, int, int]:
    """A side of ``size`` rows or columns in at most ``max_pixels``: how many cells, of how many each, how many pixels large.

    Raises InputError unless ``max_pixels`` is a whole number from 1 to 4,096.
    """
    if not 1 <= whole_number("max_pixels", max_pixels) <= MOST_PIXELS:
        raise InputError(f"max_pixels must be from 1 to {MOST_PIXELS:,}, got {max_pixels}")
    pool = -(-size // max_pixels)
    cells = -(-size // pool)
    return cells, pool, min(MAX_CELL_PIXELS, max_pixels // cells)


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
    *,
    pool: Pool = "max",
) -> Tile:
    """Attention probabilities of ``layer`` as one PNG of at most ``max_pixels`` a side and 250 KB, whatever the length.

    ``head`` is a number, or "max" or "mean" over the heads; ``rows`` and ``columns`` are (start, stop) and default to all;
    ``step`` keeps the rows one step processed. A cell of several queries and columns shows their largest probability, or with
    ``pool="mean"`` the mean over those pairs of them that may see each other. Where rows over all entries were recorded pooled,
    a value covers the entries it is the maximum of, and there is no mean. Raises InputError for a layer, head, step, range or
    pooling the trace does not have.
    """
    record = layer_of(trace, layer)
    return _tile(trace, record, head, rows, columns, column_count(record), max_pixels, step, TILE_BYTES, False, pool)


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
    record = layer_of(trace, layer)
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
    pool: Pool = "max",
) -> Tile:
    check_head(record, head)
    if pool not in ("max", "mean"):
        raise InputError(f"pool is 'max' or 'mean', got {pool!r:.40}")
    rows = checked_range("rows", rows, record.length)
    if step is not None:
        if not 0 <= whole_number("step", step) < trace.steps:
            had = f"steps 0..{trace.steps - 1}" if trace.steps else "no recorded steps"
            raise InputError(f"the trace has {had}, got step {step}")
        rows = max(rows[0], int(trace.step_starts[step])), min(rows[1], trace.step_end(step))
        if rows[0] >= rows[1]:
            raise InputError(f"step {step} processed no token in the rows asked for; leave out rows or step")
    columns = checked_range("columns", columns, width)
    shape = rows[1] - rows[0], columns[1] - columns[0]
    sides = [cells_of(size, max_pixels) for size in shape]
    pooling = sides[0][1], sides[1][1]
    if record.selection_only:
        every = max(1, pooling[0] // THUMBNAIL_QUERIES) if budget == THUMBNAIL_BYTES else 1
        values = selected_shares(record, rows, columns, pooling, composite, every)
    elif pool == "mean" and pooling != (1, 1):
        values = mean_probs(record, head, rows, columns, pooling)
    else:
        values = largest_probs(record, head, rows, columns, pooling, composite)
    visible = visible_cells(record, rows, columns, pooling, composite)
    values[~visible] = 0.0  # the end of a row recorded pooled may reach past its last visible entry
    height, width = values.shape
    scale = sides[0][2], sides[1][2]
    png = tile_png(values, visible, scale, budget)
    if len(png) > budget and max(height, width) > 1:  # a noisy picture of very many pixels: larger cells instead
        return _tile(trace, record, head, rows, columns, columns[1], max_pixels // 2, None, budget, composite, pool)
    return Tile(png, values, visible, pooling, scale, rows, columns, record, head, composite, pool)


def layer_of(trace: Trace, layer: int) -> LayerTrace:
    """The layer's record; InputError for a trace that has none, and for what is no trace."""
    if not isinstance(trace, Trace):
        raise InputError(f"expected a Trace (of a live run: run.trace), got {trace!r:.60}")
    return trace.layer(layer)


def check_head(record: LayerTrace, head: Head) -> None:
    """Raise InputError unless the layer has this head."""
    number = isinstance(head, int | np.integer) and not isinstance(head, bool)
    if (number and 0 <= head < record.heads) or (isinstance(head, str) and head in ("max", "mean")):  # type: ignore[operator]
        return
    if record.selection_only:
        raise InputError(
            f"layer {record.layer} comes from a capture, which has one selection for all heads; got head {head!r:.60}"
        )
    raise InputError(f"layer {record.layer} has heads 0..{record.heads - 1}, or 'max' or 'mean' over them, got {head!r:.60}")


def checked_range(name: str, given: Range | None, size: int) -> Range:
    if size < 1:
        raise InputError("the trace has no token yet; wait for the first step")
    if given is None:
        return 0, size
    try:
        start, stop = map(operator.index, given)
    except (TypeError, ValueError):  # no pair, or not of whole numbers
        raise InputError(f"{name} must be (start, stop), two whole numbers within 0..{size}, got {given!r:.60}") from None
    if not 0 <= start < stop <= size:
        raise InputError(f"{name} must be a non-empty (start, stop) within 0..{size}, got ({start}, {stop})")
    return start, stop


def tile_png(values: np.ndarray, visible: np.ndarray, scale: tuple[int, int], budget: int) -> bytes:
    """A palette PNG within ``budget`` bytes; a noisy picture gives up shades of colour to fit."""
    root = np.sqrt(np.clip(np.nan_to_num(values), 0.0, 1.0))  # a model that came to nothing has no colour

    def drawn(shades: int) -> Levels:
        level = np.where(visible, 1 + np.ceil(root * (shades - 1)), 0)  # 0 is transparent, 1 is zero
        return level, bytes(3) + style.colour_map(shades).tobytes(), bytes(1)

    return fitting_png(map(drawn, (255, 63, 31, 15, 7, 3)), scale, budget)


def fitting_png(pictures: Iterable[Levels], scale: tuple[int, int], budget: int) -> bytes:
    """The first of ever plainer pictures that takes at most ``budget`` bytes, else the last: as (level of each cell [h, w],
    colours of the levels, how opaque the first of them are)."""
    png = b""
    for level, colours, opacities in pictures:
        picture = Image.fromarray(level.astype(np.uint8).repeat(scale[0], axis=0).repeat(scale[1], axis=1))
        picture.putpalette(colours)
        out = io.BytesIO()
        picture.save(out, format="png", transparency=opacities)
        png = out.getvalue()
        if len(png) <= budget:
            break
    return png
