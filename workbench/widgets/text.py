"""The explorer's text: coloured by where the query looks, searched without moving the query, and tokens chosen in it."""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as ipw
import traitlets as tl

from workbench.decoded import Tokens, decoded
from workbench.figures.attention import Head
from workbench.figures.text import text_view
from workbench.trace import Trace
from workbench.widgets.render import Pointer
from workbench.widgets.session import Session
from workbench.widgets.steps import StepSlider

TEXT_PIXELS = 300


class FindBar(anywidget.AnyWidget):
    """A field to search with, how far one is, and buttons; Enter goes to the next match, Shift and Enter to the one before.

    The page sets ``needle`` and ``match_case`` and sends ``{"type": "go", "by": 1 | -1}`` and ``{"type": "choose"}``.
    """

    _esm = (Path(__file__).parent / "find.js").read_text(encoding="utf-8")
    _css = """
.wb-find {display: flex; flex-wrap: wrap; gap: 4px; align-items: center; margin: 2px;
  font: 13px var(--jp-ui-font-family, sans-serif); color: var(--jp-ui-font-color1, inherit)}
.wb-find input[type=search] {font: inherit; color: inherit; width: 240px; max-width: 100%; box-sizing: border-box;
  padding: 3px 6px;
  background: var(--jp-layout-color1, Canvas); border: 1px solid var(--jp-border-color1, grey)}
.wb-find input:focus-visible {outline: 2px solid var(--jp-brand-color1, #0072b2)}
.wb-find label {display: inline-flex; gap: 4px; align-items: center}
.wb-find .jupyter-button {width: auto}
.wb-find output {min-width: 6em; font-variant-numeric: tabular-nums}
"""
    needle = tl.Unicode().tag(sync=True)
    match_case = tl.Bool(False).tag(sync=True)
    told = tl.Unicode().tag(sync=True)  # "3 of 17"
    found = tl.Bool(False).tag(sync=True)  # whether there is a match to go to or to choose


class TextPanel(ipw.VBox):
    """A search field and a slider over the steps above the text around the session's query.

    Whoever shows it calls ``draw``; it redraws itself to search. ``matches`` are the first and last tokens of what was
    found, ``at`` the number of the one gone to, -1 for none.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.matches: list[Tokens] = []
        self.at = -1
        self._show_match = False  # the text is scrolled to the match, until the query moves
        self._searched: tuple[Any, ...] = ()
        self._drawn: tuple[Trace, int, Head, int] | None = None
        self.find = FindBar(layout=ipw.Layout(flex="0 1 auto", width="max-content", max_width="100%"))
        told = "Text coloured by where the query looks; arrow keys move it"
        self.text = Pointer(mode="text", height=TEXT_PIXELS, label=told, reports=True)
        self.step = StepSlider(session)
        super().__init__([ipw.HBox([self.find, self.step], layout=ipw.Layout(flex_flow="row wrap")), self.text])
        self.find.observe(self._on_needle, names=["needle", "match_case"])
        self.find.on_msg(self._on_find)
        self.text.on_msg(self._on_text)

    def unfollow(self) -> None:
        """Follow the session no longer. Nothing is closed: what shows a closed widget could not be saved."""
        self.step.unfollow()

    def draw(self, trace: Trace, layer: int, head: Head, token: int) -> None:
        """Show the text around ``token`` and, while a match is gone to, the text around that."""
        if self._drawn is not None and token != self._drawn[3] and not self.session.follow:
            self._show_match = False  # a person chose another query, to look at that
        self._drawn = trace, layer, head, token
        self._search(trace)
        self.text.show(html=text_view(trace, layer, head, token, self.matches, self.at, show_match=self._show_match))
        self.session.page_gets(self, self.text.sequence)

    def _search(self, trace: Trace) -> None:
        """Find what is asked for, unless it was; in a text that has grown, the match gone to stays the same."""
        asked = trace, self.find.needle, self.find.match_case
        if asked == self._searched:
            return
        self._searched = asked
        here = self.matches[self.at] if self.at >= 0 else (0, 0)
        self.matches = decoded(trace).find(self.find.needle, self.find.match_case) if self.find.needle else []
        self.at = min(bisect_left(self.matches, here), len(self.matches) - 1)
        self._tell()

    def _tell(self) -> None:
        nothing = "not found" if self.find.needle else ""
        told = f"{self.at + 1:,} of {len(self.matches):,}" if self.matches else nothing
        with self.find.hold_sync():
            self.find.told, self.find.found = told, bool(self.matches)

    def go(self, by: int) -> None:
        """To the next match (1) or the one before (-1), from the last to the first and back."""
        with self.session.lock:
            if self.matches:
                self.at = (self.at + by) % len(self.matches)
                self._tell()
                self._redraw_at_match()

    def _redraw_at_match(self) -> None:
        self._show_match = self.at >= 0
        if self._drawn is not None:
            self.draw(*self._drawn)

    def _on_needle(self, change: Any) -> None:
        with self.session.lock:
            self.at = -1  # another search begins with the first match of the text
            self._searched = ()
            if self._drawn is not None:
                self._search(self._drawn[0])
            self._redraw_at_match()

    def _on_find(self, _: Any, message: Any, buffers: Any) -> None:
        if message.get("type") == "go":
            self.go(1 if message.get("by", 1) > 0 else -1)
        elif message.get("type") == "choose" and self.at >= 0:
            self.session.choose_token(self.matches[self.at][1])  # the last token: it sees the whole match

    def _on_text(self, _: Any, message: Any, buffers: Any) -> None:
        """A token was clicked, the query is to move by one, or the page has drawn what it got."""
        if message.get("type") == "drawn":
            self.session.page_drew(self, message.get("sequence", 0))
            return
        moved = message.get("type") == "move"
        chosen = self._neighbour(message.get("by", 0)) if moved else int(message.get("token", -1))
        if 0 <= chosen < self.session.trace.length:
            self.session.choose_token(chosen)

    def _neighbour(self, by: int) -> int:
        """The query moved by one unit of the text, so that each press of a key is seen."""
        token = min(self.session.token, self.session.trace.length - 1)
        text = decoded(self.session.trace)
        first, last = text.unit(token)
        if by < 0:
            return first - 1
        return text.unit(last + 1)[1] if last + 1 < self.session.trace.length else -1
