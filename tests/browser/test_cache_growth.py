"""The notebook on the growing cache in a real JupyterLab: slots by keyboard, a guess that is locked."""

from __future__ import annotations

from tests.browser.lab import ROOT

NOTEBOOK = ROOT / "notebooks" / "04_how_the_cache_grows.ipynb"
SAYS = "([cell, text]) => cell.textContent.includes(text)"


def test_every_cell_runs_and_every_exercise_asks_its_question(notebook):
    notebook.check_that_all_ran()
    assert notebook.page.locator(".wb-check").count() == 5


def test_the_slots_follow_the_slider_by_keyboard(notebook):
    cell = notebook.cell("slots = wb.CacheSlots(recorded)")
    cell.scroll_into_view_if_needed()
    assert "3 of 4 tokens" in cell.inner_text()  # the open block of the token that looks the needle up
    cell.locator(".noUi-handle").first.focus()
    notebook.page.keyboard.press("ArrowRight")
    notebook.until(SAYS, "one token more closes the block", [cell.element_handle(), "its last token has just closed it"])
    notebook.screenshot("cache_slots_light")


def test_a_guess_is_locked_and_shown_beside_the_result(notebook):
    cell = notebook.cell("wb.Prediction(question")
    cell.scroll_into_view_if_needed()
    assert cell.locator(".jp-RenderedPlotly").count() == 0
    notebook.press(cell, "Lock my guess and show")
    cell.locator(".jp-RenderedPlotly .main-svg").nth(1).wait_for()
    assert "Your guess 85" in cell.inner_text()
    assert cell.get_by_role("button", name="Guess locked", exact=True).is_disabled()
    notebook.screenshot("cache_prediction_light")
