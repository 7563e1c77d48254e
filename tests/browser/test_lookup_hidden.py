"""The notebook on overlap in a real JupyterLab: a recording at once, a guess that is locked, an overlap broken by keyboard."""

from __future__ import annotations

import re

from tests.browser.lab import ROOT, Browser

NOTEBOOK = ROOT / "notebooks" / "05_is_the_lookup_hidden.ipynb"
SAYS = "([cell, text]) => cell.innerText.includes(text)"
WHAT_IF = "what_if = wb.OverlapWhatIf()"


def says(notebook: Browser, cell: object, text: str) -> None:
    notebook.until(SAYS, f"the cell says {text!r}", [cell.element_handle(), text])  # type: ignore[attr-defined]


def test_every_cell_runs_and_every_exercise_asks_its_question(notebook):
    notebook.check_that_all_ran()
    assert notebook.page.locator(".wb-check").count() == 4


def test_the_recording_is_drawn_at_once_and_says_that_it_is_one(notebook):
    cell = notebook.cell('wb.Trace.load(f"lookup-{name}")')
    cell.scroll_into_view_if_needed()
    cell.locator(".jp-RenderedPlotly .barlayer path").first.wait_for()
    says(notebook, cell, "recorded on CPU")
    says(notebook, cell, "Looking up ahead saves")
    notebook.screenshot("lookup_recorded")


def test_the_same_logits_by_all_three_policies(notebook):
    assert notebook.cell("wb.schedule.POLICIES").inner_text().count("bit for bit: True") == 3


def test_a_guess_is_locked_and_shown_in_the_measured_chart(notebook):
    cell = notebook.cell("wb.Prediction(question")
    cell.scroll_into_view_if_needed()
    notebook.press(cell, "Lock my guess and show")
    cell.locator(".jp-RenderedPlotly .main-svg").nth(1).wait_for()
    says(notebook, cell, "Your guess 50")
    assert cell.get_by_role("button", name="Guess locked", exact=True).is_disabled()
    says(notebook, cell, "the line is modelled")
    notebook.screenshot("lookup_prediction")


def test_fewer_gather_threads_make_stalls_in_the_break_even_table(notebook):
    cell = notebook.cell('wb.BreakEven("v4.1-flash"')
    cell.scroll_into_view_if_needed()
    assert "Modelled, nothing was measured" in cell.inner_text()
    before = cell.inner_text().count("no stall")
    handle = cell.locator(".widget-slider").filter(has_text="Gather threads").locator(".noUi-handle")
    handle.focus()
    notebook.page.keyboard.press("Home")
    says(notebook, cell, "(1 thread)")
    assert cell.inner_text().count("no stall") < before
    notebook.screenshot("lookup_break_even")


def test_the_slider_breaks_the_overlap_by_keyboard(notebook):
    cell = notebook.cell(WHAT_IF)
    cell.scroll_into_view_if_needed()
    says(notebook, cell, "Modelled: 100% of the fetching is hidden")
    notebook.press(cell, "NVMe")
    says(notebook, cell, "55% of the fetching is hidden")
    handle = cell.locator(".widget-slider").filter(has_text="Engram layer").locator(".noUi-handle")
    handle.focus()
    for layer in (13, 12, 11):
        notebook.page.keyboard.press("ArrowLeft")
        says(notebook, cell, f"layer {layer}: fetch")
    hidden = int(re.search(r"Modelled: (\d+)% of the fetching", cell.inner_text()).group(1))
    assert hidden < 55, "fewer blocks before the layer hide less"
    notebook.screenshot("lookup_what_if")
