"""AttentionExplorer without a browser: what a control, a message of the page or a live run changes, and what stays."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets as ipw
import numpy as np
import pytest

from tests.synthetic import synthetic_trace
from tests.widgets.fakes import FakeRun, eventually
from workbench.errors import InputError
from workbench.figures.attention import attention_tile, composite_tile
from workbench.figures.labels import TICKS, ticks
from workbench.figures.query import painted_column, top_sources
from workbench.trace import Trace
from workbench.widgets import attention
from workbench.widgets.attention import AttentionExplorer
from workbench.widgets.navigation import TILE_PIXELS
from workbench.widgets.render import CHART_MIME

TRACE = synthetic_trace(97, seed=11, needle=21)
NO_BUFFERS: list[Any] = []
VIEW_BYTES = 250_000


@pytest.fixture
def explorer() -> AttentionExplorer:
    widget = AttentionExplorer(synthetic_trace(97, seed=11, needle=21))
    widget.layer.value = 1
    return widget


def from_page(part: ipw.DOMWidget, **message: Any) -> None:
    """What the page sends when somebody points, clicks or presses a key."""
    part._handle_custom_msg(message, NO_BUFFERS)


def asks(widget: AttentionExplorer, **message: Any) -> None:
    """What the page sends to see another part of the map."""
    number = widget.map.answered + 1.0
    from_page(widget.map, **message, ask=number)
    assert widget.map.answered == number  # or the page would wait


def walk(widget: Any) -> list[Any]:
    return [widget, *(below for child in getattr(widget, "children", ()) for below in walk(child))]


def pressed(widget: AttentionExplorer) -> list[str]:
    return re.findall(r"data-token='([^']*)' aria-pressed='true'", widget.thumbnails.html)


def test_the_map_is_the_tile_of_the_chosen_layer_and_head(explorer):
    explorer.head.value = 2
    expected = attention_tile(explorer.session.trace, 1, 2, max_pixels=attention.TILE_PIXELS)
    assert explorer.map.png == expected.png and (explorer.map.rows, explorer.map.columns) == expected.values.shape


@pytest.mark.parametrize(("view", "columns"), [("both", (0, 121)), ("entries", (97, 121)), ("window", (0, 97))])
def test_a_view_chooses_the_columns(explorer, view, columns):
    explorer.view.value = view
    assert explorer.tile.column_range == columns and explorer.tile.row_range == (0, 97)


def test_the_composite_view_has_the_token_axis(explorer):
    explorer.view.value = "composite"
    np.testing.assert_array_equal(explorer.tile.values, composite_tile(explorer.session.trace, 1).values)
    assert explorer.map.columns == 97 and "painted" in explorer.map.column_title


def test_a_layer_without_entries_shows_its_window_and_says_so(explorer):
    explorer.view.value = "entries"
    explorer.layer.value = 0
    assert explorer.tile.column_range == (0, 97) and "no compressed entry" in explorer.title.value


def test_a_thumbnail_chooses_layer_and_head(explorer):
    from_page(explorer.thumbnails, type="click", token="layer:2")
    from_page(explorer.thumbnails, type="click", token="head:0")
    assert (explorer.session.layer, explorer.session.head) == (2, 0)
    assert (explorer.layer.value, explorer.head.value) == (2, 0) and pressed(explorer) == ["layer:2", "head:0"]
    from_page(explorer.thumbnails, type="click", token="head:max")
    assert explorer.session.head == "max"


def test_hovering_reads_out_the_cell_and_changes_nothing_else(explorer):
    entry = top_sources(explorer.session.trace, 1, "max", 90, 1)[0]
    before = explorer.map.sequence, explorer.text.sequence, explorer.strip.outputs, explorer.session.token
    from_page(explorer.map, type="hover", row=90, column=entry["column"])
    assert f"compressed entry {entry['entry']}, tokens 16–23" in explorer.readout.value
    assert (
        f"probability {entry['probability']:.3g}" in explorer.readout.value and "rank 1 of 22, kept" in explorer.readout.value
    )
    assert (explorer.map.sequence, explorer.text.sequence, explorer.strip.outputs, explorer.session.token) == before


def test_hovering_the_composite_view_names_the_entry_behind_a_token(explorer):
    explorer.view.value = "composite"
    from_page(explorer.map, type="hover", row=90, column=21)
    assert "compressed entry 5, tokens 16–23" in explorer.readout.value
    assert painted_column(explorer.tile.layer, "max", 90, 90) == 90


def test_clicking_the_map_chooses_the_query_everywhere(explorer):
    from_page(explorer.map, type="click", row=71, column=3)
    assert explorer.session.token == explorer.token.value == explorer.map.mark == 71 and not explorer.session.follow
    assert "query token 71" in explorer.chart["layout"]["title"]["text"] and "token 71 looks" in explorer.text.html
    chart = explorer.strip.outputs[0]["data"][CHART_MIME]
    assert "query token 71" in chart["layout"]["title"]["text"]


def test_a_token_of_the_text_can_be_clicked_and_walked_from(explorer):
    from_page(explorer.text, type="click", token="60")
    from_page(explorer.text, type="move", by=1)
    assert explorer.session.token == 61
    from_page(explorer.text, type="click", token="96")
    from_page(explorer.text, type="move", by=1)
    assert explorer.session.token == 96  # the last one


def test_choosing_a_token_redraws_neither_map_picture_nor_thumbnails(explorer):
    picture, thumbs, sequence = explorer.map.png, explorer.thumbnails.sequence, explorer.map.sequence
    explorer.token.value = 40
    assert explorer.map.png is picture and explorer.thumbnails.sequence == thumbs
    assert explorer.map.sequence == sequence + 1 and explorer.map.mark == 40


def test_choosing_the_same_again_draws_nothing(explorer):
    before = explorer.map.sequence, explorer.text.sequence, explorer.thumbnails.sequence
    explorer.session.layer = explorer.session.layer
    explorer._redraw()
    assert (explorer.map.sequence, explorer.text.sequence, explorer.thumbnails.sequence) == before


def test_two_explorers_of_one_trace_move_together(explorer):
    other = AttentionExplorer(explorer.session.trace)
    from_page(other.text, type="click", token="33")
    assert explorer.map.mark == other.map.mark == 33
    other.close()
    explorer.token.value = 50
    assert other.map.mark == 33


def test_zooming_keeps_the_place_pointed_at_and_goes_back(explorer):
    whole = explorer.map.png
    from_page(explorer.map, type="hover", row=90, column=100)
    for _ in range(2):
        row, column = explorer.tile.cell(90, 100)
        asks(explorer, type="zoom", by=1, row=row, column=column)
    assert explorer.tile.values.shape == (25, 31) and explorer.tile.row_range[1] == 97
    assert tuple(explorer.map.cross) == explorer.tile.cell(90, 100)
    assert explorer.map.row_labels[-1][1].startswith("96 ")  # large cells carry their token's text
    zoom_out, whole_map = explorer.zoom_buttons[1:]
    zoom_out.click()
    assert explorer.tile.values.shape == (50, 62)
    whole_map.click()
    assert explorer.map.png == whole


def test_the_page_asks_for_other_parts_and_gets_one_message_each(explorer):
    sent: list[dict[str, Any]] = []
    explorer.map.send_state = lambda key=None: sent.append(explorer.map.get_state(key))
    asks(explorer, type="select", rows=[20 / 97, 60 / 97], columns=[100 / 121, 110 / 121])
    assert (explorer.tile.row_range, explorer.tile.column_range) == ((20, 60), (100, 110))
    assert len(sent) == 1 and sent[0]["answered"] == explorer.map.answered and sent[0]["png"] == explorer.map.png
    asks(explorer, type="pan", rows=0.5, columns=-0.5)
    assert (explorer.tile.row_range, explorer.tile.column_range) == ((40, 80), (95, 105))
    assert explorer.map.room == [1.0, 17 / 40, 9.5, 1.6]
    asks(explorer, type="wheel", by=1, y=260, x=160, gesture=7.0, row=20, column=5)
    assert (explorer.tile.row_range, explorer.tile.column_range) == ((50, 70), (95, 100))  # the pointer stays at its pixel
    asks(explorer, type="back", by=2)
    assert explorer.tile.row_range == (20, 60) and not explorer.back.disabled
    asks(explorer, type="whole")
    explorer.back.click()
    assert explorer.tile.row_range == (20, 60)
    explorer.back.click()
    assert explorer.tile.row_range == (0, 97) and explorer.back.disabled


def test_a_request_that_fails_is_answered_all_the_same(explorer):
    from_page(explorer.map, type="pan", ask=5.5)  # by nothing: not a request of our page
    assert explorer.map.answered == 5.5 and explorer.tile.row_range == (0, 97)


def test_rows_and_columns_can_be_typed(explorer):
    rows, columns = explorer.range_fields
    assert (rows.placeholder, columns.placeholder) == ("0:97", "0:e24")
    rows.value, columns.value = "20:60", "90:e3"
    assert (explorer.tile.row_range, explorer.tile.column_range) == ((20, 60), (90, 100))
    assert explorer.line.value.endswith("rows=(20, 60), columns=(90, 100))")
    columns.value = ""
    assert explorer.tile.column_range == (0, 121) and explorer.tile.row_range == (20, 60)
    explorer.back.click()
    assert (rows.value, columns.value) == ("20:60", "90:e3")
    rows.value = "0:97"
    assert rows.value == "" and explorer.tile.row_range == (0, 97)
    explorer.view.value = "entries"
    assert (columns.value, columns.placeholder) == ("", "0:24")
    columns.value = "3:9"
    assert explorer.tile.column_range == (100, 106)
    explorer.look(layer=1, rows=(1, 9), columns=(2, 8))
    assert (rows.value, columns.value) == ("1:9", "2:8")


def test_a_range_that_is_none_is_answered_with_one_line_and_changes_nothing(explorer):
    rows, columns = explorer.range_fields
    rows.value = "20:60"
    before = explorer.map.sequence, explorer.line.value
    columns.value = "<b>5"
    assert "Columns: type first:stop within 0:e24" in explorer.complaint.value and "&lt;b&gt;" in explorer.complaint.value
    assert (explorer.map.sequence, explorer.line.value) == before and columns.value == "<b>5"
    explorer.token.value = 40  # what was typed stays until the map shows another part
    assert columns.value == "<b>5" and explorer.complaint.value
    columns.value = ""
    assert explorer.complaint.value == "" and explorer.tile.column_range == (0, 121)
    columns.value = "x"
    explorer.back.click()
    assert explorer.complaint.value == columns.value == rows.value == ""


def test_back_also_returns_to_another_view(explorer):
    explorer.range_fields[1].value = "90:e3"
    explorer.view.value = "composite"
    from_page(explorer.map, type="hover", row=90, column=21)
    assert explorer.tile.column_range == (0, 97)
    asks(explorer, type="back", by=1)
    assert explorer.view.value == "both" and explorer.tile.column_range == (90, 100) and not explorer.tile.composite
    assert "Point at the map" in explorer.readout.value  # columns are others


@pytest.mark.parametrize("length", [1, 7, 97, 1999, 131072])
def test_axes_have_few_round_ticks_inside_the_map(length):
    for start, stop in ((0, length), (0, length + length // 4), (length, length + length // 4)):
        if start < stop:
            found = ticks(start, stop, length)
            assert 1 <= len(found) <= TICKS + 2 and all(start <= at < stop for at in found)
            assert len(set(found)) == len(found)


def test_layer_changes_and_shorter_layers_reset_what_no_longer_fits(explorer):
    explorer.view.value = "entries"
    from_page(explorer.map, type="hover", row=96, column=23)
    explorer.zoom_buttons[0].click()
    assert not explorer.back.disabled
    explorer.layer.value = 2  # HCA has other, fewer columns
    assert explorer.back.disabled and explorer.tile.column_range == (97, 103) and "Point at the map" in explorer.readout.value


def test_markup_in_tokens_is_escaped_in_every_view(explorer):
    trace = explorer.session.trace
    hostile = next(t for t, text in enumerate(trace.token_texts[:97]) if "<b>" in text)
    from_page(explorer.map, type="click", row=hostile, column=hostile)
    assert "&lt;b&gt;" in explorer.readout.value
    for shown in (explorer.readout.value, explorer.text.html, explorer.title.value, explorer.chart["layout"]["title"]["text"]):
        assert "<b>bold" not in shown


def test_the_title_says_model_origin_layer_and_pooling():
    widget = AttentionExplorer(synthetic_trace(1999, seed=12))
    widget.layer.value = 1
    assert "synthetic-v4 (random numbers, for tests), measured on CPU" in widget.title.value
    assert "a cell is the maximum of 4 queries x 5 columns" in widget.title.value


def test_every_control_has_a_description_and_every_map_a_label(explorer):
    controls = [w for w in walk(explorer) if isinstance(w, (ipw.Dropdown, ipw.BoundedIntText, ipw.Button))]
    assert len(controls) == 9 and all(control.description for control in controls)
    assert all(part.label for part in (explorer.map, explorer.text, explorer.thumbnails))


@pytest.mark.parametrize("layer", range(4))
def test_all_that_is_sent_for_a_long_trace_is_small(layer):
    widget = AttentionExplorer(synthetic_trace(2999, seed=13, window=61, hca_ratio=8, topk=23))
    widget.layer.value, widget.token.value = layer, 2500
    widget.view.value = "composite"
    sent = len(widget.map.png) + len(widget.text.html.encode()) + len(widget.thumbnails.html)
    assert sent + len(json.dumps(widget.strip.outputs)) <= VIEW_BYTES


def test_the_script_stays_a_few_kilobytes():
    scripts = [Path(attention.__file__).parent / name for name in ("map.js", "pointer.js")]
    assert all(script.stat().st_size < 12_000 for script in scripts)


def test_a_live_run_appears_step_by_step_and_the_chosen_query_stays():
    first, later = synthetic_trace(53, seed=14), synthetic_trace(97, seed=14)
    run = FakeRun(first)
    widget = AttentionExplorer(run)
    widget.layer.value = 1
    assert widget.map.mark == 52  # follows the newest token
    from_page(widget.map, type="hover", row=50, column=53 + 7)
    run.becomes(trace=later)
    eventually(lambda: widget.map.rows == 97 and "token 96 looks" in widget.text.html, "the longer trace is drawn")
    assert widget.map.mark == 96 and "compressed entry 7," in widget.readout.value  # columns moved, the entry did not
    widget.token.value = 30
    run.becomes(trace=synthetic_trace(101, seed=14), state="done")
    eventually(lambda: widget.map.rows == 101, "the last snapshot is drawn")
    assert widget.map.mark == 30


def test_an_explorer_waits_for_the_first_step():
    empty = Trace("synthetic-v4", "toy", "CPU", {}, np.zeros(0, np.int32), (), 0)
    run = FakeRun(empty)
    widget = AttentionExplorer(run)
    assert "waiting" in widget.title.value and widget.body.layout.display == "none"
    run.becomes(trace=synthetic_trace(29), state="done")
    eventually(lambda: widget.map.rows == 29 and widget.session.state == "done", "the first trace is drawn")
    assert widget.body.layout.display is None and "waiting" not in widget.title.value


def test_choices_during_a_live_run_are_neither_lost_nor_deadlocked():
    run = FakeRun(synthetic_trace(41, seed=15))
    widgets = [AttentionExplorer(run), AttentionExplorer(run)]
    traces = [synthetic_trace(n, seed=15) for n in range(42, 60)]

    def grow() -> None:
        for trace in traces:
            run.becomes(trace=trace)

    growing = threading.Thread(target=grow)
    growing.start()
    for t in range(20):
        from_page(widgets[t % 2].text, type="click", token=str(t))
        widgets[t % 2].layer.value = t % 4
    growing.join(timeout=30)
    run.becomes(state="done")
    eventually(lambda: widgets[0].map.rows == 59 and widgets[0].session.state == "done", "the last trace is drawn")
    for widget in widgets:
        assert (widget.session.token, widget.map.mark, widget.layer.value) == (19, 19, 3)


def test_a_line_of_python_brings_a_view_back():
    trace = synthetic_trace(97, seed=1)
    explorer = AttentionExplorer(trace)
    explorer.layer.value, explorer.head.value, explorer.view.value = 1, 2, "composite"
    explorer.token.value = 71
    asks(explorer, type="zoom", by=1, row=71, column=40)
    line, zoomed, picture = explorer.line.value, explorer.navigation.place, explorer.map.png
    assert zoomed.zoom is not None and line.startswith("explorer.look(layer=1, head=2, token=71, view='composite', rows=(")
    explorer.look(layer=0)
    assert explorer.map.png != picture and explorer.line.value == "explorer.look(layer=0, head='max', token=0, view='both')"
    eval(line, {"explorer": explorer})
    assert (explorer.line.value, explorer.navigation.place, explorer.map.png) == (line, zoomed, picture)
    for wrong in ({"layer": 9}, {"layer": 1, "head": 8}, {"layer": 1, "token": 97}, {"layer": 1, "view": "x"}):
        with pytest.raises(InputError):
            explorer.look(**wrong)
    with pytest.raises(InputError, match="rows and columns"):
        explorer.look(layer=1, rows=(5, 500))
    assert explorer.line.value == line


@pytest.mark.parametrize(
    "asked",
    [
        {"token": 1.5},
        {"token": None},
        {"token": "a"},
        {"rows": (0.5, 5)},
        {"rows": (float("nan"), 5)},
        {"rows": (None, 3)},
        {"rows": 5},
        {"rows": (1,)},
        {"columns": "ab"},
        {"layer": "1"},
        {"head": None},
    ],
)
def test_a_view_of_no_numbers_is_refused_and_nothing_moves(asked):
    explorer = AttentionExplorer(synthetic_trace(97))
    explorer.look(layer=1, token=7, rows=(2, 9))
    line = explorer.line.value
    with pytest.raises(InputError):
        explorer.look(**({"layer": 2} | asked))
    assert explorer.line.value == line


def test_a_view_asked_for_with_numbers_of_numpy_has_a_plain_line():
    explorer = AttentionExplorer(synthetic_trace(97))
    explorer.look(np.int64(1), np.int64(2), np.int64(50), rows=(np.int64(1), np.int32(9)))
    assert explorer.line.value == "explorer.look(layer=1, head=2, token=50, view='both', rows=(1, 9), columns=(0, 121))"


def test_a_closed_explorer_leaves_nothing_that_could_not_be_saved():
    AttentionExplorer(TRACE).close()
    assert ipw.Widget.get_manager_state(widgets=None)["state"]


def test_cells_show_the_mean_where_there_is_one_and_say_what_they_show():
    trace = synthetic_trace(2000, kinds=("csa", "hca"))
    explorer = AttentionExplorer(trace)
    explorer.look(layer=0, cells="mean")
    assert explorer.tile.pool == "mean" and "a cell is the mean of 4 queries" in explorer.title.value
    exact = attention_tile(trace, 0, "max", max_pixels=TILE_PIXELS, pool="mean")
    np.testing.assert_array_equal(explorer.tile.values, exact.values)
    line = explorer.line.value
    assert line.endswith("cells='mean')")
    picture, sent = explorer.map.png, explorer.map.sequence
    explorer.cells.value = "max"
    assert explorer.map.png != picture and explorer.map.sequence == sent + 1 and "the maximum of 4" in explorer.title.value
    exec(line, {"explorer": explorer})
    assert explorer.map.png == picture and explorer.line.value == line
    explorer.look(layer=0, view="composite", cells="mean")
    assert explorer.tile.pool == "max" and "as there is no mean: entries overlap" in explorer.title.value
    with pytest.raises(InputError, match="cells show one of"):
        explorer.look(layer=0, cells="median")


def test_the_facts_of_a_query_stand_under_the_map():
    explorer = AttentionExplorer(synthetic_trace(97, seed=1))
    explorer.look(layer=1, head=0, token=80)
    assert "head 0" in explorer.facts.value and "It keeps 5 of 20 entries" in explorer.facts.value
    assert "layer 3 keeps" in explorer.facts.value and "the query before kept" in explorer.facts.value
    explorer.look(layer=0, token=80)
    assert "sink" in explorer.facts.value and "entries" not in explorer.facts.value


def test_recordings_without_tokens_or_the_layer_asked_for_say_so():
    empty = Trace("synthetic-v4", "toy", "CPU", {}, np.zeros(0, np.int32), (), 0)
    assert "holds no token" in AttentionExplorer(empty).title.value
    trace = synthetic_trace(31, seed=1)
    explorer = AttentionExplorer(trace)
    explorer.session.layer = 9
    assert "layer 9 was not recorded; it has [0, 1, 2, 3]" in explorer.title.value
    assert explorer.body.layout.display == "none"
    explorer.session.layer = 2
    assert explorer.body.layout.display is None
    bare = replace(trace, layers=())
    assert "no recorded attention" in AttentionExplorer(bare).title.value
