"""The frontier's picture: what is where, what the front is, what the title and hovers say, and that bad input is refused."""

import json

import pytest

from tests.test_frontier import point
from workbench.errors import InputError
from workbench.figures.frontier import frontier_chart

POINTS = [
    point(0.9, ratio=4, seed=1),
    point(0.7, ratio=4, seed=2),
    point(0.5, ratio=8),
    point(0.6, ratio=4, topk=1),
    point(0.3, hca_share=1.0),
    point(0.4, hca_share=1.0, engram=True),
    point(0.2, hca_share=0.5, ratio=16),
]


def traces(fig, name):
    return [trace for trace in fig.data if trace.name == name and trace.x[0] is not None]


def test_a_variant_stands_at_its_bytes_and_the_mean_of_its_seeds():
    held, read = traces(frontier_chart(POINTS), "4 symbols an entry")
    assert list(held.x) == [POINTS[0].held(), POINTS[3].held()] and list(read.x) == [POINTS[0].read(), POINTS[3].read()]
    assert list(held.y) == list(read.y) == pytest.approx([80.0, 60.0])
    assert list(held.error_y.array) == list(held.error_y.arrayminus) == pytest.approx([10.0, 0.0])
    assert held.xaxis == "x" and read.xaxis == "x2" and list(held.text) == ["k4", "k1"]
    assert "seeds 1, 2" in held.hovertext[0] and "top-4" in held.hovertext[0] and "one seed (1)" in held.hovertext[1]


def test_the_front_is_drawn_and_what_is_beaten_is_not_on_it():
    held, read = traces(frontier_chart(POINTS), "front: nothing cheaper is as good")
    assert list(held.x)[:2] == [POINTS[4].held(), POINTS[5].held()] and list(held.y) == pytest.approx([30.0, 40.0, 50.0, 80.0])
    assert list(held.y) == sorted(held.y) and list(held.x) == sorted(held.x) and list(read.x) == sorted(read.x)


def test_shapes_are_told_apart_without_colour():
    fig = frontier_chart(POINTS)
    alone, mixed = traces(fig, "HCA only, 32 an entry")[0], traces(fig, "16 symbols an entry")[0]
    assert list(alone.marker.symbol) == ["square", "square-open"] and list(mixed.marker.symbol) == ["diamond"]
    names = [trace.name for trace in fig.data if trace.showlegend is not False]
    assert len(names) == len(set(names)) and {"half HCA", "HCA only", "hollow: Engram"} <= set(names)


def test_the_title_says_what_was_measured_and_what_was_counted():
    title = frontier_chart(POINTS, length=65536, storage="fp32").layout.title.text
    assert "100 questions" in title and "more than 32 symbols" in title and "toys, trained and measured on CPU (test)" in title
    assert "1,024 symbols" in title and "bytes by formula at 65,536 symbols, fp32" in title
    assert frontier_chart(POINTS, length=65536).data[1].x[0] == POINTS[0].held(65536)


def test_for_a_loss_better_is_up():
    worse, better = point(0.5), point(0.5, ratio=8)
    better.scores["text_loss"] = 1.0
    fig = frontier_chart([worse, better], "text")
    assert fig.layout.yaxis.autorange == "reversed" and traces(fig, "8 symbols an entry")[0].y[0] == 1.0
    assert list(traces(fig, "front: nothing cheaper is as good")[0].y) == [1.0]  # it is cheaper and better


def test_points_of_ones_own_are_marked():
    fig = frontier_chart(POINTS, own=[POINTS[2].variant.name])
    (held, read) = traces(fig, "yours")
    assert list(held.y) == [50.0] and not traces(fig, "8 symbols an entry") and held.marker.size > 12


def test_a_device_is_escaped_and_a_view_is_small():
    strange = point()
    strange.trained_with["device"] = "<b>&"
    assert "&lt;b&gt;&amp;" in frontier_chart([strange]).layout.title.text
    assert len(json.dumps(frontier_chart(POINTS * 9).to_plotly_json(), default=list)) < 250_000


@pytest.mark.parametrize(
    ("points", "settings", "said"),
    [
        ([], {}, "no points"),
        (POINTS, {"quality": "speed"}, "quality"),
        (POINTS, {"length": -1}, "length"),
        (POINTS, {"storage": "int4"}, "storage"),
    ],
)
def test_bad_input_is_refused(points, settings, said):
    with pytest.raises(InputError, match=said):
        frontier_chart(points, **settings)


def test_points_scored_on_different_lengths_are_not_mixed():
    other = point(seed=2)
    other.scores["length"] = 99
    with pytest.raises(InputError, match="different lengths"):
        frontier_chart([point(), other])
