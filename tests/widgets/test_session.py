import gc
import threading
import time
import weakref
from dataclasses import replace

import pytest

from tests.synthetic import synthetic_trace
from tests.widgets.fakes import FakeRun, eventually
from workbench.errors import InputError
from workbench.widgets import session as painting
from workbench.widgets.attention import AttentionExplorer
from workbench.widgets.memory import KVCacheGrowth
from workbench.widgets.session import Session, resting_s, session_of
from workbench.widgets.timeline import OverlapTimeline

TRACE = synthetic_trace(47, prompt_length=31, prefill_chunk=13)
LONGER = synthetic_trace(53, prompt_length=31, prefill_chunk=13)


def shorter(trace, length):
    """What a run had recorded when it was at ``length`` tokens."""
    starts = trace.step_starts[trace.step_starts < length]
    held = {part: values[: len(starts)] for part, values in trace.cache_bytes.items()}
    return replace(trace, token_ids=trace.token_ids[:length], layers=(), step_starts=starts, cache_bytes=held)


def painter_is_gone(session):
    return session._painter is None


def test_widgets_of_one_trace_share_a_session_and_others_do_not():
    memory, timeline = KVCacheGrowth(TRACE), OverlapTimeline(TRACE)
    assert memory.session is timeline.session
    assert KVCacheGrowth(LONGER).session is not memory.session


def test_choosing_in_one_widget_moves_the_others_and_the_token():
    memory, timeline = KVCacheGrowth(TRACE), OverlapTimeline(TRACE)
    memory.step.value = 2
    assert timeline.step.value == 2
    assert memory.session.token == TRACE.step_end(2) - 1 == 30
    memory.session.choose_token(14)  # the second chunk of the prompt
    assert memory.step.value == timeline.step.value == 1


def test_a_later_choice_is_kept_while_the_run_goes_on():
    run = FakeRun(shorter(TRACE, 33))
    widget = KVCacheGrowth(run)
    eventually(lambda: widget.step.value == run.trace.steps - 1, "the newest step is followed")
    widget.step.value = 1
    run.becomes(trace=shorter(TRACE, 40), kind="token")
    eventually(lambda: widget.step.max == run.trace.steps - 1, "the slider grows with the run")
    assert widget.step.value == widget.session.step == 1
    run.becomes(state="done")
    eventually(lambda: painter_is_gone(widget.session), "the painter ends")


def test_the_painter_publishes_the_final_state_with_the_final_trace_and_ends():
    run = FakeRun(shorter(TRACE, 33))
    session = session_of(run)
    seen = []
    session.observe(lambda change: seen.append((session.state, session.trace.length)), names=["trace", "state"])
    thread = session._painter
    for length in range(34, 47):
        run.becomes(trace=shorter(TRACE, length), kind="token")
    run.trace = TRACE
    run.becomes(state="done")
    thread.join(timeout=30)
    assert not thread.is_alive() and painter_is_gone(session)
    assert seen[-1] == ("done", 47)
    assert all(length == 47 for state, length in seen if state == "done")


def test_an_attached_run_is_followed_by_every_widget_even_after_the_first_has_ended():
    first = FakeRun(shorter(TRACE, 33), state="done")
    memory, timeline = KVCacheGrowth(first), OverlapTimeline(first)
    eventually(lambda: painter_is_gone(memory.session), "the first painter ends")
    second = FakeRun(LONGER)
    memory.session.attach(second)
    eventually(lambda: memory.step.value == timeline.step.value == LONGER.steps - 1, "the new run is shown")
    assert session_of(second) is memory.session
    first.becomes(trace=TRACE)  # an earlier run goes on unseen
    second.becomes(state="stopped")
    eventually(lambda: memory.session.state == "stopped", "the new run's state is shown")
    assert memory.session.trace is LONGER


def test_attaching_again_and_again_never_loses_a_run_to_a_painter_about_to_end():
    session = Session(FakeRun(TRACE, state="done"))
    for length in range(31, 47):
        session.attach(FakeRun(shorter(TRACE, length), state="done"))
        if length % 3 == 0:
            eventually(lambda: painter_is_gone(session), "a painter ends")
    eventually(lambda: painter_is_gone(session), "the last painter ends")
    assert session.trace.length == 46


