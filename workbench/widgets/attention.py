"""AttentionExplorer: which tokens and compressed entries each query looks at, layer by layer and head by head."""

from __future__ import annotations

import html
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw
import plotly.graph_objects as go

from workbench.errors import InputError, whole_number
from workbench.figures.attention import (
    Head,
    Pool,
    Range,
    Tile,
    attention_tile,
    check_head,
    column_count,
    composite_tile,
    describe_layer,
    layer_thumbnails,
    thumbnails,
    window_columns,
)
from workbench.figures.labels import axis_labels, column_title
from workbench.figures.pooling import no_means
from workbench.figures.query import describe, painted_column, query_facts, source_probs, strip_chart
from workbench.figures.readout import colour_bar, facts_line, map_words, readout
from workbench.trace import LayerTrace, Trace
from workbench.widgets.navigation import (
    TILE_PIXELS,
    Navigation,
    Place,
    first_entry,
    parse_range,
    range_text,
    side_pixels,
    view_of,
    whole_pair,
    whole_ranges,
)
from workbench.widgets.render import MapPointer, Pointer, as_output
from workbench.widgets.session import FINAL_STATES, Session, session_of
from workbench.widgets.text import TextPanel
from workbench.widgets.thumbnails import thumbnail_buttons

if TYPE_CHECKING:
    from workbench.live import LiveRun

