"""What a page says of clicks on charts, true or not, and which charts say what a click does."""

from __future__ import annotations

import gc
import weakref

import pytest

from tests.synthetic import synthetic_trace
from tests.widgets.fakes import FakeRun, eventually
from workbench.figures.picture import picture
from workbench.trace import Span, Timeline
from workbench.widgets.memory import KVCacheGrowth
from workbench.widgets.render import CHART_MIME, ChartClicks
from workbench.widgets.session import Session
from workbench.widgets.timeline import OverlapTimeline

TRACE = synthetic_trace(47, prompt_length=31, prefill_chunk=13)
BAD = (
    None,
    "click",
    [],
    {},
    {"type": "move", "x": 3},
    {"type": "click"},
    {"type": "click", "x": None, "data": None},
    {"type": "click", "x": "3"},
    {"type": "click", "x": True},
    {"type": "click", "x": float("nan")},
    {"type": "click", "x": float("inf")},
    {"type": "click", "x": 10**400},
    {"type": "click", "x": [3], "data": {"step": 3}},
    {"type": "click", "data": "3"},
    {"type": "click", "data": -1},
    {"type": "click", "data": TRACE.steps},
)


@pytest.mark.parametrize("message", BAD, ids=lambda m: f"{m!r:.40}")
def test_a_message_that_is_no_click_on_a_chart_changes_nothing(message):
    session = Session(TRACE)
    before = (session.token, session.step)
    mine = {"of": session.number}
    session.clicks._heard(session.clicks, message | mine if isinstance(message, dict) else message, [])  # raises nothing
    assert (session.token, session.step) == before
    session.clicks._heard(session.clicks, {"type": "click", "x": 3} | mine, [])
    assert session.token == 2 != before[0]


@pytest.mark.parametrize("of", [None, "1", True, 0, -1, 10**9, [1]])
def test_a_click_on_a_chart_of_nobody_changes_nothing(of):
    session = Session(TRACE)
    before = session.token
    session.clicks._heard(None, {"type": "click", "of": of, "x": 3}, [])
    assert session.token == before != 2


def test_a_click_on_a_trace_without_tokens_or_steps_changes_nothing():
    alone = OverlapTimeline(Timeline("modelled", ())).on_show.session
    for message in ({"type": "click", "x": 1}, {"type": "click", "x": 1, "data": 0}):
        alone.clicks._heard(alone.clicks, message | {"of": alone.number}, [])
    assert alone.step == 0


def test_a_click_on_a_run_at_work_holds_the_views_there_and_one_on_its_newest_step_follows_again():
    run = FakeRun(TRACE)
    growth = KVCacheGrowth(run)
    session = growth.session

    def click(x):
        session.clicks._heard(None, {"type": "click", "of": session.number, "x": x}, [])

    click(33)
    assert not session.follow and (session.token, growth.step.value) == (32, 4)
    longer = synthetic_trace(50, prompt_length=31, prefill_chunk=13)
    run.becomes(trace=longer, kind="token")
    eventually(lambda: growth.step.max == longer.steps - 1, "the run goes on")
    assert growth.step.value == 4
    click(50)
    assert session.follow and session.token == 49
    run.becomes(state="done")


def test_the_chart_says_what_a_click_does_and_a_file_of_it_does_not():
    growth, timeline = KVCacheGrowth(TRACE), OverlapTimeline(TRACE)
    for view, anywhere in ((growth.view, True), (timeline.on_show.view, False)):
        layout = view.outputs[0]["data"][CHART_MIME]["layout"]
        assert layout["meta"]["click"]["hint"].startswith("Click") and layout["clickanywhere"] is anywhere
    for fig in (growth.figure, timeline.figure):
        assert "Click" not in picture(fig).svg() and fig.layout.meta is None


def test_one_step_alone_offers_no_choice():
    timeline = OverlapTimeline(Timeline("modelled", (Span("compute", "layer 0", 0, 0.0, 1e-3),)))
    assert "meta" not in timeline.on_show.view.outputs[0]["data"][CHART_MIME]["layout"]


def test_every_bar_of_the_timeline_knows_its_step():
    timeline = OverlapTimeline(TRACE)
    timeline.step.value = 5
    known = [list(bar.customdata or ()) for bar in timeline.figure.data if bar.type == "bar" and bar.hoverinfo != "skip"]
    assert known[-1] == list(range(TRACE.steps)) and {n for bar in known[:-1] for n in bar} == {5}


def test_all_charts_share_one_listener_which_keeps_no_session():
    growth, timeline = KVCacheGrowth(TRACE), OverlapTimeline(Timeline("measured", TRACE.timeline.spans))
    one, other = growth.session, timeline.on_show.session
    assert one.number != other.number and one.clicks is other.clicks
    assert one.clicks in growth.children and one.clicks in timeline.on_show.children
    assert len(ChartClicks._esm) < 4_000
    before = one.token
    one.clicks._heard(None, {"type": "click", "of": other.number, "x": 0, "data": 4}, [])
    assert (one.token, other.step) == (before, 4)
    lone = Session(synthetic_trace(20))
    number, gone = lone.number, weakref.ref(lone)
    del lone
    gc.collect()
    assert gone() is None
    one.clicks._heard(None, {"type": "click", "of": number, "x": 3}, [])
    assert (one.token, other.step) == (before, 4)


def test_the_listener_is_made_anew_once_all_widgets_were_closed(monkeypatch):
    monkeypatch.setattr("workbench.widgets.session._CLICKS", [])  # views of other tests keep theirs
    first = Session(TRACE).clicks
    first.close()
    second = Session(TRACE).clicks
    assert second is not first and second.comm is not None and Session(TRACE).clicks is second
