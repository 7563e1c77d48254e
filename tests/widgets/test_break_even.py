"""The break-even table follows its controls, and says in one line what cannot be."""

from __future__ import annotations

import pytest

import workbench as wb
from workbench.errors import InputError
from workbench.widgets.break_even import BreakEven


def test_every_control_changes_the_table():
    widget = BreakEven()
    for control, value in (("cards", 8), ("threads", 1), ("path", "uva"), ("device", "a100-80gb"), ("model", "engram-27b")):
        before = widget.html.value
        getattr(widget, control).value = value
        assert widget.html.value != before, control
    assert "Engram-27B of the paper on 8 × A100 80 GB SXM" in widget.html.value and widget.status.value == ""
    assert len(widget.html.value) < 250_000


def test_a_setting_that_cannot_be_is_one_line_and_the_table_stays():
    widget = BreakEven()
    before = widget.html.value
    widget.device.value = "ascend-910c"
    assert "no rate is known for the host link of Ascend 910C" in widget.status.value and widget.html.value == before
    widget.device.value = "h100"
    assert widget.status.value == ""


def test_unknown_names_are_one_clear_error_and_the_public_name_is_this_class():
    with pytest.raises(InputError, match="h101"):
        BreakEven(device="h101")
    assert wb.BreakEven is BreakEven
