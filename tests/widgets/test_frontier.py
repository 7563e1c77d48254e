"""Training a point from the notebook, without a browser: it runs in the background, stops, and lands in the picture."""

from __future__ import annotations

import threading

import pytest

from tests.test_frontier import point
from tests.widgets.fakes import eventually
from workbench.errors import WorkbenchError
from workbench.training import sweep
from workbench.widgets.frontier import TrainYourOwn

POINTS = [point(0.9), point(0.5, ratio=8)]


@pytest.fixture
def widget():
    made = TrainYourOwn(POINTS)
    yield made
    made.end()
    assert made.wait(60), "the training went on"


def own(widget):
    return [trace for trace in widget.figure.data if trace.name == "yours"]


def test_the_picture_is_there_at_once_and_follows_its_controls(widget):
    assert len(widget.view.outputs) == 1 and not own(widget)
    first = widget.figure.layout.title.text
    widget.length.value, widget.storage.value = 65_536, "fp32"
    assert "65,536 symbols, fp32" in widget.figure.layout.title.text != first
    widget.quality.value = "text"
    assert widget.figure.layout.title.text.startswith("Loss on filler")


def test_a_point_trains_in_the_background_and_lands_in_the_picture(widget, monkeypatch):
    go_on, variants = threading.Event(), []

    def train_point(variant, *, progress, stop):
        variants.append(variant)
        progress("step 1/2 text 3.00 reads 3.00", 0.5)
        assert go_on.wait(30)
        return point(0.7, ratio=variant.ratio, topk=variant.topk, hca_share=variant.hca_share, engram=variant.engram), None

    monkeypatch.setattr(sweep, "train_point", train_point)
    widget.ratio.value, widget.topk.value, widget.share.value, widget.engram.value, widget.seed.value = 16, 2, 0.5, True, 1
    widget.train.click()
    eventually(lambda: "step 1/2" in widget.status.value, "progress")
    assert widget.bar.value == 0.5 and widget.train.disabled and not widget.stop.disabled and not own(widget)
    widget.start()  # a second press changes nothing
    go_on.set()
    assert widget.wait(60)
    assert [v.name for v in variants] == ["m16-k2-hca50-engram-seed1"]
    assert [list(trace.y) for trace in own(widget)] == [[70.0], [70.0]] and "recalled 70.0%" in widget.status.value
    assert not widget.train.disabled and widget.stop.disabled


def test_a_real_point_of_two_steps_replaces_the_one_of_its_name(widget, monkeypatch):
    monkeypatch.setattr(sweep, "SCORED_BATCHES", 1)
    widget.steps.options = [("2", 2)]
    for _ in range(2):
        widget.start()
        assert widget.wait(120)
    assert len(widget.own) == 1 and widget.own[0].variant.steps == 2 and len(own(widget)) == 2
    assert widget.own[0].scores["questions"] > 20


def test_stop_ends_a_training_and_keeps_nothing(widget):
    widget.start()
    eventually(lambda: "step" in widget.status.value, "a first step", 120)
    widget.stop.click()
    assert widget.wait(120) and "was stopped after" in widget.status.value
    assert widget.own == [] and not widget.train.disabled


def test_a_failure_is_shown_escaped_and_the_button_works_again(widget, monkeypatch):
    def fails(variant, **_):
        raise WorkbenchError("training diverged: <loss>")

    monkeypatch.setattr(sweep, "train_point", fails)
    widget.start()
    assert widget.wait(60) and "training diverged: &lt;loss&gt;" in widget.status.value and not widget.train.disabled


def test_settings_that_do_nothing_are_off(widget):
    widget.ratio.value, widget.share.value = 16, 1.0
    assert widget.ratio.disabled and widget.topk.disabled and widget.variant.name == "hca100-seed3"
    widget.share.value = 0.0
    assert not widget.ratio.disabled and widget.variant.ratio == 16
