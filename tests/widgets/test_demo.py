"""The demo without a browser: turning slides, a live run in place of a recording, and coming back from it."""

from __future__ import annotations

import re
import sys
import threading
from dataclasses import replace
from html import escape

import pytest

import workbench as wb
from tests.widgets.fakes import eventually
from workbench.errors import InputError
from workbench.widgets import demo as module
from workbench.widgets.demo import Demo
from workbench.widgets.slides import SCRIPTS, SUBJECTS


def keys(demo: Demo, *types: str) -> None:
    """What the page sends."""
    for kind in types:
        demo.bar._handle_custom_msg({"type": kind}, [])


def test_slides_turn_and_end_at_both_ends():
    demo = Demo("3 minutes")
    first = demo.view
    keys(demo, "next")
    assert demo.index == 1 and demo.bar.slide["number"] == 2 and demo.place.children == (demo.view,) and demo.view is not first
    keys(demo, *["next"] * 9)
    assert demo.index == len(demo.slides) - 1 == demo.bar.slide["count"] - 1
    keys(demo, *["back"] * 9)
    assert demo.index == 0 and demo.view is first  # a picture is made once
    keys(demo, "next", "reset")
    assert demo.index == 0 and demo.view is not first
    keys(demo, "something else")
    assert demo.index == 0


def test_an_unknown_script_is_refused():
    with pytest.raises(InputError, match="'3 minutes', '10 minutes', '45 minutes', got 'forever'"):
        Demo("forever")


@pytest.mark.parametrize("script", list(SCRIPTS))
def test_every_slide_can_be_shown_and_says_numbers_of_its_subject(script):
    demo = Demo(script)
    for index, slide in enumerate(demo.slides):
        demo._go(index)
        told = demo.bar.slide
        assert demo.place.children and told["title"] and told["notes"] and "could not" not in told["status"]
        assert told["can_go_live"] is (slide.subject is not None)
        assert told["state"] == ("recorded" if slide.subject else "modelled")
        assert not re.search(r"\b(nan|inf|None)\b", told["said"])
    assert sum(slide.subject is not None for slide in demo.slides) >= 2


def test_a_slide_about_one_layer_turns_the_shared_view_to_it():
    demo = Demo("45 minutes")
    session = demo.session("needle")
    opening = session.layer
    demo.next()
    assert session.layer == 0 != opening
    demo.back()
    assert session.layer == opening


def test_scripts_are_longer_the_more_time_there_is():
    assert [len(SCRIPTS[name]) for name in ("3 minutes", "10 minutes", "45 minutes")] == sorted(map(len, SCRIPTS.values()))
    assert {s.subject for slides in SCRIPTS.values() for s in slides} - {None} == set(SUBJECTS)


def test_a_demo_starts_without_torch():
    import subprocess

    code = "import sys, workbench as wb; wb.Demo('3 minutes'); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_going_live_swaps_the_recording_and_reset_brings_it_back():
    demo = Demo("10 minutes")
    recorded = demo.session("needle").trace
    keys(demo, "live")
    assert demo.bar.slide["can_go_live"] is False
    eventually(lambda: demo.bar.slide["can_go_live"], "the run is over", 120)
    trace = demo.session("needle").trace
    assert demo.bar.slide["state"] == "live" and "measured" in demo.bar.slide["status"]
    assert trace is not recorded and trace.notes["needle"]["value"] == SUBJECTS["needle"].value
    assert wb.find_needle(trace)["right"]  # it is a real run of a trained model
    demo.next()
    assert "52" in demo.view.value  # made anew from the run
    demo.next()
    assert demo.bar.slide["state"] == "live"  # the same subject
    demo.next()
    assert demo.bar.slide["state"] == "recorded"  # another one
    demo.reset()
    assert demo.bar.slide["state"] == "recorded" and demo.session("needle").trace.label == recorded.label
    assert demo.run is None and demo.index == 0


def test_a_reset_while_a_model_loads_forgets_the_run(monkeypatch):
    loading, go_on = threading.Event(), threading.Event()

    def slow(name):
        loading.set()
        go_on.wait(30)
        return real(name)

    from workbench import checkpoint

    real = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", slow)
    demo = Demo("3 minutes")
    demo.go_live()
    assert loading.wait(30)
    demo.reset()
    go_on.set()
    eventually(lambda: not [t for t in threading.enumerate() if t.name == "workbench-demo"], "the thread ends", 60)
    assert demo.run is None and demo.bar.slide["state"] == "recorded" and demo.bar.slide["can_go_live"]


def test_a_model_that_cannot_be_loaded_leaves_the_recording(monkeypatch):
    subject = replace(SUBJECTS["needle"], model="no-such-model")
    monkeypatch.setitem(module.SUBJECTS, "needle", subject)
    demo = Demo("3 minutes")
    demo.go_live()
    eventually(lambda: demo.bar.slide["can_go_live"], "the button comes back", 60)
    assert "no-such-model" in demo.bar.slide["status"] and "the recording stays" in demo.bar.slide["status"]
    assert demo.bar.slide["state"] == "recorded"


def test_a_picture_that_fails_does_not_stop_the_demo(monkeypatch):
    def fails(_):
        raise RuntimeError("no picture")

    slides = (SCRIPTS["3 minutes"][0], replace(SCRIPTS["3 minutes"][1], view=fails), SCRIPTS["3 minutes"][2])
    monkeypatch.setitem(module.SCRIPTS, "3 minutes", slides)
    demo = Demo("3 minutes")
    demo.next()
    assert demo.place.children == () and "no picture" in demo.bar.slide["status"]
    demo.next()
    assert demo.place.children and "no picture" not in demo.bar.slide["status"]


def test_the_whole_demo_as_html_has_every_slide_and_note():
    demo = Demo("3 minutes")
    html = demo.whole_html()
    assert all(escape(slide.title) in html and escape(slide.notes) in html for slide in demo.slides)
    assert html.count("<details>") == len(demo.slides) and "<button" not in html.replace("<button data-token", "")
