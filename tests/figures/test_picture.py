"""Still pictures of charts: geometry that follows the data, text that stays text, and every chart of ours."""

from __future__ import annotations

import io
import json
from xml.etree import ElementTree

import plotly.graph_objects as go
import pytest
from PIL import Image
from plotly.subplots import make_subplots

import workbench as wb
from tests.synthetic import synthetic_trace
from workbench.caches import modelled_cache
from workbench.errors import InputError
from workbench.figures.axes import Axis, label, ticks
from workbench.figures.caches import held_and_read, read_shares
from workbench.figures.claims import memory_meters
from workbench.figures.marks import Picture, hatching
from workbench.figures.memory import kv_growth
from workbench.figures.picture import lines_of, picture
from workbench.figures.picture_axes import picture_chart
from workbench.figures.predict import guess_and_result, with_guess
from workbench.figures.query import query_strip
from workbench.figures.timeline import overlap_timeline

DAMAGED = {"data": [{"type": "bar", "x": {"bdata": "AAAA", "dtype": "O"}, "y": [1]}]}
BLUE, ORANGE = "#0072b2", "#c2884e"


def areas(drawn: Picture, colour: str, clipped: bool = True) -> list[tuple[float, float, float, float]]:
    """Bounding boxes of the areas of one colour within plot areas, in the order they were drawn."""
    boxes = []
    for mark in drawn.marks:
        if mark.shape == "area" and mark.colour == colour and (mark.clip >= 0) == clipped:
            x, y = zip(*mark.points, strict=True)
            boxes.append((min(x), min(y), max(x), max(y)))
    return boxes


def test_bars_are_as_long_as_their_values_and_stack():
    fig = go.Figure(layout={"barmode": "stack"})
    fig.add_bar(y=["a", "b"], x=[10, 40], orientation="h", marker_color=BLUE)
    fig.add_bar(y=["a", "b"], x=[20, 10], orientation="h", marker_color=ORANGE)
    drawn = picture(fig)
    (a, b), (a2, b2) = areas(drawn, BLUE), areas(drawn, ORANGE)
    assert (b[2] - b[0]) == pytest.approx(4 * (a[2] - a[0])) and (a2[2] - a2[0]) == pytest.approx(2 * (a[2] - a[0]))
    assert a[0] == b[0] and a2[0] == pytest.approx(a[2]) and b2[0] == pytest.approx(b[2])
    assert a[1] > b[3]  # the first category lies below


def test_a_reversed_axis_has_its_first_category_on_top():
    fig = go.Figure(go.Bar(y=["a", "b"], x=[1, 1], orientation="h", marker_color=BLUE))
    a, b = areas(picture(fig.update_yaxes(autorange="reversed")), BLUE)
    assert a[3] < b[1]


def test_decades_of_a_logarithmic_axis_are_equally_far_apart():
    fig = go.Figure(go.Scatter(x=[1, 10, 1000], y=[0, 0, 0], mode="markers", marker={"color": BLUE, "size": 6}))
    x = [mark.points[0][0] for mark in picture(fig.update_xaxes(type="log")).marks if mark.shape == "dot"]
    assert (x[2] - x[1]) == pytest.approx(2 * (x[1] - x[0]))


def test_areas_of_a_stack_stand_on_each_other():
    fig = go.Figure()
    for colour, y in ((BLUE, [1, 2]), (ORANGE, [3, 1])):
        fig.add_scatter(x=[0, 1], y=y, stackgroup="held", fillcolor=colour, mode="lines")
    drawn = picture(fig)
    lower, upper = (next(m.points for m in drawn.marks if m.colour == colour and m.clip >= 0) for colour in (BLUE, ORANGE))
    assert upper[2:] == (lower[1], lower[0])  # its lower edge, from right to left, is the other's upper one


def test_a_gap_breaks_a_line():
    fig = go.Figure(go.Scatter(x=[0, 1, 2, 3], y=[1, 1, None, 2], mode="lines", line_color=BLUE))
    fig.add_scatter(x=[0, 1, 2, 3, 4], y=[1, 1, float("nan"), 2, 2], mode="lines", line_color=ORANGE)
    marks = picture(fig).marks
    assert [len(m.points) for m in marks if m.clip >= 0 and m.colour == BLUE] == [2]
    assert [len(m.points) for m in marks if m.clip >= 0 and m.colour == ORANGE] == [2, 2]


