import gzip
import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.profiler_traces import cuda_trace, large_trace
from tests.synthetic import synthetic_trace
from tests.widgets.fakes import FakeRun, eventually
from workbench import chrome_trace
from workbench.cost.fetch import Setting, engram_models, modelled
from workbench.devices import devices
from workbench.errors import InputError
from workbench.schedule import Fetch, plan
from workbench.trace import Span, Timeline
from workbench.widgets import files
from workbench.widgets.timeline import OverlapTimeline
from workbench.widgets.whatif import SCENARIOS, OverlapWhatIf

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


def give(widget, name, data, piece=None):
    """What the page does with a chosen file: send it in pieces, each when asked for."""
    asked = []
    widget.files.send = lambda message, buffers=None: asked.append(message)
    piece = piece or max(1, len(data))
    parts = [data[i : i + piece] for i in range(0, len(data), piece)] or [b""]
    for index, part in enumerate(parts):
        assert index == 0 or asked[-1] == {"type": "next", "id": "7", "index": index}
        widget.files._heard(None, {"type": "piece", "id": "7", "name": name, "index": index, "count": len(parts)}, [part])
    eventually(lambda: not widget.files.busy, "the file is read", timeout_s=300.0)


def title(widget):
    return widget.figure.layout.title.text.replace("<br>", " ")


def test_a_profilers_trace_is_imported_in_pieces_and_joins_the_menu():
    widget = OverlapTimeline(TRACE)
    assert widget.shown.layout.display == "none"  # nothing to choose yet
    data = json.dumps(cuda_trace()).encode()
    give(widget, "cuda.json", gzip.compress(data), piece=100)
    assert "Imported cuda.json" in widget.status.value and widget.shown.value == "cuda.json"
    assert "NVIDIA Imaginary" in title(widget) and widget.shown.layout.display == ""
    table = widget.on_show.table.value
    assert "stream 20: copies" in table and "<td>46.7%</td>" not in table and "<td>47%</td>" in table
    assert "<td>0.150</td><td>0.070</td><td>0.080</td>" in table and "-20.0 to +5.0 us" in table
    assert not widget.files.can_save  # it is somebody else's file
    give(widget, "cuda.json", data)
    assert widget.shown.options == ("this run", "cuda.json", "cuda.json (2)")
    widget.shown.value = "this run"
    assert title(widget).startswith("Step") and widget.files.can_save


def test_an_own_export_comes_back_as_it_was_and_is_called_recorded():
    sender, receiver = OverlapTimeline(TRACE), OverlapTimeline(SERIAL)
    sent = []
    sender.files.send = lambda message, buffers=None: sent.append((message, buffers))
    sender.files._heard(None, {"type": "save", "id": "9"}, [])
    ((message, (data,)),) = sent
    assert message == {"type": "file", "name": "timeline.json", "to": "9"}
    give(receiver, "timeline.json", data)
    assert receiver.timeline.origin == "recorded" and len(receiver.timeline.spans) == len(TRACE.timeline.spans)
    receiver.step.value = 2
    assert "Step 2" in title(receiver) and "recorded on CPU" in title(receiver)
    assert TRACE.steps - 1 == receiver.step.max


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"nonsense", "mine.json is no JSON"), (b"{}", "no Chrome trace"), (b"", "no JSON"), (b"\x1f\x8bx", "damaged")],
)
def test_a_file_that_is_no_trace_is_one_line_and_changes_nothing(data, said):
    widget = OverlapTimeline(TRACE)
    before = widget.on_show.chart
    give(widget, "../../mine.json", data)
    assert said in widget.status.value and widget.on_show.chart is before and not widget.files.busy


