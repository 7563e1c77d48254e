"""EngramExplorer: the n-grams of a text, the rows and gates behind each token, and the next token with Engram on and off."""

from __future__ import annotations

import threading
from contextlib import suppress
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw

from workbench.engram import NO_ENGRAM, EngramEffect, Ngrams, engram_effect
from workbench.errors import WorkbenchError
from workbench.figures.engram import Paint, effect_paint, engram_effect_chart, engram_text, gate_paint, ngrams_html
from workbench.trace import Trace
from workbench.widgets.render import Pointer, as_output
from workbench.widgets.session import FINAL_STATES, Session, session_of

if TYPE_CHECKING:
    from workbench.live import LiveRun

TEXT_PIXELS = 260
MOST_TOKENS = 4096  # read twice to switch Engram off; of a longer text the first ones
OFF = "off"  # the colouring by what switching off changes


class EngramExplorer(ipw.VBox):
    """Takes a LiveRun, a Trace or a Session and follows its chosen token; arrow keys in the text move it.

    Switching off needs the model: that of the run, or ``model`` for a recording. It is measured when a run is over, in a
    thread of its own; ``effect`` is the result and ``figure`` the chart last drawn, both None until then.
    """

    def __init__(self, source: LiveRun | Trace | Session, model: Any = None) -> None:
        self.session, self._model = session_of(source), model
        self.effect: EngramEffect | None = None
        self.figure: Any = None
        self._measured: Trace | None = None  # what ``effect`` belongs to, or will once it is measured
        self._ngrams: tuple[Trace, Ngrams] | None = None
        self._drawn: dict[str, Any] = {}
        self._syncing: int | None = None  # the thread that copies the session's state into the controls
        narrow = {"description_width": "initial"}
        self.title = ipw.HTML()
        self.colour = ipw.Dropdown(description="Colour", style=narrow, layout=ipw.Layout(width="min(100%, 360px)"))
        self.token = ipw.BoundedIntText(description="Token", style=narrow, layout=ipw.Layout(width="150px"))
        self.text = Pointer(mode="text", height=TEXT_PIXELS, label="Text coloured by Engram's gates; arrow keys choose a token")
        self.details, self.status, self.view = ipw.HTML(), ipw.HTML(), ipw.Output()
        controls = ipw.HBox([self.colour, self.token], layout=ipw.Layout(flex_flow="row wrap"))
        self.body = ipw.VBox([controls, self.text, self.details, self.status, self.view])
        super().__init__([self.title, self.body])
        self.colour.observe(self._recoloured, names="value")
        self.token.observe(self._chosen, names="value")
        self.text.on_msg(self._on_text)
        self._measure(wait=True)  # so that a finished run is shown whole at once
        self.session.observe(self._redraw, names=["trace", "token", "state"])
        self._redraw()

    def close(self) -> None:
        with suppress(ValueError):  # closed before
            self.session.unobserve(self._redraw, names=["trace", "token", "state"])
        super().close()

    def _chosen(self, change: Any) -> None:
        if self._syncing != threading.get_ident():
            self.session.choose_token(change["new"])

    def _recoloured(self, change: Any) -> None:
        if self._syncing != threading.get_ident():
            self._redraw()

    def _on_text(self, _: Any, message: Any, buffers: Any) -> None:
        chosen = self.session.token + message.get("by", 0) if message.get("type") == "move" else int(message.get("token", -1))
        if 0 <= chosen < self.session.trace.length:
            self.session.choose_token(chosen)

    @property
    def model(self) -> Any:
        """What Engram is switched off in; None for a recording alone."""
        return self.session.run.model if self.session.run is not None else self._model

    @property
    def _working(self) -> bool:
        return self.session.run is not None and self.session.state not in FINAL_STATES

    def _measure(self, wait: bool = False) -> None:
        """Begin to measure the effect of the current trace, unless its run still works or it is done already."""
        trace, model = self.session.trace, self.model
        if model is None or self._working or not trace.engram or self._measured is trace:
            return
        self._measured, self.effect = trace, None
        if wait:
            self._work(trace, model)
            return
        self._say("Reading the text with and without Engram…")
        threading.Thread(target=self._work, args=(trace, model), name="workbench-engram", daemon=True).start()

    def _work(self, trace: Trace, model: Any) -> None:
        try:
            effect = engram_effect(model, trace.token_ids[:MOST_TOKENS].tolist())
        except WorkbenchError as error:
            self._say(str(error))
        except Exception as error:  # a thread nobody waits for: the reader must see why
            self._say(f"Engram could not be switched off ({type(error).__name__}: {error})")
        else:
            with self.session.lock:
                if self._measured is trace:
                    self.effect = effect
                    self._redraw()

    def _say(self, text: str) -> None:
        self.status.value = f"<div role='status' aria-live='polite'>{escape(text)}</div>"

    def _redraw(self, change: Any = None) -> None:
        with self.session.lock:
            trace = self.session.trace
            if not trace.length or not trace.engram:
                waiting = "waiting for the first step" if not trace.length else NO_ENGRAM
                self.title.value, self.body.layout.display = f"{escape(trace.label)}<br>{waiting}", "none"
                self._drawn = {}
                return
            self.body.layout.display = None
            if self._ngrams is None or self._ngrams[0] is not trace:
                self._ngrams = trace, Ngrams(trace)
            self._measure()
            ngrams, token = self._ngrams[1], min(self.session.token, trace.length - 1)
            effect = self.effect if self._measured is trace else None
            self._sync_controls(trace, effect, token)
            layer, stream = self.colour.value
            if stream == OFF and effect is not None and effect.length == trace.length:
                paint = effect_paint(effect)
            else:
                paint = gate_paint(trace, layer, "mean" if stream == OFF else stream)
            self._draw("text", (trace, layer, stream, token, effect), self._draw_text, trace, ngrams, layer, token, paint)
            self._draw("details", (trace, layer, token), self._draw_details, trace, ngrams, layer, token)
            self._draw("effect", (effect, token, self._measured is trace, self._working), self._draw_effect, effect, token)

    def _draw(self, part: str, drawn_from: tuple[Any, ...], draw: Any, *arguments: Any) -> None:
        if self._drawn.get(part) != drawn_from:
            draw(*arguments)
            self._drawn[part] = drawn_from

    def _sync_controls(self, trace: Trace, effect: EngramEffect | None, token: int) -> None:
        self._syncing = threading.get_ident()
        try:
            options: list[tuple[str, tuple[int, Any]]] = []
            for memory in trace.engram:
                options.append((f"layer {memory.layer}: gate, mean of streams", (memory.layer, "mean")))
                streams = range(memory.gates.shape[1])
                options += [(f"layer {memory.layer}: gate of stream {m}", (memory.layer, m)) for m in streams]
            if effect is not None and effect.length == trace.length:
                options.append(("what switching Engram off changes (KL)", (trace.engram[0].layer, OFF)))
            if self.colour.options != tuple(options):
                old = self.colour.value
                self.colour.options = options
                self.colour.value = old if old in [value for _, value in options] else options[0][1]
            self.token.max = trace.length - 1
            self.token.value = token
        finally:
            self._syncing = None

    def _draw_text(self, trace: Trace, ngrams: Ngrams, layer: int, token: int, paint: Paint) -> None:
        self.title.value = f"<b>{escape(trace.label)}</b>"
        self.text.show(html=engram_text(trace, ngrams, layer, token, paint))

    def _draw_details(self, trace: Trace, ngrams: Ngrams, layer: int, token: int) -> None:
        self.details.value = ngrams_html(trace, ngrams, layer, token)

    def _draw_effect(self, effect: EngramEffect | None, token: int) -> None:
        if effect is not None and token < effect.length:
            told = ""
            if effect.length > 1:
                on, off = effect.on_loss.mean(), effect.off_loss.mean()
                told = f"Mean loss on this text: {on:.3f} nats per token with Engram, {off:.3f} with it switched off."
            self._say(told)
            self.figure = engram_effect_chart(effect, token)
            self.view.outputs = (as_output(self.figure),)
            return
        self.figure, self.view.outputs = None, ()
        if effect is not None:
            self._say(f"Engram was switched off for the first {effect.length:,} tokens; choose one of them.")
        elif self.model is None:
            self._say("Switching Engram off needs the model: start a run, or give model= with a recording.")
        elif self._working:
            self._say("Engram on and off is measured when the run is over.")
