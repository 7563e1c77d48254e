"""Rounded rows and kept entries as charts: numbers are those given, labels say what they are, the widget follows."""

from __future__ import annotations

import numpy as np
import pytest

from tests.test_rounding import made_up
from workbench.errors import InputError
from workbench.figures.rounding import kept_by_rank, rounded_row, row_bytes_html
from workbench.rounding import StoredRows
from workbench.widgets.rounding import RoundedRows

LEVELS = np.array([-6.0, -1.0, 0.0, 1.0, 6.0])
ROWS = StoredRows(
    name="<keys>",
    layer=1,
    codes="fp4",
    block=2,
    coded=4,
    values=np.array([[1.0, 2.0, 3.0, 5.0, 0.5], [4.0, 4.0, 4.0, 4.0, 4.0]]),
    stored=np.array([[1.0, 1.0, 2.0, 12.0, 0.5], [6.0, 6.0, 6.0, 6.0, 4.0]]),
    scales=np.array([[1.0, 2.0], [1.0, 1.0]]),
    levels=LEVELS,
    nbytes={"codes": 2, "scales": 2, "BF16": 2},
    label="toy, measured on <CPU>",
)


def drawn(fig, name):
    return next(data for data in fig.data if data.name == name)


def test_a_row_is_drawn_with_its_error_scales_and_levels():
    fig = rounded_row(ROWS, 0)
    assert list(drawn(fig, "live value").y) == [1, 2, 3, 5, 0.5] and list(drawn(fig, "as stored").y) == [1, 1, 2, 12, 0.5]
    assert list(drawn(fig, "stored - live").y) == [0, -1, -1, 7, 0]
    levels = drawn(fig, "what a code can mean")
    assert [y for x, y in zip(levels.x, levels.y, strict=True) if x == 3] == list(2 * LEVELS) and max(levels.x) == 3
    assert [note.text for note in fig.layout.annotations] == ["scale 1", "scale 2", "BF16"]
    assert "largest error 7" in fig.layout.title.text and "measured on &lt;CPU&gt;" in fig.layout.title.text


def test_too_many_levels_are_left_out():
    from dataclasses import replace

    fig = rounded_row(replace(ROWS, levels=np.arange(100.0)), 1)
    assert [data.name for data in fig.data] == ["live value", "as stored", "stored - live"]


def test_the_bytes_of_a_row_stand_beside_fp32_and_bf16():
    html = row_bytes_html([ROWS])
    assert "<td>20 B</td><td>10 B</td><td>6 B</td><td>2 B</td><td>2 B</td><td>2 B</td>" in html
    assert f"{100 * ROWS.relative_error:.2f} %" in html and "&lt;keys&gt;, FP4 E2M1" in html


def test_bars_are_the_shares_by_rank():
    fig = kept_by_rank(made_up())
    assert list(fig.data[0].x) == [1, 2] and list(fig.data[0].y) == pytest.approx([200 / 3, 100 / 3])
    assert fig.data[0].name == "layer 1" and "3 queries" in fig.layout.title.text and "made up" in fig.layout.title.text


def test_the_widget_follows_its_controls_and_keeps_within_its_rows():
    from dataclasses import replace

    other = replace(ROWS, name="others", values=ROWS.values[:1], stored=ROWS.stored[:1], scales=ROWS.scales[:1])
    widget = RoundedRows([ROWS, other])
    widget.row.value = 1
    assert "Row 1 of the &lt;keys&gt;" in widget.figure.layout.title.text
    widget.kind.value = 1
    assert "Row 0 of the others" in widget.figure.layout.title.text and widget.row.max == 0
    assert len(widget.figure.to_json()) < 250_000


def test_what_cannot_be_drawn_is_one_clear_error():
    with pytest.raises(InputError, match=r"rows 0\.\.1, got 2"):
        rounded_row(ROWS, 2)
    with pytest.raises(InputError, match="at least one"):
        RoundedRows([])