def test_a_file_given_up_midway_is_forgotten_and_one_too_large_is_refused(monkeypatch):
    widget = OverlapTimeline(TRACE)
    widget.files.send = lambda *_, **__: None
    first = {"type": "piece", "id": "1", "name": "a.json", "index": 0, "count": 3}
    widget.files._heard(None, first, [b"half"])
    give(widget, "cuda.json", json.dumps(cuda_trace()).encode())
    widget.files._heard(None, first | {"index": 1}, [b"late"])  # of the one given up
    assert widget.shown.options == ("this run", "cuda.json")
    monkeypatch.setattr(files.chrome_trace, "MAX_BYTES", 50)
    widget.files._heard(None, {"type": "piece", "id": "2", "name": "b.json", "index": 0, "count": 2}, [b"x" * 60])
    assert "b.json holds more than" in widget.status.value
    widget.files._heard(None, {"type": "piece"}, [])
    assert "KeyError" in widget.status.value


def test_a_large_trace_reaches_the_page_as_a_small_view_that_zooms():
    widget = OverlapTimeline(TRACE)
    give(widget, "large.json", large_trace(5), piece=2**20)
    view = widget.on_show
    sizes = [len(json.dumps(view.view.outputs))]
    for name in ("Zoom in", "Zoom in", "Later", "Earlier", "Zoom out"):
        view.buttons[name].click()
        sizes.append(len(json.dumps(view.view.outputs)))
    assert max(sizes) < 250_000
    low, high = view.window.value
    assert high - low == pytest.approx(view.window.max / 2) and low == pytest.approx(view.window.max / 4)
    for _ in range(30):
        view.buttons["Zoom in"].click()
    assert view.window.value[1] - view.window.value[0] == pytest.approx(1e-3)
    for _ in range(3):
        view.buttons["Earlier"].click()
    assert view.window.value[0] >= 0
    view.buttons["Whole trace"].click()
    assert view.window.value == pytest.approx((0.0, view.window.max))


@pytest.mark.slow
def test_a_trace_of_50_megabytes_opens():
    data = large_trace(50)
    widget = OverlapTimeline(TRACE)
    give(widget, "large.json", data, piece=2**20)
    assert "(50%)" in title(widget) and len(json.dumps(widget.on_show.view.outputs)) < 250_000
    assert len(widget.on_show.table.value) < 10_000


def test_a_schedule_a_profile_and_a_path_are_shown_too(tmp_path):
    schedule = plan([1e-3, 2e-3], [Fetch(layer=1, gather_s=1.5e-3)])
    assert "modelled; policy prefetch" in title(OverlapTimeline(schedule))
    path = tmp_path / "cuda.json"
    path.write_text(json.dumps(cuda_trace()), encoding="utf-8")
    by_path, by_profile = OverlapTimeline(path), OverlapTimeline(chrome_trace.load(path))
    assert title(by_path) == title(by_profile) and "cuda.json" in title(by_path)
    with pytest.raises(InputError, match="no steps"):
        _ = by_path.step
    with pytest.raises(InputError, match="no file"):
        OverlapTimeline(str(tmp_path / "none.json"))
    with pytest.raises(InputError, match="a widget shows"):
        OverlapTimeline(17)


@pytest.mark.parametrize("ahead", ["prefetched", "prefetch"])
def test_an_experiment_shows_its_runs_and_the_two_that_matter_side_by_side(ahead):
    timelines = {"serial": SERIAL, ahead: PREFETCHED, "compute only": SERIAL}
    result = SimpleNamespace(timelines=timelines, hidden_fraction=0.667, saved_fraction=0.5)
    widget = OverlapTimeline(result)
    assert widget.shown.options == ("serial against prefetched", *timelines)
    assert "saves 2.00 ms of 5.00 ms" in title(widget)
    assert (
        "1 - stall / lookup: 67%" in widget.on_show.numbers.value
        and "saved, of the shorter of compute and lookup run alone: 50%" in widget.on_show.numbers.value
    )
    widget.shown.value = ahead
    assert "2.00 ms hidden (67%)" in title(widget)
    several = OverlapTimeline(SimpleNamespace(timelines=[SERIAL, PREFETCHED]))
    assert several.shown.options == ("1, measured", "2, measured")
    named = OverlapTimeline(timelines)
    assert named.shown.options == widget.shown.options and named.on_show.numbers.value == ""
    for wrong in ({}, {"serial": "not one"}):
        with pytest.raises(InputError, match="must hold Timelines"):
            OverlapTimeline(SimpleNamespace(timelines=wrong))


