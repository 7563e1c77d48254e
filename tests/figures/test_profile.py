import json

import numpy as np
import pytest

from tests.profiler_traces import cuda_trace, document, large_trace, on_stream, span
from workbench import chrome_trace
from workbench.figures.profile import EXPOSED, MOST_NAMED, MOST_TRACKS, profile_chart
from workbench.widgets.render import as_output

MOST_BYTES = 250_000


def read(trace, name="mine.json"):
    return chrome_trace.loads(trace if isinstance(trace, bytes) else json.dumps(trace).encode(), name)


@pytest.fixture(scope="module")
def cuda():
    return read(cuda_trace(), "a <b>.json")


@pytest.fixture(scope="module")
def large():
    return read(large_trace(4))


def whole(profile):
    return profile_chart(profile, 0.0, profile.length_s)


def sent(fig):
    return json.loads(json.dumps(as_output(fig)))["data"]["application/vnd.plotly.v1+json"]


def drawn_area(trace):
    """Milliseconds times thickness of the stretches of a filled path: five values each, the last a gap."""
    x, y = np.array(trace.x, float).reshape(-1, 5), np.array(trace.y, float).reshape(-1, 5)
    return float(np.sum((x[:, 1] - x[:, 0]) * (y[:, 2] - y[:, 1])))


def test_few_spans_are_drawn_one_by_one_and_named(cuda):
    bars = [t for t in whole(cuda).data if t.type == "bar"]
    assert sum(len(bar.x) for bar in bars) == cuda.spans
    kernels = next(bar for bar in bars if bar.name == "kernels")
    assert kernels.base == pytest.approx([0.03, 0.22]) and kernels.x == pytest.approx([0.1, 0.09])
    assert kernels.hovertext[0].startswith("gemm&lt;128, 64&gt;<br>0.030 to 0.130 ms")
    assert list(whole(cuda).layout.yaxis.ticktext)[:2] == ["stream 7: kernels", "stream 7: copies"]


def test_an_inner_call_is_drawn_thinner_and_after_the_one_that_made_it(cuda):
    thread = [t for t in whole(cuda).data if t.type == "bar"][-1]
    op, *calls = thread.width
    assert thread.hovertext[0].startswith("aten::mm") or max(thread.width) == op
    assert min(calls) < op


def test_what_no_kernel_covered_is_hatched(cuda):
    exposed = [t for t in whole(cuda).data if t.name == EXPOSED]
    assert len(exposed) == 2 and all(t.fillpattern.shape for t in exposed)
    ends = np.array(exposed[1].x, float).reshape(-1, 5)  # stream 20: 1220..1300, from 1090
    assert ends[0, 0] == pytest.approx(0.13, abs=1e-3) and ends[-1, 1] == pytest.approx(0.21, abs=1e-3)


def test_the_title_says_what_where_and_how_far_the_clocks_may_be_apart(cuda):
    title = whole(cuda).layout.title.text.replace("<br>", " ")
    assert "a &lt;b&gt;.json: copies 0.16 ms = 0.07 ms under kernels (44%) + 0.09 ms exposed" in title
    assert "recorded by a profiler on NVIDIA Imaginary, imported" in title
    assert "alignment error of the device's clock: -20.0 to +5.0 us" in title


def test_arrows_lead_from_launch_to_kernel(cuda):
    arrows = next(t for t in whole(cuda).data if t.name == "launches")
    pairs = list(zip(arrows.x[0::3], arrows.x[1::3], arrows.y[0::3], arrows.y[1::3], strict=True))
    assert len(pairs) == 5 and (pytest.approx(0.01), pytest.approx(0.03), 5, 0) in pairs


def test_many_spans_become_stretches_as_thick_as_they_are_busy(large):
    fig = whole(large)
    assert not [t for t in fig.data if t.type == "bar"]
    kernels, copies, exposed, _thread = (t for t in fig.data if t.fill == "toself")
    length, row = 1e3 * large.length_s, 0.72
    busy = {x.name: 1e3 * x.busy_s for x in large.overlaps}
    # Shares are rounded up to sixteenths, so what is drawn is up to that much more.
    for drawn, real in ((kernels, busy["stream 7: kernels"]), (copies, busy["stream 20: copies"])):
        assert real <= drawn_area(drawn) / row * (1 + 1e-3) and drawn_area(drawn) / row <= real + length / 16 + 1e-3 * length
    assert drawn_area(exposed) == pytest.approx(drawn_area(copies) / 2, abs=row * length / 16)


def test_zooming_in_names_the_spans_of_the_window_only(large):
    fig = profile_chart(large, 0.05, 0.051)
    kernels = next(t for t in fig.data if t.name == "kernels")
    assert kernels.type == "bar" and len(kernels.x) == 10 and min(kernels.base) >= 50.0
    assert tuple(fig.layout.xaxis.range) == (50.0, 51.0)


def test_a_long_span_that_began_before_the_window_is_still_seen():
    long = on_stream("kernel", "long", 0, 1_000_000, 7, 1)
    short = [on_stream("kernel", "short", 10 * i, 1, 7, i + 2) for i in range(1000)]
    fig = profile_chart(read(document([long, *short])), 0.5, 0.6)
    (bar,) = (t for t in fig.data if t.type == "bar")
    assert len(bar.x) == 1 and "long" in bar.hovertext[0] and bar.x[0] == pytest.approx(100.0)


def crowded():
    """The worst case for a view: many tracks, each full of spans that leave every other pixel half empty."""
    events = []
    for stream in range(30):
        kind = "gpu_memcpy" if stream % 2 else "kernel"
        events += [on_stream(kind, "n" * 300, 100 * i + 7 * stream, 10 + i % 50, stream, i) for i in range(1500)]
    return read(document(events))


@pytest.mark.parametrize("share", [1.0, 0.3, 0.05, 0.01])
def test_every_view_stays_within_its_bytes(large, share):
    for profile in (large, crowded()):
        fig = profile_chart(profile, 0.0, profile.length_s * share)
        assert len(json.dumps(sent(fig))) < MOST_BYTES
        assert len(fig.layout.yaxis.ticktext) <= MOST_TRACKS
    assert "10 quieter tracks not drawn" in fig.layout.title.text.replace("<br>", " ")


def test_a_view_full_of_named_spans_stays_within_its_bytes():
    events = [
        on_stream("kernel" if stream % 2 else "gpu_memcpy", "k" * 300, 10 * i, 6, stream, i)
        for stream in range(MOST_TRACKS)
        for i in range(MOST_NAMED)
    ]
    assert len(json.dumps(sent(whole(read(document(events)))))) < MOST_BYTES


def test_threads_alone_say_that_there_is_no_device():
    fig = whole(read([span("cpu_op", "aten::mm", 0, 5)]))
    assert "host threads alone" in fig.layout.title.text
