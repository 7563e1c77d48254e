"""Demo: a presenter's slides on recorded runs, driven by a clicker; one button runs the model behind the slide live."""

from __future__ import annotations

import threading
import time
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets as ipw
import traitlets as tl

from workbench.errors import InputError, WorkbenchError
from workbench.trace import Trace
from workbench.widgets.session import FINAL_STATES, Session
from workbench.widgets.slides import SCRIPTS, SUBJECTS, Slide, Subject
from workbench.widgets.still import still_html

if TYPE_CHECKING:
    from workbench.live import LiveRun

PAINTED_S = 20.0
FORMULA = "Nothing to run: this slide is computed by formula."


class SlideBar(anywidget.AnyWidget):
    """Title, sentence, buttons and notes of one slide; ``on_msg`` gets {"type": "next" | "back" | "reset" | "live"}."""

    _esm = (Path(__file__).parent / "demo.js").read_text(encoding="utf-8")
    _css = """
.wb-slide {padding: 4px 8px; color: var(--jp-ui-font-color1, inherit); font-family: var(--jp-ui-font-family, sans-serif)}
.wb-slide:focus-visible {outline: 2px solid var(--jp-brand-color1, #0072b2)}
.wb-slide-title {font-size: 34px; line-height: 1.2; margin: 4px 0}
.wb-slide-said {font-size: 22px; line-height: 1.4; margin: 6px 0}
.wb-slide-bar {display: flex; flex-wrap: wrap; gap: 8px; align-items: center; margin: 8px 0}
.wb-slide .wb-slide-button {width: auto; height: 38px; padding: 0 18px; font-size: 17px; line-height: 38px}
.wb-slide-place, .wb-slide-status {font-size: 17px} .wb-slide-hint {font-size: 13px; margin: 2px 0}
.wb-slide-notes {font-size: 15px; line-height: 1.4; max-width: 60em} .wb-slide-notes summary {cursor: pointer}
"""
    slide: tl.Dict[str, Any] = tl.Dict().tag(sync=True)  # all of it as one message