def test_a_view_that_cannot_draw_does_not_stop_the_painter(caplog):
    run = FakeRun(shorter(TRACE, 33))
    session = session_of(run)

    def fail(change):
        raise RuntimeError("cannot draw")

    session.observe(fail, names="trace")
    run.becomes(trace=TRACE, state="done")
    eventually(lambda: painter_is_gone(session), "the painter ends")
    assert session.trace is TRACE and session.state == "done"
    assert "latest snapshot" in caplog.text


def test_a_choice_made_while_the_painter_publishes_wins():
    """A view that draws slowly must not let the snapshot it draws overwrite what a person chose meanwhile."""
    run = FakeRun(shorter(TRACE, 33))
    session = session_of(run)
    drawing, go_on = threading.Event(), threading.Event()

    def draw_slowly(change):
        if threading.current_thread() is session._painter:
            drawing.set()
            go_on.wait(30)

    session.observe(draw_slowly, names="trace")
    run.becomes(trace=shorter(TRACE, 40), kind="token")
    assert drawing.wait(30)
    chooser = threading.Thread(target=session.choose_token, args=(5,))
    chooser.start()
    go_on.set()
    chooser.join(30)
    run.becomes(trace=TRACE, state="done")
    eventually(lambda: painter_is_gone(session), "the painter ends")
    assert (session.token, session.step) == (5, 0)


class Drawing:
    """A view that works for a while at each snapshot of a run whose every token is an event."""

    def __init__(self, run, worked_s):
        self.worked_s, self.spent_s, self.frames = worked_s, 0.0, 0
        self.session = session_of(run)
        self.session.observe(self.draw, names="trace")

    def draw(self, change):
        end = time.thread_time() + self.worked_s
        while time.thread_time() < end:
            pass
        self.spent_s += self.worked_s
        self.frames += 1


def lengthening(run, view, enough):
    """Tokens until ``enough``; how many there were, and in how many seconds of how many the view worked."""
    began, tokens = time.monotonic(), 0
    while not enough(view):
        tokens += 1
        run.becomes(trace=replace(TRACE), kind="token")
        time.sleep(2e-3)
        assert time.monotonic() < began + 60
    took, spent = time.monotonic() - began, view.spent_s
    run.becomes(state="done")
    eventually(lambda: painter_is_gone(view.session), "the painter ends")
    return tokens, spent, took


def test_drawing_keeps_to_its_share_of_the_time_and_leaves_snapshots_out(monkeypatch):
    monkeypatch.setattr(painting, "FRAME_S", 0.01)
    run = FakeRun(shorter(TRACE, 33))
    view = Drawing(run, worked_s=0.03)
    tokens, spent, took = lengthening(run, view, lambda v: v.frames >= 10)
    assert spent <= painting.SHARE * took + 3 * view.worked_s  # the last frame, and the first, which nothing comes before
    assert view.frames < tokens / 4


def test_quick_frames_come_no_faster_than_somebody_can_look(monkeypatch):
    monkeypatch.setattr(painting, "FRAME_S", 0.1)
    run = FakeRun(shorter(TRACE, 33))
    view = Drawing(run, worked_s=0.0)
    _, _, took = lengthening(run, view, lambda v: v.frames >= 6)
    assert view.frames <= took / 0.1 + 2


def test_a_new_state_is_shown_without_waiting_for_the_share():
    run = FakeRun(shorter(TRACE, 33))
    view = Drawing(run, worked_s=0.5)
    run.becomes(trace=TRACE, kind="token")
    eventually(lambda: view.frames == 1, "a slow frame is drawn")
    began = time.monotonic()
    run.becomes(trace=LONGER, state="paused")
    eventually(lambda: view.session.state == "paused", "the state is shown")
    assert time.monotonic() - began < resting_s(view.worked_s, 0.0)
    run.becomes(state="stopped")


def test_the_rest_after_a_frame_makes_up_for_its_work():
    assert resting_s(0.0, 0.0) == painting.FRAME_S and resting_s(0.0, 9.0) == 0.0
    for worked in (0.05, 0.4, 3.0):
        assert worked / (worked + resting_s(worked, worked)) == pytest.approx(painting.SHARE)


def test_a_session_and_its_trace_are_freed_when_nobody_looks():
    trace = synthetic_trace(11)
    session = session_of(trace)
    gone = weakref.ref(trace)
    del trace, session
    gc.collect()
    assert gone() is None