def test_the_modelled_pass_opens_beside_any_timeline_and_says_that_it_is_modelled():
    widget = OverlapTimeline(TRACE)
    assert widget.what_if is None and widget.what_if_place.children == ()  # made when first asked for
    widget.break_it.value = True
    what_if = widget.what_if
    assert widget.what_if_place.children == (what_if,)
    texts = (what_if.figure.layout.title.text, what_if.curve.layout.title.text, what_if.numbers.value, what_if.status.value)
    assert all("modelled" in text.lower() for text in texts)
    assert {s.origin for s in what_if.schedule.timeline.spans} == {"modelled"}
    widget.break_it.value = False
    assert widget.what_if_place.children == ()
    widget.break_it.value = True
    assert widget.what_if is what_if


def test_every_scenario_but_the_first_breaks_the_overlap():
    widget = OverlapWhatIf()
    hidden = {}
    for name in SCENARIOS:
        widget.buttons[name].click()
        hidden[name] = widget.schedule.hidden_fraction
        assert (widget.schedule.stall_s > 0) == (name != "It hides")
        shaded = [shape for shape in widget.figure.layout.shapes if shape.type == "rect"]
        assert bool(shaded) == (name != "It hides")
        assert f"{max(0, hidden[name]):.0%} of the fetching is hidden" in widget.status.value
    assert hidden.pop("It hides") == 1.0 and max(hidden.values()) < 0.9


def test_the_controls_of_a_what_if_are_those_of_its_setting():
    widget = OverlapWhatIf()
    widget.model.value, widget.device.value = "v4.1-flash", "b200"
    widget.layer.value, widget.tokens.value, widget.threads.value, widget.hit_rate.value = 1, 512, 3, 25
    expected = Setting(
        model=engram_models["v4.1-flash"], device=devices["b200"], tokens=512, threads=3, hit_rate=0.25, layers=(1, 14)
    )
    assert widget.setting == expected and widget.schedule.total_s == modelled(expected).total_s
    widget.layer.value = 14
    assert widget.setting.layers == (14,)
    worse = []
    for way in ("NVLink-C2C", "PCIe 3.0 x16", "NVMe Gen4"):
        widget.layer.value, widget.tokens.value, widget.way.value = 1, 131072, way
        worse.append(widget.schedule.stall_s)
    assert worse == sorted(worse) and worse[0] < worse[-1]


def test_a_setting_that_cannot_be_is_one_line_and_the_charts_stay():
    widget = OverlapWhatIf()
    before = widget.figure
    widget.device.value = "ascend-910c"  # whose link nobody has published
    assert "no rate is known for the host link of Ascend 910C" in widget.status.value and widget.figure is before
    widget.way.value = "PCIe 4.0 x16"
    assert widget.figure is not before and "is hidden" in widget.status.value
    widget.path.value = "uva"
    widget.way.value = "NVMe Gen5"
    assert "cannot read rows from a drive" in widget.status.value


def test_the_script_for_files_stays_small_and_in_the_package():
    assert len(files.TraceFiles._esm) < 5_000


def test_file_buttons_are_made_when_asked_for_and_anew_after_closing():
    widget = OverlapTimeline(TRACE)
    assert widget._files is None and widget.files_place.children == ()
    widget.exchange.value = True
    first = widget.files
    assert widget.files_place.children == (first,) and first.can_save
    widget.exchange.value = False
    assert widget.files_place.children == ()
    widget.exchange.value = True
    assert widget.files is not first