def test_an_arrow_points_away_from_where_it_came():
    fig = go.Figure(
        go.Scatter(x=[0, 10], y=[0, 0], mode="lines+markers", marker={"symbol": "arrow", "size": [0, 9], "color": BLUE})
    )
    tip, *back = next(m.points for m in picture(fig).marks if m.shape == "area" and m.clip >= 0)
    assert all(x < tip[0] for x, _ in back)


def test_the_pointer_tells_what_a_bar_is():
    fig = go.Figure(go.Bar(x=["a", "b"], y=[3, 1234], name="bytes"))
    fig.add_bar(x=["a"], y=[1], hovertext=["one &lt;b&gt;<br>two"], name="own")
    svg = picture(fig).svg()
    assert "<title>bytes: 3</title>" in svg and "<title>bytes: 1,234</title>" in svg
    assert "<title>one &lt;b&gt;; two</title>" in svg
    many = go.Figure(go.Bar(x=list(range(500)), y=[1] * 500, name="bytes"))
    assert picture(many).svg().count("<title>") == 1  # that of the chart


def test_text_is_escaped_and_markup_is_not_shown():
    fig = go.Figure(go.Bar(x=["&lt;script&gt;alert(1)&lt;/script&gt;"], y=[1], name="<b>bold</b>"))
    fig.update_layout(title_text="one<br>&lt;img src=x onerror=alert(1)&gt;", showlegend=True)
    svg = picture(fig).svg()
    texts = [text for element in ElementTree.fromstring(svg).iter() if (text := element.text)]
    assert "<script>alert(1)</script>" in texts and "<img src=x onerror=alert(1)>" in texts and "bold" in texts
    assert "<script" not in svg and "<img" not in svg


def test_a_colour_that_is_none_cannot_leave_its_attribute():
    svg = picture(go.Figure(go.Bar(x=[1], y=[1]))).svg()
    chart = {"data": [{"type": "bar", "x": [1], "y": [1], "marker": {"color": '"><script>1</script>'}}], "layout": {}}
    assert "<script" not in picture(chart).svg() and "#797979" in picture(chart).svg()
    assert svg.startswith("<svg ")


def test_json_of_a_figure_with_packed_arrays_gives_the_same_picture():
    import numpy as np

    fig = go.Figure(go.Scatter(x=np.arange(5.0), y=np.arange(5.0) ** 2, mode="lines+markers"))
    stored = json.loads(fig.to_json())
    assert "bdata" in json.dumps(stored)
    assert picture(stored).svg() == picture(fig).svg()


@pytest.mark.parametrize("chart", [go.Figure(go.Heatmap(z=[[1]])), "chart", {"data": 3}, DAMAGED])
def test_what_cannot_be_drawn_is_refused(chart):
    with pytest.raises(InputError, match="still picture|plotly figure|could not be drawn .ValueError"):
        picture(chart)


def test_png_shows_the_bar_where_it_is():
    drawn = picture(go.Figure(go.Bar(x=[3], y=["a"], orientation="h", marker_color=BLUE)))
    x0, y0, x1, y1 = areas(drawn, BLUE)[0]
    image = Image.open(io.BytesIO(drawn.png(scale=2))).convert("RGB")
    assert image.size == (2 * drawn.width, 2 * drawn.height)
    inside, outside = image.getpixel((int(x0 + x1), int(y0 + y1))), image.getpixel((2, 2))
    assert outside == (255, 255, 255) and max(abs(a - b) for a, b in zip(inside, (0, 0x72, 0xB2), strict=True)) < 12


def test_what_leaves_the_plot_area_is_cut_off():
    fig = go.Figure(go.Scatter(x=[0, 1], y=[0, 100], mode="lines", line={"color": BLUE, "width": 8}))
    drawn = picture(fig.update_yaxes(range=[0, 1]))
    image = Image.open(io.BytesIO(drawn.png(scale=1))).convert("RGB")
    top = int(drawn.clips[0][1])
    blue = [
        (x, y)
        for x in range(image.width)
        for y in range(image.height)
        if image.getpixel((x, y))[2] > 150 > image.getpixel((x, y))[0]
    ]
    assert blue and min(y for _, y in blue) >= top - 1


