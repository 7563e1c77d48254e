"""Pictures of selections without probabilities: every kept entry alike, nothing that was not in the capture."""

from __future__ import annotations

import io
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.synthetic import FAMILIES, synthetic_trace
from workbench.errors import InputError
from workbench.figures.attention import attention_tile, composite_tile, layer_thumbnails, thumbnails
from workbench.figures.query import MAX_POINTS, describe, query_strip, source_probs, top_sources
from workbench.figures.text import text_view
from workbench.trace import LayerTrace, Trace
from workbench.widgets.attention import AttentionExplorer


def only_selections(trace: Trace) -> Trace:
    """The same trace as a capture tells it."""
    nothing = np.zeros((trace.length, 0, 0), np.float16), np.zeros((trace.length, 0), np.float16)
    layers = [LayerTrace(x.layer, x.kind, x.ratio, *nothing, selected=x.selected) for x in trace.layers if x.indexes]
    return replace(trace, layers=tuple(layers), step_starts=np.zeros(0, np.int32), cache_bytes={})


V4 = only_selections(synthetic_trace(97, seed=5))
V32 = only_selections(synthetic_trace(61, seed=6, kinds=FAMILIES["deepseek_v32"]))
CASES = {"V4": (V4, 1), "V3.2": (V32, 0)}
every_case = pytest.mark.parametrize(("trace", "number"), CASES.values(), ids=CASES)


