"""Dense attention beside the sparse one, and two runs one minus the other: menus, two sliders, pictures."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw

from workbench.differences import compare_runs
from workbench.errors import InputError, WorkbenchError
from workbench.figures.attention import Head, describe_layer
from workbench.figures.beside import beside_maps, missed_chart, reuse_chart, reuse_html
from workbench.figures.difference import DifferenceTile, difference_html, difference_map, difference_tile
from workbench.trace import SELECTING, LayerTrace, Trace
from workbench.widgets.render import as_output

if TYPE_CHECKING:
    from workbench.beside import Beside

NARROW = {"description_width": "initial"}
WRAP = ipw.Layout(flex_flow="row wrap", align_items="center")
TABS = ("Dense attention", "Reusing choices")  # a tab has room for so many letters
READ_AT_ONCE = 2048  # tokens; a longer text is read while the page can be used
OTHER_RATIOS = "Another compression ratio needs other weights: train a variant of your own (notebook 11)."


class DenseBeside(ipw.VBox):
    """One text read by one model: what a layer attends to beside what it would with every entry kept, and what reuse would do.

    Top-k and window are what the weights allow to be changed; *Read again* reads the text with them, in the background, and
    *Stop* ends that. ``found`` is the ``wb.dense_beside`` shown; ``layer`` and ``head`` choose the picture. Given none, a short
    text is read before the widget is there and a longer one in the background. Raises InputError as ``wb.dense_beside``.
    """

    def __init__(self, model: Any, text: str | Sequence[int], found: Beside | None = None) -> None:
        from workbench.beside import dense_beside
        from workbench.live import encode

        self.model, self.text = model, text
        ids = encode(model, text)
        if not any(kind in SELECTING for kind in model.config.layer_kinds):
            raise InputError(f"{model.name} attends to every token already; take a model that chooses entries")
        self.found = dense_beside(model, ids) if found is None and len(ids) <= READ_AT_ONCE else found
        self.figures: dict[str, Any] = {}
        self._halt = threading.Event()
        self._thread: threading.Thread | None = None
        config = model.config
        self.layer = ipw.Dropdown(description="Layer", style=NARROW, layout=ipw.Layout(width="270px"))
        self.head = ipw.Dropdown(description="Head", style=NARROW, layout=ipw.Layout(width="130px"))
        self.topk = _slider("Top-k", config.index_topk, "Entries that each choosing layer keeps for a query")
        self.window = _slider("Window", config.sliding_window or 1, "Last tokens that every layer sees, besides entries")
        if not config.sliding_window:
            self.window.disabled, self.window.layout.display = True, "none"
        self.again = ipw.Button(description="Read again", button_style="primary", layout=ipw.Layout(width="auto"))
        self.stop = ipw.Button(description="Stop reading", disabled=True, layout=ipw.Layout(width="auto"))
        self.bar = ipw.FloatProgress(value=0.0, min=0.0, max=1.0, layout=ipw.Layout(width="120px"))
        self.status = ipw.HTML()
        self.maps, self.missed, self.reuse = ipw.Output(), ipw.Output(), ipw.Output()
        self.table = ipw.HTML(layout=ipw.Layout(max_height="420px", overflow="auto"))
        settings = ipw.HBox([self.topk, self.window, self.again, self.stop, self.bar], layout=WRAP)
        looking = ipw.HBox([self.layer, self.head], layout=WRAP)
        self.tabs = ipw.Tab([ipw.VBox([looking, self.maps, self.missed]), ipw.VBox([self.reuse, self.table])], titles=TABS)
        super().__init__([settings, self.status, self.tabs])
        self.again.on_click(lambda _: self.read())
        self.stop.on_click(lambda _: self._halt.set())
        self.tabs.layout.display = "none"
        if self.found is None:
            self.read()
        else:
            self._show(self.found)

    def read(self) -> None:
        """What the first button does. While a text is being read, another press changes nothing."""
        if self._thread is not None:
            return
        self._halt.clear()
        self.again.disabled, self.stop.disabled, self.bar.value = True, False, 0.0
        self._say("Reading.")
        settings = {"topk": self.topk.value, "window": None if self.window.disabled else self.window.value}
        self._thread = threading.Thread(target=self._work, args=(settings,), daemon=True, name="dense beside")
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether nothing is being read any more after at most so many seconds."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        return self._thread is None

    def _work(self, settings: dict[str, Any]) -> None:
        from workbench.beside import dense_beside

        try:
            self._show(dense_beside(self.model, self.text, progress=self._progress, stop=self._halt.is_set, **settings))
        except Exception as error:  # nobody waits for this thread: the reader must see why, and may try again
            said = str(error) if isinstance(error, WorkbenchError) else f"That failed: {type(error).__name__}: {error}"
            self._say(f"{said}.{' What is shown is the reading before.' if self.found else ''}")
        finally:
            self._thread = None
            self.again.disabled, self.stop.disabled = False, True

    def _progress(self, share: float) -> None:
        self.bar.value = share

    def _show(self, found: Beside) -> None:
        self.found = found
        if self.layer.value is None:  # the first one: what there is to choose from
            self.layer.options = [(f"{n}: {describe_layer(found.trace.layer(n))}", n) for n in found.dense]
            self.layer.value = min(found.dense)
            self.head.options = _heads(found.trace.layer(self.layer.value))
            self.head.value = "max"
            self.topk.value = min(found.topk, self.topk.max)
            if not self.window.disabled:
                self.window.value = int(found.trace.config["sliding_window"])
            self.layer.observe(self._look, names="value")
            self.head.observe(self._look, names="value")
        self._look()
        try:
            self.figures["reuse"], self.table.value = reuse_chart(found), reuse_html(found)
            self.reuse.outputs = (as_output(self.figures["reuse"]),)
        except WorkbenchError as error:
            self.reuse.outputs, self.table.value = (), f"<p>{escape(str(error))}</p>"
        self.tabs.layout.display = None

    def _look(self, change: Any = None) -> None:
        layer, head = self.layer.value, self.head.value
        assert self.found is not None
        self.figures["maps"], self.figures["missed"] = beside_maps(self.found, layer, head), missed_chart(self.found, layer)
        self.maps.outputs = (as_output(self.figures["maps"]),)
        self.missed.outputs = (as_output(self.figures["missed"]),)
        dense = self.found.layer(layer)
        near = f", window {self.found.trace.config['sliding_window']}" if not self.window.disabled else ""
        self._say(
            f"Layer {layer}, top-{self.found.topk}{near}: {dense.missed.mean():.1%} of the attention is missed, mean over text "
            f"and heads. Shared out anew among what was kept, the dense attention is the sparse one to {dense.deviation:.0e}. "
            f"{OTHER_RATIOS}"
        )

    def _say(self, text: str) -> None:
        self.status.value = f"<div role='status' aria-live='polite'>{escape(text)}</div>"


class DifferenceOfRuns(ipw.VBox):
    """Attention of recording ``b`` minus that of ``a``, for two of the same tokens, with a table of every layer.

    ``logits`` of both, [L, V] each, make the next token's KL exact; ``names`` say of A and B what their recordings do not, such
    as that Engram was off. ``tile`` is what is shown, ``comparison`` the numbers.
    Raises InputError, saying what differs, for recordings that cannot be compared.
    """

    def __init__(self, a: Trace, b: Trace, logits: Any = None, names: tuple[str, str] = ("", "")) -> None:
        self.a, self.b, self.names = a, b, names
        self.comparison = compare_runs(a, b, logits)
        self.tile: DifferenceTile | None = None
        self.figure: Any = None
        most = max(self.comparison.layers, key=lambda x: x.moved).layer
        self.layer = ipw.Dropdown(
            description="Layer", options=[(f"{x.layer}: {describe_layer(x)}", x.layer) for x in a.layers], value=most,
            style=NARROW, layout=ipw.Layout(width="270px"),
        )  # fmt: skip
        self.head = ipw.Dropdown(
            description="Head", options=_heads(a.layer(most)), value="mean", style=NARROW, layout=ipw.Layout(width="130px")
        )
        self.view, self.table = ipw.Output(), ipw.HTML(difference_html(self.comparison))
        super().__init__([ipw.HBox([self.layer, self.head], layout=WRAP), self.view, self.table])
        self.layer.observe(self._layer_chosen, names="value")
        self.head.observe(self._draw, names="value")
        self._draw()

    def _layer_chosen(self, change: Any) -> None:
        heads, chosen = _heads(self.a.layer(self.layer.value)), self.head.value
        if self.head.options != heads:
            self.head.options = heads
            self.head.value = chosen if chosen in [value for _, value in heads] else "mean"
        self._draw()

    def _draw(self, change: Any = None) -> None:
        self.tile = difference_tile(self.a, self.b, self.layer.value, self.head.value)
        self.figure = difference_map(self.tile, self.names)
        self.view.outputs = (as_output(self.figure),)


def _heads(record: LayerTrace) -> tuple[tuple[str, Head], ...]:
    return (("max", "max"), ("mean", "mean"), *((str(head), head) for head in range(record.heads)))


def _slider(name: str, most: int, tip: str) -> ipw.IntSlider:
    return ipw.IntSlider(
        most, 1, most, description=name, tooltip=tip, continuous_update=False, style=NARROW,
        layout=ipw.Layout(width="min(100%, 280px)"),
    )  # fmt: skip
