"""Start a run from the page, watch its text grow, pause it, take single steps, stop it."""

from __future__ import annotations

import threading
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw

from workbench.errors import WorkbenchError
from workbench.trace import Trace
from workbench.widgets.session import FINAL_STATES, Session, session_of

if TYPE_CHECKING:
    from workbench.live import LiveRun

SHIPPED = ("tiny-v4", "tiny-v4-engram", "tiny-v41", "tiny-mla-dsa", "tiny-gqa", "tiny-v4-tally")
MAX_NEW_TOKENS = 4096
POLICIES = {
    "look up ahead (prefetch)": "prefetch",
    "look up when needed (serial)": "serial",
    "on the device already (resident)": "resident",
}
WIDE, NARROW = ipw.Layout(width="100%"), ipw.Layout(width="min(100%, 320px)")
TEXT_STYLE = "white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.4; margin-top: 4px"
LABELS = {"description_width": "110px"}
TOPK_TOOLTIP = "Entries a query keeps in each layer that chooses"
NO_TOPK_TOOLTIP = "This model attends to every token: nothing is chosen"


class RunControls(ipw.VBox):
    """Prompt, settings and buttons. A started run is attached to the session, so every widget of it follows.

    ``model`` is a loaded model, or a name or folder to load on the first Start; a recorded trace offers the shipped models.
    Whatever goes wrong is one line of ``status``; the prompt and settings stay as they are.
    """

    def __init__(self, source: LiveRun | Trace | Session, model: Any = None) -> None:
        self.session = session_of(source)
        trace, run = self.session.trace, self.session.run
        current = model if model is not None else run.model if run is not None else None
        name = current if isinstance(current, str) else trace.model
        self._models = {} if current is None or isinstance(current, str) else {name: current}
        names = list(dict.fromkeys([*([name] if current is not None else []), *SHIPPED]))
        self._starting = False
        self._cancelled = threading.Event()
        self._message = ""

        prompt = "".join(trace.token_texts[: trace.prompt_length])
        self.prompt = ipw.Textarea(
            prompt, description="Prompt", rows=5, tooltip="Text the model reads", layout=WIDE, style=LABELS
        )
        self.model = ipw.Dropdown(
            options=names, value=name if name in names else names[0], description="Model",
            tooltip="Loaded on the first start", layout=NARROW, style=LABELS,
        )  # fmt: skip
        asked = trace.notes  # what the run on show was asked for is what another one starts from
        new_tokens, temperature = _number(asked.get("max_new_tokens"), 64), _number(asked.get("temperature"), 0.0)
        self.max_new_tokens = ipw.BoundedIntText(
            new_tokens, 1, MAX_NEW_TOKENS, description="New tokens", tooltip="Tokens to generate at most", layout=NARROW,
            style=LABELS,
        )  # fmt: skip
        self.temperature = ipw.BoundedFloatText(
            temperature, min=0.0, max=5.0, step=0.1, description="Temperature", tooltip="0: always the likeliest token",
            layout=NARROW, style=LABELS,
        )  # fmt: skip
        self.topk = ipw.BoundedIntText(
            1,
            1,
            1,
            description="Index top-k",
            tooltip=TOPK_TOOLTIP,
            layout=NARROW,
            style=LABELS,
        )
        self.seed = ipw.BoundedIntText(
            _number(asked.get("seed"), 0), 0, 2**31 - 1, description="Seed", tooltip="Same seed, same text", layout=NARROW,
            style=LABELS,
        )  # fmt: skip
        self.prefetch = ipw.Dropdown(
            options=POLICIES, description="Engram rows", tooltip="When the rows are fetched", layout=NARROW, style=LABELS
        )
        self.start = ipw.Button(description="Start", tooltip="Start a new run", button_style="primary")
        self.pause = ipw.Button(description="Pause", tooltip="Pause after this step, or go on")
        self.step = ipw.Button(description="Step", tooltip="One more step of a paused run")
        self.stop = ipw.Button(description="Stop", tooltip="End the run; what it recorded stays")
        self.progress = ipw.FloatProgress(max=1.0, description="Progress", layout=NARROW, style=LABELS)
        self.text, self.status = ipw.HTML(description="Text", layout=WIDE, style=LABELS), ipw.HTML()

        wrap = ipw.Layout(flex_flow="row wrap")
        settings = (self.model, self.max_new_tokens, self.temperature, self.topk, self.seed, self.prefetch)
        buttons = (self.start, self.pause, self.step, self.stop, self.progress)
        super().__init__([self.prompt, ipw.HBox(settings, layout=wrap), ipw.HBox(buttons, layout=wrap), self.status, self.text])
        self._bound_topk(trace.config.get("index_topk"), at=_number(asked.get("topk"), 0))
        self.model.observe(self._model_chosen, names="value")
        self.start.on_click(self._start)
        for button, act in ((self.pause, self._pause_or_resume), (self.step, self._one_step), (self.stop, self._stop_run)):
            button.on_click(act)
        self.session.observe(self._refresh, names=["trace", "state"])
        self._refresh()

    # -- what the buttons do ---------------------------------------------------------------------------------------------

    def _start(self, _: ipw.Button) -> None:
        if not self.prompt.value.strip():
            self._say("The prompt is empty: type some text for the model to read.")
            return
        self._starting = True
        self._cancelled.clear()
        self._say(f"Loading {self.model.value}…" if self.model.value not in self._models else "Starting…")
        settings = {
            "max_new_tokens": self.max_new_tokens.value,
            "temperature": self.temperature.value,
            # None: all the model is made for
            "topk": None if self.topk.disabled or self.topk.value == self.topk.max else self.topk.value,
            "seed": self.seed.value,
            "prefetch": self.prefetch.value,
        }
        work = (self.model.value, self.prompt.value, settings)
        threading.Thread(target=self._launch, args=work, name="workbench-start", daemon=True).start()

    def _launch(self, name: str, prompt: str, settings: dict[str, Any]) -> None:
        """Load the model if need be and start the run; in a thread, so that the page stays alive meanwhile."""
        message = ""
        try:
            if name not in self._models:
                self._models[name] = _load(name)
            model = self._models[name]
            self._bound_topk(getattr(model.config, "index_topk", None))
            if self._cancelled.is_set():
                message = "Stopped before the run began."
            else:
                self.session.attach(_run(model, prompt, **settings))
        except WorkbenchError as error:
            message = str(error)
        except Exception as error:  # Start must come back, and the reader must see why
            message = f"The run could not start ({type(error).__name__}: {error})"
        finally:
            self._starting = False
            self._say(message)

    def _pause_or_resume(self, _: ipw.Button) -> None:
        run = self.session.run
        if run is not None:
            self._do(run.resume if run.state == "paused" else run.pause)

    def _one_step(self, _: ipw.Button) -> None:
        if self.session.run is not None:
            self._do(self.session.run.step)

    def _stop_run(self, _: ipw.Button) -> None:
        if self._starting:
            self._cancelled.set()
        elif self.session.run is not None:
            self._do(self.session.run.stop)

    def _do(self, act: Any) -> None:
        try:
            act()
            self._say("")
        except WorkbenchError as error:
            self._say(str(error))

    # -- what the page shows ---------------------------------------------------------------------------------------------

    def _say(self, message: str) -> None:
        self._message = message
        self._refresh()

    def _refresh(self, change: Any = None) -> None:
        with self.session.lock:
            run = self.session.run
            state = run.state if run is not None else "recorded"
            busy = state not in (*FINAL_STATES, "recorded")
            self.start.disabled = busy or self._starting
            self.pause.disabled = not busy
            self.step.disabled = state != "paused"
            self.stop.disabled = not (busy or self._starting)
            self.pause.description = "Resume" if state == "paused" else "Pause"
            self.progress.value = run.progress if run is not None else 0.0
            if run is not None:
                self.text.value = f"<div dir='auto' style='{TEXT_STYLE}'>{escape(run.text)}</div>"
            line = self._message or _state_line(run, self.session)
            shown = f"<div role='status' aria-live='polite'>{escape(line)}</div>"
            if self.status.value != shown:  # a screen reader says each change
                self.status.value = shown

    def _model_chosen(self, change: Any) -> None:
        model = self._models.get(change["new"])
        if model is not None:
            self._bound_topk(getattr(model.config, "index_topk", None))
        self._say("")

    def _bound_topk(self, most: int | None, at: int = 0) -> None:
        """Let ``topk`` range from 1 to what the model is made for; a value at the old limit moves to the new one or ``at``."""
        self.topk.disabled = not most
        self.topk.description, self.topk.tooltip = ("Index top-k", TOPK_TOOLTIP) if most else ("No top-k", NO_TOPK_TOOLTIP)
        if most:
            at_limit = self.topk.value == self.topk.max
            self.topk.max = most
            if at_limit:
                self.topk.value = at or most


def _number(noted: Any, otherwise: Any) -> Any:
    """A number that a trace noted; ``otherwise`` if it noted none."""
    return noted if isinstance(noted, int | float) and not isinstance(noted, bool) else otherwise


def _state_line(run: LiveRun | None, session: Session) -> str:
    """The state that was published together with the trace, so that its token count belongs to it."""
    if run is None:
        return f"Showing {session.trace.label}; press Start for a run of your own."
    return f"Run {session.state}, {session.trace.length:,} tokens." + (f" {run.error}" if run.error else "")


def _load(name: str) -> Any:
    from workbench.checkpoint import load  # brings in torch

    return load(name)


def _run(model: Any, prompt: str, **settings: Any) -> LiveRun:
    from workbench.live import run  # brings in torch

    return run(model, prompt, **settings)
