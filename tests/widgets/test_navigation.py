"""Zoom, pan, typed ranges and the way back, without widgets: any sequence of them stays inside the map."""

from __future__ import annotations

import random

import pytest

from tests.synthetic import synthetic_trace
from workbench.errors import InputError
from workbench.figures.attention import attention_tile
from workbench.widgets import navigation
from workbench.widgets.navigation import (
    Navigation,
    Place,
    first_entry,
    panned,
    parse_range,
    part_of,
    range_text,
    side_pixels,
    view_of,
    whole_ranges,
    zoomed,
    zoomed_under,
)

TRACE = synthetic_trace(97, seed=11)


def random_range(chance: random.Random, whole: tuple[int, int]) -> tuple[int, int]:
    start, stop = sorted(chance.sample(range(whole[0], whole[1] + 1), 2))
    return start, stop


def random_whole(chance: random.Random) -> tuple[int, int]:
    start = chance.choice([0, 0, 97, 4096])
    return start, start + chance.choice([1, 2, 3, 24, 97, 521, 5000, 131072])


def test_a_zoom_stays_inside_what_there_is():
    assert zoomed((0, 97), (0, 97), 0, 1) == (0, 49) and zoomed((0, 97), (0, 97), 96, 1) == (48, 97)
    assert zoomed((48, 97), (0, 97), 50, -1) == (0, 97) and zoomed((5, 6), (0, 97), 5, 1) == (5, 6)
    assert zoomed((0, 97), (0, 97), 50, 1e9) == (50, 51) and zoomed((50, 51), (0, 97), 50, -1e9) == (0, 97)


@pytest.mark.parametrize("seed", range(20))
def test_every_zoom_changes_the_size_unless_it_cannot_and_keeps_the_place(seed):
    chance = random.Random(seed)
    for _ in range(100):
        whole = random_whole(chance)
        old, by = random_range(chance, whole), chance.choice([-5.0, -1.0, -0.5, -0.25, 0.25, 0.5, 1.0, 7.0])
        at, share = chance.randrange(*old), chance.random()
        for new in (zoomed(old, whole, at, by), zoomed_under(old, whole, share * side_pixels(old[1] - old[0])[0], by)):
            size, before = new[1] - new[0], old[1] - old[0]
            assert whole[0] <= new[0] < new[1] <= whole[1]
            assert (size < before or before == 1) if by > 0 else (size > before or old == whole)
        assert zoomed(old, whole, at, by)[0] <= at < zoomed(old, whole, at, by)[1]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_under_the_pointer_stays_there_while_the_wheel_turns(seed):
    chance = random.Random(seed)
    whole = (0, 131072)
    for _ in range(100):
        size = chance.choice([40, 300, 519, 521, 5000])
        start, share = chance.randrange(20_000, 100_000), chance.uniform(0.1, 0.6)
        old_pixels, old_reach = side_pixels(size)
        new = zoomed_under((start, start + size), whole, share * old_pixels, chance.choice([-0.5, 0.5]))
        pixels, reach = side_pixels(new[1] - new[0])
        at = start + share * old_reach
        if share * old_pixels < pixels:  # the pointer is over the new picture, too
            assert abs((at - new[0]) / reach * pixels - share * old_pixels) <= pixels / reach  # to one row or column


@pytest.mark.parametrize("size", [1, 2, 97, 519, 520, 521, 1041, 1999])
def test_sides_are_as_large_as_the_tile_that_is_drawn(size):
    tile = attention_tile(synthetic_trace(1999, seed=12), 0, rows=(0, size), max_pixels=navigation.TILE_PIXELS)
    pixels, reach = side_pixels(size)
    assert pixels == max(navigation.MIN_SIDE_PIXELS, tile.values.shape[0] * tile.scale[0])
    assert reach == tile.values.shape[0] * tile.pooling[0]


