"""Attention of one layer pooled into the cells of a picture, straight from what a trace holds: no L x L array is ever made.

A cell holds the largest probability of its pairs (query, column), or their mean, or where only the selection is known the share
of them that was selected. Rows and columns are numbered as in ``workbench.figures.attention``; letters as there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from workbench.errors import InputError
from workbench.trace import LayerTrace

Head = int | Literal["max", "mean"]
Range = tuple[int, int]  # (start, stop)

CHUNK_VALUES = 1 << 20  # probabilities worked on at once


def window_columns(layer: LayerTrace) -> int:
    """How many columns stand for window tokens; the column of entry 0."""
    return layer.length if layer.window else 0


def column_count(layer: LayerTrace) -> int:
    return window_columns(layer) + layer.entries


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
    for start, stop in chunks(record, (max(rows[0], first), min(rows[1], last))) if record.window else ():
        t = np.arange(start, stop)
        scatter((t - rows[0]) // pooling[0], *_window_runs(record, head, t, columns, pooling[1]))
    for start, stop in chunks(record, rows) if record.ratio else ():
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
            cover = spread(record, band, columns, pooling[1], record.entry_pooling(start), composite)
            grid[cells[edges]] = np.maximum(grid[cells[edges]], cover)
    return grid if head == "mean" else grid.view(np.float16).astype(np.float32)


def comparable(probs: np.ndarray, head: Head) -> np.ndarray:
    """float16 [..., H, N] -> [..., N] of one head or the maximum over heads, as int16 in the same order, or float32 means."""
    bits = probs.view(np.int16)
    if head != "mean":
        return most_of_heads(bits) if head == "max" else bits[..., head, :]
    values = widened(bits)
    total = values[..., 0, :].copy()
    for one in range(1, probs.shape[-2]):
        total += values[..., one, :]
    total /= np.float32(probs.shape[-2])
    return total


def most_of_heads(bits: np.ndarray) -> np.ndarray:
    """[..., H, N] -> [..., N]: the maximum, half of the heads against the other half, whose rows are neighbours in memory."""
    while (heads := bits.shape[-2]) > 1:
        half = heads // 2
        most = np.maximum(bits[..., :half, :], bits[..., half : 2 * half, :])
        if heads % 2:
            np.maximum(most[..., :1, :], bits[..., -1:, :], out=most[..., :1, :])
        bits = most
    return bits[..., 0, :]


def widened(bits: np.ndarray) -> np.ndarray:
    """Halves given as int16, those from 0 up, as float32: exact, and many times faster than numpy's own conversion.

    A half's exponent and fraction, put where a single's are, are its value but for the exponents' different zero points.
    """
    return (np.maximum(bits, 0).astype(np.int32) << 13).view(np.float32) * np.float32(2.0 ** (127 - 15))


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


def no_means(record: LayerTrace, rows: Range) -> str:
    """Why there is no mean over these rows, "" if there is one."""
    each = 1 if record.entry_probs is None else record.entry_pooling(rows[1] - 1)
    return f"later rows were recorded as maxima of {each} entries" if each > 1 else ""


def mean_probs(record: LayerTrace, head: Head, rows: Range, columns: Range, pooling: tuple[int, int]) -> np.ndarray:
    """The mean probability per cell, over the pairs that a query of it may look at, [h, w] float32.

    Raises InputError where rows were recorded pooled: of maxima there is no mean.
    """
    if why := no_means(record, rows):
        raise InputError(f"layer {record.layer} has no mean here, as {why}; take pool='max', or rows that end earlier")
    height, width = (-(-(stop - start) // pool) for (start, stop), pool in zip((rows, columns), pooling, strict=True))
    total = np.zeros(height * width)
    tokens = window_columns(record)

    def add(cells: np.ndarray, column: np.ndarray, recorded: np.ndarray) -> None:
        value = comparable(recorded, head)
        value = value if value.dtype == np.float32 else widened(value)
        inside = (value > 0) & (column >= columns[0]) & (column < columns[1])
        flat = (column - columns[0]) // pooling[1] + (cells * width)[:, None]
        total[:] += np.bincount(flat[inside], value[inside], minlength=len(total))

    for start, stop in chunks(record, rows):
        t = np.arange(start, stop)
        cells = (t - rows[0]) // pooling[0]
        if record.window:
            add(cells, t[:, None] - record.window + 1 + np.arange(record.window), record.window_probs[start:stop])
        if record.selected is not None and record.selected_probs is not None:
            kept = record.selected[start:stop]
            add(cells, np.where(kept >= 0, tokens + kept, -1), record.selected_probs[start:stop])
        if record.entry_probs is not None and record.entries:
            probs = record.entry_probs[start:stop]
            add(cells, np.broadcast_to(tokens + np.arange(probs.shape[-1]), (stop - start, probs.shape[-1])), probs)
    pairs = visible_pairs(record, rows, columns, pooling)
    return (total.reshape(height, width) / np.maximum(pairs, 1)).astype(np.float32)


def visible_pairs(record: LayerTrace, rows: Range, columns: Range, pooling: tuple[int, int]) -> np.ndarray:
    """How many pairs (query, column it may look at) a cell holds, [h, w], in closed form whatever a cell's size."""
    top = np.arange(rows[0], rows[1], pooling[0])[:, None]
    bottom = np.minimum(top + pooling[0], rows[1])
    edges = np.append(np.arange(columns[0], columns[1], pooling[1]), columns[1])
    tokens, length = window_columns(record), record.length
    before = np.zeros((len(top), len(edges)), np.int64)  # columns left of an edge, summed over a cell's queries
    if record.window:
        # Query t sees clip(x - t + W - 1, 0, W) columns left of x, less those left of 0: sums of one function of x - t.
        sums = np.cumsum(np.clip(np.arange(-length, length + 1) + record.window - 1, 0, record.window))
        for x, sign in ((np.minimum(edges, tokens), 1), (np.zeros_like(edges), -1)):
            before += sign * (sums[x - top + length] - sums[x - bottom + length])
    if record.ratio:
        closed = np.append(0, np.cumsum((np.arange(length) + 1) // record.ratio))
        entries = np.clip(edges - tokens, 0, record.entries)
        all_from = np.clip(entries * record.ratio - 1, top, bottom)  # the first query of the cell that sees all of them
        before += closed[all_from] - closed[top] + entries * (bottom - all_from)
    return np.diff(before, axis=1)


def selected_shares(
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
    kept_pairs, pairs = np.zeros(height * width, np.int64), np.zeros((height, width), np.int64)
    if every == 1:
        pairs = _drawn_pairs(record, rows, left, right, pooling[0], each)
    size = every * max(1, CHUNK_VALUES // max(1, record.selected.shape[1]))
    for start in range(rows[0], rows[1], size):
        t = np.arange(start, min(start + size, rows[1]), every)
        cells = (t - rows[0]) // pooling[0]
        begun, count = int(cells[0]) * width, int(cells[-1] - cells[0] + 1) * width
        row = (width * (cells - cells[0]))[:, None]
        kept = record.selected[t[0] : t[-1] + 1 : every]
        first = each * kept
        cell = (first - columns[0]) // pooling[1]
        inside = (kept >= 0) & (first >= columns[0]) & (first + each <= columns[1])
        if each > 1:  # entries that an edge cuts: in turn in all the cells that they lie in
            drawn = (kept >= 0) & (first + each > columns[0]) & (first < columns[1])
            whole = inside & ((first + each - 1 - columns[0]) // pooling[1] == cell)
            whose, which = np.nonzero(drawn & ~whole)
            inside = whole
            one, last = np.maximum(first[whose, which], columns[0]), np.minimum(first[whose, which] + each, columns[1])
            at = begun + row[whose, 0]
            while len(one):
                part = (one - columns[0]) // pooling[1]
                stop = np.minimum(columns[0] + pooling[1] * (part + 1), last)
                np.add.at(kept_pairs, at + part, stop - one)
                more = stop < last
                one, last, at = stop[more], last[more], at[more]
        flat = np.where(inside, row + cell, count)  # the last for what is not drawn
        kept_pairs[begun : begun + count] += each * np.bincount(flat.reshape(-1), minlength=count + 1)[:count]
        if every == 1:
            continue
        edges = np.flatnonzero(np.diff(cells, prepend=-1))  # where a new row of cells begins
        seen = np.clip(np.minimum(right, each * ((t + 1) // record.ratio)[:, None]) - left, 0, None)
        pairs[cells[edges]] += np.add.reduceat(seen, edges, axis=0)
    return (kept_pairs.reshape(height, width) / np.maximum(pairs, 1)).astype(np.float32)


def _drawn_pairs(record: LayerTrace, rows: Range, left: np.ndarray, right: np.ndarray, pool: int, each: int) -> np.ndarray:
    """How many pairs (query, column of a complete entry) a cell holds, [h, w]; an entry is drawn over ``each`` columns."""
    top = np.arange(rows[0], rows[1], pool)[:, None]
    bottom = np.minimum(top + pool, rows[1])
    closed = np.append(0, np.cumsum((np.arange(record.length) + 1) // record.ratio))  # summed over the queries before one

    def before(edge: np.ndarray) -> np.ndarray:
        """Such pairs left of ``edge``, all queries of the cell together."""
        all_from = np.clip(-(-edge // each) * record.ratio - 1, top, bottom)  # the first query that sees all of them
        return each * (closed[all_from] - closed[top]) + edge * (bottom - all_from)

    return np.asarray(before(right) - before(left))


def chunks(record: LayerTrace, rows: Range) -> Iterator[Range]:
    """Split ``rows`` so that a chunk is small and, where rows are over all entries, recorded with one entry pooling."""
    size = max(1, CHUNK_VALUES // max(1, values_of_query(record)))
    start = rows[0]
    while start < rows[1]:
        stop = min(start + size, rows[1])
        if record.entry_probs is not None:
            stop = min(stop, record.pooled_alike_until(start))
        yield start, stop
        start = stop


def values_of_query(record: LayerTrace) -> int:
    """How many probabilities were recorded for each query."""
    width = record.window
    for probs in (record.selected_probs, record.entry_probs):
        width += 0 if probs is None else probs.shape[-1]
    return record.heads * width


def spread(
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
