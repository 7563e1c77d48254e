"""Caches to compare and to look into: bytes held and read at any length, and one layer's slots token by token."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw

from workbench.caches import CacheUse, modelled_cache
from workbench.config.parts import STORAGES
from workbench.errors import WorkbenchError
from workbench.figures.caches import held_and_read
from workbench.figures.slots import cache_slots_html
from workbench.presets import presets
from workbench.trace import Trace
from workbench.widgets.render import as_output
from workbench.widgets.session import Session, session_of

if TYPE_CHECKING:
    from workbench.live import LiveRun

COMPARED = ("mha", "gqa-8", "v3.2", "v4-pro", "v4-flash", "v4.1-flash")
LENGTHS = tuple(1024 * 2**power for power in range(11))  # 1,024 to 1,048,576 tokens


class HeldAndRead(ipw.VBox):
    """Published models at a length and in a storage of one's choice, by formula. ``figure`` is the chart last drawn.

    ``uses`` are what it shows. Raises InputError for a preset there is not.
    """

    def __init__(self, models: Sequence[str] = COMPARED, length: int = LENGTHS[-1]) -> None:
        self.models = tuple(presets[name].name for name in models)
        self.length = ipw.SelectionSlider(
            options=[(f"{n:,}", n) for n in sorted({*LENGTHS, length})],
            value=length,
            description="Tokens",
            continuous_update=False,
            layout=ipw.Layout(width="min(100%, 420px)"),
        )
        self.storage = ipw.Dropdown(
            options=STORAGES,
            value="released",
            description="stored",
            style={"description_width": "initial"},
            layout=ipw.Layout(width="160px"),
        )
        self.view, self.status = ipw.Output(), ipw.HTML()
        self.uses: tuple[CacheUse, ...] = ()
        row = ipw.HBox([self.length, self.storage], layout=ipw.Layout(flex_flow="row wrap"))
        super().__init__([row, self.status, self.view])
        for control in (self.length, self.storage):
            control.observe(self._redraw, names="value")
        self._redraw()

    def _redraw(self, change: Any = None) -> None:
        try:
            self.uses = tuple(modelled_cache(name, self.length.value, self.storage.value) for name in self.models)
        except WorkbenchError as error:
            self.status.value = f"<p role='status'>{escape(str(error))}</p>"
            return
        self.status.value = ""
        self.figure = held_and_read(self.uses)
        self.view.outputs = (as_output(self.figure),)


class CacheSlots(ipw.VBox):
    """One layer's ring, open block and entries after each token; moves with every other view of its run or recording."""

    def __init__(self, source: LiveRun | Trace | Session) -> None:
        self.session = session_of(source)
        self.token = ipw.IntSlider(
            description="Token",
            max=0,
            tooltip="The newest token in the cache",
            layout=ipw.Layout(width="min(100%, 520px)"),
        )
        self.layer = ipw.Dropdown(description="Layer", layout=ipw.Layout(width="220px"))
        self.html = ipw.HTML()
        self._following = False
        row = ipw.HBox([self.token, self.layer], layout=ipw.Layout(flex_flow="row wrap"))
        super().__init__([row, self.html])
        self.token.observe(self._chosen, names="value")
        self.layer.observe(self._chosen, names="value")
        self.session.observe(self._follow, names=["trace", "token", "layer"])
        self._follow()

    def _chosen(self, change: Any) -> None:
        if self._following:
            return
        if change["owner"] is self.token:
            self.session.choose_token(change["new"])
        elif change["new"] is not None:
            self.session.layer = change["new"]

    def _follow(self, change: Any = None) -> None:
        with self.session.lock:
            trace = self.session.trace
            options = [(f"{x.layer}: {x.kind}", x.layer) for x in trace.layers]
            self._following = True
            try:
                if list(self.layer.options) != options:
                    self.layer.options = options
                if options:
                    self.layer.value = self.session.layer
                self.token.max = max(0, trace.length - 1)
                self.token.value = min(self.session.token, self.token.max)
            finally:
                self._following = False
            if not options or not trace.length:
                self.html.value = "<p>Nothing was recorded yet.</p>"
                return
            self.html.value = cache_slots_html(trace, self.session.layer, self.token.value + 1)
