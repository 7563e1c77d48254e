"""What several widgets look at together: one source, one chosen token, layer, head and step.

Widgets given the same LiveRun or Trace share a Session, so that choosing a token in one moves the others, and a new run
started by RunControls shows up in all of them. While a run works, one painter thread publishes a fresh snapshot a few times a
second; the run's own thread never draws. Drawing and generating take turns in one interpreter, so the painter keeps to a share
of the time and leaves snapshots out when drawing is slow.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from itertools import count
from typing import TYPE_CHECKING, Any

import traitlets as tl

from workbench.errors import InputError
from workbench.trace import Trace
from workbench.widgets.render import ChartClicks

if TYPE_CHECKING:
    from workbench.live import LiveRun

log = logging.getLogger(__name__)
FRAME_S = 0.17  # between frames at least: more than six a second nobody needs, and the page must keep time for a click
# Between charts of a run at work: a page takes far longer to draw one than a map or a text, on a busy machine a second.
CHART_S = 0.5  # at least, and
CHART_DELAYS = 3  # times as long as the page was late since the last ones
PATIENCE_S = 0.5  # how long a page that has answered is waited for; a kernel at work in a cell does not hear it
SHARE = 0.12  # of the time, at most, that the painter works: generating then takes 1 / (1 - SHARE) as long, and a little more
IDLE_S = 5.0  # how often a silent run is asked for its state
FINAL_STATES = ("done", "stopped", "failed")


class Session(tl.HasTraits):
    """The shared state; observe ``trace``, ``token``, ``layer``, ``head``, ``step`` or ``state`` and redraw."""

    trace = tl.Any()  # the latest snapshot, a Trace; there is always one
    token = tl.Int(0)  # chosen query token
    layer = tl.Int(0)  # chosen layer
    head = tl.Union([tl.Int(), tl.Unicode()], default_value="max")  # a head, "max" or "mean"
    step = tl.Int(0)  # chosen step
    state = tl.Unicode("recorded")  # a LiveRun's state, or "recorded"
    charts = tl.Int(0)  # changes when charts that were left out are to be drawn
    follow = tl.Bool(True)  # while a run works, token and step follow its newest one until a person chooses another

    def __init__(self, source: LiveRun | Trace) -> None:
        super().__init__()
        self.run: LiveRun | None = None
        self.number = next(_NUMBERS)
        _NUMBERED[self.number] = self
        self.clicks = _clicks_of_all()
        self._painter: threading.Thread | None = None
        self._wake = threading.Event()
        self.charts_wait = False  # while a snapshot is published of which charts are left out; another one comes soon
        self._charts_after, self._charts_owed = 0.0, False
        self._page_answers, self._page_late_s = False, 0.0  # whether any page ever did, and how late it was since the charts
        self._page_owes: dict[Any, tuple[int, float]] = {}  # view -> what was sent last and not drawn yet, and when
        self._page_is_ready = threading.Event()
        self._hurry = threading.Event()  # the run's state has changed: somebody waits to see that
        # One change at a time, its redrawing included: a choice made while the painter publishes must not be overwritten.
        # Widgets take the same lock when they redraw for a reason of their own.
        self.lock = threading.RLock()
        if isinstance(source, Trace):
            self.show(source)
        else:
            self.attach(source)
        self.layer = _first_layer(self.trace) if self.trace.layers else self.layer
        if isinstance(source, Trace) and source.length:
            self._open(source)

    def _open(self, trace: Trace) -> None:
        """Where a recording opens: where its notes say to look, or where the prompt ends, the query somebody asked."""
        noted = trace.notes.get("look_at")
        token, layer = (noted.get("token"), noted.get("layer")) if isinstance(noted, dict) else (None, None)
        if not isinstance(token, int) or not 0 <= token < trace.length:
            token = max(0, trace.prompt_length - 1)
        self.choose_token(token)
        if layer in [x.layer for x in trace.layers]:
            self.layer = layer

    def show(self, trace: Trace) -> None:
        """Publish a snapshot; the chosen token, layer and step are moved only if it does not have them."""
        numbers = [layer.layer for layer in trace.layers]
        with self.lock, self.hold_trait_notifications():
            self.trace = trace
            if numbers and self.layer not in numbers:
                self.layer = _first_layer(trace)
            live = self.run is not None and self.follow
            if live or self.token >= trace.length:
                self.token = max(0, trace.length - 1)
            if live or self.step >= trace.steps:
                self.step = max(0, trace.steps - 1)

    def choose_token(self, t: int) -> None:
        """A person chose query token ``t``: stop following the newest one and show the step that processed it."""
        with self.lock, self.hold_trait_notifications():
            self.follow = False
            self.token = t
            if self.trace.steps:
                self.step = self.trace.step_of_token(t)

    def choose_step(self, step: int) -> None:
        """A person chose a step: show its last token in every view. Choosing the newest of a run at work follows it again."""
        with self.lock, self.hold_trait_notifications():
            self.follow = self.run is not None and self.state not in FINAL_STATES and step == self.trace.steps - 1
            self.step = step
            if self.trace.steps:
                self.token = self.trace.step_end(step) - 1

    def click(self, hint: str) -> dict[str, Any]:
        """What a chart that shows this session says of clicks on it."""
        return {"hint": hint, "of": self.number}

    def clicked(self, tokens: float | None, step: float | None) -> None:
        """A person clicked a chart: a step, or a number of tokens in the cache, the last of which is meant."""
        with self.lock:
            trace = self.trace
            if step is None and tokens is not None and trace.steps and trace.length:
                token = min(max(1, round(tokens)), trace.length) - 1
                step = trace.step_of_token(token)
                if token != trace.step_end(step) - 1:
                    self.choose_token(token)
                    return
            if step is not None and 0 <= step < trace.steps:
                self.choose_step(int(step))

    def attach(self, run: LiveRun) -> None:
        """Follow ``run`` from now on; every widget of this session does. An earlier run goes on unseen."""
        run.on_event(self._on_event)
        with self.lock:
            self.run = run
            self.follow = True
            with self.hold_trait_notifications():
                self.state = run.state
                self.show(run.trace)
            _SESSIONS[run] = weakref.ref(self)
            self._wake.set()
            self._hurry.set()
            if self._painter is None:
                self._painter = threading.Thread(target=self._paint, name="workbench-painter", daemon=True)
                self._painter.start()

    def page_gets(self, view: Any, sequence: int) -> None:
        """``view`` has sent its drawing number ``sequence``; it will say when the page has drawn it."""
        self._page_is_ready.clear()
        self._page_owes[view] = sequence, time.monotonic()

    def page_drew(self, view: Any, sequence: int) -> None:
        self._page_answers = True
        owed, since = self._page_owes.get(view, (0, time.monotonic()))
        if sequence >= owed:
            self._page_owes.pop(view, None)
            self._page_late_s = max(self._page_late_s, time.monotonic() - since)
        if not self._page_owes:
            self._page_is_ready.set()

    def _await_page(self) -> None:
        """Until the page has drawn the last frame: else frames would pile up in it, and clicks behind them."""
        if self._page_answers and self._page_owes and not self._page_is_ready.wait(PATIENCE_S):
            self._page_owes.clear()
            self._page_late_s = max(self._page_late_s, PATIENCE_S)

    def _on_event(self, event: Any) -> None:
        self._wake.set()
        if event.kind == "state":
            self._hurry.set()

    def _paint(self) -> None:
        """Publish snapshots until the run is over; one drawing at a time, the newest state always drawn last."""
        while True:
            news = self._wake.wait(timeout=CHART_S if self._charts_owed else IDLE_S) or self._charts_owed
            self._wake.clear()
            self._await_page()
            run = self.run
            assert run is not None  # attach sets it before this thread starts
            began, worked = time.monotonic(), time.thread_time()
            state = run.state  # before the snapshot, so that a final state never comes with an unfinished trace
            if news or state != self.state:
                self._publish(run, state)
            with self.lock:
                if state in FINAL_STATES and run is self.run and not self._wake.is_set():
                    self._painter = None
                    return
            self._hurry.wait(resting_s(time.thread_time() - worked, time.monotonic() - began))
            self._hurry.clear()

    def _publish(self, run: LiveRun, state: str) -> None:
        with self.lock:
            if run is not self.run:  # another run was attached meanwhile; it has set the wake event
                return
            now = time.monotonic()
            self.charts_wait = state == self.state == "running" and now < self._charts_after
            if not self.charts_wait:
                self._charts_after = now + max(CHART_S, CHART_DELAYS * self._page_late_s)
                self._page_late_s = 0.0
            try:
                with self.hold_trait_notifications():
                    self.show(run.trace)
                    self.state = state
                    self.charts += self._charts_owed and not self.charts_wait
            except Exception:  # a view that cannot draw this snapshot must not stop the painter
                log.exception("a view could not show the latest snapshot")
            finally:
                self._charts_owed, self.charts_wait = self.charts_wait, False


def resting_s(worked_s: float, took_s: float) -> float:
    """How long the painter rests after a frame of ``worked_s`` seconds of its own work that took ``took_s`` in all."""
    return max(0.0, max(FRAME_S, worked_s / SHARE) - took_s)


def _first_layer(trace: Trace) -> int:
    """The layer that views open on: the first that chooses entries, if there is one."""
    return next((x.layer for x in trace.layers if x.indexes), trace.layers[0].layer)


_NUMBERS = count(1)
_NUMBERED: weakref.WeakValueDictionary[float, Session] = weakref.WeakValueDictionary()
_CLICKS: list[ChartClicks] = []  # one for the charts of all sessions, made with the first


def _clicks_of_all() -> ChartClicks:
    if not _CLICKS or _CLICKS[0].comm is None:  # none yet, or somebody closed all widgets
        _CLICKS[:] = [ChartClicks(_tell)]
    return _CLICKS[0]


def _tell(number: float | None, x: float | None, data: float | None) -> None:
    session = _NUMBERED.get(number) if number is not None else None
    if session is not None:
        session.clicked(x, data)


# A session holds its source, so a strong reference here would keep both for ever.
_SESSIONS: weakref.WeakKeyDictionary[Any, weakref.ref[Session]] = weakref.WeakKeyDictionary()


def session_of(source: LiveRun | Trace | Session) -> Session:
    """The session that shows ``source``: the same one for every widget given the same run or trace."""
    if isinstance(source, Session):
        return source
    if not isinstance(source, Trace) and not hasattr(source, "on_event"):
        raise InputError(f"a widget shows a LiveRun or a Trace, got {type(source).__name__}; see wb.run and wb.Trace.load")
    known = _SESSIONS.get(source)
    session = known() if known else None
    if session is None:
        session = Session(source)
        _SESSIONS[source] = weakref.ref(session)
    return session
