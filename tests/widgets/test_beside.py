"""The widgets of dense beside sparse and of two runs: controls draw what they say, and what goes wrong is told."""

from __future__ import annotations

import json

import pytest

import workbench as wb
from workbench.errors import InputError
from workbench.figures.beside import reuse_html
from workbench.widgets import beside as widget_module
from workbench.widgets.render import CHART_MIME

MODEL = wb.load("tiny-v4", device="cpu")
IDS = MODEL.tokenizer.encode(wb.sample_text()).ids[:300]


@pytest.fixture(scope="module")
def found():
    return wb.dense_beside(MODEL, IDS)


def chart(output):
    return output.outputs[0]["data"][CHART_MIME]


def test_both_maps_share_their_axes_and_stay_small(found):
    view = wb.DenseBeside(MODEL, IDS, found)
    maps = chart(view.maps)
    images = maps["layout"]["images"]
    assert len(images) == 2 and images[0]["source"] != images[1]["source"]
    assert {(i["x"], i["y"], i["sizex"], i["sizey"]) for i in images} == {(-0.5, -0.5, 300, 300)}
    assert maps["layout"]["xaxis2"]["matches"] == "x" and maps["layout"]["yaxis2"]["matches"] == "y"
    assert len(json.dumps(maps)) < 250_000
    assert "as it ran" in maps["layout"]["annotations"][0]["text"]


def test_layer_and_head_choose_the_picture(found):
    view = wb.DenseBeside(MODEL, IDS, found)
    before = chart(view.maps)
    view.layer.value = 3
    assert (
        "layer 3" in chart(view.maps)["layout"]["title"]["text"] and "layer 3" in chart(view.missed)["layout"]["title"]["text"]
    )
    assert f"{found.layer(3).missed.mean():.1%}" in view.status.value
    view.head.value = 2
    assert "head 2" in chart(view.maps)["layout"]["title"]["text"] and chart(view.maps) != before
    lines = [x["name"] for x in chart(view.missed)["data"]]
    assert lines[:4] == [f"head {h}: {100 * found.layer(3).missed[:, h].mean():.1f} %" for h in range(4)]


def test_reading_again_uses_what_the_weights_allow(found):
    view = wb.DenseBeside(MODEL, IDS, found)
    assert (view.topk.max, view.window.max) == (8, 16)
    view.topk.value, view.window.value = 2, 4
    view.read()
    assert view.wait(60)
    assert view.found.topk == 2 and view.found.trace.layer(0).window == 4 and view.bar.value == 1
    assert "top-2, window 4" in view.status.value
    assert view.found.layer(1).missed.mean() > found.layer(1).missed.mean()


def test_stop_keeps_what_is_shown_and_errors_are_said(found, monkeypatch):
    view = wb.DenseBeside(MODEL, IDS, found)
    view._halt.set()
    monkeypatch.setattr(view._halt, "clear", lambda: None)
    view.read()
    assert view.wait(60) and view.found is found
    assert "stopped after 0 of 300 tokens" in view.status.value and not view.again.disabled
    monkeypatch.setattr("workbench.beside.dense_beside", lambda *_, **__: 1 / 0)
    view.read()
    assert view.wait(60) and "ZeroDivisionError" in view.status.value and view.found is found


def test_a_long_text_is_read_in_the_background_with_progress(monkeypatch):
    monkeypatch.setattr(widget_module, "READ_AT_ONCE", 250)
    view = wb.DenseBeside(MODEL, IDS)
    assert view.wait(60) and view.found is not None and view.found.trace.length == 300
    assert view.bar.value == 1 and view.tabs.layout.display is None and "is missed" in view.status.value
    assert view.layer.value == 1 and len(chart(view.maps)["layout"]["images"]) == 2


def test_a_first_reading_that_was_stopped_can_be_done_again(monkeypatch):
    monkeypatch.setattr(widget_module, "READ_AT_ONCE", 250)
    with monkeypatch.context() as patched:
        patched.setattr("workbench.beside.dense_beside", lambda *_, **__: 1 / 0)
        view = wb.DenseBeside(MODEL, IDS)
        assert view.wait(60) and view.found is None and view.tabs.layout.display == "none"
    view.read()
    assert view.wait(60) and view.found is not None and view.tabs.layout.display is None


def test_a_model_without_windows_has_no_slider_for_them():
    model = wb.load("tiny-mla-dsa", device="cpu")
    view = wb.DenseBeside(model, IDS[:120])
    assert view.window.layout.display == "none" and view.topk.max == 32
    view.topk.value = 5
    view.read()
    assert view.wait(60) and view.found.topk == 5
    with pytest.raises(InputError, match="attends to every token"):
        wb.DenseBeside(wb.load("tiny-gqa", device="cpu"), IDS)


def test_the_table_of_reuse_says_what_it_saves_and_how_that_is_known(found):
    table = reuse_html(found)
    saved = found.index_bytes[3]
    assert f"{saved:,} B ({saved / found.bytes_read:.0%} of all)" in table and "measured" in table
    pair = found.layer_reuse[0]
    assert f"<td>{pair.overlap:.1%}</td><td>{pair.by_chance:.1%}</td><td>{pair.missed:.1%}</td>" in table
    read = wb.decode_bytes("v4-pro", 2**20)
    assert "modelled by formula" in table and f"{read['index'] / 1e6:,.0f} MB of it index keys" in table
    assert table.count("<tr>") == 1 + 1 + 2 * 3  # head, one pair, three lags of two layers


def test_the_chart_of_reuse_draws_chance_beside_everything(found):
    fig = wb.reuse_chart(found)
    bars = [x for x in fig.data if x.type == "bar"]
    assert list(bars[0].x) == ["1 to 3"] and bars[0].y[0] == pytest.approx(100 * found.layer_reuse[0].overlap)
    lines = {x.name: x for x in fig.data if x.type == "scatter"}
    assert list(lines["layer 1"].x) == [1, 2, 4, 8, 16, 32, 64]
    assert list(lines["layer 1 by chance"].y) == [100 * x.by_chance for x in found.step_reuse if x.layer == 1]


def test_two_runs_are_drawn_where_they_differ_most(found):
    other = wb.record_text(MODEL, IDS, topk=2)
    view = wb.DifferenceOfRuns(found.trace, other, names=("as it is", "<few>"))
    assert view.layer.value == max(view.comparison.layers, key=lambda x: x.moved).layer
    assert "&lt;few&gt;" in chart(view.view)["layout"]["title"]["text"]
    view.head.value = 1
    view.layer.value = 2
    assert view.tile.layer.layer == 2 and view.tile.head == 1 and "layer 2" in chart(view.view)["layout"]["title"]["text"]
    with pytest.raises(InputError, match="300 and 100 tokens"):
        wb.DifferenceOfRuns(found.trace, wb.record_text(MODEL, IDS[:100]))
    assert widget_module.OTHER_RATIOS in wb.DenseBeside(MODEL, IDS, found).status.value
