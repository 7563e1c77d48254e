"""How pictures reach the page: charts as outputs, and one small widget for everything that needs the pointer.

A chart is one output of an ``ipywidgets.Output``, never a FigureWidget, which would carry megabytes of script per instance:
an output is drawn by the page's own plotly renderer, is sent as one message from any thread, and is replaced as a whole.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import plotly.graph_objects as go
import traitlets as tl

from workbench.figures.style import CHART_CSS

CHART_MIME = "application/vnd.plotly.v1+json"


def script(name: str) -> str:
    """A widget's script, behind the one that keeps keys from the notebook: a page needs that from any widget of ours, whichever
    it shows, and a widget's script cannot import another."""
    folder = Path(__file__).parent
    return "".join((folder / part).read_text(encoding="utf-8") for part in ("keys.js", name))


def as_output(
    fig: go.Figure | dict[str, Any], click: Mapping[str, Any] | None = None, *, anywhere: bool = False
) -> dict[str, Any]:
    """A chart as a notebook output, for ``out.outputs = (as_output(fig),)``; also one of plain values and arrays.

    ``click``, for ``ChartClicks``: what a click on one of its points does, "hint", and whom to tell, "of"; with ``anywhere``
    also a click beside them.
    """
    chart = _sent(fig) if isinstance(fig, dict) else json.loads(fig.to_json())
    if click:  # an older plotly.py would refuse "clickanywhere" in a figure; an older plotly.js does without
        chart["layout"] |= {"meta": {"click": dict(click)}, "clickanywhere": anywhere}
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


class ChartClicks(anywidget.AnyWidget):
    """Hears clicks on the chart in the same box, if ``as_output`` was told what they do, and shows that as a hint.

    ``clicked(of, x, data)`` gets whom to tell, where on the x axis it was and the point's ``customdata``, both numbers or None:
    nothing but x is known of a place beside all points. Whatever else the page may send is dropped. One widget serves all
    boxes of a page; make it before the first chart: while a page takes in the script that draws them, it may give up another.
    """

    _esm = script("clicks.js")
    _css = """
.wb-clicks {min-height: 1.5em; padding: 0 4px; opacity: 0.8;
  font: 11px/1.5 var(--jp-ui-font-family, sans-serif); color: var(--jp-ui-font-color1, inherit)}
"""

    def __init__(self, clicked: Callable[[float | None, float | None, float | None], None]) -> None:
        super().__init__()
        self._clicked = clicked
        self.on_msg(self._heard)

    def _heard(self, _: Any, message: Any, buffers: Any) -> None:
        if isinstance(message, Mapping) and message.get("type") == "click":
            self._clicked(*(_number(message.get(part)) for part in ("of", "x", "data")))


def _number(value: Any) -> float | None:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return value if plain and -(2**53) < value < 2**53 else None  # which "not a number" is not either


class Pointer(anywidget.AnyWidget):
    """HTML with ``data-token`` elements that can be chosen (``mode="text"``); ``MapPointer`` is a picture instead.

    Change traits with ``show``, which sends them as one message. The page answers with ``on_msg`` messages:
    ``{"type": "click", "token": text}`` and ``{"type": "move", "by": 1 | -1}``. ``html`` is shown as it is: escape it.
    """

    _esm = script("pointer.js")
    _css = (
        """
.wb-pointer.wb-text {overflow-y: auto; padding: 0 2px}
.wb-pointer.wb-text:focus-visible {outline: 2px solid var(--jp-brand-color1, #0072b2)}
"""
        + CHART_CSS
    )
    mode = tl.Enum(("text", "picture"), "text").tag(sync=True)
    label = tl.Unicode().tag(sync=True)  # read out by screen readers
    height = tl.Int(0).tag(sync=True)  # CSS pixels of a picture; of a text, the most it takes before it scrolls (0: no limit)
    html = tl.Unicode().tag(sync=True)
    reports = tl.Bool(False).tag(sync=True)  # whether the page says {"type": "drawn", "sequence"} after each drawing
    sequence = tl.Int(0).tag(sync=True)

    def show(self, **traits: Any) -> None:
        """Set traits and have the page draw them together."""
        with self.hold_sync():
            for name, value in traits.items():
                setattr(self, name, value)
            self.sequence += 1


class MapPointer(Pointer):
    """A picture with a cross-hair over its cells, and ways to ask for another part of what it shows.

    ``{"type": "hover" | "click", "row", "column"}`` are in cells. Requests for another part carry ``ask``, a number to be
    repeated in ``answered`` once all that follows is set; the page has one such request out at a time, and adds up what people
    do meanwhile. They are ``{"type": "zoom", "by": halvings, "row", "column"}`` around a cell; ``{"type": "wheel",
    "by", "y", "x", "gesture", "row", "column"}``, which keeps what is at y and x, in CSS pixels, where it is;
    ``{"type": "pan", "rows", "columns"}`` by shares of the sides; ``{"type": "select", "rows": [2], "columns": [2]}`` between
    shares of the sides; ``{"type": "back", "by": steps}`` and ``{"type": "whole"}``.
    """

    _esm = script("map.js")
    _css = """
.wb-picture {display: grid; grid-template-columns: auto auto var(--wb-width, 300px); align-content: start;
  width: max-content; max-width: 100%;
  font-family: var(--jp-ui-font-family, sans-serif); font-size: 11px; color: var(--jp-ui-font-color1, inherit); padding: 4px 0}
.wb-box {grid-column: 3; grid-row: 1; position: relative; width: 100%; height: var(--wb-height); overflow: hidden;
  cursor: crosshair; box-shadow: 0 0 0 1px var(--jp-border-color1, grey)}
.wb-box:focus-visible {outline: 2px solid var(--jp-brand-color1, #0072b2); outline-offset: 2px}
.wb-box img {display: block; width: 100%; height: 100%; image-rendering: pixelated}
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
.wb-box, .wb-box img {user-select: none; -webkit-user-select: none}
.wb-band {position: absolute; pointer-events: none; border: 1px solid #d55e00; background: rgb(213 94 0 / 0.2)}
.wb-moving .wb-box {cursor: grabbing} .wb-moving .wb-across, .wb-moving .wb-down {display: none}
.wb-moving .wb-row-labels, .wb-moving .wb-column-labels {opacity: 0.3}
.wb-hint {grid-column: 1 / -1; grid-row: 4; width: 0; min-width: 100%; margin-top: 4px; opacity: 0.8}
"""
    mode = tl.Enum(("text", "picture"), "picture").tag(sync=True)
    png = tl.Bytes().tag(sync=True)
    rows = tl.Int(1).tag(sync=True)  # cells
    columns = tl.Int(1).tag(sync=True)
    cross: tl.List[int] = tl.List().tag(sync=True)  # [row, column] of the cross-hair in a new picture, [] for none
    mark = tl.Int(-1).tag(sync=True)  # the chosen row of cells
    width = tl.Int(300).tag(sync=True)  # CSS pixels
    row_title = tl.Unicode().tag(sync=True)
    column_title = tl.Unicode().tag(sync=True)
    row_labels: tl.List[Any] = tl.List().tag(sync=True)  # [[share of the side, text], ...]
    column_labels: tl.List[Any] = tl.List().tag(sync=True)
    upright = tl.Bool(False).tag(sync=True)  # column labels written downwards
    hint = tl.Unicode().tag(sync=True)  # under the picture
    room: tl.List[float] = tl.List().tag(sync=True)  # how far it can be moved up, down, left, right, in shares of its sides
    answered = tl.Float(0.0).tag(sync=True)  # the request for another part that all this answers
