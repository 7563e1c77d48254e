"""The claims as a table, and meters to try: KV bytes beside weight bytes, with Engram's tables here or there."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import ipywidgets as ipw

from workbench.claims import Claim
from workbench.config.parts import STORAGES
from workbench.errors import WorkbenchError
from workbench.figures.claims import METERED, claims_html, freed_html, memory_meters
from workbench.presets import presets
from workbench.widgets.render import as_output

LENGTHS = tuple(1024 * 2**power for power in range(11))  # 1,024 to 1,048,576 tokens


class ClaimsTable(ipw.HTML):
    """One row a claim, see ``wb.article_claims``."""

    def __init__(self, claims: Sequence[Claim]) -> None:
        super().__init__(claims_html(claims))


class MemoryMeters(ipw.VBox):
    """How long the context is and where Engram's tables lie, on separate meters; below, what freed bytes are worth as cache.

    ``figure`` is the chart last drawn.
    """

    def __init__(self, length: int = LENGTHS[-1]) -> None:
        narrow = {"description_width": "initial"}
        self.length = ipw.SelectionSlider(
            options=[(f"{n:,}", n) for n in sorted({*LENGTHS, length})],
            value=length,
            description="Tokens",
            continuous_update=False,
            layout=ipw.Layout(width="min(100%, 420px)"),
        )
        self.offloaded = ipw.Checkbox(True, description="Engram tables in host memory", indent=False)
        tables = presets["v4.1-flash"].weights
        self.freed = ipw.FloatText(
            tables.host_bytes / 1e9 if tables else 0.0, description="GB freed", style=narrow, layout=ipw.Layout(width="160px")
        )
        self.model = ipw.Dropdown(
            options=[(presets[name].title, name) for name in METERED],
            value="v4.1-flash",
            description="as cache of",
            style=narrow,
            layout=ipw.Layout(width="270px"),
        )
        self.storage = ipw.Dropdown(
            options=STORAGES, value="released", description="stored", style=narrow, layout=ipw.Layout(width="160px")
        )
        self.view, self.worth = ipw.Output(), ipw.HTML()
        row = ipw.Layout(flex_flow="row wrap")
        super().__init__(
            [
                ipw.HBox([self.length, self.offloaded], layout=row),
                self.view,
                ipw.HBox([self.freed, self.model, self.storage], layout=row),
                self.worth,
            ]
        )
        for control in (self.length, self.offloaded):
            control.observe(self._redraw, names="value")
        for control in (self.freed, self.model, self.storage):
            control.observe(self._count, names="value")
        self._redraw()
        self._count()

    def _redraw(self, change: Any = None) -> None:
        self.figure = memory_meters(self.length.value, offloaded=self.offloaded.value)
        self.view.outputs = (as_output(self.figure),)

    def _count(self, change: Any = None) -> None:
        try:
            self.worth.value = freed_html(1e9 * self.freed.value, self.model.value, self.storage.value)
        except WorkbenchError as error:
            self.worth.value = f"<p role='status'>{escape(str(error))}</p>"
