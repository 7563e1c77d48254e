"""Rows of a cache to look through: as they were, and as the release stores them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ipywidgets as ipw

from workbench.figures.rounding import rounded_row, row_bytes_html
from workbench.rounding import StoredRows
from workbench.widgets.render import as_output


class RoundedRows(ipw.VBox):
    """Choose a kind of rows and one of them; ``figure`` is the chart last drawn. Below, what the bytes of a row are."""

    def __init__(self, stored: Sequence[StoredRows]) -> None:
        bytes_of = ipw.HTML(row_bytes_html(stored))
        self.stored = tuple(stored)
        self.kind = ipw.Dropdown(
            options={rows.name: i for i, rows in enumerate(self.stored)}, description="Rows", layout=ipw.Layout(width="260px")
        )
        self.row = ipw.IntSlider(
            description="Row",
            tooltip="In the order of the text",
            continuous_update=False,
            layout=ipw.Layout(width="min(100%, 420px)"),
        )
        self.row.max = len(self.stored[0].values) - 1
        self.view = ipw.Output()
        self.figure: Any = None
        super().__init__([ipw.HBox([self.kind, self.row], layout=ipw.Layout(flex_flow="row wrap")), self.view, bytes_of])
        self.kind.observe(self._redraw, names="value")
        self.row.observe(self._redraw, names="value")
        self._redraw()

    def _redraw(self, change: Any = None) -> None:
        rows = self.stored[self.kind.value]
        self.row.max = len(rows.values) - 1
        self.figure = rounded_row(rows, self.row.value)
        self.view.outputs = (as_output(self.figure),)
