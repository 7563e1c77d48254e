"""How the KV cache grows: a chart of bytes by part, and the formula beside what the live cache holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ipywidgets as ipw
import plotly.graph_objects as go

from workbench.figures.memory import kv_growth_chart, kv_panel_html
from workbench.trace import Trace
from workbench.widgets.render import as_output
from workbench.widgets.session import Session, session_of
from workbench.widgets.steps import StepSlider

if TYPE_CHECKING:
    from workbench.live import LiveRun

HINT = "Click the chart to choose a token in all views; the Step slider does it by key."


class KVCacheGrowth(ipw.VBox):
    """Bytes against tokens with a step slider; follows a run while it works. ``figure`` is the chart last drawn.

    A click on the chart chooses the token there, the n-th for n tokens in the cache, in all views of the session.
    """

    def __init__(self, source: LiveRun | Trace | Session) -> None:
        self.session = session_of(source)
        self.step = StepSlider(self.session)
        self.scale = ipw.ToggleButtons(
            options=[("linear", False), ("logarithmic", True)],
            description="Bytes axis",
            tooltips=["parts stacked", "parts as lines, dense caches in sight"],
            style={"button_width": "auto"},
            layout=ipw.Layout(width="auto"),
        )
        self.view, self.panel = ipw.Output(), ipw.HTML()
        self._drawn: tuple[Any, ...] = ()
        controls = ipw.HBox([self.step, self.scale], layout=ipw.Layout(flex_flow="row wrap"))
        super().__init__([controls, self.view, self.session.clicks, self.panel])
        self.scale.observe(self._redraw, names="value")
        self.session.observe(self._redraw, names=["trace", "step", "token", "charts"])
        self._redraw()

    @property
    def figure(self) -> go.Figure:
        return go.Figure(self.chart)

    def _redraw(self, change: Any = None) -> None:
        with self.session.lock:
            trace, step = self.session.trace, self.session.step
            token = self.session.token
            wanted = (trace, step, token, self.scale.value)
            if wanted == self._drawn or self.session.charts_wait:  # a new trace with a new step reports both
                return
            self._drawn = wanted
            self.chart = kv_growth_chart(trace, step if trace.steps else None, log=self.scale.value, token=token)
            self.view.outputs = (as_output(self.chart, self.session.click(HINT) if trace.length else None, anywhere=True),)
            told = kv_panel_html(trace, step) if trace.steps and trace.cache_bytes else ""
            self.panel.value = told or f"<p>{'No step' if not trace.steps else 'No cache'} was recorded.</p>"
