import threading
from dataclasses import replace

import pytest

from tests.synthetic import synthetic_trace
from tests.widgets.fakes import FakeRun, eventually
from workbench.errors import InputError
from workbench.trace import Span, Timeline
from workbench.widgets.timeline import OverlapTimeline

TRACE = synthetic_trace(47, prompt_length=31, prefill_chunk=13)
SERIAL = Timeline(
    "measured",
    (Span("compute", "layer 0", 0, 0.0, 2e-3), Span("lookup", "rows", 0, 2e-3, 5e-3), Span("stall", "wait", 0, 2e-3, 5e-3)),
    "CPU",
)
PREFETCHED = Timeline(
    "measured",
    (Span("compute", "layer 0", 0, 0.0, 2e-3), Span("lookup", "rows", 0, 0.0, 3e-3), Span("stall", "wait", 0, 2e-3, 3e-3)),
    "CPU",
    "a table made for <timing>",
)


def settled(widget):
    return widget.stop.disabled and not widget.start.disabled


def test_moving_the_slider_shows_that_steps_lookup():
    early, late = Span("lookup", "rows", 0, 0.0, 0.5e-3), Span("lookup", "rows", 1, 1.8e-3, 2.2e-3)
    compute = Span("compute", "layer 0", 1, 1.5e-3, 2.5e-3)
    widget = OverlapTimeline(Timeline("modelled", (early, compute, late)))
    widget.step.value = 1
    lookup = next(bar for bar in widget.figure.data if bar.name == "lookup")
    assert lookup.base[0] == pytest.approx(0.3) and lookup.x[0] == pytest.approx(0.4)  # ms since the step began
    assert "modelled" in widget.figure.layout.title.text


def test_a_model_without_engram_says_which_one_has_it():
    plain = {name: value for name, value in TRACE.config.items() if not name.startswith("engram")}
    compute_only = Timeline("measured", tuple(s for s in TRACE.timeline.spans if s.lane == "compute"))
    assert "tiny-v4-engram" in OverlapTimeline(replace(TRACE, config=plain, timeline=compute_only)).numbers.value
    assert "tiny-v4-engram" not in OverlapTimeline(TRACE).numbers.value


def test_comparing_shows_both_runs_their_note_and_how_small_the_own_lookup_is():
    widget = OverlapTimeline(TRACE, compare=lambda progress, should_stop: (SERIAL, PREFETCHED))
    widget.start.click()
    eventually(lambda: settled(widget), "the comparison ends")
    assert "saves 2.00 ms of 5.00 ms" in widget.comparison.layout.title.text
    assert widget.comparison_view.outputs
    assert "a table made for &lt;timing&gt;" in widget.comparison.layout.title.text
    lookup = 1e3 * TRACE.timeline.lookup_s
    assert f"own lookup took {lookup:.2f} ms of" in widget.status.value


def test_a_comparison_reports_progress_and_can_be_stopped():
    stopped = threading.Event()

    def compare(progress, should_stop):
        progress(0.25)
        while not should_stop():
            stopped.wait(0.005)
        stopped.set()

    widget = OverlapTimeline(TRACE, compare=compare)
    widget.start.click()
    assert widget.start.disabled
    eventually(lambda: widget.progress.value == 0.25, "progress is shown")
    widget.stop.click()
    eventually(lambda: settled(widget), "the comparison ends")
    assert stopped.is_set() and "Stopped" in widget.status.value and not widget.comparison_view.outputs


@pytest.mark.parametrize("error", [InputError("no room for the table"), ZeroDivisionError("no <time>")])
def test_a_failed_comparison_is_one_line_and_can_be_tried_again(error):
    def compare(progress, should_stop):
        raise error

    widget = OverlapTimeline(TRACE, compare=compare)
    widget.start.click()
    eventually(lambda: settled(widget), "the button comes back")
    assert str(error).replace("<", "&lt;").replace(">", "&gt;") in widget.status.value


def test_a_recording_alone_and_a_working_run_cannot_be_compared_and_say_why():
    recorded, live = OverlapTimeline(TRACE), OverlapTimeline(FakeRun(TRACE))
    recorded.start.click()
    live.start.click()
    assert "start a run first" in recorded.status.value and "pause or stop" in live.status.value
    live.session.run.becomes(state="stopped")
