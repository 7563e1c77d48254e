"""The attention of two recordings of one layer, one minus the other, pooled into the cells of a picture: no L x L array.

For a query, the token axis falls into pieces on which both recordings have one probability: the tokens of its window one by
one, and left of them the blocks of tokens that entries were made from. Only pieces that one of the two attends to are worked
out, some thousand queries at once. Letters as in ``workbench.figures.attention``, and B blocks.
"""

from __future__ import annotations

import numpy as np

from workbench.figures.pooling import Head, Range, chunks, comparable, spread, values_of_query, widened
from workbench.trace import LayerTrace

Runs = tuple[LayerTrace, LayerTrace]
NONE = np.iinfo(np.int64).max  # sorts behind everything
BLOCK_BIT, RUN_BIT = 32, 31  # a sorted number is, from above: a block, which of two recordings, the bits of a probability


def largest_change(runs: Runs, head: Head, rows: Range, columns: Range, pooling: tuple[int, int]) -> np.ndarray:
    """[h, w] float32: of the pairs (query, token) in a cell the largest probability in the second recording less that in the
    first, its sign kept; of two of one size the one above 0.

    A pair counts if the query sees the token in its window, or a complete entry made from it; of several the largest counts.
    """
    canvas = _Canvas(rows, columns, pooling)
    window, ratio = max(run.window for run in runs), runs[0].ratio
    for start, stop in chunks(max(runs, key=values_of_query), rows):
        t = np.arange(start, stop)
        oldest = t - window + 1
        closed = (t + 1) // ratio * ratio if ratio else np.zeros_like(t)  # tokens that went into complete entries
        reach = np.minimum(oldest, closed)  # what a query attends to through entries alone ends here
        tokens = oldest[:, None] + np.arange(window)  # [n, W]
        near = np.zeros((2, *tokens.shape), np.float32)  # what entries give the tokens of the window
        if runs[0].selected is not None:
            near = _paint_kept(canvas, runs, head, t, reach, tokens)
        elif runs[0].entry_probs is not None:
            near = _paint_all(canvas, runs, head, t, reach, tokens)
            near[:, (tokens < 0) | (tokens >= closed[:, None])] = 0
        for run, probs in zip(runs, near, strict=True):
            own = probs[:, window - run.window :]
            np.maximum(own, _floats(run.window_probs[start:stop], head), out=own)
        canvas.paint(np.repeat(t, window), tokens.reshape(-1), tokens.reshape(-1) + 1, (near[1] - near[0]).reshape(-1))
    more, less = canvas.most
    return np.where(more >= less, more, -less)