def test_a_pan_moves_by_whole_rows_and_stops_at_the_edge():
    assert panned((10, 20), (0, 97), 5.4) == (15, 25) and panned((10, 20), (0, 97), -0.2) == (9, 19)
    assert panned((10, 20), (0, 97), 0) == (10, 20)
    assert panned((10, 20), (0, 97), 1e6) == (87, 97) and panned((10, 20), (0, 97), -1e6) == (0, 10)


def test_a_part_holds_every_row_it_touches_in_whichever_direction_it_was_drawn():
    assert part_of((10, 20), 2.5, 4.5) == part_of((10, 20), 4.5, 2.5) == (12, 15)
    assert part_of((10, 20), 3.0, 5.0) == (13, 15) and part_of((10, 20), 0.1 + 0.2, 0.7) == (10, 11)
    assert part_of((10, 20), -3, 40) == (10, 20) and part_of((10, 20), 10, 10) == (19, 20)


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("view", ["both", "entries", "window", "composite"])
def test_a_range_comes_back_from_its_own_text(layer, view):
    record, chance = TRACE.layer(layer), random.Random(layer)
    whole = whole_ranges(record, view_of(record, view))[1]
    entries = first_entry(record, view)
    for _ in range(200):
        shown = random_range(chance, whole)
        assert parse_range(range_text(shown, whole, entries), whole, "Columns", entries) == shown


def test_ranges_are_typed_as_first_and_stop_and_entries_with_their_letter():
    assert parse_range(" 12 : 30 ", (0, 97), "Rows") == (12, 30) and parse_range("", (0, 97), "Rows") == (0, 97)
    assert parse_range("90:", (0, 97), "Rows") == (90, 97) and parse_range(":5", (0, 97), "Rows") == (0, 5)
    assert parse_range("E2:e9", (0, 121), "Columns", 97) == (99, 106) and parse_range("90:e3", (0, 121), "Columns", 97) == (
        90,
        100,
    )
    assert parse_range("2:9", (97, 121), "Columns", 97) == (99, 106) == parse_range("e2:e9", (97, 121), "Columns", 97)
    assert range_text((90, 100), (0, 121), 97) == "90:e3" and range_text((90, 97), (0, 121), 97) == "90:97"
    assert range_text((97, 121), (97, 121), 97) == "0:24" and range_text((97, 100), (0, 121), 97) == "e0:e3"


@pytest.mark.parametrize(
    "text", ["abc", "5", "5:5", "9:5", "-3:5", "0:98", "1:2:3", "1.5:3", "e1:e2", "１:３", "0x1:9", "9" * 400 + ":"]
)
def test_what_is_no_range_of_the_map_is_refused_in_one_line(text):
    with pytest.raises(InputError) as refused:
        parse_range(text, (0, 97), "Rows")
    assert str(refused.value).startswith("Rows: type first:stop within 0:97") and len(str(refused.value)) < 110
    with pytest.raises(InputError, match=r"within 0:e24"):
        parse_range("100:105", (0, 121), "Columns", 97)  # there is no token 100


def test_back_returns_step_by_step_to_where_one_was():
    nav = Navigation("both")
    nav.fit(((0, 97), (0, 121)))
    places = [nav.place]
    for go in (
        lambda: nav.zoom((50, 60), 1),
        lambda: nav.answer({"type": "pan", "rows": 0.5, "columns": -0.25}),
        lambda: nav.answer({"type": "select", "rows": [0.2, 0.5], "columns": [0.9, 0.1]}),
        lambda: nav.go(Place("composite")),
        lambda: nav.go(Place("both", ((1, 9), (2, 8)))),
        nav.show_all,
    ):
        go()
        assert nav.place != places[-1]
        places.append(nav.place)
    for place in places[-2::-1]:
        assert nav.can_go_back
        nav.answer({"type": "back", "by": 1})
        assert nav.place == place
    assert not nav.can_go_back
    nav.back()
    assert nav.place == Place("both")


