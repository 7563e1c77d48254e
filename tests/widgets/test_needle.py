"""Hide-a-needle without a browser: what its buttons do, which views follow, and what its tables say."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import datetime

import pytest

from tests.synthetic import synthetic_trace
from tests.widgets.fakes import FakeRun, eventually
from workbench.checkpoint import load
from workbench.needle import hide_needle, sample_text
from workbench.trace import Trace
from workbench.widgets.attention import AttentionExplorer
from workbench.widgets.memory import KVCacheGrowth
from workbench.widgets.needle import MAX_UPLOAD_BYTES, HideANeedle, NeedleAnswer, NeedleRates
from workbench.widgets.session import session_of

VIEW_BYTES = 250_000


@pytest.fixture(scope="module")
def model():
    return load("tiny-v4", device="cpu")


@pytest.fixture
def widget(model):
    made = HideANeedle(replace(Trace.load("needle")), model)
    made.tokens.value = 256
    return made


def ask(widget):
    widget.ask.click()
    eventually(lambda: not widget.ask.disabled, "the model answers")


def text(html: str) -> str:
    """What a reader sees of some HTML, cells apart."""
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", html))


def test_a_recording_shows_its_answer_at_once_and_opens_where_the_needle_was_looked_up(model):
    trace = replace(Trace.load("needle"))
    widget = HideANeedle(trace, model)
    note = trace.notes["look_at"]
    assert "“37”: right" in text(widget.result.value) and "recorded" in widget.result.value
    assert (widget.session.token, widget.session.layer) == (note["token"], note["layer"])


def test_hide_and_ask_runs_the_model_and_every_view_turns_to_the_needle(widget):
    explorer, growth = AttentionExplorer(widget.session), KVCacheGrowth(widget.session)
    widget.key.value, widget.value.value, widget.depth.value = "river", "52", 40
    ask(widget)
    shown = text(widget.result.value)
    assert "“52”: right" in shown and "measured on CPU" in shown and "kept (top" in shown
    trace = widget.session.trace
    assert trace is widget.session.run.trace and trace.length == 256 and growth.session.trace is trace
    assert trace.token_texts[widget.session.token].strip() in ("is", "river") and explorer.token.value == widget.session.token
    assert "".join(trace.token_texts[:256]).count("The code of river is") == 2


def test_an_untrained_model_is_asked_the_same_when_wanted(widget):
    widget.compare.value = True
    ask(widget)
    shown = text(widget.result.value)
    assert "(toy, trained)" in shown and "(toy, untrained)" in shown and shown.count("right") + shown.count("wrong") == 2
    assert "untrained" not in widget.session.trace.label  # the pictures stay with the trained one


def test_fewer_kept_entries_are_what_the_run_keeps(widget):
    widget.topk.value = 2
    ask(widget)
    assert "(top 2)" in widget.result.value and widget.session.trace.notes["topk"] == 2


def test_a_needle_given_is_shown_in_table_and_fields(model):
    from workbench.live import run

    needle = hide_needle(model, sample_text(), "piano", "64", 0.25, 256)
    live = run(model, needle.ids, max_new_tokens=1)
    live.wait()
    widget = HideANeedle(live, model, needle)
    assert (widget.key.value, widget.value.value, widget.tokens.value) == ("piano", "64", 256)
    assert "“64”" in widget.result.value and "The code of piano is 64." in widget.sentence.value
    assert abs(widget.depth.value - 25) <= 5


def test_what_cannot_be_hidden_is_one_line_and_the_button_comes_back(widget):
    before = widget.session.trace
    widget.value.value = " "
    ask(widget)
    assert "give the needle a key and a value" in widget.result.value and widget.session.trace is before


def test_an_unexpected_failure_is_told_and_the_button_comes_back(widget, monkeypatch):
    monkeypatch.setattr("workbench.needle.hide_needle", lambda *_: 1 / 0)
    ask(widget)
    assert "could not be asked for (ZeroDivisionError" in widget.result.value


def test_a_run_still_going_is_stopped_first(model):
    going = FakeRun(synthetic_trace(47), model=model)
    widget = HideANeedle(going, model)
    widget.tokens.value = 128
    ask(widget)
    assert going.calls == ["stop"] and "right" in widget.result.value


def test_stop_ends_the_run_and_says_what_is_missing(widget, monkeypatch):
    from workbench.live import LiveRun

    monkeypatch.setattr(LiveRun, "_may_go_on", stoppable)
    widget.ask.click()
    eventually(lambda: widget._asked is not None, "the run begins")
    widget.stop.click()
    eventually(lambda: not widget.ask.disabled, "the run ends")
    assert "stopped before it answered" in widget.result.value


def stoppable(run) -> bool:
    """Instead of going on, a run waits for Stop."""
    with run._control:
        run._control.wait_for(lambda: run._wanted == "stop", timeout=30)
    return False


def upload(widget, content: bytes, name: str = "my <b>.txt") -> None:
    file = {"name": name, "type": "text/plain", "size": len(content), "content": memoryview(content)}
    widget.upload.value = (file | {"last_modified": datetime(2026, 1, 1)},)


def test_a_text_file_replaces_the_text(widget):
    upload(widget, "Grüße ".encode() + b"\xff")  # not quite UTF-8
    assert widget.text.value == "Grüße \ufffd" and "Loaded my &lt;b&gt;.txt." in widget.result.value


def test_a_file_too_large_is_refused_and_the_text_stays(widget):
    before = widget.text.value
    upload(widget, b"a" * (MAX_UPLOAD_BYTES + 1))
    assert widget.text.value == before and "at most 1,000,000 are read" in widget.result.value


def test_markup_in_key_and_code_is_shown_as_text(widget):
    widget.key.value, widget.value.value = "<img src=x>", "<script>"
    assert "<img" not in widget.sentence.value and "&lt;script&gt;" in widget.sentence.value
    ask(widget)
    assert "<script" not in widget.result.value and "<img" not in widget.result.value


def test_the_answer_of_a_hostile_trace_is_escaped():
    trace = Trace.load("needle")
    nasty = replace(trace, model="<i>evil</i>", token_texts=(*trace.token_texts[:-2], "<u>", "<s>x"))
    html = NeedleAnswer(nasty).value
    assert "<i>" not in html and "<u>" not in html and "<s>" not in html and "&lt;s&gt;x" in html


def test_every_rate_stands_beside_its_chance():
    rates = {"model": "m (toy, trained)", "topk": 2, "questions": 37, "recall": 0.97, "recall_chance": 1 / 90}
    rates |= {"hits": {"1 key": 0.3, "1 end": 1.0}, "hit_chance": 0.12}
    shown = text(NeedleRates({"<trained>": rates}).value)
    assert "m (toy, trained)" in shown and "&lt;trained&gt; top 2 37 97% 1.1% 30% 100% 12%" in shown
    assert "layer 1 keeps it, at the key layer 1 keeps it, at the end chance" in shown


def test_the_view_stays_small(widget):
    sent = sum(len(str(state)) for w in (widget, *widget.children) for state in (w.get_state(),))
    assert sent < VIEW_BYTES


@pytest.mark.parametrize("noted", [None, "here", {"token": 10**6, "layer": 99}, {"token": "3", "layer": "1"}, {"token": None}])
def test_notes_that_point_nowhere_open_a_recording_where_its_prompt_ends(noted):
    trace = synthetic_trace(47, prompt_length=31)
    session = session_of(replace(trace, notes={"look_at": noted}))
    assert (session.token, session.layer) == (30, 1)