class _Canvas:
    """How much more (first) and less (second) any pair of a cell has at most: ``most`` [2, h, w], not below 0."""

    def __init__(self, rows: Range, columns: Range, pooling: tuple[int, int]) -> None:
        self.rows, self.columns, self.pooling = rows, columns, pooling
        sides = (-(-(stop - start) // pool) for (start, stop), pool in zip((rows, columns), pooling, strict=True))
        self.most = np.zeros((2, *sides), np.float32)

    def paint(self, t: np.ndarray, first: np.ndarray, stop: np.ndarray, change: np.ndarray) -> None:
        """All [n]: a query, its tokens from ``first`` up to ``stop``, and by how much their probability changed."""
        first, stop = np.maximum(first, self.columns[0]), np.minimum(stop, self.columns[1])
        seen = np.flatnonzero((first < stop) & (change != 0))
        t, first, last, change = t[seen], first[seen], stop[seen] - 1, change[seen]
        row = (t - self.rows[0]) // self.pooling[0] + self.most.shape[1] * (change < 0)
        left, right = ((x - self.columns[0]) // self.pooling[1] for x in (first, last))
        at, more, size = row * self.most.shape[2] + left, right - left, np.abs(change)
        while len(at):
            np.maximum.at(self.most.reshape(-1), at, size)
            on = np.flatnonzero(more)  # that reach into one more cell
            at, more, size = at[on] + 1, more[on] - 1, size[on]

    def paint_rows(self, record: LayerTrace, t: np.ndarray, change: np.ndarray) -> None:
        """Queries [n] in a row whose entries were recorded alike, and the change of every recorded column [n, E]."""
        cells = (t - self.rows[0]) // self.pooling[0]
        edges = np.flatnonzero(np.diff(cells, prepend=-1))  # where a new row of cells begins
        pooled = record.entry_pooling(int(t[0]))
        for most, band in zip(
            self.most, (np.maximum.reduceat(change, edges), -np.minimum.reduceat(change, edges)), strict=True
        ):
            cover = spread(record, np.maximum(band, 0), self.columns, self.pooling[1], pooled, True)
            most[cells[edges]] = np.maximum(most[cells[edges]], cover)


def _paint_kept(canvas: _Canvas, runs: Runs, head: Head, t: np.ndarray, reach: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Paint what queries t [n] attend to through the entries they kept left of ``reach`` [n], and tell what these entries
    give ``tokens`` [n, W], of which a row are neighbours: [2, n, W]."""
    ratio = runs[0].ratio
    query, block, probs = _blocks(runs, head, slice(int(t[0]), int(t[-1]) + 1))
    stop = np.minimum((block + 1) * ratio, reach[query])
    canvas.paint(t[query], block * ratio, stop, probs[1] - probs[0])
    near = np.zeros((2, *tokens.shape), np.float32)
    if tokens.size:
        first = tokens[:, 0] // ratio
        held = np.zeros((2, len(t), (tokens.shape[1] - 1) // ratio + 2), np.float32)
        place = block - first[query]
        inside = np.flatnonzero((place >= 0) & (place < held.shape[2]))
        held[:, query[inside], place[inside]] = probs.take(inside, axis=1)
        place = tokens // ratio - first[:, None]
        for given, of in zip(near, held, strict=True):
            given[:] = np.take_along_axis(of, place, axis=1)
    return near


def _blocks(runs: Runs, head: Head, rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks of tokens that a kept entry of either recording was made from: queries, counted from the first of ``rows``, and
    block numbers [m], and the largest probability of these entries in each recording [2, m].

    Sorted, the numbers of one block and recording are neighbours, the most probable last.
    """
    numbers = []
    for which, run in enumerate(runs):
        assert run.selected is not None and run.selected_probs is not None
        kept = run.selected[rows].astype(np.int64)
        bits = _floats(run.selected_probs[rows], head).view(np.int32)
        number = (kept << BLOCK_BIT) | (which << RUN_BIT) | bits
        for back in range(run.look_back // run.ratio + 1):
            numbers.append(np.where(kept >= back, number - (back << BLOCK_BIT), NONE))
    found = np.sort(np.concatenate(numbers, axis=1), axis=1)
    group = found >> RUN_BIT
    last = found != NONE
    last[:, :-1] &= group[:, :-1] != group[:, 1:]
    at = np.flatnonzero(last)
    query, found = at // found.shape[1], found.reshape(-1)[at]
    block, second = found >> BLOCK_BIT, (found >> RUN_BIT & 1).astype(bool)
    value = (found & ((1 << RUN_BIT) - 1)).astype(np.int32).view(np.float32)
    both = (block[1:] == block[:-1]) & (query[1:] == query[:-1])  # the first recording's comes first
    probs = np.stack([value * ~second, value * second])
    probs[0, 1:] += probs[0, :-1] * both  # onto 0
    single = np.flatnonzero(np.append(~both, True)[: len(found)])
    return query[single], block[single], probs.take(single, axis=1)


def _paint_all(canvas: _Canvas, runs: Runs, head: Head, t: np.ndarray, reach: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """As ``_paint_kept``, of queries that attend to every entry and whose rows were recorded alike."""
    rows = slice(int(t[0]), int(t[-1]) + 1)
    each = runs[0].ratio * runs[0].entry_pooling(int(t[0]))  # tokens of a recorded column
    recorded = [run.entry_probs[rows] for run in runs if run.entry_probs is not None]
    probs = np.zeros((2, len(t), max(x.shape[2] for x in recorded) + 1), np.float32)  # the last column is nobody's
    for row, one in zip(probs, recorded, strict=True):
        row[:, : one.shape[2]] = _floats(one, head)
    change = probs[1] - probs[0]
    cut = np.clip(reach // each, 0, change.shape[1] - 1)  # the column that is seen in part
    canvas.paint(t, cut * each, reach, change[np.arange(len(t)), cut])
    change[np.arange(change.shape[1]) >= cut[:, None]] = 0
    canvas.paint_rows(runs[0], t, change[:, :-1])
    place = np.clip(tokens // each, 0, probs.shape[2] - 1)
    return np.stack([np.take_along_axis(of, place, axis=1) for of in probs])


def _floats(probs: np.ndarray, head: Head) -> np.ndarray:
    """float16 [n, H, N] -> [n, N] float32 of one head, or the maximum or mean over them; what is negative counts as 0."""
    value = comparable(probs, head)
    return value if value.dtype == np.float32 else widened(value)
