"""Widgets as still HTML: what a page shows of them without a kernel, in a reopened notebook or an exported file.

Works on what widgets send to the page, so a live widget and one whose state was saved in a notebook give the same. Nothing
needs a script: charts are SVG, maps PNG, controls the value they had, and buttons, which would do nothing, are left out.
"""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as ipw
import plotly.graph_objects as go

from workbench.errors import InputError, WorkbenchError, given_path
from workbench.figures.picture import picture
from workbench.widgets.render import CHART_MIME

VIEW_MIME = "application/vnd.jupyter.widget-view+json"
EXPORTING = "WORKBENCH_EXPORTING"  # set in the kernels of `workbench.export`
MOST_BYTES = 200_000  # of a still picture that is stored beside its widget
TEXT_CHARACTERS = 600  # of a text field
_SELECTIONS = ("Dropdown", "Select", "RadioButtons", "ToggleButtons", "SelectionSlider")
_NOTHING = ("Button", "ToggleButton", "FileUpload", "Play", "FloatProgress", "IntProgress", "Layout")
_LABELS = ("row_labels", "column_labels")
States = Mapping[str, Mapping[str, Any]]


def still_html(widget: ipw.Widget, most_bytes: int | None = None, *, whole: bool = False) -> str:
    """``widget`` and all it holds, as it is now; "" for one that shows nothing without a kernel.

    With ``most_bytes``, its longest texts are left out until it fits. ``whole`` is for files: a widget that has more than it
    shows at once, such as a demo, gives all of it, by its ``whole_html()``.
    """
    own = getattr(widget, "whole_html", None)
    if whole and callable(own):
        return str(own())
    states: dict[str, Mapping[str, Any]] = {}
    _collect(widget, states)
    html = html_of_states(states, widget.model_id)
    if most_bytes is None or len(html) <= most_bytes:
        return html
    for longest in (most_bytes // 4, most_bytes // 16, 0):
        html = html_of_states(states, widget.model_id, longest)
        if len(html) <= most_bytes:
            return html
    return ""


def html_of_states(states: States, model_id: str, longest: int | None = None) -> str:
    """The same from the states of widgets by their ids; pieces of more than ``longest`` characters are left out, and say so."""
    return _Still(states, longest).of(model_id, frozenset())


def saved_states(stored: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """States as a notebook keeps them, ``metadata.widgets``, with their binary parts put back."""
    states: dict[str, dict[str, Any]] = {}
    for model_id, entry in dict(stored.get("state") or {}).items():
        states[model_id] = dict(entry.get("state") or {})
        for buffer in entry.get("buffers") or ():
            if buffer.get("encoding") == "base64" and len(buffer.get("path", ())) == 1:
                states[model_id][buffer["path"][0]] = base64.b64decode(buffer["data"])
    return states


def html_of_chart(chart: Any) -> str:
    """A chart's JSON, or a figure, as an image; a line of text for one that cannot be drawn."""
    try:
        drawn = picture(chart)
    except WorkbenchError as error:
        return f"<p>{escape(str(error))}.</p>"
    return image(drawn.svg().encode(), "svg+xml", drawn.title, "wb-chart", f"max-width:100%;width:{drawn.width}px")


def image(data: bytes, kind: str, alt: str, name: str = "", style: str = "") -> str:
    source = base64.b64encode(bytes(data)).decode()
    return f'<img class="{name}" style="{style}" alt="{escape(alt, quote=True)}" src="data:image/{kind};base64,{source}">'


def html_of_outputs(outputs: Iterable[Mapping[str, Any]], of_widget: Callable[[str], str]) -> str:
    """Outputs of a cell, or of an Output widget; ``of_widget`` gives what stands for a widget, by its id."""
    return "".join(_output(output, of_widget) for output in outputs)


def _output(output: Mapping[str, Any], of_widget: Callable[[str], str]) -> str:
    if output.get("output_type") == "stream":
        return f"<pre>{escape(_joined(output.get('text')))}</pre>"
    if output.get("output_type") == "error":
        return f"<pre>{escape(str(output.get('ename')))}: {escape(str(output.get('evalue')))}</pre>"
    data = output.get("data") or {}
    if VIEW_MIME in data:
        return _joined(data["text/html"]) if "text/html" in data else of_widget(str(data[VIEW_MIME].get("model_id")))
    if CHART_MIME in data:
        return html_of_chart(data[CHART_MIME])
    for kind in ("png", "jpeg", "gif"):
        if f"image/{kind}" in data:
            return image(base64.b64decode(_joined(data[f"image/{kind}"])), kind, "picture")
    if "image/svg+xml" in data:
        return image(_joined(data["image/svg+xml"]).encode(), "svg+xml", "picture")
    if "text/html" in data:
        return _joined(data["text/html"])
    plain = _joined(data.get("text/markdown") or data.get("text/plain"))
    return f"<pre>{escape(plain)}</pre>" if plain else ""


class _Still:
    def __init__(self, states: States, longest: int | None) -> None:
        self.states, self.longest = states, longest

    def of(self, model_id: str, inside: frozenset[str]) -> str:
        state = self.states.get(model_id.removeprefix("IPY_MODEL_"))
        if state is None or model_id in inside:
            return ""
        layout = self.states.get(str(state.get("layout", "")).removeprefix("IPY_MODEL_")) or {}
        if layout.get("display") == "none" or layout.get("visibility") == "hidden":
            return ""
        kind = str(state.get("_model_name", "")).removesuffix("Model")
        inner = inside | {model_id}
        if "children" in state:
            return self._box(kind, state, inner)
        if {"mode", "html", "sequence"} <= set(state):  # our Pointer
            return self._pointer(state)
        if kind == "Output":
            outputs = [o for o in state.get("outputs") or () if isinstance(o, Mapping)]
            return self._fits(html_of_outputs(outputs, lambda found: self.of(found, inner)), "an output")
        if kind == "Image" and state.get("value"):
            return image(bytes(state["value"]), str(state.get("format") or "png"), "picture")
        return self._fits(_control(kind, state), "a text")

    def _box(self, kind: str, state: Mapping[str, Any], inside: frozenset[str]) -> str:
        parts = [self.of(str(child), inside) for child in state["children"] or ()]
        if kind in ("Tab", "Accordion"):
            titles = [str(t) for t in state.get("titles") or ()]
            named = [f"<p><b>{escape(t)}</b></p>" for t in titles] + [""] * (len(parts) - len(titles))
            parts = [name + part for name, part in zip(named, parts, strict=False) if part]
        shown = "".join(part for part in parts if part)
        if not shown:
            return ""
        flow = "display:flex;flex-wrap:wrap;gap:2px 18px;align-items:center" if kind == "HBox" else ""
        return f'<div style="{flow}">{shown}</div>'

    def _fits(self, html: str, what: str) -> str:
        if self.longest is None or len(html) <= self.longest:
            return html
        return f"<p><i>(left out to save room: {what} of {len(html):,} characters)</i></p>"

    def _pointer(self, state: Mapping[str, Any]) -> str:
        label = str(state.get("label") or "picture")
        if state["mode"] == "text":
            high = int(state.get("height") or 0)
            limit = f"max-height:{high}px;overflow-y:auto;" if high else ""
            shown = self._fits(str(state.get("html") or ""), "a text")
            return f'<div class="wb-pointer wb-text" role="group" style="{limit}padding:2px">{shown}</div>' if shown else ""
        if not state.get("png"):
            return ""
        wide, high = int(state.get("width") or 300), int(state.get("height") or 300)
        size = f"display:block;width:{wide}px;height:{high}px;image-rendering:pixelated"
        shown = image(state["png"], "png", label.split(". Arrow keys")[0], "wb-map", size)
        left, below = (2 + max((len(str(t)) for _, t in state.get(side) or ()), default=0) for side in _LABELS)
        upright = bool(state.get("upright"))
        rows = _labels(state.get("row_labels"), "right:5px;transform:translateY(-50%);top:")
        turned = "writing-mode:vertical-rl;" if upright else ""
        columns = _labels(state.get("column_labels"), f"{turned}top:4px;transform:translateX(-50%);left:")
        beside, under = f"margin-left:{left}ch", f"{below}ch" if upright else "1.5em"
        return (
            '<div class="wb-picture" style="display:inline-block;font-size:11px;padding:4px 4em 4px 0">'
            f"<div style='margin-bottom:6px'>{escape(str(state.get('row_title') or ''))} ↓</div>"
            f'<div style="position:relative;{beside};width:{wide}px">'
            f'<div style="position:absolute;left:-{left}ch;width:{left}ch;top:0;height:100%">{rows}</div>'
            f"{shown}{_mark_line(state, high)}</div>"
            f'<div style="position:relative;{beside};width:{wide}px;height:{under}">{columns}</div>'
            f'<div style="{beside}">{escape(str(state.get("column_title") or ""))}</div><!--/wb-picture--></div>'
        )


def _labels(labels: Any, style: str) -> str:
    """Spans at their share of a side; ``style`` ends with the name of that side."""
    return "".join(
        f'<span style="position:absolute;white-space:pre;{style}{100 * float(at):.2f}%">{escape(str(text))}</span>'
        for at, text in labels or ()
    )


def _mark_line(state: Mapping[str, Any], high: int) -> str:
    """The row of the chosen query, a dashed line over the map."""
    mark, rows = int(state.get("mark", -1)), int(state.get("rows") or 1)
    if not 0 <= mark < rows:
        return ""
    top = high * (mark + 0.5) / rows
    return f'<div style="position:absolute;left:0;right:0;top:{top:.1f}px;border-top:1px dashed #cc79a7"></div>'


def _control(kind: str, state: Mapping[str, Any]) -> str:
    """What a control says: its text, or its name and the value it has."""
    if kind in _NOTHING:
        return ""
    name = str(state.get("description") or "")
    named = f"<b>{escape(name)}</b> " if name else ""
    if kind in ("HTML", "HTMLMath"):
        html = str(state.get("value") or "")
        return f"<div>{named}{html}</div>" if html else ""
    if kind == "Checkbox":
        return f"<span>{'☑' if state.get('value') else '☐'} {escape(name)}</span>"
    if kind in _SELECTIONS:
        labels, index = list(state.get("_options_labels") or ()), state.get("index")
        return f"<span>{named}{escape(str(labels[index]))}</span>" if isinstance(index, int) and index < len(labels) else ""
    value = state.get("value")
    if value in (None, "") or isinstance(value, bytes | dict):
        return ""
    if isinstance(value, list | tuple):
        value = " to ".join(_said(v) for v in value)
    text = _said(value)
    if kind == "Textarea":
        cut = text if len(text) <= TEXT_CHARACTERS else f"{text[:TEXT_CHARACTERS]} … ({len(text):,} characters)"
        return f"<div>{named}<pre style='white-space:pre-wrap;margin:2px 0'>{escape(cut)}</pre></div>" if text else ""
    return f"<span>{named}{escape(text)}</span>"


def _said(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _joined(text: Any) -> str:
    return "".join(text) if isinstance(text, list | tuple) else str(text or "")


def _collect(widget: ipw.Widget, states: dict[str, Mapping[str, Any]]) -> None:
    if widget.model_id in states:
        return
    states[widget.model_id] = widget.get_state()
    for other in (*getattr(widget, "children", ()), getattr(widget, "layout", None)):
        if isinstance(other, ipw.Widget):
            _collect(other, states)


# -- beside every widget ---------------------------------------------------------------------------------------------------


def bundle(widget: ipw.Widget) -> Any:
    """What a notebook stores of a displayed widget: its view, and beside it a still picture for those who have no kernel.

    While a notebook is run to be exported, the picture is all that the widget has.
    """
    exporting = bool(os.environ.get(EXPORTING))
    made = widget._repr_mimebundle_()
    data, metadata = made if isinstance(made, tuple) else (made, {})
    if isinstance(data, dict) and VIEW_MIME in data:
        try:
            still = still_html(widget, None if exporting else MOST_BYTES, whole=exporting)
        except Exception:  # a widget that cannot be pictured must still be shown
            still = ""
        if still:
            data = {**data, "text/html": f'<div class="wb-still">{still}</div>'}
    return data, metadata


def register() -> None:
    """Have IPython, if it runs, display every widget with its still picture. Nothing else about widgets changes."""
    if "IPython" not in sys.modules:
        return
    from IPython import get_ipython

    shell = get_ipython()
    if shell is not None:
        shell.display_formatter.mimebundle_formatter.for_type(ipw.Widget, bundle)


# -- one view as a file ----------------------------------------------------------------------------------------------------


def save_picture(view: Any, path: str | Path) -> Path:
    """Write what ``view`` shows now: .svg or .png of a chart, .png of an attention map, .html of any widget or chart.

    A tile, as `attention_tile` makes it, is saved as .png. Of a widget, .svg and .png are its ``figure``, the chart last drawn;
    a widget without one gives its map. Returns the path.
    InputError for another ending, for something that is no view, and for a view that has no such picture.
    """
    target = given_path("a picture's file", path)
    kind = target.suffix.lower()
    if kind not in (".svg", ".png", ".html"):
        raise InputError(f"a picture is saved as .svg, .png or .html, got {target.name!r}")
    is_tile = isinstance(getattr(view, "png", None), bytes) and not isinstance(view, ipw.Widget)
    if not isinstance(view, ipw.Widget | go.Figure) and not (is_tile and kind == ".png"):
        raise InputError(f"give a widget or a chart to save, or a tile as .png; got {type(view).__name__} as {kind}")
    if not target.parent.is_dir():
        raise InputError(f"there is no folder {target.parent} to save {target.name} in; make it first")
    chart = view if isinstance(view, go.Figure) else getattr(view, "figure", None)
    if kind == ".html":
        from workbench.export import page

        shown = html_of_chart(view) if isinstance(view, go.Figure) else still_html(view, whole=True)
        if not shown:
            raise InputError(f"{type(view).__name__} shows nothing without a kernel, so there is nothing to save")
        data = page(type(view).__name__, shown).encode()
    elif isinstance(chart, go.Figure):
        data = picture(chart).svg().encode() if kind == ".svg" else picture(chart).png()
    else:
        png = getattr(view, "png", None) or getattr(getattr(view, "map", None), "png", None)
        if kind == ".svg" or not png:
            raise InputError(f"{type(view).__name__} has no chart to save as {kind}; save it as .html")
        data = bytes(png)
    target.write_bytes(data)
    return target
