"""AttentionExplorer: which tokens and compressed entries each query looks at, layer by layer and head by head."""

from __future__ import annotations

import base64
import html
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw
import plotly.graph_objects as go

from workbench.errors import InputError
from workbench.figures import style
from workbench.figures.attention import (
    Head,
    Range,
    Tile,
    attention_tile,
    check_head,
    column_count,
    composite_tile,
    describe_head,
    describe_layer,
    layer_thumbnails,
    thumbnails,
    token_columns,
    tokens_each,
    window_columns,
)
from workbench.figures.query import describe, query_facts, source_probs, strip_chart
from workbench.figures.readout import facts_line, readout
from workbench.trace import LayerTrace, Trace
from workbench.widgets.render import Pointer, as_output
from workbench.widgets.session import FINAL_STATES, Session, session_of
from workbench.widgets.text import TextPanel

if TYPE_CHECKING:
    from workbench.live import LiveRun

VIEWS = {
    "window and entries": "both",
    "compressed entries": "entries",
    "window": "window",
    "on one token axis": "composite",
}
TILE_PIXELS = 520
MIN_SIDE_PIXELS = 120  # a picture of few cells is stretched to this
MIN_LABEL_PIXELS = 13  # cells at least this large are labelled one by one
LABEL_PIXELS = 130  # beside a map, for the labels of its rows
TICKS = 7
MOST_THUMBNAILS = 24  # of heads, and of layers; the menus list all
TITLE = "<div style='line-height:1.5'><b>{}</b><br>{}</div>"

_THUMBNAIL_CSS = """<style>
.wb-thumbs {display: flex; flex-wrap: wrap; gap: 6px; align-items: end; font: 11px var(--jp-ui-font-family, sans-serif);
  color: var(--jp-ui-font-color1, inherit); padding: 3px}
.wb-thumbs button {font: inherit; color: inherit; background: none; border: 2px solid transparent; border-radius: 3px;
  padding: 2px; cursor: pointer}
.wb-thumbs button:hover {border-color: var(--jp-border-color1, grey)}
.wb-thumbs button[aria-pressed=true] {border-color: #d55e00; font-weight: bold}
.wb-thumbs img {display: block; width: 56px; height: 56px; image-rendering: pixelated; margin: 0 auto 2px;
  box-shadow: 0 0 0 1px var(--jp-border-color2, grey)}
.wb-thumbs hr {width: 1px; height: 60px; border: 0; margin: 0 6px; background: var(--jp-border-color1, grey)}
</style>"""


