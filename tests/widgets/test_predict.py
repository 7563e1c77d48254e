"""Predictions without a browser: nothing is done before the button, the guess is locked, and both are in the chart."""

from __future__ import annotations

import json

import plotly.graph_objects as go
import pytest

from workbench.errors import InputError
from workbench.figures.predict import guess_and_result, number, with_guess
from workbench.widgets.predict import Prediction


def guess_line(fig):
    return next(data for data in fig.data if (data.name or "").startswith("your guess"))


def bars():
    return go.Figure(go.Bar(x=["CSA", "HCA", "window"], y=[3.0, 40.0, 7.0], name="bytes"))


def test_nothing_runs_before_the_button_and_the_guess_is_what_the_slider_says():
    calls = []
    widget = Prediction("How many?", lambda: calls.append(1) or 7.0, high=10)
    widget.control.value = 4
    assert calls == [] and widget.guess == 4 and widget.figure is None and widget.view.outputs == ()
    widget.show.click()
    assert calls == [1] and widget.result == 7.0
    assert "Your guess 4, result 7: off by 3." in widget.status.value


def test_once_shown_the_guess_is_locked_and_nothing_runs_again():
    calls = []
    widget = Prediction("How many?", lambda: calls.append(1) or 7.0, high=10)
    widget.show.click()
    shown = widget.view.outputs
    assert widget.control.disabled and widget.show.disabled
    widget.show.click()
    widget.lock()
    assert calls == [1] and widget.view.outputs == shown


def test_the_guess_is_a_line_over_the_result_s_own_chart():
    widget = Prediction("Share?", lambda: (40.0, bars()), unit="%", value=25)
    widget.show.click()
    line = guess_line(widget.figure)
    assert list(line.y) == [25, 25] and list(line.x) == ["CSA", "window"] and line.name == "your guess: 25 %"
    assert widget.figure.data[0].name == "bytes" and "your guess" in json.dumps(widget.view.outputs)
    assert "off by 15 %" in widget.status.value


def test_over_bars_that_lie_the_line_stands_upright():
    fig = with_guess(go.Figure(go.Bar(y=["a", "b"], x=[1, 2], orientation="h")), 5, across="x")
    assert list(guess_line(fig).x) == [5, 5] and list(guess_line(fig).y) == ["a", "b"]


def test_without_a_chart_guess_and_result_are_two_bars_told_apart_without_colour():
    widget = Prediction("Factor?", lambda: 9.5, low=1, high=1000, step=0.1, control="log slider", value=100, unit="times")
    widget.show.click()
    mine, found = widget.figure.data
    assert (mine.x[0], found.x[0]) == (pytest.approx(100), 9.5) and (list(mine.y), list(found.y)) == (
        ["your guess"],
        ["result"],
    )
    assert widget.figure.layout.xaxis.type == "log" and "factor of 10.5" in widget.status.value


def test_where_no_axis_counts_what_was_guessed_the_bars_stand_above_the_chart():
    widget = Prediction("How many?", lambda: (7, bars()), high=10, across=None)
    widget.show.click()
    assert [data.name for data in widget.figure.data] == ["your guess", "result"]
    assert len(widget.view.outputs) == 2 and "HCA" in json.dumps(widget.view.outputs[1])


@pytest.mark.parametrize("control", ["slider", "number"])
def test_limits_hold_and_whole_numbers_stay_whole(control):
    widget = Prediction("?", lambda: 1.0, low=0, high=8, control=control)
    assert widget.control.value == 4 and isinstance(widget.control.value, int)
    fine = Prediction("?", lambda: 1.0, low=0, high=1, step=0.05, control=control)
    assert fine.guess == pytest.approx(0.5)


def test_a_guess_that_is_right_is_said_to_be():
    widget = Prediction("?", lambda: 4, high=8)
    widget.show.click()
    assert "the same" in widget.status.value


def test_a_failure_is_shown_escaped_and_the_guess_can_be_changed_and_tried_again():
    outcome = [ValueError("no <model>"), 3.0]

    def reveal():
        found = outcome.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    widget = Prediction("<b>?", reveal, high=8)
    assert "&lt;b&gt;?" in widget.children[0].value
    widget.show.click()
    assert "no &lt;model&gt;" in widget.status.value and not widget.control.disabled and widget.result is None
    widget.control.value = 3
    widget.show.click()
    assert widget.result == 3.0 and widget.control.disabled


@pytest.mark.parametrize(
    "wrong",
    [{"low": 5, "high": 5}, {"value": 11, "high": 10}, {"step": 0}, {"low": float("nan")}, {"control": "dial"},
     {"low": 0, "control": "log slider"}],
)  # fmt: skip
def test_limits_that_are_none_are_one_clear_error(wrong):
    with pytest.raises(InputError):
        Prediction("?", lambda: 1.0, **wrong)


def test_a_chart_without_data_or_an_unknown_axis_is_one_clear_error():
    with pytest.raises(InputError, match="no data"):
        with_guess(go.Figure(), 1)
    with pytest.raises(InputError, match="axis"):
        with_guess(bars(), 1, across="z")


def test_numbers_read_well_and_titles_are_escaped():
    assert [number(x) for x in (0, 0.7579, 12, 9.544, 50402.9)] == ["0", "0.758", "12", "9.54", "50,403"]
    assert "&lt;b&gt;" in guess_and_result("<b>", 1, 2).layout.title.text