def test_how_far_a_point_may_be_off_is_drawn_up_and_down_from_it():
    error = {"type": "data", "array": [2, 0], "arrayminus": [1, 0], "symmetric": False, "width": 0, "thickness": 3}
    fig = go.Figure(go.Scatter(x=[1, 2], y=[4, 5], mode="markers", error_y=error))
    (bar,) = [mark for mark in picture(fig).marks if mark.shape == "line" and mark.width == 3]
    at, other = [mark.points[0] for mark in picture(fig).marks if mark.shape == "dot"]
    unit = at[1] - other[1]  # pixels of one, upwards
    assert {x for x, _ in bar.points} == {at[0]}
    assert sorted(y for _, y in bar.points) == pytest.approx([at[1] - 2 * unit, at[1] + unit])


def test_such_ends_lie_within_the_axis_also_of_a_logarithmic_one():
    fig = go.Figure(go.Scatter(x=[1, 2], y=[10, 100], mode="markers", error_y={"array": [0, 900], "width": 5}))
    fig.update_yaxes(type="log")
    drawn = picture(fig)
    first, second = [mark.points[0] for mark in drawn.marks if mark.shape == "dot"]
    stem = next(mark for mark in drawn.marks if mark.shape == "line" and {x for x, _ in mark.points} == {second[0]}
                and mark.clip >= 0 and mark.width == 2)  # fmt: skip
    top = min(y for _, y in stem.points)
    assert top == pytest.approx(second[1] - (first[1] - second[1]))  # 1,000 lies as far above 100 as 100 above 10
    assert drawn.clips[stem.clip][1] <= top


@pytest.mark.parametrize("symbol", ["circle-open", "square-open", "diamond-open"])
def test_an_open_symbol_is_an_outline(symbol):
    fig = go.Figure(go.Scatter(x=[1], y=[1], mode="markers", marker={"symbol": symbol, "color": "#cc79a7", "size": 12}))
    (mark,) = [mark for mark in picture(fig).marks if mark.edge == "#cc79a7"]
    assert mark.colour == "none" and mark.shape == ("dot" if "circle" in symbol else "area")


def test_a_line_in_steps_goes_sideways_first():
    fig = go.Figure(go.Scatter(x=[0, 1, 2], y=[0, 5, 7], mode="lines", line={"shape": "hv", "width": 4}))
    (line,) = [mark for mark in picture(fig).marks if mark.shape == "line" and mark.width == 4]
    (a, b, c, d, e) = line.points
    assert a[1] == b[1] and b[0] == c[0] and c[1] == d[1] and d[0] == e[0] and a[0] < b[0] < d[0]


@pytest.mark.parametrize("shape", ["/", "x", "."])
def test_hatching_stays_within_its_box(shape):
    strokes = hatching(shape, (10, 20, 60, 35))
    assert strokes and all(10 <= x <= 60 and 20 <= y <= 35 for stroke in strokes for x, y in stroke)
    assert hatching("", (0, 0, 9, 9)) == []


def test_axes_of_a_group_have_the_same_ends():
    fig = make_subplots(rows=1, cols=2, shared_yaxes=True)
    fig.add_bar(x=["a"], y=[10], row=1, col=1, marker_color=BLUE)
    fig.add_bar(x=["a"], y=[20], row=1, col=2, marker_color=ORANGE)
    drawn = picture(fig)
    (one,), (two,) = areas(drawn, BLUE), areas(drawn, ORANGE)
    assert (two[3] - two[1]) == pytest.approx(2 * (one[3] - one[1]))


@pytest.mark.parametrize(
    ("value", "spec", "step", "shown"),
    [
        (0.25, {"tickformat": ".0%"}, 0.25, "25%"),
        (50_000, {}, 10_000, "50k"),
        (2_000, {}, 1_000, "2000"),
        (3e9, {"exponentformat": "SI"}, 1e9, "3G"),
        (-0.5, {}, 0.5, "\u22120.5"),
        (-50_000, {}, 10_000, "\u221250k"),
        (0, {}, 1, "0"),
    ],
)
def test_numbers_of_ticks(value, spec, step, shown):
    assert label(value, spec, step) == shown