VIEWS = {
    "window and entries": "both",
    "compressed entries": "entries",
    "window": "window",
    "on one token axis": "composite",
}
LABEL_PIXELS = 130  # beside a map, for the labels of its rows
MOST_THUMBNAILS = 24  # of heads, and of layers; the menus list all
MAP_HINT = (
    "Wheel with Ctrl, or after a click, zooms; a drag moves; Shift and a drag zoom to a part. "
    "Keys: + - 0 zoom, Alt and arrows move, b goes back."
)
MAP_KEYS = (
    "Arrow keys move the cross-hair, Enter chooses its query. Plus, minus and zero zoom; Alt and an arrow key, Page up, "
    "Page down, Home and End move by half of what is shown; b or Backspace goes back. The mouse wheel zooms while the map has "
    "the keyboard, or with Ctrl; a drag moves the map, Shift and a drag zoom to a part of it."
)
COMPLAINT = (
    "<span role='alert' style='display:flex;align-items:center;min-height:32px;font-size:12px;line-height:1.25;"
    "color:var(--jp-error-color1,#b00020)'>{}</span>"
)
CELLS = {"maximum": "max", "mean": "mean"}
TITLE = "<div style='line-height:1.5'><b>{}</b><br>{}</div>"


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
        self.navigation = Navigation("both")
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
        self.map = MapPointer(
            label="Attention map", hint=MAP_HINT, layout=ipw.Layout(flex="0 0 auto", width=f"{TILE_PIXELS + LABEL_PIXELS}px")
        )
        self.strip = ipw.Output(layout=ipw.Layout(flex="1 1 420px", min_width="380px", margin="0 0 0 16px"))
        self.text_panel = TextPanel(self.session)
        self.text = self.text_panel.text
        self.thumbnails.on_msg(self._on_thumbnail)
        self.map.on_msg(self._on_map)
        wrap = ipw.Layout(flex_flow="row wrap", align_items="center")
        controls = (
            (self.layer, self.head, self.view, self.cells),
            (self.token, *self.range_fields),
            (*self.zoom_buttons, self.back),
        )
        self.body = ipw.VBox(
            [
                self.thumbnails,
                ipw.HBox([*(ipw.HBox(part, layout=wrap) for part in controls), self.complaint], layout=wrap),
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
            self.text_panel.unfollow()
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
        cells: Pool = "max",
    ) -> None:
        """Show exactly this; what the line under the text says. Raises InputError for what the trace does not have."""
        with self.session.lock:
            record = self.session.trace.layer(layer)
            check_head(record, head)
            head = head if isinstance(head, str) else int(head)
            if view not in VIEWS.values() or not 0 <= whole_number("token", token) < record.length:
                raise InputError(
                    f"expected a view of {list(VIEWS.values())} and a token below {record.length}, got {view!r} and {token}"
                )
            if cells not in CELLS.values():
                raise InputError(f"cells show one of {list(CELLS.values())}, got {cells!r:.40}")
            whole = whole_ranges(record, view_of(record, view))
            shown = whole_pair("rows", rows, whole[0]), whole_pair("columns", columns, whole[1])
            if not all(a <= x < y <= b for (x, y), (a, b) in zip(shown, whole, strict=True)):
                raise InputError(f"rows and columns must lie within {whole[0]} and {whole[1]}, got {shown[0]} and {shown[1]}")
            self.session.layer, self.session.head = layer, head
            self.session.choose_token(token)
            self.navigation.go(Place(view, None if shown == whole else shown))
            self.cells.value = cells
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
        self.back = ipw.Button(
            description="Back", tooltip="to what was shown before (key b or Backspace)", layout=ipw.Layout(width="auto")
        )
        self.range_fields = tuple(
            ipw.Text(
                description=name, tooltip=f"{name} to show, first:stop, stop not included; nothing for all. Enter shows them",
                continuous_update=False, style=narrow, layout=ipw.Layout(width=f"{width}px"),
            )
            for name, width in (("Rows", 160), ("Columns", 180))
        )  # fmt: skip
        self.complaint = ipw.HTML(layout=ipw.Layout(flex="1 1 220px", min_height="32px", margin="0 0 0 8px"))
        self.layer.observe(self._when_chosen("layer"), names="value")
        self.head.observe(self._when_chosen("head"), names="value")
        self.token.observe(self._when_chosen("token"), names="value")
        self.view.observe(self._on_view, names="value")
        self.cells = ipw.Dropdown(
            description="Cells", options=CELLS, style=narrow, layout=ipw.Layout(width="150px"),
            tooltip="what a cell of several queries and columns shows",
        )  # fmt: skip
        self.cells.observe(self._redraw, names="value")
        for button, move in zip(
            (*self.zoom_buttons, self.back),
            (lambda: self._zoom_by(1), lambda: self._zoom_by(-1), self.navigation.show_all, self.navigation.back),
            strict=True,
        ):
            button.on_click(self._when_pressed(move))
        for field in self.range_fields:
            field.observe(self._on_range, names="value")

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

    def _when_pressed(self, move: Callable[[], None]) -> Callable[[Any], None]:
        def press(_: Any) -> None:
            with self.session.lock:
                if self.tile is not None:
                    move()
                    self._redraw()

        return press

    # What people do, one thing at a time: under the lock all widgets of the session share.

    def _on_thumbnail(self, _: Any, message: Any, buffers: Any) -> None:
        kind, _, value = message["token"].partition(":")  # as written by _button
        with self.session.lock:
            setattr(self.session, kind, int(value) if value.isdecimal() else value)

    def _on_map(self, _: Any, message: Any, buffers: Any) -> None:
        with self.session.lock, self.map.hold_sync():
            if self.tile is None:
                return
            try:
                if "row" in message:  # the cell pointed at
                    height, width = self.tile.values.shape
                    i, j = min(max(0, message["row"]), height - 1), min(max(0, message["column"]), width - 1)
                    self._at = self.tile.strongest(i, j)
                    if message["type"] == "click":
                        self.session.choose_token(self._at[0])
                if message["type"] == "zoom":
                    self._zoom_by(message["by"])
                elif "ask" in message:
                    self.navigation.answer(message)
                self._redraw()
            finally:
                if "ask" in message:  # the page asks for nothing else before it has this answer
                    self.map.show(answered=message["ask"])

    def _on_view(self, change: Any) -> None:
        if self._syncing == threading.get_ident():
            return
        with self.session.lock:
            self.navigation.go(Place(change["new"]))
        self._redraw()

    def _on_range(self, change: Any) -> None:
        """Somebody typed rows or columns: show them, or say why not and change nothing."""
        if self._syncing == threading.get_ident() or self.tile is None:
            return
        with self.session.lock:
            entries_from = first_entry(self.tile.layer, view_of(self.tile.layer, self.view.value))
            (rows, columns), whole = self.range_fields, self.navigation.whole
            try:
                ranges = (
                    parse_range(rows.value, whole[0], "Rows"),
                    parse_range(columns.value, whole[1], "Columns", entries_from),
                )
            except InputError as wrong:
                self.complaint.value = COMPLAINT.format(html.escape(str(wrong)))
                return
            self.navigation.show(*ranges)
            self._drawn.pop("ranges", None)  # "0:97" and "" are the same
        self._redraw()

    def _zoom_by(self, by: float) -> None:
        """``by`` times half as many rows and columns around the last place pointed at, or twice as many if negative."""
        self.navigation.zoom(self._at or self._strongest(self.navigation.whole[1]), by)

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
            token, view = min(self.session.token, trace.length - 1), view_of(record, self.navigation.place.view)
            self.navigation.fit(whole_ranges(record, view))
            self._draw("view", (view,), setattr, self, "_at", None)  # columns of one view are not those of another
            self._sync_controls(trace, record, head, token)
            self._draw("pictures", (*self._progress(trace), record.layer), self._draw_pictures, trace, record)
            self._draw("thumbnails", (self._drawn["pictures"], head), self._draw_thumbnails, record, head)
            ranges = self.navigation.shown
            self._draw("ranges", (ranges, self.navigation.whole, view), self._draw_ranges, first_entry(record, view))
            map_of = (trace, record.layer, head, view, ranges, self.cells.value)
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
            zoom = "" if ranges == self.navigation.whole else f", rows={ranges[0]}, columns={ranges[1]}"
            cells = "" if self.cells.value == "max" else f", cells={self.cells.value!r}"
            self.line.value = f"explorer.look({asked}{zoom}{cells})"

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
            self.navigation.forget()
            self._at = None
            return

        def moved(column: int) -> int:
            return column + (now - before if column >= before else 0)

        self.navigation.move_columns(moved)
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
                self.view.options = views
            view = self.navigation.place.view
            self.view.value = view if view in views.values() else "entries"
            self.back.disabled = not self.navigation.can_go_back
            self.token.max = trace.length - 1
            self.token.value = token
        finally:
            self._syncing = None

    def _draw_pictures(self, trace: Trace, record: LayerTrace) -> None:
        self._pictures = layer_thumbnails(trace)[:MOST_THUMBNAILS], thumbnails(trace, record.layer)[: MOST_THUMBNAILS + 1]

    def _draw_thumbnails(self, record: LayerTrace, head: Head) -> None:
        layers, heads = self._pictures
        self.thumbnails.show(html=thumbnail_buttons(layers, [] if record.selection_only else heads, record.layer, head))

    def _draw_map(self, trace: Trace, record: LayerTrace, head: Head, token: int, view: str) -> None:
        rows, columns = self.navigation.shown
        mean = self.cells.value == "mean"
        no_mean = "entries overlap on this axis" if view == "composite" else no_means(record, rows)
        if view == "composite":
            tile = self.tile = composite_tile(trace, record.layer, head, rows, columns, TILE_PIXELS)
        else:
            pool: Pool = "mean" if mean and not no_mean else "max"
            tile = self.tile = attention_tile(trace, record.layer, head, rows, columns, TILE_PIXELS, pool=pool)
        height, width = (side_pixels(stop - start)[0] for start, stop in (rows, columns))
        row_labels, column_labels, upright = axis_labels(trace, tile, height, width)
        what = map_words(tile, mean_asked=mean, no_mean=no_mean, no_entries=view == "entries" and not record.entries)
        self.title.value = TITLE.format(html.escape(trace.label), f"{html.escape(what)}.&emsp;{colour_bar(record)}")
        # The chart stands next to it, at one place as long as parts of the map are shown.
        wide = width if (rows, columns) == self.navigation.whole else TILE_PIXELS
        self.map.layout.width = f"{wide + LABEL_PIXELS}px"
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
            room=self.navigation.room,
            label=f"Attention map of {what}. {MAP_KEYS}",
        )
        self._drawn["mark"] = (tile, token)

    def _draw_ranges(self, entries_from: int | None) -> None:
        """What is shown, in the fields where other ranges can be typed; a complaint about what was typed is settled."""
        self._syncing = threading.get_ident()
        try:
            whole = self.navigation.whole
            for field, shown, all_of_it, entries in zip(
                self.range_fields, self.navigation.shown, whole, (None, entries_from), strict=True
            ):
                field.placeholder = range_text(all_of_it, all_of_it, entries)
                field.value = "" if shown == all_of_it else range_text(shown, all_of_it, entries)
            self.complaint.value = ""
        finally:
            self._syncing = None

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
