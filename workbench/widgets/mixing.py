"""mHC's mixing matrices to turn over: a dial for Sinkhorn's iterations, and gain through depth."""

from __future__ import annotations

from typing import Any

import ipywidgets as ipw

from workbench.figures.mixing import matrix_html, stream_gain, sum_error_chart
from workbench.figures.style import visible_text
from workbench.mixing import EXP, ITERATION_STEPS, MEASURES, MHC, SIGNS, SOFTMAX, Mixing, sum_errors
from workbench.presets import presets
from workbench.widgets.render import as_output

DEEPEST = "v4-pro"
_WIDE = ipw.Layout(width="min(100%, 330px)")
_LABELS = {"description_width": "90px"}


class SinkhornDial(ipw.VBox):
    """One live matrix after 0 to 20 Sinkhorn iterations with its sums, and what is left of the errors of all of them."""

    def __init__(self, mixing: Mixing) -> None:
        self.mixing = mixing
        self.iterations = ipw.IntSlider(
            mixing.iterations, 0, max(ITERATION_STEPS, mixing.iterations), description="Iterations",
            tooltip="0 is the row softmax that Sinkhorn begins with", continuous_update=False, layout=_WIDE, style=_LABELS,
        )  # fmt: skip
        self.sublayer = ipw.Dropdown(
            options={name: p for p, name in enumerate(mixing.names)}, description="Sublayer", layout=_WIDE, style=_LABELS
        )
        worst = sum_errors(mixing.mix)[0].max(-1)  # [P, T]: open where most is left to see
        sublayer, token = divmod(int(worst.argmax()), worst.shape[1])
        self.sublayer.value = sublayer
        self.token = ipw.BoundedIntText(
            token, min=0, max=len(mixing.token_texts) - 1, description="Token", layout=ipw.Layout(width="180px"), style=_LABELS
        )
        self.matrix, self.view = ipw.HTML(), ipw.Output()
        self.figure: Any = None
        self.controls = (self.iterations, self.sublayer, self.token)
        super().__init__([ipw.HBox(self.controls, layout=ipw.Layout(flex_flow="row wrap")), self.matrix, self.view])
        for control in self.controls:
            control.observe(self._redraw, names="value")
        self._redraw()

    def _redraw(self, change: Any = None) -> None:
        number, p, t = self.iterations.value, self.sublayer.value, self.token.value
        shown = self.mixing.balanced(number)[p, t]
        row, column = (float(error.max()) for error in sum_errors(shown))
        said = f"{self.mixing.names[p]}, token {t} “{visible_text(self.mixing.token_texts[t])}”, after {number} iterations: "
        said += f"rows miss one by up to {row:.1e}, columns by {column:.1e}"
        self.matrix.value = f"<div role='status' aria-live='polite'>{matrix_html(shown, said)}</div>"
        if change is None or change["owner"] is self.iterations:
            self.figure = sum_error_chart(self.mixing, number)
            self.view.outputs = (as_output(self.figure),)


class StreamGain(ipw.VBox):
    """Gain through depth, by one of three measures, through the recorded sublayers or a deeper modelled stack of them."""

    def __init__(self, mixing: Mixing) -> None:
        self.mixing = mixing
        wide = ipw.Layout(width="min(100%, 430px)")
        self.measure = ipw.Dropdown(options={text: name for name, text in MEASURES.items()}, description="Gain", layout=wide)
        preset = presets[DEEPEST]
        deep = 2 * preset.config.num_hidden_layers  # each layer has two sublayers
        self.depth = ipw.Dropdown(
            options={
                f"{len(mixing.names)} sublayers, as recorded": None,
                f"{deep}, as many as {preset.title} has (modelled)": deep,
            },
            description="Depth",
            layout=wide,
        )
        self.raw = ipw.Checkbox(False, description="also the same logits without any normalisation", indent=False, layout=wide)
        self.view = ipw.Output()
        self.figure: Any = None
        self.controls = (self.measure, self.depth, self.raw)
        super().__init__([ipw.HBox(self.controls, layout=ipw.Layout(flex_flow="row wrap")), self.view])
        for control in self.controls:
            control.observe(self._redraw, names="value")
        self._redraw()

    def _redraw(self, change: Any = None) -> None:
        self.raw.disabled = self.depth.value is not None  # it would leave the range of numbers
        names = (MHC, SOFTMAX, SIGNS) + ((EXP,) if self.raw.value and not self.raw.disabled else ())
        self.figure = stream_gain(self.mixing, self.measure.value, depth=self.depth.value, names=names)
        self.view.outputs = (as_output(self.figure),)