class AttentionExplorer(ipw.VBox):
    """Thumbnails of layers and heads, one attention map to point at, one query as a chart, and the text it looks at.

    Takes a LiveRun, a Trace or a Session and follows its chosen token, layer and head. It redraws only what a change
    touches; changes may come from the session's painter thread. ``close`` stops following.
    """

    _following = False

    def __init__(self, source: LiveRun | Trace | Session) -> None:
        self.session = session_of(source)
        self._syncing: int | None = None  # the thread that is copying the session's state into the controls
        self._drawn: dict[str, Any] = {}
        self._zoom: tuple[Range, Range] | None = None
        self._at: tuple[int, int] | None = None  # query and column last pointed at
        self.tile: Tile | None = None
        self._make_controls()
        self.title, self.readout = ipw.HTML(), ipw.HTML(layout=ipw.Layout(min_height="44px"))  # two lines, so nothing jumps
        self.facts = ipw.HTML(layout=ipw.Layout(min_height="24px"))
        self.line = ipw.Text(
            description="This view", tooltip="Copy this line: it brings back layer, head, query, view and zoom",
            layout=ipw.Layout(width="min(100%, 760px)"), style={"description_width": "initial"},
        )  # fmt: skip
        self.thumbnails = Pointer(mode="text", label="Thumbnails of layers and heads: choose one to look at it")
        self.map = Pointer(
            mode="picture", label="Attention map", layout=ipw.Layout(flex="0 0 auto", width=f"{TILE_PIXELS + LABEL_PIXELS}px")
        )
        self.strip = ipw.Output(layout=ipw.Layout(flex="1 1 420px", min_width="380px", margin="0 0 0 16px"))
        self.text_panel = TextPanel(self.session)
        self.text = self.text_panel.text
        self.thumbnails.on_msg(self._on_thumbnail)
        self.map.on_msg(self._on_map)
        wrap = ipw.Layout(flex_flow="row wrap", align_items="center")
        self.body = ipw.VBox(
            [
                self.thumbnails,
                ipw.HBox([self.layer, self.head, self.view, self.token, *self.zoom_buttons], layout=wrap),
                self.readout,
                ipw.HBox([self.map, self.strip], layout=ipw.Layout(flex_flow="row wrap")),
                self.facts,
                self.text_panel,
                self.line,
            ]
        )
        super().__init__([self.title, self.body])
        self.session.observe(self._redraw, names=["trace", "token", "layer", "head", "state", "charts"])
        self._following = True
        self._redraw()

    def close(self) -> None:
        if self._following:
            self.session.unobserve(self._redraw, names=["trace", "token", "layer", "head", "state", "charts"])
            self._following = False
            self.text_panel.close()
        super().close()

    @property
    def figure(self) -> go.Figure:
        """The chart of the chosen query, for whoever wants to look into it; drawing does without."""
        return go.Figure(self.chart)

    def look(
        self,
        layer: int,
        head: Head = "max",
        token: int = 0,
        view: str = "both",
        rows: Range | None = None,
        columns: Range | None = None,
    ) -> None:
        """Show exactly this; what the line under the text says. Raises InputError for what the trace does not have."""
        with self.session.lock:
            record = self.session.trace.layer(layer)
            check_head(record, head)
            if view not in VIEWS.values() or not 0 <= token < record.length:
                raise InputError(
                    f"expected a view of {list(VIEWS.values())} and a token below {record.length}, got {view!r} and {token}"
                )
            whole = whole_ranges(record, view_of(record, view))
            shown = rows or whole[0], columns or whole[1]
            if not all(a <= x < y <= b for (x, y), (a, b) in zip(shown, whole, strict=True)):
                raise InputError(f"rows and columns must lie within {whole[0]} and {whole[1]}, got {shown[0]} and {shown[1]}")
            self.session.layer, self.session.head, self.view.value = layer, head, view
            self.session.choose_token(token)
            self._zoom = None if shown == whole else (tuple(shown[0]), tuple(shown[1]))  # type: ignore[assignment]
        self._redraw()

    def _make_controls(self) -> None:
        narrow = {"description_width": "initial"}
        self.layer = ipw.Dropdown(description="Layer", style=narrow, layout=ipw.Layout(width="250px"))
        self.head = ipw.Dropdown(description="Head", style=narrow, layout=ipw.Layout(width="120px"))
        self.view = ipw.Dropdown(
            description="View", options=VIEWS, value="both", style=narrow, layout=ipw.Layout(width="220px")
        )
        self.token = ipw.BoundedIntText(description="Query token", style=narrow, layout=ipw.Layout(width="170px"))
        self.zoom_buttons = tuple(
            ipw.Button(description=name, tooltip=tip, layout=ipw.Layout(width="auto"))
            for name, tip in (
                ("Zoom in", "twice as close around the cross-hair (key +)"),
                ("Zoom out", "twice as far (key -)"),
                ("Whole map", "all queries and columns (key 0)"),
            )
        )
        self.layer.observe(self._when_chosen("layer"), names="value")
        self.head.observe(self._when_chosen("head"), names="value")
        self.token.observe(self._when_chosen("token"), names="value")
        self.view.observe(self._on_view, names="value")
        for button, by in zip(self.zoom_buttons, (1, -1, 0), strict=True):
            button.on_click(lambda _, by=by: self._zoom_by(by))

    def _when_chosen(self, name: str) -> Callable[[Any], None]:
        def choose(change: Any) -> None:
            if self._syncing == threading.get_ident() or change["new"] is None:
                return  # the session told us, not a person
            with self.session.lock:
                if name == "token":
                    self.session.choose_token(change["new"])
                else:
                    setattr(self.session, name, change["new"])

        return choose

    # What people do, one thing at a time: under the lock all widgets of the session share.

    def _on_thumbnail(self, _: Any, message: Any, buffers: Any) -> None:
        kind, _, value = message["token"].partition(":")  # as written by _button
        with self.session.lock:
            setattr(self.session, kind, int(value) if value.isdecimal() else value)

    def _on_map(self, _: Any, message: Any, buffers: Any) -> None:
        with self.session.lock:
            tile = self.tile
            if tile is None:
                return
            height, width = tile.values.shape
            i, j = min(max(0, message["row"]), height - 1), min(max(0, message["column"]), width - 1)
            self._at = tile.strongest(i, j)
            if message["type"] == "click":
                self.session.choose_token(self._at[0])
            elif message["type"] == "zoom":
                self._zoom_by(message["by"])
            self._redraw()

    def _on_view(self, change: Any) -> None:
        if self._syncing == threading.get_ident():
            return
        with self.session.lock:
            self._zoom = self._at = None
        self._redraw()

    def _zoom_by(self, by: int) -> None:
        """Show half as many rows and columns around the last place pointed at (1), twice as many (-1) or all (0)."""
        with self.session.lock:
            if self.tile is None:
                return
            whole = whole_ranges(self.tile.layer, view_of(self.tile.layer, self.view.value))
            old = self.tile.row_range, self.tile.column_range
            at = self._at or self._strongest(whole[1])
            rows, columns = (zoomed(r, w, a, by) for r, w, a in zip(old, whole, at, strict=True))
            self._zoom = None if (rows, columns) == whole else (rows, columns)
        self._redraw()

    def _strongest(self, columns: Range) -> tuple[int, int]:
        """The chosen query and, of ``columns``, the one it attends to most: where to zoom before anybody has pointed."""
        assert self.tile is not None
        token = min(self.session.token, self.tile.layer.length - 1)
        if self.tile.composite:
            return token, token
        seen, probs, _ = source_probs(self.tile.layer, self.tile.head, token)
        inside = (seen >= columns[0]) & (seen < columns[1])
        return token, int(seen[inside][probs[inside].argmax()]) if inside.any() else sum(columns) // 2

    # Drawing: every part remembers what it was drawn from and is drawn again only if that changed.

    def _redraw(self, change: Any = None) -> None:
        with self.session.lock:
            trace = self.session.trace
            if not trace.length or self.session.layer not in [x.layer for x in trace.layers]:
                over = self.session.run is None or self.session.state in FINAL_STATES
                here = [x.layer for x in trace.layers]
                why = (
                    f"layer {self.session.layer} was not recorded; it has {here}" if here else "it holds no recorded attention"
                )
                why = why if trace.length and over else "it holds no token" if over else "waiting for the first step"
                self.title.value = TITLE.format(html.escape(trace.label), why)
                self.body.layout.display, self._drawn = "none", {}
                return
            self.body.layout.display = None
            record = trace.layer(self.session.layer)
            self._carry_over(record)
            head: Head = self.session.head
            if record.selection_only or (isinstance(head, int) and not 0 <= head < record.heads):
                head = "max"  # chosen in a layer or model with more heads
            token, view = min(self.session.token, trace.length - 1), view_of(record, self.view.value)
            self._sync_controls(trace, record, head, token)
            self._draw("pictures", (*self._progress(trace), record.layer), self._draw_pictures, trace, record)
            self._draw("thumbnails", (self._drawn["pictures"], head), self._draw_thumbnails, record, head)
            map_of = (trace, record.layer, head, view, self._zoom)
            self._draw("map", map_of, self._draw_map, trace, record, head, token, view)
            self._draw("mark", (self.tile, token), lambda: self.map.show(mark=self._mark(token)))
            self._draw(
                "readout", (trace, record.layer, head, view, token, self._at), self._draw_readout, trace, record, head, token
            )
            if not self.session.charts_wait:
                self._draw("strip", (trace, record.layer, head, token), self._draw_strip, trace, record, head, token)
            self._draw("facts", (trace, record.layer, head, token), self._draw_facts, trace, record, head, token)
            self._draw("text", (trace, record.layer, head, token), self.text_panel.draw, trace, record.layer, head, token)
            asked = f"layer={record.layer}, head={head!r}, token={token}, view={self.view.value!r}"
            zoom = "" if self._zoom is None else f", rows={self._zoom[0]}, columns={self._zoom[1]}"
            self.line.value = f"explorer.look({asked}{zoom})"

    def _draw(self, part: str, drawn_from: tuple[Any, ...], draw: Callable[..., None], *arguments: Any) -> None:
        if self._drawn.get(part) != drawn_from:
            draw(*arguments)
            self._drawn[part] = drawn_from

    def _progress(self, trace: Trace) -> tuple[Any, ...]:
        """What thumbnails are redrawn for: every trace, but of a working run only now and then."""
        if self.session.run is None or self.session.state in FINAL_STATES:
            return (trace,)
        return self.session.run, trace.length.bit_length(), trace.length * 8 >> trace.length.bit_length()

    def _carry_over(self, record: LayerTrace) -> None:
        """Keep zoom and cross-hair at their place in the text: entry columns move as the trace grows."""
        old = None if self.tile is None else self.tile.layer
        if old is None or old is record:
            return
        before, now = window_columns(old), window_columns(record)
        if record.length < old.length or (record.ratio, bool(now)) != (old.ratio, bool(before)):  # another run or other columns
            self._zoom = self._at = None
            return

        def moved(column: int) -> int:
            return column + (now - before if column >= before else 0)

        if self._zoom is not None:
            rows, (start, stop) = self._zoom
            self._zoom = rows, (moved(start), moved(stop - 1) + 1)
        if self._at is not None:
            self._at = self._at[0], moved(self._at[1])

    def _sync_controls(self, trace: Trace, record: LayerTrace, head: Head, token: int) -> None:
        self._syncing = threading.get_ident()
        try:
            layers = tuple((f"{x.layer}: {describe_layer(x)}", x.layer) for x in trace.layers)
            heads = (("max", "max"), ("mean", "mean"), *((str(h), h) for h in range(record.heads)))
            if record.selection_only:
                heads = (("all", "max"),)
            for menu, options, value in ((self.layer, layers, record.layer), (self.head, heads, head)):
                if menu.options != options:
                    menu.options = options
                menu.value = value
            self.view.disabled = record.of_tokens  # there is one axis only
            views = {
                name: view for name, view in VIEWS.items() if not record.selection_only or view in ("entries", "composite")
            }
            if dict(self.view.options) != views:  # a capture has no window
                kept = self.view.value if self.view.value in views.values() else "entries"
                self.view.options = views
                self.view.value = kept
            self.token.max = trace.length - 1
            self.token.value = token
        finally:
            self._syncing = None

    def _draw_pictures(self, trace: Trace, record: LayerTrace) -> None:
        self._pictures = layer_thumbnails(trace)[:MOST_THUMBNAILS], thumbnails(trace, record.layer)[: MOST_THUMBNAILS + 1]

    def _draw_thumbnails(self, record: LayerTrace, head: Head) -> None:
        layers, heads = self._pictures
        buttons = [_button("layer", n, f"layer {n}", png, n == record.layer) for n, png in layers]
        if record.selection_only:
            heads = []  # one selection for all of them
        else:
            buttons.append("<hr>")
        buttons += [_button("head", h, f"head {h}" if isinstance(h, int) else f"{h}", png, h == head) for h, png in heads]
        self.thumbnails.show(html=f"{_THUMBNAIL_CSS}<div class='wb-thumbs'>{''.join(buttons)}</div>")

    def _draw_map(self, trace: Trace, record: LayerTrace, head: Head, token: int, view: str) -> None:
        rows, columns = self._zoom or whole_ranges(record, view)
        make = composite_tile if view == "composite" else attention_tile
        tile = self.tile = make(trace, record.layer, head, rows, columns, TILE_PIXELS)
        height, width = (max(MIN_SIDE_PIXELS, size * s) for size, s in zip(tile.values.shape, tile.scale, strict=True))
        row_labels, column_labels, upright = axis_labels(trace, tile, height, width)
        of_cell = "share selected" if record.selection_only else "maximum"
        pooled = (
            ""
            if tile.pooling == (1, 1)
            else f"; a cell is the {of_cell} of {tile.pooling[0]} queries x {tile.pooling[1]} columns"
        )
        if view == "entries" and not record.entries:
            pooled += "; no compressed entry here, so the window is shown"
        what = f"layer {record.layer} ({describe_layer(record)}), {describe_head(record, head)}{pooled}"
        self.title.value = TITLE.format(html.escape(trace.label), f"{html.escape(what)}.&emsp;{_colour_bar(record)}")
        self.map.layout.width = f"{width + LABEL_PIXELS}px"  # so that the chart stands next to it
        at = self._at
        inside = at is not None and all(a <= x < b for x, (a, b) in zip(at, (rows, columns), strict=True))
        self.map.show(
            png=tile.png,
            cross=list(tile.cell(*at)) if at is not None and inside else [],
            mark=self._mark(token),
            rows=tile.values.shape[0],
            columns=tile.values.shape[1],
            width=width,
            height=height,
            row_title="query token (position)",
            column_title=column_title(tile),
            row_labels=row_labels,
            column_labels=column_labels,
            upright=upright,
            label=f"Attention map of {what}. Arrow keys move the cross-hair, Enter chooses its query, plus and minus zoom.",
        )
        self._drawn["mark"] = (tile, token)

    def _mark(self, token: int) -> int:
        """The row of cells that holds the chosen query, -1 if it is not on the map."""
        assert self.tile is not None
        start, stop = self.tile.row_range
        return (token - start) // self.tile.pooling[0] if start <= token < stop else -1

    def _draw_readout(self, trace: Trace, record: LayerTrace, head: Head, token: int) -> None:
        row, column = self._at or (token, -1)
        row = min(row, trace.length - 1)
        composite = self.tile is not None and self.tile.composite
        if self._at is None or (column >= column_count(record) and not composite):
            self.readout.value = "Point at the map, or move over it with the arrow keys; a click or Enter chooses the query."
            return
        if composite:
            column = painted_column(record, head, row, min(column, record.length - 1))
            if column >= column_count(record):
                self.readout.value = "The entry of this token is not complete yet."
                return
        self.readout.value = readout(describe(trace, record.layer, head, row, column))

    def _draw_strip(self, trace: Trace, record: LayerTrace, head: Head, token: int) -> None:
        self.chart = strip_chart(trace, record.layer, token, head)
        self.strip.outputs = (as_output(self.chart),)

    def _draw_facts(self, trace: Trace, record: LayerTrace, head: Head, token: int) -> None:
        self.facts.value = facts_line(query_facts(trace, record.layer, token, head), head)