def test_something_that_is_neither_run_nor_trace_is_refused():
    with pytest.raises(InputError, match="LiveRun or a Trace, got str"):
        session_of("tiny-v4")


def test_charts_of_a_run_at_work_are_drawn_less_often_than_pictures_and_none_is_left_behind():
    traces = {n: synthetic_trace(n, prompt_length=31, prefill_chunk=13) for n in range(33, 48)}
    run = FakeRun(traces[33])
    explorer, memory, timeline = AttentionExplorer(run), KVCacheGrowth(run), OverlapTimeline(run)
    parts = {
        "map": explorer.map,
        "text": explorer.text,
        "strip": explorer.strip,
        "KV": memory.view,
        "timeline": timeline.on_show.view,
    }
    sent = dict.fromkeys(parts, 0)
    for name, part in parts.items():
        part.send_state = lambda key=None, name=name: sent.update({name: sent[name] + 1})
    for length in range(34, 47):
        run.becomes(trace=traces[length], kind="token")
        eventually(lambda n=length: explorer.map.rows == n, "the map shows the token")
    eventually(lambda: sent["map"] == sent["text"] == 13, "each token is drawn once")
    assert all(sent[name] < 13 for name in ("strip", "KV", "timeline")), sent
    # The run is silent now: charts that were left out are drawn all the same.
    eventually(lambda: "query token 45 " in explorer.chart["layout"]["title"]["text"], "the strip shows the last token")
    eventually(lambda: "46 tokens" in memory.figure.layout.annotations[0].text, "the KV chart shows the last step")
    eventually(lambda: timeline.figure.layout.title.text.startswith(f"Step {traces[46].steps - 1}:"), "so does the timeline")
    memory.step.value = 1  # what a person chooses is drawn at once
    assert "26 tokens" in memory.figure.layout.annotations[0].text
    run.becomes(trace=traces[47], state="done")
    eventually(lambda: memory.session.state == "done", "the end is shown")
    eventually(lambda: memory._drawn[0] is timeline.on_show._drawn[0] is traces[47], "charts show it, too")


def test_a_page_that_answers_is_waited_for_and_one_that_falls_silent_not_for_ever(monkeypatch):
    traces = {n: synthetic_trace(n, prompt_length=31, prefill_chunk=13) for n in range(33, 48)}
    run = FakeRun(traces[33])
    explorer = AttentionExplorer(run)

    def page_draws():
        explorer.text._handle_custom_msg({"type": "drawn", "sequence": explorer.text.sequence}, [])

    run.becomes(trace=traces[34], kind="token")
    eventually(lambda: explorer.map.rows == 34, "where no page ever answered, none is waited for")
    eventually(lambda: "token 33 looks" in explorer.text.html, "the text is sent, too")
    page_draws()
    monkeypatch.setattr(painting, "PATIENCE_S", 60)
    run.becomes(trace=traces[35], kind="token")
    eventually(lambda: "token 34 looks" in explorer.text.html, "the next frame")
    for length in (36, 37, 38):
        run.becomes(trace=traces[length], kind="token")
    time.sleep(3 * painting.FRAME_S)
    assert explorer.map.rows == 35  # the page has not drawn the last one
    monkeypatch.setattr(painting, "PATIENCE_S", 0.05)
    page_draws()
    eventually(lambda: explorer.map.rows == 38, "the newest follows, those between are left out")
    run.becomes(trace=traces[40], kind="token")
    eventually(lambda: explorer.map.rows == 40, "patience ends")
    run.becomes(state="done")
    eventually(lambda: painter_is_gone(explorer.session), "the painter ends")


def test_charts_come_the_less_often_the_later_the_page_is(monkeypatch):
    run = FakeRun(shorter(TRACE, 33))
    session = session_of(run)
    run.becomes(trace=shorter(TRACE, 34), kind="token")
    eventually(lambda: session.trace.length == 34, "a frame")
    seen = []
    for late_s in (0.0, 7.0):
        session._page_late_s, session._charts_after = late_s, 0.0
        now = time.monotonic()
        session._publish(run, "running")
        seen.append(session._charts_after - now)
    assert seen[0] == pytest.approx(painting.CHART_S, abs=0.2) and seen[1] >= painting.CHART_DELAYS * 7.0
    run.becomes(state="done")
    eventually(lambda: painter_is_gone(session), "the painter ends")
