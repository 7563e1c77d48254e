"""All terms of the glossary under a search box."""

from __future__ import annotations

from html import escape
from typing import Any

import ipywidgets as ipw

from workbench.glossary import STYLE, TERMS, Term


class GlossarySearch(ipw.VBox):
    """Type a word: ``found`` are the terms that mention it, those named so first."""

    def __init__(self) -> None:
        self.query = ipw.Text(description="Find", placeholder="a word, for instance window", continuous_update=True)
        self.list = ipw.HTML()
        self.found: tuple[Term, ...] = ()
        super().__init__([self.query, self.list])
        self.query.observe(self._redraw, names="value")
        self._redraw()

    def _redraw(self, change: Any = None) -> None:
        words = self.query.value.strip().lower()
        found = [term for term in TERMS if term.mentions(words)]
        found.sort(key=lambda term: (bool(words) and not _named(term, words), term.name.lower()))
        self.found = tuple(found)
        count = f"{len(found)} of {len(TERMS)} terms"
        none = f"<p>No term mentions “{escape(words)}”.</p>" if not found else ""
        items = "".join(term.html() for term in found)
        self.list.value = (
            f"{STYLE}<p role='status'>{count}</p>{none}<div style='max-height:420px;overflow-y:auto' tabindex='0'>{items}</div>"
        )


def _named(term: Term, words: str) -> bool:
    return any(words in name.lower() for name in (term.name, *term.also))