def view_of(record: LayerTrace, chosen: str) -> str:
    """The view that is drawn: a layer whose entries are tokens has one only, and a capture no window."""
    if record.selection_only and chosen != "composite" and not record.of_tokens:
        return "entries"
    return "both" if record.of_tokens else chosen


def whole_ranges(record: LayerTrace, view: str) -> tuple[Range, Range]:
    """All rows, and the columns of a view; a layer without compressed entries shows its window instead."""
    length, tokens, every = record.length, window_columns(record), column_count(record)
    columns = {"both": (0, every), "entries": (tokens, every), "window": (0, tokens), "composite": (0, length)}[view]
    return (0, length), columns if columns[0] < columns[1] else (0, length)


def zoomed(old: Range, whole: Range, at: int, by: int) -> Range:
    """``old`` halved (by=1) or doubled (-1) around ``at``, kept inside ``whole``; all of it for 0."""
    size = min(whole[1] - whole[0], max(1, (old[1] - old[0] + 1) // 2 if by > 0 else 2 * (old[1] - old[0])))
    if by == 0 or size == whole[1] - whole[0]:
        return whole
    start = min(max(whole[0], at - size // 2), whole[1] - size)
    return start, start + size


def painted_column(record: LayerTrace, head: Head, row: int, token: int) -> int:
    """The column behind a token of the composite view: the token itself, or an entry made from it that got more."""
    if record.selection_only:
        return token // record.ratio  # drawn over its own block alone; perhaps not complete yet
    columns, probs, stands_for = source_probs(record, head, row)
    best, most, tokens = token, 0.0, window_columns(record)
    for column, prob, count in zip(columns.tolist(), probs.tolist(), stands_for.tolist(), strict=True):
        first = last = column
        if column >= tokens:
            first = record.entry_tokens(column - tokens)[0]
            last = record.entry_tokens(column - tokens + count - 1)[1]
        if first <= token <= last and prob > most:
            own = tokens + token // record.ratio if count > 1 else column  # recorded pooled: the entry it lies in
            best, most = own, prob
    return best


def axis_labels(trace: Trace, tile: Tile, height: int, width: int) -> tuple[list[list[Any]], list[list[Any]], bool]:
    """Labels as [share of the side, text] for rows and columns, and whether the column labels are written downwards.

    Cells large enough are labelled one by one, with their token's text; otherwise a few positions are.
    """

    def name(column: int, with_text: bool, length: int) -> str:
        if column >= length:  # where all columns are entries the title says so
            return f"entry {column - length}" if length else str(column)
        return f"{column} {style.visible_text(trace.token_texts[column], 10)}" if with_text else str(column)

    sides = []
    of_columns = tile.layer.length if tile.composite else token_columns(tile.layer)
    for (start, stop), pool, pixels, length in (
        (tile.row_range, tile.pooling[0], height, tile.layer.length),
        (tile.column_range, tile.pooling[1], width, of_columns),
    ):
        each = pool == 1 and pixels / (stop - start) >= MIN_LABEL_PIXELS
        places = range(start, stop) if each else ticks(start, stop, length)
        cells = -(-(stop - start) // pool)
        sides.append([[((at - start) // pool + 0.5) / cells, name(at, each, length)] for at in places])
    upright = len(sides[1]) > 2 * TICKS or any(" " in str(text) and not str(text).startswith("entry") for _, text in sides[1])
    return sides[0], sides[1], upright


def ticks(start: int, stop: int, length: int) -> list[int]:
    """Round token positions and round numbers of compressed entries (columns from ``length`` on), about TICKS of them."""
    step = 1
    while (stop - start) / step > TICKS:
        step = step * 2 if str(step)[0] in "15" else step * 5 // 2  # 1, 2, 5, 10, ...
    tokens = list(range(-(-start // step) * step, min(stop, length), step))
    first = max(start - length, 0)
    entries = [length + e for e in range(-(-first // step) * step, stop - length, step)] if stop > length else []
    if tokens and entries and entries[0] - tokens[-1] < 0.7 * step:
        tokens.pop()  # it would touch the first entry's label
    return tokens + entries


def column_title(tile: Tile) -> str:
    """What the columns are, with their unit."""
    layer, (start, stop) = tile.layer, tile.column_range
    length, entry = layer.length, f"compressed entry ({tokens_each(layer)} each)"
    if layer.of_tokens:
        return "token position; a query " + ("sees the tokens it chose" if layer.selects else "sees every token up to its own")
    if tile.composite:
        return f"token position; an entry is painted over its {'own block of' if layer.selection_only else 'source'} tokens"
    if start >= token_columns(layer):
        return entry
    return "token position (sliding window)" + (f", then {entry}" if stop > length else "")


def _button(kind: str, value: Any, name: str, png: bytes, pressed: bool) -> str:
    picture = base64.b64encode(png).decode()
    return (
        f"<button data-token='{kind}:{value}' aria-pressed='{str(pressed).lower()}' title='show {name}'>"
        f"<img alt='' src='data:image/png;base64,{picture}'>{name}</button>"
    )


def _colour_bar(record: LayerTrace) -> str:
    stops = ", ".join(f"rgb({r} {g} {b})" for r, g, b in style.colour_map(9).tolist())
    bar = f"<span style='display:inline-block;width:120px;height:10px;background:linear-gradient(90deg,{stops})'></span>"
    what = "share selected" if record.selection_only else "probability"
    return f"{what} 0 {bar} 1 (colour is its square root; blank: not visible)"
