"""Widgets without a kernel: what is shown of them, what is stored beside them, and one view as a file."""

from __future__ import annotations

import io
from dataclasses import replace
from xml.etree import ElementTree

import ipywidgets as ipw
import plotly.graph_objects as go
import pytest
from PIL import Image

import workbench as wb
from tests.synthetic import synthetic_trace
from workbench.errors import InputError
from workbench.widgets import still
from workbench.widgets.render import as_output
from workbench.widgets.still import VIEW_MIME, bundle, html_of_states, saved_states, still_html

CHART = go.Figure(go.Bar(x=[1, 2], y=[3, 4], marker_color="#0072b2"))


def test_controls_show_their_names_and_values_and_buttons_are_left_out():
    box = ipw.VBox(
        [
            ipw.IntSlider(1024, 0, 4096, description="Tokens"),
            ipw.Dropdown(options=[("one", 1), ("two", 2)], value=2, description="Layer"),
            ipw.Checkbox(True, description="compare"),
            ipw.Text("37", description="Code"),
            ipw.Button(description="Start"),
            ipw.Text("", description="Empty"),
        ]
    )
    html = still_html(box)
    assert all(part in html for part in ("<b>Tokens</b> 1,024", "<b>Layer</b> two", "☑ compare", "<b>Code</b> 37"))
    assert "Start" not in html and "Empty" not in html


def test_what_a_person_typed_is_escaped():
    html = still_html(ipw.VBox([ipw.Text("<img src=x onerror=alert(1)>"), ipw.Textarea("<script>"), ipw.Label("<b>")]))
    assert "<img" not in html and "<script" not in html and "<b>" not in html


def test_hidden_parts_stay_hidden_and_nothing_gives_nothing():
    hidden = ipw.HTML("secret", layout=ipw.Layout(display="none"))
    assert still_html(ipw.VBox([hidden])) == "" and still_html(ipw.Button(description="x")) == ""


def test_charts_and_texts_of_an_output_are_there():
    out = ipw.Output(outputs=(as_output(CHART), {"output_type": "stream", "name": "stdout", "text": "a < b"}))
    html = still_html(ipw.HBox([out]))
    assert html.count("data:image/svg+xml;base64,") == 1 and "<pre>a &lt; b</pre>" in html


def test_a_box_that_holds_itself_in_an_output_ends():
    out = ipw.Output()
    out.outputs = ({"output_type": "display_data", "data": {VIEW_MIME: {"model_id": out.model_id}}, "metadata": {}},)
    assert still_html(ipw.VBox([out, ipw.HTML("end")])).count("end") == 1


def test_an_explorer_shows_its_map_labels_chart_and_text():
    trace = synthetic_trace(length=40)
    explorer = wb.AttentionExplorer(trace)
    html = still_html(explorer)
    assert html.count("wb-map") == 1 and "data:image/svg+xml" in html and "token position" in html
    assert html.count('<span style="position:absolute') == len(explorer.map.row_labels) + len(explorer.map.column_labels)


def test_token_texts_are_never_markup():
    trace = synthetic_trace(length=40)
    evil = tuple("<img src=x onerror=alert(1)>" for _ in trace.token_texts)
    trace = replace(trace, token_texts=evil, model="<script>alert(1)</script>")
    for view in (wb.AttentionExplorer(trace), wb.CacheSlots(trace), wb.KVCacheGrowth(trace), wb.OverlapTimeline(trace)):
        html = still_html(view)
        assert html and "<script" not in html and "<img src=x" not in html


def test_state_saved_in_a_notebook_gives_the_same_as_the_widget():
    explorer = wb.AttentionExplorer(synthetic_trace(length=40))
    stored = ipw.Widget.get_manager_state(widgets=None)
    html = html_of_states(saved_states(stored), explorer.model_id)
    assert html == still_html(explorer) and "wb-map" in html


def test_a_limit_leaves_out_the_longest_texts_first():
    box = ipw.VBox([ipw.HTML("x" * 5000), ipw.IntSlider(3, description="Layer")])
    short = still_html(box, 2000)
    assert len(short) <= 2000 and "left out" in short and "<b>Layer</b> 3" in short
    assert len(still_html(box)) > 5000


@pytest.mark.parametrize("view", [wb.AttentionExplorer, wb.KVCacheGrowth, wb.CacheSlots, wb.OverlapTimeline, wb.RunControls])
def test_each_view_of_the_shipped_recording_is_stored_with_a_picture_within_the_budget(view):
    data, _ = bundle(view(wb.Trace.load("needle")))
    assert VIEW_MIME in data and 200 < len(data["text/html"]) < 250_000


def test_a_widget_that_cannot_be_pictured_is_still_shown(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no picture")

    monkeypatch.setattr(still, "still_html", fails)
    data, _ = bundle(ipw.IntSlider())
    assert VIEW_MIME in data and "text/html" not in data


def test_a_file_gets_all_of_a_widget_that_has_more(monkeypatch):
    class Several(ipw.VBox):
        def whole_html(self) -> str:
            return "all of it"

    widget = Several([ipw.HTML("one")])
    assert "one" in bundle(widget)[0]["text/html"]
    monkeypatch.setenv(still.EXPORTING, "1")
    assert "all of it" in bundle(widget)[0]["text/html"]


def test_pictures_are_saved_by_their_ending(tmp_path):
    growth, explorer = wb.KVCacheGrowth(synthetic_trace(length=40)), wb.AttentionExplorer(synthetic_trace(length=40))
    assert ElementTree.parse(wb.save_picture(growth, tmp_path / "a.svg")).getroot().tag.endswith("svg")
    assert Image.open(wb.save_picture(CHART, tmp_path / "b.png")).width == 2 * 760
    html = wb.save_picture(explorer, tmp_path / "c.html").read_text(encoding="utf-8")
    assert "Content-Security-Policy" in html and "wb-map" in html
    assert wb.save_picture(explorer.map, tmp_path / "d.png").read_bytes() == explorer.map.png
    assert Image.open(io.BytesIO(explorer.map.png)).size[0] > 0
    tile = wb.attention_tile(synthetic_trace(length=40), 1)
    assert wb.save_picture(tile, tmp_path / "e.png").read_bytes() == tile.png
    for wrong in (None, 5, "a\0.png"):
        with pytest.raises(InputError, match="must be a path"):
            wb.save_picture(CHART, wrong)
    with pytest.raises(InputError, match="a tile as .png; got Tile as .html"):
        wb.save_picture(tile, tmp_path / "f.html")


@pytest.mark.parametrize(
    ("view", "name", "said"),
    [
        (CHART, "a.pdf", "as .svg, .png or .html, got 'a.pdf'"),
        ("chart", "a.png", "got str"),
        (CHART, "nowhere/a.png", "no folder"),
        (ipw.IntSlider(), "a.svg", "no chart"),
        (ipw.Button(), "a.html", "nothing without a kernel"),
        (go.Figure(go.Heatmap(z=[[1]])), "a.png", "heatmap"),
    ],
)
def test_what_cannot_be_saved_is_one_clear_error(view, name, said, tmp_path):
    with pytest.raises(InputError, match=said):
        wb.save_picture(view, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