def full(layer: LayerTrace, composite: bool) -> tuple[np.ndarray, np.ndarray]:
    """The oracle: selected and visible, pair by pair."""
    each = layer.ratio if composite else 1
    shape = layer.length, layer.length if composite else layer.entries
    kept, seen = np.zeros(shape, bool), np.zeros(shape, bool)
    for t in range(layer.length):
        seen[t, : (t + 1) // layer.ratio * each] = True
        for entry in layer.selected[t]:
            if entry >= 0:
                kept[t, entry * each : (entry + 1) * each] = True
    return kept, seen


@every_case
@pytest.mark.parametrize("composite", [False, True])
@pytest.mark.parametrize("pixels", [7, 20, 400])
def test_a_cell_is_the_share_of_its_pairs_that_was_selected(trace, number, composite, pixels):
    tile = (composite_tile if composite else attention_tile)(trace, number, max_pixels=pixels)
    kept, seen = full(trace.layer(number), composite)
    a, b = tile.pooling
    for i, j in np.ndindex(tile.values.shape):
        rows, columns = slice(i * a, (i + 1) * a), slice(j * b, (j + 1) * b)
        pairs = seen[rows, columns].sum()
        assert tile.values[i, j] == pytest.approx(kept[rows, columns].sum() / pairs if pairs else 0.0)
        assert tile.visible[i, j] or not pairs
    Image.open(io.BytesIO(tile.png)).verify()


@every_case
def test_a_part_of_the_map_counts_the_pairs_in_it_alone(trace, number):
    kept, seen = full(trace.layer(number), True)
    for rows, columns, pixels in (((40, 61), (5, 43), 10), ((50, 51), (18, 21), 2), ((3, 60), (0, 61), 9)):
        tile = composite_tile(trace, number, rows=rows, columns=columns, max_pixels=pixels)
        (a, b), share = tile.pooling, np.zeros(tile.values.shape)
        for i, j in np.ndindex(share.shape):
            cell = (
                slice(rows[0] + i * a, min(rows[0] + (i + 1) * a, rows[1])),
                slice(columns[0] + j * b, min(columns[0] + (j + 1) * b, columns[1])),
            )
            share[i, j] = kept[cell].sum() / max(1, seen[cell].sum())
        assert tile.values == pytest.approx(share)


def test_a_part_of_a_long_map_needs_memory_for_what_is_kept_not_for_every_entry():
    length, few = 65_536, 64
    selected = np.full((length, few), -1, np.int32)
    selected[-2000:] = np.arange(few) * 1000
    nothing = np.zeros((length, 0, 0), np.float16), np.zeros((length, 0), np.float16)
    layer = LayerTrace(0, "mla-dsa", 1, *nothing, selected=selected)
    trace = replace(V32, layers=(layer,), token_ids=np.zeros(length, np.int32), token_texts=("x",) * length)
    tracemalloc.start()
    tile = attention_tile(trace, 0, rows=(length - 2000, length))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 150e6  # every entry of 799 rows of cells at once: 420 MB
    assert np.count_nonzero(tile.values[0]) == few


@every_case
def test_only_what_is_known_is_told(trace, number):
    layer = trace.layer(number)
    t = layer.length - 3
    kept = int(layer.selected[t][0])
    other = next(e for e in range(layer.visible_entries(t)) if e not in layer.selected[t])
    for entry, selected in ((kept, True), (other, False)):
        told = describe(trace, number, "max", t, entry)
        assert told["selected"] is selected and told["visible"] and told["entry"] == entry
        assert all(told[name] is None for name in ("probability", "index_score", "rank"))
    columns, marks, _ = source_probs(layer, "max", t)
    assert columns.tolist() == [e for e in layer.selected[t] if e >= 0] and set(marks.tolist()) == {1.0}
    assert [s["entry"] for s in top_sources(trace, number, "max", t, 2)] == columns[:2].tolist()
    with pytest.raises(InputError, match="one selection for all heads"):
        attention_tile(trace, number, head=0)


@every_case
def test_the_strip_marks_the_kept_entries_alike_and_has_no_sink(trace, number):
    layer = trace.layer(number)
    t = layer.length - 3
    (bar,) = query_strip(trace, number, t).data
    assert set(np.asarray(bar.y).tolist()) == {1.0} and "selected" in bar.name
    centres = [e * layer.ratio + (layer.ratio - 1) / 2 for e in sorted(layer.selected[t]) if e >= 0]
    assert np.asarray(bar.x).tolist() == centres
    assert "no probabilities in a capture" in query_strip(trace, number, t).layout.title.text.replace("<br>", " ")


def test_the_strip_of_many_entries_shows_shares():
    selected = np.full((4096, 8), -1, np.int32)
    selected[4095] = [0, 1, 2, 3, 8, 100, 101, 1023]
    nothing = np.zeros((4096, 0, 0), np.float16), np.zeros((4096, 0), np.float16)
    layer = LayerTrace(1, "csa", 4, *nothing, selected=selected)
    trace = replace(V4, layers=(layer,), token_ids=np.zeros(4096, np.int32), token_texts=("x",) * 4096)
    figure = query_strip(trace, 1, 4095)
    (bar,) = figure.data
    # 1,024 entries in at most MAX_POINTS bars of six: 0 to 3, then 8, then 100 and 101, and 1,023 among the last four
    assert MAX_POINTS == 200 and "6 neighbours" in figure.layout.yaxis.title.text
    assert np.asarray(bar.y).tolist() == pytest.approx([4 / 6, 1 / 6, 2 / 6, 1 / 4])


@every_case
def test_the_text_marks_sources_and_says_what_it_is(trace, number):
    layer = trace.layer(number)
    t = layer.length - 3
    page = text_view(trace, number, "max", t)
    assert "no probabilities in a capture" in page and "window " not in page.split("</style>")[1]
    first, last = layer.entry_tokens(int(layer.selected[t][0]))
    for token in range(first, last + 1):
        assert f'title="token {token}: selected"' in page
    assert page.count('title="token') == len({x for e in layer.selected[t] if e >= 0 for x in span(layer, e)})


def span(layer: LayerTrace, entry: int) -> range:
    first, last = layer.entry_tokens(int(entry))
    return range(first, last + 1)


@every_case
def test_the_explorer_shows_a_capture_honestly(trace, number):
    widget = AttentionExplorer(trace)
    widget.layer.value = number
    layer = trace.layer(number)
    assert widget.head.options == (("all", "max"),) and "share selected" in widget.title.value
    assert "head" not in widget.thumbnails.html.split("</style>")[1]
    assert widget.tile.column_range == (0, layer.entries) and "window" not in widget.map.column_title
    t = layer.length - 3
    kept = int(layer.selected[t][0])
    for column, said in ((kept, "selected (no probabilities in a capture)"), (layer.entries - 1, "")):
        i, j = widget.tile.cell(t, column)
        widget.map._handle_custom_msg({"type": "hover", "row": i, "column": j}, [])
        assert said in widget.readout.value and "probability" not in widget.readout.value
    if layer.ratio > 1:
        assert [text for _, text in widget.map.column_labels][-1] == "23" and "compressed entry" in widget.map.column_title
        assert int(widget.map.row_labels[-1][1]) > layer.entries
        assert dict(widget.view.options) == {"compressed entries": "entries", "on one token axis": "composite"}
        widget.view.value = "composite"
        widget.map._handle_custom_msg({"type": "hover", "row": t, "column": kept * layer.ratio}, [])
        assert f"compressed entry {kept}," in widget.readout.value
        widget.map._handle_custom_msg({"type": "hover", "row": 96, "column": 96}, [])
        assert "not complete yet" in widget.readout.value
        widget.view.value = "entries"
        assert widget.tile.column_range == (0, layer.entries)
    widget.zoom_buttons[0].click()
    assert len(range(*widget.tile.row_range)) < layer.length


def test_thumbnails_of_a_long_capture_look_at_some_queries_only():
    reads = []

    class Counting(np.ndarray):
        def __getitem__(self, key):
            got = np.asarray(self).__getitem__(key)
            reads.append(got.size)
            return got

    selected = np.zeros((20_000, 8), np.int32).view(Counting)
    nothing = np.zeros((20_000, 0, 0), np.float16), np.zeros((20_000, 0), np.float16)
    layer = LayerTrace(1, "csa", 4, *nothing, selected=selected)
    trace = replace(V4, layers=(layer,), token_ids=np.zeros(20_000, np.int32), token_texts=("x",) * 20_000)
    assert len(layer_thumbnails(trace)) == 1 and len(thumbnails(trace, 1)) == 1
    assert sum(reads) <= 2 * 20_000 * 8 / 40


def test_a_tile_of_many_queries_touches_each_kept_entry_and_not_each_cell_of_each_query(monkeypatch):
    """Work grows with the entries that were kept: chunks hold so many of these, whatever the width of the picture."""
    taken = []
    bincount = np.bincount
    monkeypatch.setattr(np, "bincount", lambda x, *a, **k: taken.append(len(x)) or bincount(x, *a, **k))
    length, few = 65_536, 2
    selected = np.full((length, few), -1, np.int32)
    selected[-1] = (0, 5)
    nothing = np.zeros((length, 0, 0), np.float16), np.zeros((length, 0), np.float16)
    trace = replace(V32, layers=(LayerTrace(0, "mla-dsa", 1, *nothing, selected=selected),))
    trace = replace(trace, token_ids=np.zeros(length, np.int32), token_texts=("x",) * length)
    tile = attention_tile(trace, 0)
    assert taken == [length * few] and tile.values[-1, 0] > 0 == tile.values[:-1].max()
