"""Stepper without a browser: which walk and step it shows, how they are chosen, what it says when there is none."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from tests.model.test_kv_cache import GQA
from tests.slow_reference import CONFIG, random_model
from tests.synthetic import synthetic_trace
from tests.widgets.fakes import FakeRun, eventually
from workbench.checkpoint import load
from workbench.errors import InputError
from workbench.figures.walk import walk_html
from workbench.live import run
from workbench.training.recipes import _shared_stream
from workbench.walk import walk_token, walkable
from workbench.widgets.session import session_of
from workbench.widgets.stepper import Stepper

VIEW_BYTES = 250_000
IDS = [int(i) for i in np.random.default_rng(5).integers(0, 12, 47)]


def finished(model, ids=IDS):
    live = run(model, ids, max_new_tokens=0)
    live.wait()
    assert live.error is None
    return live


@pytest.fixture(scope="module")
def model():
    return random_model(replace(CONFIG))


@pytest.fixture
def stepper(model):
    return Stepper(finished(model), topic="csa")


def title(stepper):
    return re.search(r"<h4[^>]*>(.*?)</h4>", stepper.view.html).group(1)


def said(stepper):
    return re.sub("<[^>]+>", "", stepper.message.value)


def test_a_finished_run_is_walked_at_its_sessions_token_and_layer(stepper, model):
    session = stepper.session
    assert stepper.walk.token == session.token == stepper.token.value and stepper.walk.layer == session.layer
    text = session.trace.token_texts[session.token]
    expected = walk_token(model, IDS, "csa", layer=session.layer, token=session.token)
    assert [s.title for s in stepper.walk.steps] == [s.title for s in expected.steps]
    np.testing.assert_array_equal(stepper.walk.steps[-1].values[-1].array, expected.steps[-1].values[-1].array)
    assert stepper.view.html == walk_html(stepper.walk, 0, text) and said(stepper) == ""
    assert {value for _, value in stepper.topic.options} == set(walkable(model))


def test_next_back_arrow_keys_a_click_and_the_slider_choose_the_step(stepper):
    last = len(stepper.walk.steps) - 1
    assert stepper.step.max == stepper.play.max == last and stepper.back.disabled and not stepper.next.disabled
    stepper.next.click()
    assert stepper.step.value == 1 and title(stepper).startswith("2 of ") and not stepper.back.disabled
    stepper.view._handle_custom_msg({"type": "move", "by": 1}, [])
    assert title(stepper).startswith("3 of ")
    stepper.back.click()
    stepper.view._handle_custom_msg({"type": "move", "by": -1}, [])
    stepper.view._handle_custom_msg({"type": "move", "by": -1}, [])  # there is nothing before the first
    assert stepper.step.value == 0 and title(stepper).startswith("1 of ")
    stepper.view._handle_custom_msg({"type": "click", "token": str(last)}, [])
    assert title(stepper).startswith(f"{last + 1} of ") and stepper.next.disabled
    stepper.view._handle_custom_msg({"type": "click", "token": "<b>"}, [])
    stepper.view._handle_custom_msg({"type": "click"}, [])
    stepper.next.click()
    assert stepper.step.value == last
    stepper.step.value = 4
    assert title(stepper).startswith("5 of ") and 'class="q" data-token="4"' in stepper.view.html


def test_autoplay_moves_the_steps_and_goes_on_from_where_a_person_went(stepper):
    stepper.play.value = 3  # what the page's timer sets
    assert stepper.step.value == 3 and title(stepper).startswith("4 of ")
    stepper.next.click()
    assert stepper.play.value == 4


def test_the_step_stays_when_another_token_is_chosen_and_every_view_follows(stepper):
    stepper.step.value = 5
    name = title(stepper)
    stepper.session.choose_token(20)  # in another view
    assert stepper.walk.token == stepper.token.value == 20 and title(stepper) == name
    stepper.token.value = 31
    assert stepper.session.token == stepper.walk.token == 31


def test_topic_and_layer_are_chosen_and_the_layer_is_every_views(stepper, model):
    stepper.step.value = 5
    stepper.topic.value = "mhc"
    assert stepper.walk.topic == "mhc" and stepper.step.value == 0 and title(stepper).startswith("1 of ")
    assert stepper.layer.options == tuple(range(CONFIG.num_hidden_layers))
    stepper.layer.value = 0
    assert stepper.walk.layer == stepper.session.layer == 0
    stepper.topic.value = "hca"  # not in layer 0: the first that has it, and the session stays
    assert stepper.walk.layer == walkable(model)["hca"][0] and stepper.session.layer == 0
    stepper.topic.value = "mhc"
    stepper.session.layer = 3
    assert stepper.walk.layer == stepper.layer.value == 3


@pytest.mark.parametrize("topic", ["csa2", "engram", "mhc", "moe"])
def test_v41_is_walked_too(topic):
    stepper = Stepper(finished(random_model(_shared_stream(53, 29))), topic=topic)
    assert stepper.walk.topic == topic and all(step.ran for step in stepper.walk.steps)
    for number in range(len(stepper.walk.steps)):
        stepper.step.value = number
        assert title(stepper).startswith(f"{number + 1} of ")


def test_a_recording_needs_the_model_and_is_walked_with_one(model):
    trace = finished(model).trace
    alone = Stepper(replace(trace, origin="recorded"))
    assert "needs" not in said(alone) and "give model= with a recording" in said(alone) and alone.walk is None
    assert alone.view.html == "" and alone.next.disabled and alone.play.disabled
    alone.next.click()
    with_model = Stepper(replace(trace), model)
    assert with_model.walk is not None and with_model.walk.token == with_model.session.token


def test_a_working_run_is_walked_when_it_pauses(model):
    going = FakeRun(finished(model).trace, model=model)
    stepper = Stepper(session_of(going))
    assert stepper.walk is None and "when it pauses or ends" in said(stepper)
    going.becomes(state="paused")
    eventually(lambda: stepper.walk is not None, "the paused run is walked")
    assert said(stepper) == ""


def test_what_cannot_be_walked_is_said(model, monkeypatch):
    with pytest.raises(InputError, match="topic must be one of"):
        Stepper(finished(model), topic="mla")
    with pytest.raises(InputError, match="can be walked through .* got 'engram'"):
        Stepper(finished(model), topic="engram")
    other = Stepper(finished(model).trace, random_model(replace(CONFIG, sliding_window=CONFIG.sliding_window + 1)))
    assert other.walk is None and "of another shape" in said(other)
    dense = FakeRun(synthetic_trace(31, kinds=("gqa",)), state="done", model=random_model(GQA))
    assert "has none of what can be walked: CSA attention" in said(Stepper(session_of(dense)))
    monkeypatch.setattr("workbench.widgets.stepper.MOST_TOKENS", 30)
    stepper = Stepper(finished(model))
    assert stepper.walk is None and "up to token 29" in said(stepper)
    stepper.session.choose_token(29)
    assert stepper.walk is not None and stepper.walk.token == 29
    monkeypatch.setattr("workbench.widgets.stepper.walk_token", lambda *_, **__: 1 / 0)
    stepper.session.choose_token(3)
    assert "could not be walked (ZeroDivisionError" in said(stepper) and stepper.view.html == ""


def test_walks_are_kept_for_a_while(model, monkeypatch):
    calls = []

    def counted(*args, **settings):
        calls.append(args)
        return walk_token(*args, **settings)

    monkeypatch.setattr("workbench.widgets.stepper.walk_token", counted)
    stepper = Stepper(finished(model), topic="moe")
    for token in (1, 2, 1, 2, 3):
        stepper.session.choose_token(token)
    assert len(calls) == 4 and len(stepper._walks) == 4
    for token in range(10, 20):
        stepper.session.choose_token(token)
    assert len(stepper._walks) == 8


def test_closing_stops_following(stepper):
    before, session = stepper.view.html, stepper.session
    stepper.close()
    session.choose_token(2)
    assert stepper.view.html == before


def test_every_view_stays_small():
    from workbench.needle import sample_text

    live = finished(load("tiny-v4", device="cpu"), sample_text()[:1600])
    stepper = Stepper(live)
    for topic in walkable(live.model):
        stepper.topic.value = topic
        for number in range(len(stepper.walk.steps)):
            stepper.step.value = number
            assert len(stepper.view.html.encode()) < VIEW_BYTES
