"""EntryWeights: how each compressed entry of a layer is made of its tokens, entry by entry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ipywidgets as ipw
import plotly.graph_objects as go

from workbench.config import read_config
from workbench.errors import InputError
from workbench.figures.compressing import entry_weights
from workbench.trace import Trace, entries_of
from workbench.widgets.render import as_output

if TYPE_CHECKING:
    from workbench.compressing import GateWeights

COMPRESSING = ("csa", "hca")


class EntryWeights(ipw.VBox):
    """Choose a layer and an entry: the weight of each of its tokens, channel by channel, and on average.

    ``trace`` says which text, ``model`` makes its entries again, once for each layer. It opens on the entry of ``token`` in the
    first CSA layer. ``gates`` are those of the layer that is shown, ``figure`` is the chart. InputError for a model without
    such layers, one of another shape than the trace's, and a token outside.
    """

    def __init__(self, model: Any, trace: Trace, token: int = 0) -> None:
        if read_config(trace.config) != model.config:
            raise InputError(f"the recording is of a model of another shape than {model.name}; give the one it is of")
        kinds = model.config.layer_kinds
        options = [(f"{i}: {kind}", i) for i, kind in enumerate(kinds) if kind in COMPRESSING]
        if not options:
            raise InputError(f"{model.name} has no CSA and no HCA layer; take tiny-v4")
        if not 0 <= token < trace.length:
            raise InputError(f"the trace has tokens 0..{trace.length - 1}, got {token}")
        self.model, self.trace = model, trace
        self._gates: dict[int, GateWeights] = {}
        self.figure: go.Figure | None = None
        self.layer = ipw.Dropdown(options=options, description="Layer", layout=ipw.Layout(width="180px"))
        self.entry = ipw.IntSlider(
            description="Entry", min=0, max=0, tooltip="Which entry of the layer", layout=ipw.Layout(width="min(100%, 480px)")
        )
        self.view = ipw.Output()
        super().__init__([ipw.HBox([self.layer, self.entry], layout=ipw.Layout(flex_flow="row wrap")), self.view])
        self.show_token(token)
        self.layer.observe(self._layer_chosen, names="value")
        self.entry.observe(self._draw, names="value")
        self._draw()

    @property
    def gates(self) -> GateWeights:
        from workbench.compressing import gate_weights  # brings in torch, which the model has brought in already

        layer = self.layer.value
        if layer not in self._gates:
            self._gates[layer] = gate_weights(self.model, self.trace.token_ids.tolist(), layer)
        return self._gates[layer]

    def show_token(self, token: int) -> None:
        """Go to the entry whose own block holds ``token``; the last one if that block is still open."""
        self.entry.max = len(self.gates.weights) - 1
        own = entries_of(self.gates.kind, self.trace.layer(self.layer.value).ratio, token)[0]
        self.entry.value = min(own, self.entry.max)

    def _layer_chosen(self, change: Any) -> None:
        """The entry of another layer that holds the same tokens."""
        before = self.trace.layer(change["old"]).ratio * self.entry.value
        with self.entry.hold_trait_notifications():
            self.show_token(before)
        self._draw()

    def _draw(self, change: Any = None) -> None:
        self.figure = entry_weights(self.gates, self.entry.value, self.trace.token_texts)
        self.view.outputs = (as_output(self.figure),)
