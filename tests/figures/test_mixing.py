"""mHC's charts and its two widgets: the numbers drawn are those computed, every control changes what is shown."""

from __future__ import annotations

import re

import numpy as np
import pytest

import workbench as wb
from workbench.errors import InputError
from workbench.figures.mixing import matrix_html, stream_gain, sum_error_chart
from workbench.mixing import EXP, MHC, SIGNS, SOFTMAX, Mixing, balance, compared, gains, stacked, sum_errors
from workbench.widgets.mixing import SinkhornDial, StreamGain

LOGITS = 2 * np.random.default_rng(0).standard_normal((6, 5, 4, 4)) + 2 * np.eye(4)
NAMES = tuple(f"layer {i // 2} {'MoE' if i % 2 else 'attention'}" for i in range(6))
MIXING = Mixing(
    logits=LOGITS,
    mix=balance(LOGITS, 20),
    names=NAMES,
    token_texts=("a", "<b>", "c", "d", "e"),
    iterations=20,
    eps=1e-6,
    label="made up (toy), measured on <CPU>",
)


def line(fig, name):
    return next(data for data in fig.data if data.name == name)


@pytest.mark.parametrize("measure", ["energy", "forward", "backward"])
def test_lines_are_the_largest_gain_over_tokens(measure):
    fig = stream_gain(MIXING, measure)
    for name in (MHC, SOFTMAX, SIGNS):
        found = gains(compared(MIXING)[name], measure)
        assert list(line(fig, name).y) == pytest.approx(found.max(axis=1)) and list(line(fig, name).x) == [1, 2, 3, 4, 5, 6]
    assert [data.name for data in fig.data] == [MHC, SOFTMAX, SIGNS] and fig.layout.yaxis.type == "log"
    assert "5 tokens" in fig.layout.title.text and "measured on &lt;CPU&gt;" in fig.layout.title.text


def test_a_deep_stack_is_called_modelled_and_drawn_from_the_recorded():
    fig = stream_gain(MIXING, depth=30)
    assert "Modelled: 30 sublayers" in fig.layout.title.text and len(line(fig, MHC).x) == 30
    assert line(fig, SIGNS).y[-1] == pytest.approx(gains(stacked(compared(MIXING)[SIGNS], 30))[-1].max())


def test_what_cannot_be_drawn_is_one_clear_error():
    with pytest.raises(InputError, match="overflows"):
        stream_gain(MIXING, depth=30, names=(MHC, EXP))
    with pytest.raises(InputError, match="names must be"):
        stream_gain(MIXING, names=("HC",))


def test_errors_of_sums_are_drawn_for_every_number_of_iterations():
    fig = sum_error_chart(MIXING, 3)
    rows, columns = sum_errors(MIXING.balanced(3))
    assert line(fig, "rows, the worst").y[3] == pytest.approx(rows.max()) and len(line(fig, "rows, the worst").y) == 21
    assert line(fig, "rows, on average").y[3] == pytest.approx(rows.mean())
    assert line(fig, "columns, the worst").y[3] == pytest.approx(columns.max())
    assert fig.layout.shapes[0].x0 == 3 and "30 live matrices" in fig.layout.title.text


def test_a_matrix_stands_between_its_sums():
    html = matrix_html(np.array([[0.5, 0.25], [0.25, 0.5]]) * [[1.0, 2.0], [1.0, 2.0]], "<caption>")
    assert re.findall(r"class='sum'>([\d.]+)<", html) == ["1.0000", "1.2500"]
    assert re.findall(r"<td>([\d.]+)</td>", html.split("<tfoot>")[1]) == ["0.7500", "1.5000"]
    assert "&lt;caption&gt;" in html and "<caption>&lt;" in html


def test_the_dial_opens_where_most_is_left_and_follows_its_controls():
    dial = SinkhornDial(MIXING)
    worst = sum_errors(MIXING.mix)[0].max(-1)
    assert worst[dial.sublayer.value, dial.token.value] == worst.max() and dial.iterations.value == 20
    for control, value in ((dial.iterations, 0), (dial.sublayer, (dial.sublayer.value + 1) % 6), (dial.token, 1)):
        before = dial.matrix.value
        control.value = value
        assert dial.matrix.value != before
    assert "“&lt;b&gt;”" in dial.matrix.value and "after 0 iterations" in dial.matrix.value
    assert dial.figure.layout.shapes[0].x0 == 0 and len(dial.matrix.value) < 250_000


def test_the_gain_follows_measure_depth_and_what_is_compared():
    widget = StreamGain(MIXING)
    before = widget.figure.to_json()
    widget.measure.value = "backward"
    assert widget.figure.to_json() != before and "gradients" in widget.figure.layout.title.text
    widget.raw.value = True
    assert EXP in [data.name for data in widget.figure.data]
    widget.depth.value = 122
    assert widget.raw.disabled and "Modelled: 122" in widget.figure.layout.title.text
    assert EXP not in [data.name for data in widget.figure.data]
    assert len(widget.figure.to_json()) < 250_000


def test_public_names():
    assert wb.SinkhornDial is SinkhornDial and wb.StreamGain is StreamGain and wb.stream_gain is stream_gain
