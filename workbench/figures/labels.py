"""Labels and titles of the sides of an attention map."""

from __future__ import annotations

from typing import Any

from workbench.figures import style
from workbench.figures.attention import Tile, token_columns, tokens_each
from workbench.trace import Trace

MIN_LABEL_PIXELS = 13  # cells at least this large are labelled one by one
TICKS = 7


def axis_labels(trace: Trace, tile: Tile, height: int, width: int) -> tuple[list[list[Any]], list[list[Any]], bool]:
    """Labels as [share of the side, text] for rows and columns, and whether the column labels are written downwards.

    Cells large enough are labelled one by one, with their token's text; otherwise a few positions are.
    """

    def name(column: int, with_text: bool, length: int) -> str:
        if column >= length:  # where all columns are entries the title says so
            return f"entry {column - length}" if length else str(column)
        return f"{column} {style.visible_text(trace.token_text(column), 10)}" if with_text else str(column)

    sides = []
    of_columns = tile.layer.length if tile.composite else token_columns(tile.layer)
    for (start, stop), pool, pixels, length in (
        (tile.row_range, tile.pooling[0], height, tile.layer.length),
        (tile.column_range, tile.pooling[1], width, of_columns),
    ):
        each = pool == 1 and pixels / (stop - start) >= MIN_LABEL_PIXELS
        places = range(start, stop) if each else ticks(start, stop, length)
        cells = -(-(stop - start) // pool)
        sides.append([[((at - start) // pool + 0.5) / cells, name(at, each, length)] for at in places])
    upright = len(sides[1]) > 2 * TICKS or any(" " in str(text) and not str(text).startswith("entry") for _, text in sides[1])
    return sides[0], sides[1], upright


def ticks(start: int, stop: int, length: int) -> list[int]:
    """Round token positions and round numbers of compressed entries (columns from ``length`` on), about TICKS of them."""
    step = 1
    while (stop - start) / step > TICKS:
        step = step * 2 if str(step)[0] in "15" else step * 5 // 2  # 1, 2, 5, 10, ...
    tokens = list(range(-(-start // step) * step, min(stop, length), step))
    first = max(start - length, 0)
    entries = [length + e for e in range(-(-first // step) * step, stop - length, step)] if stop > length else []
    if tokens and entries and entries[0] - tokens[-1] < 0.7 * step:
        tokens.pop()  # it would touch the first entry's label
    return tokens + entries


def column_title(tile: Tile) -> str:
    """What the columns are, with their unit."""
    layer, (start, stop) = tile.layer, tile.column_range
    length, entry = layer.length, f"compressed entry ({tokens_each(layer)} each)"
    if layer.of_tokens:
        return "token position; a query " + ("sees the tokens it chose" if layer.selects else "sees every token up to its own")
    if tile.composite:
        return f"token position; an entry is painted over its {'own block of' if layer.selection_only else 'source'} tokens"
    if start >= token_columns(layer):
        return entry
    return "token position (sliding window)" + (f", then {entry}" if stop > length else "")