def test_what_changes_nothing_is_no_step_and_the_turns_of_one_wheel_are_one():
    nav = Navigation("both")
    nav.fit(((0, 97), (0, 121)))
    nav.show_all()
    nav.answer({"type": "wheel", "by": -1, "y": 200, "x": 200, "gesture": 1.5})  # all is shown already
    assert not nav.can_go_back
    for by in (0.5, 0.5, 0.5):
        nav.answer({"type": "wheel", "by": by, "y": 200, "x": 200, "gesture": 2.5})
    first = nav.place
    for by in (0.5, 0.5):
        nav.answer({"type": "wheel", "by": by, "y": 80, "x": 200, "gesture": 3.5})
    nav.back()
    assert nav.place == first
    nav.back()
    assert nav.place == Place("both") and not nav.can_go_back
    for by in (1, -9):  # there and back in one gesture
        nav.answer({"type": "wheel", "by": by, "y": 200, "x": 200, "gesture": 4.5})
    assert nav.place == Place("both") and not nav.can_go_back


@pytest.mark.parametrize("seed", range(25))
def test_any_sequence_stays_inside_the_map_and_back_returns_exactly(seed):
    chance = random.Random(seed)
    rows = random_whole(chance)
    nav, whole = Navigation("both"), ((0, rows[1]), random_whole(chance))
    nav.fit(whole)
    came_from = [nav.place]
    for number in range(400):
        by, kind = chance.uniform(-3, 3), chance.choice(("zoom", "wheel", "pan", "select", "whole", "back"))
        if kind == "zoom":
            nav.zoom((chance.randrange(*whole[0]), chance.randrange(*whole[1])), by)
        else:
            rows_and_columns = {"rows": by, "columns": chance.uniform(-2, 2)}
            if kind == "select":
                rows_and_columns = {name: [chance.random(), chance.random()] for name in rows_and_columns}
            place = {"y": chance.uniform(0, 520), "x": chance.uniform(0, 520), "gesture": float(number)}
            steps = {"by": chance.randrange(1, 4) if kind == "back" else by}
            nav.answer({"type": kind, **rows_and_columns, **place, **steps})
        for (start, stop), (first, last) in zip(nav.shown, whole, strict=True):
            assert first <= start < stop <= last
        assert all(room >= 0 for room in nav.room)
        if kind == "back":
            del came_from[max(1, len(came_from) - steps["by"]) :]
            assert nav.place == came_from[-1]
        elif nav.place != came_from[-1]:
            came_from = [*came_from, nav.place][-navigation.MOST_BACK - 1 :]
    for place in came_from[-2::-1]:
        nav.back()
        assert nav.place == place
    assert not nav.can_go_back


def test_only_so_many_steps_are_kept():
    nav = Navigation("both")
    nav.fit(((0, 1000), (0, 1000)))
    for start in range(3 * navigation.MOST_BACK):
        nav.show((start, start + 10), (0, 10))
    nav.back(10_000)
    assert nav.shown == ((2 * navigation.MOST_BACK - 1, 2 * navigation.MOST_BACK + 9), (0, 10)) and not nav.can_go_back


def test_places_move_with_the_columns_of_a_growing_trace_and_fit_one_that_shrank():
    nav = Navigation("both")
    nav.fit(((0, 53), (0, 66)))
    nav.show((10, 20), (53, 60))
    nav.show((10, 20), (40, 50))
    nav.move_columns(lambda column: column + 44 if column >= 53 else column)
    nav.fit(((0, 97), (0, 121)))
    assert nav.shown == ((10, 20), (40, 50))
    nav.back()
    assert nav.shown == ((10, 20), (97, 104))
    nav.fit(((0, 15), (0, 100)))
    assert nav.shown == ((5, 15), (93, 100))
    nav.forget()
    assert nav.shown == ((0, 15), (0, 100)) and not nav.can_go_back
