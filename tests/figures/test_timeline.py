import json
import random

import numpy as np
import pytest

from workbench.cost.fetch import Setting, engram_models, modelled
from workbench.devices import devices, drives
from workbench.figures.timeline import overlap_comparison, overlap_numbers, overlap_timeline, step_lengths
from workbench.figures.whatif import hidden_chart
from workbench.trace import Span, Timeline
from workbench.widgets.render import as_output

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


def test_all_steps_stand_below_a_chosen_one_each_with_its_length_and_stall():
    fig = overlap_timeline(MEASURED, 1, chosen="step 1: token 7")
    rest, stall, unseen = fig.data[-3:]
    assert {bar.xaxis for bar in fig.data[-3:]} == {"x2"} and list(unseen.customdata) == [0, 1]
    assert list(rest.y) == pytest.approx([1.0, 5.0]) and list(stall.y) == pytest.approx([0.0, 1.0])
    assert list(stall.base) == pytest.approx([1.0, 5.0]) and list(unseen.hovertext) == [
        "step 0: 1.00 ms", "step 1: 6.00 ms, 1.00 ms of it stall",
    ]  # fmt: skip
    assert {n for bar in fig.data[:-4] for n in bar.customdata} == {1}
    assert fig.layout.annotations[-1].text == "step 1: token 7" and fig.layout.shapes[-1].x0 == 1
    lanes, steps = fig.layout.yaxis.domain, fig.layout.yaxis2.domain
    assert lanes[1] == 1 and steps[0] == 0 and steps[1] < lanes[0]
    plain = overlap_timeline(MEASURED, 1)
    assert "xaxis2" not in plain.layout.to_plotly_json() and plain.layout.height < fig.layout.height


def test_a_modelled_span_does_not_lengthen_a_measured_step():
    far = Span("stall", "modelled", 1, 7e-3, 20e-3, "modelled")
    assert step_lengths(Timeline("measured", (*SPANS, far))) == step_lengths(MEASURED)
    assert step_lengths(Timeline("measured", ())) == []


def test_many_steps_are_pooled_and_the_longest_of_each_pool_is_offered():
    spans = tuple(Span("compute", "all", n, n * 1.0, n + (0.9 if n % 10 == 4 else 0.01)) for n in range(4000))
    fig = overlap_timeline(Timeline("measured", spans), 3999, chosen="step 3999")
    unseen = fig.data[-1]
    assert len(unseen.x) == 800 and unseen.width == 5
    assert 4 in unseen.customdata and 14 in unseen.customdata and 24 in unseen.customdata
    assert unseen.x[0] == 2 and fig.layout.xaxis2.range == (-0.5, 3999.5)
    assert len(json.dumps(as_output(fig))) < 125_000


def test_one_long_step_does_not_press_the_others_flat_and_the_axis_says_so():
    spans = tuple(Span("compute", "all", n, 10.0 * n, 10.0 * n + (9.0 if n == 0 else 0.02)) for n in range(9))
    fig = overlap_timeline(Timeline("measured", spans), 3, chosen="step 3")
    assert fig.layout.yaxis2.range[1] == pytest.approx(80.0) and "cut off" in fig.layout.xaxis2.title.text
    assert "cut off" not in overlap_timeline(Timeline("measured", spans[1:]), 3, chosen="step 3").layout.xaxis2.title.text


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


def test_a_copy_counts_as_part_of_the_fetch_whose_lanes_may_overlap():
    spans = (Span("lookup", "a", 0, 0.0, 3e-3), Span("transfer", "b", 0, 2e-3, 4e-3), Span("stall", "c", 0, 3e-3, 4e-3))
    assert "lookup and copy 4.00 ms = 3.00 ms hidden (75%) + 1.00 ms exposed" in overlap_numbers(Timeline("modelled", spans))


SETTING = Setting(model=engram_models["v4.1-flash"], device=devices["h100"], tokens=4096, drive=drives["nvme-gen4"])


def test_a_modelled_pass_has_arrows_from_ids_to_hash_to_copy_to_layer():
    fig = overlap_timeline(modelled(SETTING).timeline, 0, "What if")
    arrows = lane(fig, "waits for")
    ways = set(zip(arrows.y[0::3], arrows.y[1::3], strict=True))
    assert ways == {("ids", "lookup"), ("lookup", "transfer"), ("transfer", "stall"), ("transfer", "compute")}
    title = fig.layout.title.text.replace("<br>", " ")
    assert title.startswith("What if: ") and "modelled on H100 SXM (virtual clock)" in title and "rows from NVMe Gen4" in title
    lookups = lane(fig, "lookup")
    shapes = {text.split("<br>")[0]: shape for text, shape in zip(lookups.hovertext, lookups.marker.pattern.shape, strict=True)}
    assert shapes["layer 1 hash"] and not shapes["layer 1 gather"]  # told apart without colour


def random_spans(seed):
    draw = random.Random(seed)
    for i in range(40):
        start = draw.random()
        origin = draw.choice(["measured", "modelled", "recorded"])
        yield Span(draw.choice(["compute", "lookup", "x"]), f"{origin} {i}", 0, start, start + draw.random(), origin)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("origin", ["measured", "modelled", "recorded"])
def test_no_lane_holds_spans_of_two_origins(seed, origin):
    fig = overlap_timeline(Timeline(origin, tuple(random_spans(seed))), 0)
    bars = [bar for bar in fig.data if bar.type == "bar"]
    assert sum(len(bar.x) for bar in bars) == 40
    for bar in bars:
        origins = {text.split()[0] for text in bar.hovertext}
        assert len(origins) <= 1
        assert len(set(bar.y)) <= 1
        if origins:
            (own,) = origins
            assert bar.name.endswith(f"({own})") == (own != origin)


def test_a_crowded_step_is_drawn_by_how_busy_each_pixel_is():
    rng = np.random.default_rng(0)
    starts = np.sort(rng.uniform(0, 1, 20_000))
    spans = tuple(Span("compute", f"k{i}", 0, t, t + 1e-5, after=(f"k{i - 1}",)) for i, t in enumerate(starts.tolist()))
    stalls = tuple(Span("stall", "w", 0, 1e-4 * i, 1e-4 * i + 1e-6) for i in range(5000))
    fig = overlap_timeline(Timeline("measured", (*spans, *stalls), "CPU"), 0)
    assert len(json.dumps(as_output(fig))) < 250_000
    compute = lane(fig, "compute")
    assert len(compute.x) <= 800 and 0.1 < np.average(compute.width, weights=compute.x) / 0.6 < 0.35  # 18 % is busy
    assert "busy" in compute.hovertext[0] and "measured" in compute.hovertext[0]


def test_lane_names_are_escaped():
    fig = overlap_timeline(Timeline("recorded", (Span("<a href='x'>", "k", 0, 0.0, 1.0, "recorded"),)), 0)
    assert fig.layout.yaxis.categoryarray[-1] == "&lt;a href='x'&gt;" == fig.data[-2].y[0]


def test_the_hidden_curves_agree_with_the_clock_and_mark_the_setting():
    fig = hidden_chart(SETTING, [drives["nvme-gen4"], drives["nvme-gen5"]], (1, 64, 4096))
    gen4 = next(t for t in fig.data if t.name == "NVMe Gen4")
    here = next(t for t in fig.data if t.name == "this setting")
    assert gen4.y[-1] == here.y[0] == pytest.approx(modelled(SETTING).hidden_fraction)
    assert len({t.line.dash for t in fig.data if t.mode == "lines"}) == 2  # told apart without colour
    assert "modelled" in fig.layout.title.text
