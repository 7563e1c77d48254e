"""Microscope: press an entry to drop it or force it in, and see what the next token would have been."""

from __future__ import annotations

import threading
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw

from workbench.errors import InputError, WorkbenchError
from workbench.figures.attention import describe_layer
from workbench.figures.microscope import change_chart, choice_chart, entries_html
from workbench.trace import Trace
from workbench.widgets.render import Pointer, as_output
from workbench.widgets.session import FINAL_STATES, Session, session_of

if TYPE_CHECKING:
    from workbench.live import LiveRun
    from workbench.microscope import Change, Choice, Forks

MOST_TOKENS = 16_384  # the text is read once more, up to the query
ENTRIES_PIXELS = 330
WATCHED = ["trace", "token", "layer", "state"]


class Microscope(ipw.VBox):
    """Takes a LiveRun, a Trace or a Session and follows its chosen token and layer; ``model`` is needed for a recording.

    Pressing an entry drops it if it is attended to and forces it in if not; one of each is a swap. The run is forked from a
    copy of a cache before the query, so nothing else changes. ``change`` is what is shown, None while a run works or where a
    layer does not choose.
    """

    _following = False

    def __init__(self, source: LiveRun | Trace | Session, model: Any = None) -> None:
        self.session, self._model = session_of(source), model
        if self.model is None:
            raise InputError("a recording alone cannot be forked; give its model: wb.Microscope(trace, model=wb.load(...))")
        if not hasattr(self.model, "blocks"):
            raise InputError(f"expected a model that wb.load gave, got {self.model!r:.60}")
        self.change: Change | None = None
        self._choice: Choice | None = None
        self._forks: Forks | None = None
        self._drop: tuple[int, ...] = ()
        self._force: tuple[int, ...] = ()
        self._shown: tuple[Any, ...] = ()  # model, layer and query that the edit is about
        self._syncing: int | None = None  # the thread that copies state into the controls
        narrow = {"description_width": "initial"}
        self.layer = ipw.Dropdown(description="Layer", style=narrow, layout=ipw.Layout(width="250px"))
        self.token = ipw.BoundedIntText(description="Query token", style=narrow, layout=ipw.Layout(width="170px"))
        self.read_at = ipw.BoundedIntText(
            description="Next token after", style=narrow, layout=ipw.Layout(width="200px"),
            tooltip="The fork reads on to this token before it is asked for the next one",
        )  # fmt: skip
        self.entry = ipw.BoundedIntText(description="Entry", style=narrow, layout=ipw.Layout(width="130px"))
        self.press = ipw.Button(
            description="Drop or force in", tooltip="The entry of this number", layout=ipw.Layout(width="auto")
        )
        self.undo = ipw.Button(description="Undo all", layout=ipw.Layout(width="auto"))
        self.status = ipw.HTML(layout=ipw.Layout(min_height="24px"))
        self.entries = Pointer(
            mode="text", height=ENTRIES_PIXELS, label="Entries of the query: press one to drop or force it in"
        )
        self.chart = ipw.Output(layout=ipw.Layout(flex="1 1 420px", min_width="360px", margin="0 0 0 16px"))
        wrap = ipw.Layout(flex_flow="row wrap", align_items="center")
        controls = (self.layer, self.token, self.read_at, self.entry, self.press, self.undo)
        self.scores = ipw.Output(layout=ipw.Layout(flex="1 1 420px", min_width="360px"))
        left = ipw.VBox([self.entries, self.scores], layout=ipw.Layout(flex="1 1 420px", min_width="320px"))
        self.body = ipw.HBox([left, self.chart], layout=ipw.Layout(flex_flow="row wrap"))
        super().__init__([ipw.HBox(controls, layout=wrap), self.status, self.body])
        self.layer.observe(self._layer_chosen, names="value")
        self.token.observe(self._token_chosen, names="value")
        self.read_at.observe(self._read_at_chosen, names="value")
        self.entries.on_msg(self._on_entry)
        self.press.on_click(lambda _: self.toggle(self.entry.value))
        self.undo.on_click(lambda _: self.edit())
        self.session.observe(self._redraw, names=WATCHED)
        self._following = True
        self._redraw()

    def close(self) -> None:
        if self._following:  # not where __init__ refused its arguments
            self.session.unobserve(self._redraw, names=WATCHED)
            self._following = False
        super().close()

    @property
    def model(self) -> Any:
        """What is forked."""
        return self.session.run.model if self.session.run is not None else self._model

    def toggle(self, entry: int) -> None:
        """Drop an entry that is attended to, force in one that is not, or undo that."""
        with self.session.lock:
            if self._choice is None:
                return
            kept = entry in self._choice.kept
            mine = self._drop if kept else self._force
            mine = tuple(e for e in mine if e != entry) if entry in mine else (*mine, entry)
            self.edit(drop=mine if kept else self._drop, force=self._force if kept else mine)

    def edit(self, drop: tuple[int, ...] = (), force: tuple[int, ...] = ()) -> None:
        """Fork with exactly these entries dropped and forced in; what cannot be done is said and changes nothing."""
        with self.session.lock:
            if self._choice is None:
                return
            before, (self._drop, self._force) = (self._drop, self._force), (tuple(drop), tuple(force))
            try:
                self._fork()
            except WorkbenchError as error:
                self._drop, self._force = before
                self._say(str(error), trouble=True)

    def _on_entry(self, _: Any, message: Any, buffers: Any) -> None:
        if message.get("type") == "click" and str(message.get("token", "")).isdigit():
            self.toggle(int(message["token"]))

    def _layer_chosen(self, change: Any) -> None:
        if self._syncing != threading.get_ident() and change["new"] is not None:
            with self.session.lock:
                self.session.layer = change["new"]

    def _token_chosen(self, change: Any) -> None:
        if self._syncing != threading.get_ident():
            self.session.choose_token(change["new"])

    def _read_at_chosen(self, change: Any) -> None:
        if self._syncing != threading.get_ident():
            self.edit(self._drop, self._force)

    def _redraw(self, change: Any = None) -> None:
        with self.session.lock:
            self.change = self._choice = None
            trouble = self._trouble()
            if not trouble:
                try:
                    self._look()
                except WorkbenchError as error:
                    trouble = str(error)
                except Exception as error:  # maybe in a thread nobody waits for: the reader must see why
                    trouble = f"The run could not be forked ({type(error).__name__}: {error})"
            self.body.layout.display = "none" if self.change is None else None
            for control in (self.read_at, self.entry, self.press, self.undo):
                control.disabled = self.change is None
            if trouble:
                self._say(trouble, trouble=True)

    def _trouble(self) -> str:
        """Why there is nothing to fork, or nothing at all; the choosers are set on the way."""
        trace, model = self.session.trace, self.model
        layers = [record for record in trace.layers if record.selects]
        self._syncing = threading.get_ident()
        try:
            self.layer.options = [(f"{x.layer}: {describe_layer(x)}", x.layer) for x in layers]
            self.layer.value = self.session.layer if self.session.layer in [x.layer for x in layers] else None
            self.token.max = max(0, trace.length - 1)
            self.token.value = min(self.session.token, self.token.max)
        finally:
            self._syncing = None
        if trace.config != model.config.to_dict():
            return f"{trace.model} is of another shape than {model.name}; give the model this recording was made with."
        if self.session.run is not None and self.session.state not in (*FINAL_STATES, "paused"):
            return "The run is at work; its choices can be edited when it pauses or ends."
        if not trace.length:
            return "Nothing was read yet."
        if not layers:
            return f"{trace.model} attends to every token: there is no choice to edit."
        if self.layer.value is None:
            return f"Layer {self.session.layer} chooses nothing; take one that does from the list."
        if self.session.token >= MOST_TOKENS:
            return f"A query before token {MOST_TOKENS:,} can be forked; the text is read again up to there."
        return ""

    def _look(self) -> None:
        """The chosen query as it was; an edit made for the same one stays."""
        from workbench.microscope import Forks

        trace, token = self.session.trace, self.token.value
        topk = trace.notes.get("topk") if isinstance(trace.notes.get("topk"), int) else None
        ids = trace.token_ids.tolist()
        if self._forks is None or self._forks.model is not self.model or self._forks.topk != topk:
            self._forks = Forks(self.model, ids, topk)
        elif self._forks.ids != ids:
            self._forks.read(ids)
        self._choice = self._forks.choice(self.layer.value, token)
        self.scores.outputs = (as_output(choice_chart(trace, self._choice)),)
        shown = (self.model, self.layer.value, token)
        self._syncing = threading.get_ident()
        try:
            self.entry.max, self.read_at.max = max(0, self._choice.visible - 1), trace.length - 1
            if shown != self._shown:
                self._shown, self._drop, self._force = shown, (), ()
                self.read_at.min = 0
                self.read_at.value = self.read_at.min = token
        finally:
            self._syncing = None
        self._fork()

    def _fork(self) -> None:
        from workbench.microscope import Edit

        assert self._forks is not None and self._choice is not None
        trace, read_at = self.session.trace, self.read_at.value
        edit = Edit(self._choice.layer, self._choice.query, self._drop, self._force)
        change = self.change = self._forks.change(edit, read_at)
        followed = int(self._forks.ids[read_at + 1]) if read_at + 1 < trace.length else self._chosen_by_the_run(trace, read_at)
        tokenizer = self.model.tokenizer

        def text_of(token: int) -> str:
            return tokenizer.decode([token]) if tokenizer else f"[{token}]"

        named = [self.entry.value] if self.entry.value < self._choice.visible else []
        self.entries.show(html=entries_html(trace, self._choice, change, named))
        self.figure = change_chart(trace, change, text_of, followed)
        self.chart.outputs = (as_output(self.figure),)
        told = f"The next token's distribution moved by KL {change.kl_nats:.3g} nats"
        if followed is not None:
            before, after = change.before[followed], change.after[followed]
            told += f"; “{text_of(followed)}”, which came next, went from {before:.2%} to {after:.2%}"
        if read_at > edit.query and edit.layer == len(self.model.blocks) - 1:
            told += "; what the last layer makes of a query reaches no later token"
        if not (self._drop or self._force):
            told = "Nothing is edited yet: press an entry"
        self._say(f"{told}. Forked and read in {1e3 * change.seconds:.0f} ms.")

    def _chosen_by_the_run(self, trace: Trace, t: int) -> int | None:
        """The token that the run chose after ``t``, the last one it read."""
        step = trace.step_of_token(t)
        chosen = int(trace.next_ids[step]) if 0 <= step < len(trace.next_ids) else -1
        return chosen if chosen >= 0 and t == trace.step_end(step) - 1 else None

    def _say(self, message: str, trouble: bool = False) -> None:
        mark = "⚠ " if trouble and self._choice is not None else ""
        self.status.value = f"<div role='status' aria-live='polite'>{mark}{escape(message)}</div>"