def test_ticks_lie_between_the_ends_at_round_numbers():
    axis = Axis("x", {}, [0, 97])
    axis.reach(0.0, 97.0, pad=False)
    axis.settle([axis])
    axis.between(0, 600)
    values = [value for value, _ in ticks(axis)]
    assert values == [0, 20, 40, 60, 80]


def test_lines_of_a_title():
    assert lines_of("a &amp; b<br><b>c</b>") == ["a & b", "c"] and lines_of(None) == [""]


def _charts() -> dict[str, go.Figure]:
    trace = synthetic_trace(length=40)
    uses = [modelled_cache(name, 65_536, "released") for name in ("gqa-8", "v4-pro", "v4-flash")]
    rates = {
        "trained": [
            {
                "topk": k,
                "recall": 0.9,
                "recall_chance": 0.01,
                "hits": {"1 key": 0.8},
                "hit_chance": 0.1,
                "questions": 9,
                "model": "m",
            }
            for k in (8, 1)
        ]
    }
    return {
        "query": query_strip(trace, trace.layers[1].layer, 30),
        "growth": kv_growth(trace, 1),
        "growth, logarithmic": kv_growth(trace, 1, log=True),
        "timeline": overlap_timeline(trace.timeline, 0),
        "held": held_and_read(uses),
        "guess over held": with_guess(held_and_read(uses), 1e9, "B", across="x"),
        "shares": read_shares(uses),
        "meters": memory_meters(65_536),
        "guess": guess_and_result("How many?", 3, 5, "tokens"),
        "needle": wb.needle_chart(rates, 50),
    }


@pytest.mark.parametrize("name", list(_charts()))
def test_every_chart_of_ours_is_drawn_with_all_its_traces(name):
    fig = _charts()[name]
    drawn = picture(fig)
    root = ElementTree.fromstring(drawn.svg())
    assert root.tag.endswith("svg") and len(drawn.svg()) < 100_000
    assert len([mark for mark in drawn.marks if mark.clip >= 0]) >= len([t for t in fig.data if t.x is not None and len(t.x)])
    words = {text for element in root.iter() if (text := element.text)}
    for trace in fig.data:
        if fig.layout.showlegend is not False and trace.showlegend is not False and trace.name and len(fig.data) > 1:
            assert lines_of(trace.name)[0] in words
    image = Image.open(io.BytesIO(drawn.png(scale=1))).convert("L")
    assert image.getextrema()[0] < 200


def test_long_titles_are_wrapped_and_the_plot_moves_down():
    fig = go.Figure(go.Bar(x=[1], y=[1]))
    short, long = picture(fig.update_layout(title_text="short")), picture(fig.update_layout(title_text="word " * 60))
    assert long.height > short.height and long.clips[0][1] > short.clips[0][1]
    assert all(len(mark.text) < 120 for mark in long.marks)


def test_an_image_lies_on_its_axes_with_sharp_cells():
    """2 x 2 cells over tokens 0..19, the first row on top: each colour where its cells are."""
    own = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    own.putpixel((0, 0), (255, 0, 0, 255))
    own.putpixel((0, 1), (0, 0, 255, 255))
    out = io.BytesIO()
    own.save(out, "PNG")
    fig = picture_chart([("", out.getvalue())], (0, 20), (0, 20), "cells")
    drawn = picture(fig)
    image = next(mark for mark in drawn.marks if mark.shape == "image")
    assert image.png == out.getvalue() and drawn.clips[image.clip] == pytest.approx([*image.points[0], *image.points[1]])
    (x0, y0), (x1, y1) = image.points
    pixels = Image.open(io.BytesIO(drawn.png(1))).convert("RGB")

    def at(x, y):
        return pixels.getpixel((round(x0 + x * (x1 - x0)), round(y0 + y * (y1 - y0))))

    assert at(0.3, 0.3)[0] > 200 > at(0.3, 0.3)[2] and at(0.3, 0.7)[2] > 200 > at(0.3, 0.7)[0]
    assert min(at(0.77, 0.3)) > 240  # clear
    assert f'width="{x1 - x0:.1f}"' in drawn.svg() and "image-rendering:pixelated" in drawn.svg()
    fig.layout.images[0].source = "https://example.org/x.png"
    with pytest.raises(InputError, match="PNG images that lie on axes"):
        picture(fig)
