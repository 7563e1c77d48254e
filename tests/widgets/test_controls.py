import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.synthetic import synthetic_trace
from tests.widgets.fakes import FakeRun, eventually
from workbench.checkpoint import shipped_names
from workbench.errors import InputError
from workbench.widgets import controls
from workbench.widgets.controls import RunControls
from workbench.widgets.memory import KVCacheGrowth

RECORDED = synthetic_trace(47, prompt_length=31, prefill_chunk=13)
LONGER = synthetic_trace(53, prompt_length=31, prefill_chunk=13)
MODEL = SimpleNamespace(config=SimpleNamespace(index_topk=7))


@pytest.fixture
def started(monkeypatch):
    """Runs started from the page; nothing is loaded from disk."""
    runs = []

    def run(model, prompt, **settings):
        runs.append(FakeRun(LONGER, model=model))
        runs[-1].asked = (prompt, settings)
        return runs[-1]

    monkeypatch.setattr(controls, "_run", run)
    monkeypatch.setattr(controls, "_load", lambda name: MODEL)
    yield runs
    for run in runs:
        run.becomes(state="stopped")


def recording():
    """Another trace each time: widgets of the same one share a session, and what was started in it."""
    return replace(RECORDED)


def enabled(widget):
    return [b.description for b in (widget.start, widget.pause, widget.step, widget.stop) if not b.disabled]


def start(widget, runs):
    before = len(runs)
    widget.start.click()
    eventually(lambda: len(runs) > before and not widget._starting and widget.session.run is runs[-1], "the run starts")
    return runs[-1]


def test_start_passes_the_settings_and_every_widget_follows_the_run(started):
    widget = RunControls(recording())
    chart = KVCacheGrowth(widget.session)
    widget.prompt.value, widget.max_new_tokens.value, widget.temperature.value = "  Two <words>", 17, 0.5
    widget.seed.value, widget.prefetch.value, widget.topk.value = 3, "serial", 2
    run = start(widget, started)
    assert run.model is MODEL
    assert run.asked == (
        "  Two <words>",
        {"max_new_tokens": 17, "temperature": 0.5, "topk": 2, "seed": 3, "prefetch": "serial"},
    )
    eventually(lambda: chart.step.value == LONGER.steps - 1, "the chart follows")


def test_buttons_are_enabled_when_they_mean_something(started):
    widget = RunControls(recording())
    assert enabled(widget) == ["Start"]
    run = start(widget, started)
    assert enabled(widget) == ["Pause", "Stop"]
    widget.pause.click()
    assert enabled(widget) == ["Resume", "Step", "Stop"]
    widget.step.click()
    widget.pause.click()
    assert enabled(widget) == ["Pause", "Stop"]
    widget.stop.click()
    assert enabled(widget) == ["Start"]
    assert run.calls == ["pause", "step", "resume", "stop"]


def test_text_and_progress_stream_and_markup_in_them_stays_text(started):
    widget = RunControls(recording())
    run = start(widget, started)
    run.becomes(kind="token", text="a <script>b</script>\n c", progress=0.4)
    run.becomes(kind="token", trace=synthetic_trace(13))
    eventually(lambda: widget.progress.value == 0.4, "progress is shown")
    assert "a &lt;script&gt;b&lt;/script&gt;\n c" in widget.text.value and "pre-wrap" in widget.text.value


def test_the_topk_is_bounded_by_the_model_and_its_limit_means_the_models_own(started):
    widget = RunControls(recording())
    assert (widget.topk.min, widget.topk.max, widget.topk.value) == (1, RECORDED.config["index_topk"], 5)
    widget.topk.value = 500
    run = start(widget, started)
    assert run.asked[1]["topk"] is None
    assert widget.topk.max == widget.topk.value == 7  # the loaded model keeps more


def test_a_given_model_is_used_without_loading(started, monkeypatch):
    monkeypatch.setattr(controls, "_load", None)
    mine = SimpleNamespace(config=SimpleNamespace(index_topk=3))
    widget = RunControls(recording(), model=mine)
    assert widget.model.options == ("synthetic-v4", *controls.SHIPPED)
    assert sorted(controls.SHIPPED) == sorted(shipped_names())
    assert start(widget, started).model is mine


@pytest.mark.parametrize("error", [InputError("no folder <tiny-v9>; give a model"), RuntimeError("bad <weights>")])
def test_an_error_is_one_line_and_the_prompt_stays(started, monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr(controls, "_load", fail)
    widget = RunControls(recording())
    widget.prompt.value = "keep me"
    widget.start.click()
    eventually(lambda: enabled(widget) == ["Start"], "Start comes back")
    line = str(error).replace("<", "&lt;").replace(">", "&gt;")
    assert line in widget.status.value and "aria-live='polite'" in widget.status.value
    assert widget.prompt.value == "keep me" and widget.session.trace.length == 47


def test_an_empty_prompt_starts_nothing(started):
    widget = RunControls(recording())
    widget.prompt.value = " \n"
    widget.start.click()
    assert "prompt is empty" in widget.status.value and not started


def test_a_failed_run_shows_its_reason_and_can_be_started_again(started):
    widget = RunControls(recording())
    run = start(widget, started)
    run.becomes(state="failed", error="out of memory at 1,024 tokens")
    eventually(lambda: "out of memory at 1,024 tokens" in widget.status.value, "the reason is shown")
    assert enabled(widget) == ["Start"]


def test_stop_while_loading_starts_nothing(started, monkeypatch):
    loading, loaded = threading.Event(), threading.Event()

    def load(name):
        loading.set()
        loaded.wait(30)
        return MODEL

    monkeypatch.setattr(controls, "_load", load)
    widget = RunControls(recording())
    widget.start.click()
    assert loading.wait(30) and enabled(widget) == ["Stop"]
    widget.stop.click()
    loaded.set()
    eventually(lambda: enabled(widget) == ["Start"], "Start comes back")
    assert "before the run began" in widget.status.value and not started


def test_every_control_has_a_name_and_a_tooltip():
    widget = RunControls(recording())
    settings = (widget.model, widget.max_new_tokens, widget.temperature, widget.topk, widget.seed, widget.prefetch)
    for control in (widget.prompt, *settings, widget.start, widget.pause, widget.step, widget.stop):
        assert control.description and control.tooltip


def test_widgets_do_not_import_torch():
    modules = "controls, memory, session, timeline"
    code = f"import sys; from workbench.widgets import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_settings_start_from_what_the_run_on_show_was_asked_for():
    asked = {"max_new_tokens": 32, "seed": 9, "temperature": 0.5, "topk": 3}
    widget = RunControls(replace(RECORDED, notes=asked))
    shown = {name: getattr(widget, name).value for name in asked}
    assert shown == asked
    assert RunControls(replace(RECORDED, notes={"seed": "x"})).max_new_tokens.value == 64


def test_a_model_that_attends_to_everything_has_no_topk_and_says_so(started):
    dense = SimpleNamespace(config=SimpleNamespace(index_topk=None))
    widget = RunControls(synthetic_trace(31, kinds=("gqa",)), model=dense)
    assert widget.topk.disabled and widget.topk.description == "No top-k" and "every token" in widget.topk.tooltip
    assert start(widget, started).asked[1]["topk"] is None
    started[-1].becomes(state="done")
    widget.model.value = "tiny-v4"
    eventually(lambda: not widget.start.disabled, "Start comes back")
    assert start(widget, started).model is MODEL
    assert (widget.topk.disabled, widget.topk.description, widget.topk.value) == (False, "Index top-k", 7)
