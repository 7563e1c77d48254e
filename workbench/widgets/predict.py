"""Predict before you run: a guess is set, locked, and then shown over what came out."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from typing import Any, Literal

import ipywidgets as ipw
import plotly.graph_objects as go

from workbench.errors import InputError
from workbench.figures.predict import guess_and_result, number, with_guess
from workbench.figures.style import CHART_CSS
from workbench.widgets.render import as_output

Control = Literal["slider", "log slider", "number"]
REVEAL, BUSY, LOCKED = "Lock my guess and show", "Working …", "Guess locked"


class Prediction(ipw.VBox):
    """A question with a slider, or a number, and a button. ``guess`` stays as it was once the result is shown.

    ``reveal()`` does the work, when the button is pressed and not before, and returns the result, or the result and a chart in
    which it can be seen; the guess is drawn over that, as a value of the axis ``across`` ("x" or "y"). Without a chart, or
    where neither axis counts what was guessed (None), the two are shown as bars, above the chart if there is one. ``figure`` is
    the chart with the guess, ``result`` the number, None before. If ``reveal`` fails, what it says is shown and the guess can
    still be changed.
    Raises InputError for limits that are none and a starting value outside of them.
    """

    def __init__(
        self,
        question: str,
        reveal: Callable[[], float | tuple[float, go.Figure]],
        *,
        low: float = 0.0,
        high: float = 100.0,
        step: float = 1.0,
        value: float | None = None,
        unit: str = "",
        control: Control = "slider",
        across: Literal["x", "y"] | None = "y",
    ) -> None:
        _check(low, high, step, low if value is None else value, control)
        start = value if value is not None else _middle(low, high, step, control)
        self.question, self.unit, self.across, self._reveal = question, unit, across, reveal
        self._log = control == "log slider"
        self.result: float | None = None
        self.figure: go.Figure | None = None
        self.control = _control(control, low, high, step, start, unit)
        self.show = ipw.Button(description=REVEAL, button_style="primary", layout=ipw.Layout(width="auto"))
        self.status, self.view = ipw.HTML(), ipw.Output()
        self.show.on_click(lambda _: self.lock())
        row = ipw.HBox([self.control, self.show], layout=ipw.Layout(flex_flow="row wrap", align_items="center"))
        asked = ipw.HTML(f"<style>{CHART_CSS}</style><p style='line-height:1.5'><b>Predict:</b> {escape(question)}</p>")
        super().__init__([asked, row, self.status, self.view])

    @property
    def guess(self) -> float:
        return float(self.control.value)

    def lock(self) -> None:
        """What the button does: fix the guess, do the work, show both. Once is all; a second press changes nothing."""
        if self.show.disabled:
            return
        self.control.disabled = self.show.disabled = True
        self.show.description = BUSY
        self.status.value = ""
        guess = self.guess
        try:
            found = self._reveal()
            result, figure = found if isinstance(found, tuple) else (found, None)
            result = float(result)
            if figure is None or self.across is None:
                shown = [guess_and_result(self.question, guess, result, self.unit, log=self._log)]
                shown += [figure] if figure is not None else []
            else:
                shown = [with_guess(figure, guess, self.unit, across=self.across)]
            outputs = tuple(as_output(fig) for fig in shown)
        except Exception as error:  # whatever went wrong belongs under the question, and the guess is not lost
            self.control.disabled = self.show.disabled = False
            self.show.description = REVEAL
            self.status.value = f"<p role='status'>That failed: {escape(' '.join(str(error).split()))}. Try again.</p>"
            return
        self.result, self.figure = result, shown[0]
        self.show.description, self.show.button_style = LOCKED, ""
        self.status.value = f"<p role='status'>{escape(self._said(guess, result))}</p>"
        self.view.outputs = outputs

    def whole_html(self) -> str:
        """For exported files: the question, and folded away the result, which is worked out for that."""
        from workbench.widgets.still import still_html

        self.lock()
        asked = f"<p><b>Predict:</b> {escape(self.question)}</p>"
        shown = still_html(self.view) or still_html(self.status)
        return f"{asked}<details><summary>Result, beside the guess in the middle of the scale</summary>{shown}</details>"

    def _said(self, guess: float, result: float) -> str:
        unit = f" {self.unit}" if self.unit else ""
        told = f"Your guess {number(guess)}{unit}, result {number(result)}{unit}"
        if self._log and guess > 0 and result > 0:
            factor = max(guess, result) / min(guess, result)
            return f"{told}: {'the same' if factor < 1.005 else f'off by a factor of {number(factor)}'}."
        off = abs(guess - result)
        return f"{told}: {'the same' if off < 1e-9 else f'off by {number(off)}{unit}'}."


def _control(control: Control, low: float, high: float, step: float, start: float, unit: str) -> Any:
    label = f"Guess ({unit})" if unit else "Guess"
    common = {"description": label, "style": {"description_width": "initial"}, "layout": ipw.Layout(width="min(100%, 460px)")}
    if control == "log slider":
        ends = {"min": math.log10(low), "max": math.log10(high)}
        return ipw.FloatLogSlider(start, base=10, step=step, readout_format=".3g", **ends, **common)
    whole = all(float(x).is_integer() for x in (low, high, step, start))
    limits = {"min": int(low) if whole else low, "max": int(high) if whole else high, "step": int(step) if whole else step}
    first = int(start) if whole else start
    if control == "number":
        return (ipw.BoundedIntText if whole else ipw.BoundedFloatText)(first, **limits, **common)
    return (ipw.IntSlider if whole else ipw.FloatSlider)(first, **limits, **common)


def _middle(low: float, high: float, step: float, control: Control) -> float:
    """Where a guess starts: halfway, so that it gives nothing away."""
    if control == "log slider":
        return math.sqrt(low * high)
    return low + step * round((high - low) / 2 / step)


def _check(low: float, high: float, step: float, start: float, control: Control) -> None:
    if control not in ("slider", "log slider", "number"):
        raise InputError(f"a prediction is made with a 'slider', a 'log slider' or a 'number', got {control!r}")
    if not all(math.isfinite(x) for x in (low, high, step, start)) or step <= 0 or not low < high or not low <= start <= high:
        raise InputError(f"a guess needs low <= value <= high and a positive step, got {low}, {start}, {high} and {step}")
    if control == "log slider" and low <= 0:
        raise InputError(f"a log slider needs a positive lower end, got {low}")
