"""Which part of an attention map is shown, how one gets to another part, and the way back; no widgets in here.

A range is (start, stop), stop not included, of query tokens (rows) or of columns as counted in ``figures.attention``.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from workbench.errors import InputError, whole_number
from workbench.figures.attention import Range, cells_of, column_count, window_columns
from workbench.trace import LayerTrace

Ranges = tuple[Range, Range]  # of rows and of columns
TILE_PIXELS = 520  # the most of a map's sides
MIN_SIDE_PIXELS = 120  # a picture of few cells is stretched to this
MOST_BACK = 100  # steps back that are kept
MOST_DOUBLINGS = 64  # of one zoom; no map is that large
ROUNDING = 1e-6  # of places on the screen, so that the edge of a cell does not touch the next one


def view_of(record: LayerTrace, chosen: str) -> str:
    """The view that is drawn: a layer whose entries are tokens has one only, and a capture no window."""
    if record.selection_only and chosen != "composite" and not record.of_tokens:
        return "entries"
    return "both" if record.of_tokens else chosen


def whole_ranges(record: LayerTrace, view: str) -> Ranges:
    """All rows, and the columns of a view; a layer without compressed entries shows its window instead."""
    length, tokens, every = record.length, window_columns(record), column_count(record)
    columns = {"both": (0, every), "entries": (tokens, every), "window": (0, tokens), "composite": (0, length)}[view]
    return (0, length), columns if columns[0] < columns[1] else (0, length)


def whole_pair(name: str, given: Range | None, whole: Range) -> Range:
    """A range that was given, (start, stop), or the whole one for None. Raises InputError unless these are whole numbers."""
    if given is None:
        return whole
    try:
        start, stop = given
    except (TypeError, ValueError):
        raise InputError(f"{name} must be (start, stop), got {given!r:.60}") from None
    return whole_number(f"{name}' start", start), whole_number(f"{name}' stop", stop)


def first_entry(record: LayerTrace, view: str) -> int | None:
    """The column of compressed entry 0; None where all columns are tokens."""
    return None if record.of_tokens or view == "composite" or not record.entries else window_columns(record)


def resized(old: Range, whole: Range, by: float) -> int:
    """How long ``old`` is after ``by`` halvings, of doublings if negative; at least one longer or shorter where it can be."""
    size, most = old[1] - old[0], whole[1] - whole[0]
    new = size / 2 ** min(max(by, -MOST_DOUBLINGS), MOST_DOUBLINGS)
    return max(1, min(math.ceil(new), size - 1)) if by > 0 else min(most, max(math.floor(new), size + 1)) if by < 0 else size


def zoomed(old: Range, whole: Range, at: int, by: float) -> Range:
    """``old`` halved ``by`` times, or doubled if negative, with ``at`` in the middle as far as ``whole`` allows."""
    if not by:
        return old
    size = resized(old, whole, by)
    return placed(at - size // 2, size, whole)


def side_pixels(size: int) -> tuple[int, int]:
    """CSS pixels of the side that shows ``size`` rows or columns, and how many these are with the last cell a whole one."""
    cells, pool, pixels = cells_of(size, TILE_PIXELS)
    return max(MIN_SIDE_PIXELS, cells * pixels), cells * pool


def zoomed_under(old: Range, whole: Range, place: float, by: float) -> Range:
    """The same, but what lies ``place`` CSS pixels into the old picture stays there in the new one, to a row or column."""
    size = resized(old, whole, by)
    (old_pixels, old_reach), (pixels, reach) = side_pixels(old[1] - old[0]), side_pixels(size)
    before = min(place / pixels, 1.0) * reach
    return placed(round(old[0] + min(place / old_pixels, 1.0) * old_reach - before), size, whole)


def panned(old: Range, whole: Range, by: float) -> Range:
    """``old`` moved by so many rows or columns, at least one if any, as far as ``whole`` allows."""
    step = round(by) or (by > 0) - (by < 0)
    return placed(old[0] + step, old[1] - old[0], whole)


def part_of(old: Range, first: float, last: float) -> Range:
    """The rows or columns of ``old`` that lie, in part at least, between two places counted from its start."""
    size = old[1] - old[0]
    first, last = (min(max(0.0, place), float(size)) for place in sorted((first, last)))
    start = min(math.floor(first + ROUNDING), size - 1)
    return old[0] + start, old[0] + max(start + 1, math.ceil(last - ROUNDING))


def placed(start: int, size: int, whole: Range) -> Range:
    """``size`` from ``start`` on, moved into ``whole``."""
    start = max(whole[0], min(start, whole[1] - size))
    return start, min(start + size, whole[1])


def range_text(shown: Range, whole: Range, entries_from: int | None = None) -> str:
    """A range as people type it: "e3" is compressed entry 3 where there are tokens, too, and 3 where all are entries."""
    start, stop = shown
    if entries_from is None or (stop <= entries_from and whole[0] < entries_from):
        return f"{start}:{stop}"
    if whole[0] >= entries_from:
        return f"{start - entries_from}:{stop - entries_from}"
    return f"{start if start < entries_from else f'e{start - entries_from}'}:e{stop - entries_from}"


def parse_range(text: str, whole: Range, name: str, entries_from: int | None = None) -> Range:
    """What somebody typed: "first:stop", stop not included, either may be left out; "" is all.

    "e3" is compressed entry 3; where all columns are entries the letter may be left out. Raises InputError in one sentence.
    """
    said = text.replace(" ", "").lower()
    if not said:
        return whole
    parts = said.split(":")
    if len(parts) == 2:
        ends = [_number(part, whole[i], whole, entries_from) for i, part in enumerate(parts)]
        if ends[0] is not None and ends[1] is not None and whole[0] <= ends[0] < ends[1] <= whole[1]:
            return ends[0], ends[1]
    shown = text if len(text) <= 30 else f"{text[:30]}…"
    all_of_it = range_text(whole, whole, entries_from)
    raise InputError(f"{name}: type first:stop within {all_of_it}, or nothing for all; got {shown!r}")


def _number(text: str, default: int, whole: Range, entries_from: int | None) -> int | None:
    entry = text.startswith("e")
    digits = text.removeprefix("e")
    if not text:
        return default
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > 12 or (entry and entries_from is None):
        return None
    if entries_from is not None and (entry or whole[0] >= entries_from):
        return entries_from + int(digits)
    beyond = entries_from is not None and int(digits) > entries_from  # no such token
    return None if beyond else int(digits)


class Place(NamedTuple):
    """What of a map is shown: one of its views, and the ranges in it, None for the whole."""

    view: str
    zoom: Ranges | None = None


class Navigation:
    """Where one is on a map, and the places one came from.

    ``fit`` tells it the ranges of the whole map whenever they may have changed; all it shows lies within them. Changes that
    carry the same ``gesture``, such as the turns of a wheel, are one step back.
    """

    def __init__(self, view: str) -> None:
        self.place = Place(view)
        self.whole: Ranges = ((0, 1), (0, 1))
        self._past: deque[Place] = deque(maxlen=MOST_BACK)
        self._gesture: float | None = None

    @property
    def shown(self) -> Ranges:
        return self.place.zoom or self.whole

    @property
    def can_go_back(self) -> bool:
        return bool(self._past)

    @property
    def room(self) -> list[float]:
        """How far one can still move up, down, left and right, as shares of what is shown."""
        return [
            space / (shown[1] - shown[0])
            for shown, whole in zip(self.shown, self.whole, strict=True)
            for space in (shown[0] - whole[0], whole[1] - shown[1])
        ]

    def fit(self, whole: Ranges) -> None:
        self.whole = whole
        if self.place.zoom is not None:
            rows, columns = (
                placed(start, min(stop - start, most[1] - most[0]), most)
                for (start, stop), most in zip(self.place.zoom, whole, strict=True)
            )
            self.place = Place(self.place.view, None if (rows, columns) == whole else (rows, columns))

    def show(self, rows: Range, columns: Range, gesture: float | None = None) -> None:
        """Show these ranges, which lie within the whole, of the same view."""
        self.go(Place(self.place.view, None if (rows, columns) == self.whole else (rows, columns)), gesture)

    def zoom(self, at: tuple[int, int], by: float) -> None:
        """Halve what is shown ``by`` times around row and column ``at``; double it if negative."""
        rows, columns = (zoomed(r, w, a, by) for r, w, a in zip(self.shown, self.whole, at, strict=True))
        self.show(rows, columns)

    def show_all(self) -> None:
        self.show(*self.whole)

    def answer(self, message: Mapping[str, Any]) -> None:
        """What a ``MapPointer`` asks for; all but a zoom around a cell, which needs to know the cell."""
        kind = message["type"]
        rows, columns = sides = [side_pixels(stop - start)[1] for start, stop in self.shown]
        if kind == "back":
            self.back(message["by"])
        elif kind == "whole":
            self.show_all()
        elif kind == "wheel":
            places, by = (message["y"], message["x"]), message["by"]
            one, other = (zoomed_under(r, w, at, by) for r, w, at in zip(self.shown, self.whole, places, strict=True))
            self.show(one, other, gesture=message["gesture"])
        elif kind == "pan":
            ways = (message["rows"] * rows, message["columns"] * columns)
            one, other = (panned(r, w, way) for r, w, way in zip(self.shown, self.whole, ways, strict=True))
            self.show(one, other)
        elif kind == "select":
            ends = (message["rows"], message["columns"])
            one, other = (part_of(r, a * n, b * n) for r, (a, b), n in zip(self.shown, ends, sides, strict=True))
            self.show(one, other)

    def go(self, place: Place, gesture: float | None = None) -> None:
        if place == self.place:
            return
        if gesture is None or gesture != self._gesture:
            self._past.append(self.place)
            self._gesture = gesture
        self.place = place
        if self._past and self._past[-1] == place:  # a wheel turned there and back
            self._past.pop()
            self._gesture = None

    def back(self, steps: int = 1) -> None:
        """To where one was before; stays at the first place that is known."""
        for _ in range(min(steps, len(self._past))):
            self.place = self._past.pop()
        self._gesture = None

    def forget(self) -> None:
        """The whole map, and no way back: its columns are others now."""
        self.place = Place(self.place.view)
        self._past.clear()
        self._gesture = None

    def move_columns(self, moved: Callable[[int], int]) -> None:
        """A growing trace gave its columns other numbers; the places one came from move with them."""

        def of(place: Place) -> Place:
            if place.zoom is None:
                return place
            rows, (start, stop) = place.zoom
            return Place(place.view, (rows, (moved(start), moved(stop - 1) + 1)))

        self.place = of(self.place)
        self._past = deque(map(of, self._past), maxlen=MOST_BACK)
