"""How pictures reach the page: charts as outputs, and one small widget for everything that needs the pointer.

A chart is one output of an ``ipywidgets.Output``, never a FigureWidget, which would carry megabytes of script per instance:
an output is drawn by the page's own plotly renderer, is sent as one message from any thread, and is replaced as a whole.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import plotly.graph_objects as go
import traitlets as tl

CHART_MIME = "application/vnd.plotly.v1+json"


def as_output(fig: go.Figure | dict[str, Any]) -> dict[str, Any]:
    """A chart as a notebook output, for ``out.outputs = (as_output(fig),)``; also one of plain values and arrays."""
    chart = _sent(fig) if isinstance(fig, dict) else json.loads(fig.to_json())
    chart["config"] = {"displaylogo": False}  # "responsive" makes charts of a height given in pixels collapse to none at times
    title = (chart["layout"].get("title", {}).get("text") or "chart").replace("<br>", " ")
    return {"output_type": "display_data", "data": {CHART_MIME: chart, "text/plain": title}, "metadata": {}}


def _sent(value: Any) -> Any:
    """Arrays as plotly.js takes them, their bytes in base64; everything else as it is."""
    if isinstance(value, dict):
        return {name: _sent(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_sent(part) for part in value]
    if not isinstance(value, np.ndarray):
        return value
    kind = {"f": "f", "i": "i"}[value.dtype.kind] + str(value.dtype.itemsize)
    shape = {"shape": ", ".join(map(str, value.shape))} if value.ndim > 1 else {}
    return {"dtype": kind, "bdata": base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()} | shape


class Pointer(anywidget.AnyWidget):
    """A picture with a cross-hair over its cells (``mode="picture"``), or HTML with ``data-token`` elements (``"text"``).

    Change traits with ``show``, which sends them as one message. The page answers with ``on_msg`` messages:
    ``{"type": "hover" | "click", "row", "column"}`` in cells, ``{"type": "zoom", "by": 1 | -1 | 0, "row", "column"}``,
    ``{"type": "click", "token": text}`` and ``{"type": "move", "by": 1 | -1}``. ``html`` is shown as it is: escape it.
    """

    _esm = (Path(__file__).parent / "pointer.js").read_text(encoding="utf-8")
    _css = """
.wb-picture {display: grid; grid-template-columns: auto auto var(--wb-width, 300px); width: max-content; max-width: 100%;
  font-family: var(--jp-ui-font-family, sans-serif); font-size: 11px; color: var(--jp-ui-font-color1, inherit); padding: 4px 0}
.wb-box {grid-column: 3; grid-row: 1; position: relative; width: 100%; height: var(--wb-height); overflow: hidden;
  cursor: crosshair; box-shadow: 0 0 0 1px var(--jp-border-color1, grey)}
.wb-box:focus-visible {outline: 2px solid var(--jp-brand-color1, #0072b2); outline-offset: 2px}
.wb-box img {display: block; width: 100%; height: 100%; image-rendering: pixelated; user-select: none}
.wb-across, .wb-down, .wb-mark {position: absolute; pointer-events: none; background: #d55e00}
.wb-across {left: 0; right: 0; height: 1px} .wb-down {top: 0; bottom: 0; width: 1px}
.wb-mark {left: 0; right: 0; height: 0; background: none; border-top: 1px dashed #cc79a7}
.wb-box [hidden] {display: none}
.wb-row-title {grid-column: 1; grid-row: 1; writing-mode: vertical-rl; transform: rotate(180deg); text-align: center}
.wb-row-labels {grid-column: 2; grid-row: 1; position: relative}
.wb-row-labels span {position: absolute; right: 5px; transform: translateY(-50%); white-space: pre; line-height: 1}
.wb-column-labels {grid-column: 3; grid-row: 2; position: relative; height: 1.5em}
.wb-column-labels span {position: absolute; top: 4px; transform: translateX(-50%); white-space: pre; line-height: 1}
.wb-upright span {writing-mode: vertical-rl}
.wb-column-title {grid-column: 3; grid-row: 3; text-align: center}
.wb-pointer.wb-text {overflow-y: auto; padding: 0 2px}
.wb-pointer.wb-text:focus-visible {outline: 2px solid var(--jp-brand-color1, #0072b2)}
"""
    mode = tl.Enum(("picture", "text"), "picture").tag(sync=True)
    label = tl.Unicode().tag(sync=True)  # read out by screen readers
    png = tl.Bytes().tag(sync=True)
    rows = tl.Int(1).tag(sync=True)  # cells
    columns = tl.Int(1).tag(sync=True)
    cross: tl.List[int] = tl.List().tag(sync=True)  # [row, column] of the cross-hair in a new picture, [] for none
    mark = tl.Int(-1).tag(sync=True)  # the chosen row of cells
    width = tl.Int(300).tag(sync=True)  # CSS pixels
    height = tl.Int(0).tag(sync=True)  # of the picture; of a text, the most it takes before it scrolls (0: no limit)
    row_title = tl.Unicode().tag(sync=True)
    column_title = tl.Unicode().tag(sync=True)
    row_labels: tl.List[Any] = tl.List().tag(sync=True)  # [[share of the side, text], ...]
    column_labels: tl.List[Any] = tl.List().tag(sync=True)
    upright = tl.Bool(False).tag(sync=True)  # column labels written downwards
    html = tl.Unicode().tag(sync=True)
    reports = tl.Bool(False).tag(sync=True)  # whether the page says {"type": "drawn", "sequence"} after each drawing
    sequence = tl.Int(0).tag(sync=True)

    def show(self, **traits: Any) -> None:
        """Set traits and have the page draw them together."""
        with self.hold_sync():
            for name, value in traits.items():
                setattr(self, name, value)
            self.sequence += 1