class Demo(ipw.VBox):
    """Slides for "3 minutes", "10 minutes" or "45 minutes". PageDown, PageUp and arrow keys turn them, Reset starts again.

    Everything shown is recorded, or modelled by formula, until *Go live* runs the model of the slide's subject: then every
    slide on that subject follows the run. ``index`` is the slide on show, ``view`` its picture, ``run`` the last live run.
    Raises InputError for a script there is not.
    """

    def __init__(self, script: str = "3 minutes") -> None:
        if script not in SCRIPTS:
            raise InputError(f"there are demos of {', '.join(map(repr, SCRIPTS))}, got {script!r:.60}")
        self.script, self.slides = script, SCRIPTS[script]
        self.index = 0
        self.run: LiveRun | None = None
        self._lock = threading.RLock()  # a slide is built once, by the page's messages or ahead of them
        self._models: dict[str, Any] = {}
        self._round = 0  # counts resets, so that what was started before one ends quietly
        self._starting = False
        self._status = ""
        self._start_again()
        self.bar = SlideBar()
        self.bar.on_msg(self._on_message)
        self.place = ipw.VBox(layout=ipw.Layout(min_height="420px"))
        super().__init__([self.bar, self.place])
        self.add_class("wb-demo")
        self._show()

    # -- what keys and buttons do ------------------------------------------------------------------------------------------

    def next(self) -> None:
        self._go(self.index + 1)

    def back(self) -> None:
        self._go(self.index - 1)

    def reset(self) -> None:
        """The first slide, every recording as it was; a live run is stopped."""
        with self._lock:
            if self.run is not None:
                self.run.stop()
            self._round += 1
            self._start_again()
            self._go(0)

    def go_live(self) -> None:
        """Load the model of this slide's subject if need be and start its run; in a thread, so that the page stays alive."""
        with self._lock:
            name = self.slides[self.index].subject
            if name is None or self._starting:
                return
            self._starting = True
            subject = SUBJECTS[name]
            self._say(f"Starting {subject.model}…" if subject.model in self._models else f"Loading {subject.model}…")
            work = (name, subject, self._round)
            threading.Thread(target=self._launch, args=work, name="workbench-demo", daemon=True).start()

    def _on_message(self, _: Any, message: Any, buffers: Any) -> None:
        act = {"next": self.next, "back": self.back, "reset": self.reset, "live": self.go_live}.get(message.get("type"))
        if act is not None:
            act()

    # -- slides ------------------------------------------------------------------------------------------------------------

    @property
    def view(self) -> ipw.Widget:
        return self._build(self.index)

    def session(self, name: str) -> Session:
        """What all slides on a subject look at together."""
        with self._lock:
            if name not in self._sessions:
                self._sessions[name] = Session(Trace.load(SUBJECTS[name].trace))
            return self._sessions[name]

    def _start_again(self) -> None:
        self._sessions: dict[str, Session] = {}
        for view in getattr(self, "_built", {}).values():
            view.close()  # so that it follows no session any more
        self._built: dict[Any, ipw.Widget] = {}  # by what slides with the same picture have in common
        self._starting, self._status, self.run = False, "", None

    def _go(self, index: int) -> None:
        with self._lock:
            self.index = min(max(0, index), len(self.slides) - 1)
            self._show()

    def _build(self, index: int) -> ipw.Widget:
        with self._lock:
            slide = self.slides[index]
            key = (slide.view, slide.subject)
            if key not in self._built:
                self._built[key] = slide.view(self.session(slide.subject) if slide.subject else None)
            return self._built[key]

    def _turn(self, slide: Slide) -> None:
        """Have the views of a slide's subject look at the layer it is about."""
        if slide.subject is None:
            return
        session = self.session(slide.subject)
        noted = session.trace.notes.get("look_at")
        opening = noted.get("layer") if isinstance(noted, dict) else None
        layer: Any = slide.layer if slide.layer is not None else opening
        with session.lock:
            if layer in [record.layer for record in session.trace.layers]:
                session.layer = layer

    def _show(self) -> None:
        if not self._starting:
            self._status = ""  # what was said on another slide
        try:
            self._turn(self.slides[self.index])
            self.place.children = (self._build(self.index),)
        except Exception as error:  # the next slide must still be reachable, and the presenter see why
            self.place.children = ()
            self._status = f"This picture could not be drawn ({type(error).__name__}: {error})"
        self._tell()
        if self.index + 1 < len(self.slides):
            threading.Thread(target=self._prepare, args=(self.index + 1, self._round), daemon=True).start()

    def _prepare(self, index: int, of_round: int) -> None:
        """Build the next slide ahead, so that turning to it takes no time."""
        try:
            with self._lock:
                if of_round == self._round:
                    self._build(index)
        except Exception:  # the slide itself says so when it is shown
            return

    def _tell(self) -> None:
        slide = self.slides[self.index]
        session = self.session(slide.subject) if slide.subject else None
        live = session is not None and session.run is not None
        about = SUBJECTS[slide.subject] if slide.subject else None
        self.bar.slide = {
            "title": slide.title,
            "said": slide.said(session.trace if session else None) if _ready(session) else "The run has just begun.",
            "notes": slide.notes,
            "number": self.index + 1,
            "count": len(self.slides),
            "state": "live" if live else "recorded" if session else "modelled",
            "status": self._status or _standing(session),
            "can_go_live": about is not None and not self._starting,
            "about_live": f"Run {about.model} now and show it here" if about else FORMULA,
        }

    def _say(self, text: str) -> None:
        self._status = text
        self._tell()

    # -- the live run --------------------------------------------------------------------------------------------------------

    def _launch(self, name: str, subject: Subject, of_round: int) -> None:
        message = ""
        try:
            if subject.model not in self._models:
                from workbench.checkpoint import load  # brings in torch

                self._models[subject.model] = load(subject.model)
            self._run(name, subject, self._models[subject.model], of_round)
        except WorkbenchError as error:
            message = f"{error}; the recording stays."
        except Exception as error:  # the button must come back, and the presenter see why
            message = f"The run could not start ({type(error).__name__}: {error}); the recording stays."
        finally:
            with self._lock:
                if of_round == self._round:
                    self._starting = False
                    self._say(message)

    def _run(self, name: str, subject: Subject, model: Any, of_round: int) -> None:
        """Start the run, have every slide on its subject follow, and turn them to the needle at its end."""
        from dataclasses import replace

        from workbench.live import run
        from workbench.needle import find_needle, hide_needle, sample_text
        from workbench.training.sample import prose

        text = prose(sample_text())
        needle = hide_needle(model, text, subject.key, subject.value, subject.depth, subject.tokens)
        with self._lock:
            if of_round != self._round:
                return
            if self.run is not None and self.run.state not in FINAL_STATES:
                self.run.stop()  # one run at a time
            live = self.run = run(model, needle.ids, max_new_tokens=subject.new_tokens)
            session = self.session(name)
            session.attach(live)
            self._say(f"Live: {subject.model} is running…")
        live.wait()
        if live.error:
            raise WorkbenchError(live.error)
        found = find_needle(live.trace, needle)
        end = time.monotonic() + PAINTED_S
        while session.run is live and session.state not in FINAL_STATES and time.monotonic() < end:
            time.sleep(0.05)  # the last snapshot is about to be painted
        with self._lock:
            if of_round != self._round or session.run is not live:
                return
            look = {"look_at": {"token": found["best_query"], "layer": found["best_layer"]}}
            with session.lock:
                session.show(replace(live.trace, notes=live.trace.notes | needle.notes | look))
                session.choose_token(found["best_query"])
            for key in [key for key in self._built if key[1] == name and not hasattr(self._built[key], "session")]:
                self._built.pop(key).close()  # made once, from the recording: made anew
            self._show()

    # -- without a kernel ----------------------------------------------------------------------------------------------------

    def whole_html(self) -> str:
        """All slides one below the other, notes folded; for exported files."""
        parts = []
        for index, slide in enumerate(self.slides):
            session = self.session(slide.subject) if slide.subject else None
            self._turn(slide)
            parts.append(_section(index, slide, slide.said(session.trace if session else None), still_html(self._build(index))))
        return f"<div><p><b>Demo, {escape(self.script)}</b></p>{''.join(parts)}</div>"


def _section(index: int, slide: Slide, said: str, picture: str) -> str:
    return (
        f"<h2>{index + 1}. {escape(slide.title)}</h2><p style='font-size:20px;line-height:1.4'>{escape(said)}</p>{picture}"
        f"<details><summary>Presenter notes</summary><p>{escape(slide.notes)}</p></details>"
    )


def _ready(session: Session | None) -> bool:
    return session is None or session.trace.length > 0


def _standing(session: Session | None) -> str:
    if session is None:
        return "modelled, by formula"
    return f"{'live: measured' if session.run is not None else 'recorded'} on {session.trace.device}"
