import pytest

from workbench.figures.timeline import overlap_comparison, overlap_numbers, overlap_timeline
from workbench.trace import Span, Timeline

SPANS = (
    Span("compute", "layer 0", 0, 0.0, 1e-3),
    Span("lookup", "rows <b>", 1, 2e-3, 5e-3),
    Span("compute", "layer 0", 1, 2e-3, 4e-3),
    Span("stall", "wait", 1, 4e-3, 5e-3, after=("rows <b>",)),
    Span("compute", "layer 1", 1, 5e-3, 8e-3, after=("rows <b>", "sampling of step 0")),
)
MEASURED = Timeline("measured", SPANS, "a CPU", "toy <i>")


def lane(fig, name):
    return next(bar for bar in fig.data if bar.name == name)


def test_a_step_is_drawn_in_milliseconds_from_its_own_start():
    fig = overlap_timeline(MEASURED, 1)
    compute = lane(fig, "compute")
    assert compute.base == pytest.approx([0.0, 3.0]) and compute.x == pytest.approx([2.0, 3.0])
    assert lane(fig, "stall").base == pytest.approx([2.0])


def test_the_title_says_what_was_hidden_where_and_of_which_origin():
    title = overlap_timeline(MEASURED, 1).layout.title.text
    assert "lookup 3.00 ms = 2.00 ms hidden (67%) + 1.00 ms exposed" in title
    assert "measured on a CPU" in title and "toy &lt;i&gt;" in title


def test_stalls_are_shaded_across_all_lanes_and_hatched():
    fig = overlap_timeline(MEASURED, 1)
    (shade,) = fig.layout.shapes
    assert (shade.x0, shade.x1) == pytest.approx((2.0, 3.0)) and shade.yref == "y domain"
    assert lane(fig, "stall").marker.pattern.shape


def test_arrows_run_from_the_end_of_a_cause_to_what_waited_and_never_back_in_time():
    arrows = lane(overlap_timeline(MEASURED, 1), "waits for")
    assert [v for v in arrows.x if v is not None] == pytest.approx([3.0, 3.0, 3.0, 3.0])
    assert list(arrows.y) == ["lookup", "stall", None, "lookup", "compute", None]


def test_names_are_escaped_where_they_are_hovered():
    assert lane(overlap_timeline(MEASURED, 1), "lookup").hovertext[0].startswith("rows &lt;b&gt;<br>0.000 to 3.000 ms")


def test_modelled_and_measured_spans_never_share_a_lane():
    modelled = Span("lookup", "a link", 1, 2e-3, 3e-3, "modelled")
    fig = overlap_timeline(Timeline("measured", (*SPANS, modelled)), 1)
    assert len(lane(fig, "lookup").x) == len(lane(fig, "lookup (modelled)").x) == 1
    alone = overlap_timeline(Timeline("measured", (modelled,)), 1)
    assert len(lane(alone, "lookup").x) == 0 and len(lane(alone, "lookup (modelled)").x) == 1


def test_lanes_keep_their_order_even_when_empty():
    fig = overlap_timeline(Timeline("recorded", (Span("stream 7", "kernel", 0, 0.0, 1e-3, "recorded"),)), 0)
    assert fig.layout.yaxis.categoryarray == ("compute", "lookup", "stall", "stream 7")


def test_a_step_without_spans_says_so():
    fig = overlap_timeline(MEASURED, 7)
    assert "nothing was timed in step 7" in fig.layout.annotations[0].text


def test_two_runs_share_one_time_axis_and_give_their_totals():
    ahead = Timeline(
        "measured", (Span("compute", "layer 0", 0, 1e-3, 3e-3), Span("lookup", "rows", 0, 1e-3, 4e-3)), "a CPU", "note"
    )
    fig = overlap_comparison(MEASURED, ahead)
    assert fig.layout.xaxis.matches == "x2"
    assert "saves 5.00 ms of 8.00 ms" in fig.layout.title.text
    serial, prefetched = (annotation.text for annotation in fig.layout.annotations)
    assert "serial: 8.00 ms in all" in serial and "1.00 ms exposed" in serial
    assert "prefetched: 3.00 ms in all" in prefetched and "3.00 ms hidden (100%)" in prefetched
    assert "costs" in overlap_comparison(ahead, MEASURED).layout.title.text


def test_a_stall_longer_than_the_lookup_hides_nothing_rather_than_less():
    slow = Timeline("measured", (Span("lookup", "rows", 0, 0.0, 1e-3), Span("stall", "wait", 0, 0.0, 4e-3)))
    assert "none of it hidden: 4.00 ms of stall" in overlap_numbers(slow)
    assert overlap_numbers(Timeline("measured", ())) == "no lookup"
