"""What several widgets look at together: one source, one chosen token, layer, head and step.

Widgets given the same LiveRun or Trace share a Session, so that choosing a token in one moves the others, and a new run
started by RunControls shows up in all of them. While a run works, one painter thread publishes a fresh snapshot a few times a second;
the run's own thread never draws.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

import traitlets as tl

from workbench.errors import InputError
from workbench.trace import Trace

if TYPE_CHECKING:
    from workbench.live import LiveRun

PAINT_INTERVAL_S = 0.25
FINAL_STATES = ("done", "stopped", "failed")


class Session(tl.HasTraits):
    """The shared state; observe ``trace``, ``token``, ``layer``, ``head``, ``step`` or ``state`` and redraw."""

    trace = tl.Any(None, allow_none=True)  # the latest snapshot, a Trace
    token = tl.Int(0)  # chosen query token
    layer = tl.Int(0)  # chosen layer
    head = tl.Union([tl.Int(), tl.Unicode()], default_value="max")  # a head, "max" or "mean"
    step = tl.Int(0)  # chosen step
    state = tl.Unicode("recorded")  # a LiveRun's state, or "recorded"
    follow = tl.Bool(True)  # while a run works, token and step follow its newest one until a person chooses another

    def __init__(self, source: LiveRun | Trace) -> None:
        super().__init__()
        self.run: LiveRun | None = None
        self._painter: threading.Thread | None = None
        self._wake = threading.Event()
        if isinstance(source, Trace):
            self.show(source)
        else:
            self.attach(source)

    def show(self, trace: Trace) -> None:
        """Publish a snapshot; the chosen token, layer and step are moved only if it does not have them."""
        numbers = [layer.layer for layer in trace.layers]
        with self.hold_trait_notifications():
            self.trace = trace
            if numbers and self.layer not in numbers:
                self.layer = next((x.layer for x in trace.layers if x.kind == "csa"), numbers[0])
            live = self.run is not None and self.follow
            if live or self.token >= trace.length:
                self.token = max(0, trace.length - 1)
            if live or self.step >= trace.steps:
                self.step = max(0, trace.steps - 1)

    def choose_token(self, t: int) -> None:
        """A person chose query token ``t``: stop following the newest one and show the step that processed it."""
        self.follow = False
        with self.hold_trait_notifications():
            self.token = t
            if self.trace is not None and self.trace.steps:
                self.step = self.trace.step_of_token(t)

    def choose_step(self, step: int) -> None:
        """A person chose a step: show its last token in every view."""
        self.follow = False
        with self.hold_trait_notifications():
            self.step = step
            if self.trace is not None and self.trace.steps:
                self.token = self.trace.step_end(step) - 1

    def attach(self, run: LiveRun) -> None:
        """Follow ``run`` from now on; every widget of this session does. An earlier run goes on unseen."""
        self.run = run
        self.follow = True
        _SESSIONS[run] = self
        run.on_event(self._on_event)
        self.state = run.state
        self._wake.set()
        if self._painter is None or not self._painter.is_alive():
            self._painter = threading.Thread(target=self._paint, name="workbench-painter", daemon=True)
            self._painter.start()

    def _on_event(self, event: Any) -> None:
        self._wake.set()

    def _paint(self) -> None:
        """Publish snapshots until the run is over; one drawing at a time, the newest state always drawn last."""
        while (run := self.run) is not None:
            self._wake.wait(timeout=5.0)
            self._wake.clear()
            state = run.state
            self.show(run.trace)
            self.state = state
            if state in FINAL_STATES and run is self.run and not self._wake.is_set():
                return
            threading.Event().wait(PAINT_INTERVAL_S)


_SESSIONS: weakref.WeakKeyDictionary[Any, Session] = weakref.WeakKeyDictionary()


def session_of(source: LiveRun | Trace | Session) -> Session:
    """The session that shows ``source``: the same one for every widget given the same run or trace."""
    if isinstance(source, Session):
        return source
    if not isinstance(source, Trace) and not hasattr(source, "on_event"):
        raise InputError(f"a widget shows a LiveRun or a Trace, got {type(source).__name__}; see wb.run and wb.Trace.load")
    if source not in _SESSIONS:
        _SESSIONS[source] = Session(source)
    return _SESSIONS[source]
