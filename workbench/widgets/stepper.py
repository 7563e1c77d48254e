"""Stepper: one token through one layer, one operation at a time, with the line of code that does it."""

from __future__ import annotations

import threading
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw
import traitlets as tl

from workbench.config import read_config
from workbench.errors import InputError, WorkbenchError
from workbench.figures.walk import walk_html
from workbench.trace import Trace
from workbench.walk import TOPICS, Walk, walk_token, walkable
from workbench.widgets.render import Pointer
from workbench.widgets.session import FINAL_STATES, Session, session_of

if TYPE_CHECKING:
    from workbench.live import LiveRun

MOST_TOKENS = 4096  # a walk reads the text up to its token once more
KEPT_WALKS = 8
AUTOPLAY_MS = 2500
VIEW_PIXELS = 900  # the most it takes before it scrolls; only with a limit does it take the keyboard
STEPS_HINT = "Steps of the walk; arrow keys left and right go back and on"


class Stepper(ipw.VBox):
    """Takes a LiveRun, a Trace or a Session and follows its chosen token; arrow keys in the view go from step to step.

    A walk needs the model: that of the run, or ``model`` for a recording. ``topic`` is one of workbench.walk.TOPICS, the
    model's first unless given. ``walk`` is what is shown, None while a run works: the token is walked when it pauses
    or ends.
    """

    _link: Any = None

    def __init__(self, source: LiveRun | Trace | Session, model: Any = None, topic: str | None = None) -> None:
        if topic is not None and topic not in TOPICS:
            raise InputError(f"topic must be one of {list(TOPICS)}, got {topic!r}")
        self.session, self._model = session_of(source), model
        if topic is not None and self.model is not None and topic not in walkable(self.model):
            raise InputError(f"{self.model.name} can be walked through {list(walkable(self.model))}, got {topic!r}")
        self.walk: Walk | None = None
        self._walks: dict[tuple[Any, ...], Walk] = {}
        self._layer: int | None = None  # chosen here, where the session's layer does not have the topic
        self._wanted_topic = topic
        self._syncing: int | None = None  # the thread that copies state into the controls
        narrow = {"description_width": "initial"}
        self.topic = ipw.Dropdown(description="Walk through", style=narrow, layout=ipw.Layout(width="min(100%, 280px)"))
        self.layer = ipw.Dropdown(description="Layer", style=narrow, layout=ipw.Layout(width="110px"))
        self.token = ipw.BoundedIntText(description="Token", style=narrow, layout=ipw.Layout(width="140px"))
        self.back = ipw.Button(description="Back", layout=ipw.Layout(width="90px"))
        self.next = ipw.Button(description="Next", layout=ipw.Layout(width="90px"))
        self.play = ipw.Play(min=0, max=0, interval=AUTOPLAY_MS, show_repeat=False, tooltip="Autoplay")
        self.step = ipw.IntSlider(description="Step", min=0, max=0, readout=False, style=narrow)
        self.view = Pointer(mode="text", height=VIEW_PIXELS, label=STEPS_HINT)
        self.message = ipw.HTML()
        rows = (
            [self.topic, self.layer, self.token],
            [self.back, self.next, ipw.HTML("<span style='padding-left: 8px'>Autoplay</span>"), self.play, self.step],
        )
        wrap = ipw.Layout(flex_flow="row wrap")
        super().__init__([*(ipw.HBox(row, layout=wrap) for row in rows), self.message, self.view])
        self._link = tl.link((self.play, "value"), (self.step, "value"))
        self.back.on_click(lambda _: self.go(-1))
        self.next.on_click(lambda _: self.go(1))
        self.view.on_msg(self._on_view)
        self.step.observe(self._stepped, names="value")
        for control, chosen in (
            (self.topic, self._topic_chosen),
            (self.layer, self._layer_chosen),
            (self.token, self._token_chosen),
        ):
            control.observe(chosen, names="value")
        self.session.observe(self._redraw, names=["trace", "token", "layer", "state"])
        self._redraw()

    def close(self) -> None:
        if self._link is not None:  # None where __init__ refused its arguments
            self.session.unobserve(self._redraw, names=["trace", "token", "layer", "state"])
            self._link.unlink()
        super().close()

    @property
    def model(self) -> Any:
        """What is walked; None for a recording alone."""
        return self.session.run.model if self.session.run is not None else self._model

    def go(self, by: int) -> None:
        """To another step; the first and the last are the ends."""
        self.step.value = min(max(0, self.step.value + by), self.step.max)

    def _on_view(self, _: Any, message: Any, buffers: Any) -> None:
        if message.get("type") == "move":
            self.go(int(message.get("by", 0)))
        elif message.get("type") == "click" and str(message.get("token", "")).isdigit():
            self.step.value = min(int(message["token"]), self.step.max)

    def _topic_chosen(self, change: Any) -> None:
        if self._syncing != threading.get_ident():
            self._wanted_topic = change["new"]
            self._hold(0)
            self._redraw()

    def _layer_chosen(self, change: Any) -> None:
        if self._syncing == threading.get_ident() or change["new"] is None:
            return
        self._layer = change["new"]
        if change["new"] in [record.layer for record in self.session.trace.layers]:
            self.session.layer = change["new"]  # every view goes there
        self._redraw()

    def _token_chosen(self, change: Any) -> None:
        if self._syncing != threading.get_ident():
            self.session.choose_token(change["new"])

    def _stepped(self, change: Any) -> None:
        if self._syncing != threading.get_ident():
            with self.session.lock:
                self._show()

    def _hold(self, step: int) -> None:
        """Set the step without drawing it."""
        before, self._syncing = self._syncing, threading.get_ident()
        try:
            self.step.value = step
        finally:
            self._syncing = before

    def _redraw(self, change: Any = None) -> None:
        with self.session.lock:
            if change is not None and change["name"] == "layer":
                self._layer = None  # chosen in another view, or here
            self.walk = None
            trouble = self._trouble()
            if not trouble:
                try:
                    self.walk = self._walked()
                except WorkbenchError as error:
                    trouble = str(error)
                except Exception as error:  # maybe in a thread nobody waits for: the reader must see why
                    trouble = f"The token could not be walked ({type(error).__name__}: {error})"
            self._say(trouble)
            self._show()

    def _trouble(self) -> str:
        """Why there is nothing to walk, or nothing at all; the choosers are set on the way."""
        trace, model = self.session.trace, self.model
        if model is None:
            return "A walk runs the model: start a run, or give model= with a recording."
        topics = walkable(model)
        if not topics:
            return f"{model.name} has none of what can be walked: {', '.join(TOPICS.values())}."
        if not trace.length:
            return "There is no token yet."
        self._sync(topics, trace)
        if self.session.run is not None and self.session.state not in (*FINAL_STATES, "paused"):
            return "The run works; the walk begins when it pauses or ends."
        if self.session.token >= MOST_TOKENS:
            return f"A walk reads the text again and goes up to token {MOST_TOKENS - 1:,}; choose an earlier one."
        return ""

    def _sync(self, topics: dict[str, tuple[int, ...]], trace: Trace) -> None:
        topic = self._wanted_topic if self._wanted_topic in topics else next(iter(topics))
        layers = topics[topic]
        choices = [self._layer, self.session.layer, self.layer.value, layers[0]]
        self._syncing = threading.get_ident()
        try:
            options = tuple((TOPICS[name], name) for name in topics)
            if self.topic.options != options:
                self.topic.options = options
            self.topic.value = topic
            if self.layer.options != layers:
                self.layer.options = layers
            self.layer.value = next(layer for layer in choices if layer in layers)
            self.token.max = trace.length - 1
            self.token.value = self.session.token
        finally:
            self._syncing = None

    def _walked(self) -> Walk:
        topic, layer, token = self.topic.value, self.layer.value, self.session.token
        if self.session.run is None and read_config(self.session.trace.config) != self.model.config:
            raise InputError(
                f"the recording is of a model of another shape than {self.model.name}; give model= the one it is of"
            )
        ids = self.session.trace.token_ids[: token + 1]
        key = (self.model, topic, layer, ids.tobytes())
        if key not in self._walks:
            while len(self._walks) >= KEPT_WALKS:
                self._walks.pop(next(iter(self._walks)))
            self._walks[key] = walk_token(self.model, [int(i) for i in ids], topic, layer=layer)
        return self._walks[key]

    def _show(self) -> None:
        walk = self.walk
        last = len(walk.steps) - 1 if walk else 0
        if self.step.max != last:
            self._hold(min(self.step.value, last))
            self.play.max = self.step.max = last
        for control in (self.step, self.play):
            control.disabled = walk is None
        self.back.disabled = walk is None or self.step.value == 0
        self.next.disabled = walk is None or self.step.value == last
        if walk is None:
            self.view.show(html="")
            return
        self.view.show(html=walk_html(walk, self.step.value, self.session.trace.token_texts[walk.token]))

    def _say(self, text: str) -> None:
        self.message.value = f"<div role='status' aria-live='polite'>{escape(text)}</div>" if text else ""
