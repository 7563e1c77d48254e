"""The notebook on what fits in a real JupyterLab: the session is replayed by keyboard, models are chosen, a guess is locked."""

from __future__ import annotations

from tests.browser.lab import ROOT
from workbench.agent import agent_session

NOTEBOOK = ROOT / "notebooks" / "09_will_it_fit.ipynb"
SAYS = "([cell, text]) => cell.textContent.includes(text)"


def test_every_cell_runs_and_every_exercise_asks_its_question(notebook):
    notebook.check_that_all_ran()
    assert notebook.page.locator(".wb-check").count() == 4


def test_a_turn_back_by_keyboard_and_another_model_change_the_card(notebook):
    cell = notebook.cell("will_it_fit = wb.WillItFit")
    cell.scroll_into_view_if_needed()
    cell.locator(".jp-RenderedPlotly .main-svg").nth(2).wait_for()
    assert "The whole session fits" in cell.inner_text()
    cell.locator(".noUi-handle").first.focus()
    notebook.page.keyboard.press("ArrowLeft")
    before_last = agent_session(seed=0)[-2]
    said = f"Turn {before_last.number}, {before_last.role}: {before_last.what}"
    notebook.until(SAYS, "the turn before is shown", [cell.element_handle(), said])
    cell.get_by_label("Model").select_option("baseline with GQA, 8 KV heads")
    notebook.until(SAYS, "the dense baseline fills the card", [cell.element_handle(), "Does not fit. Full at turn"])
    cell.scroll_into_view_if_needed()
    notebook.screenshot("will_it_fit_light")


def test_play_replays_the_session_from_where_it_stands(notebook):
    cell = notebook.cell("will_it_fit = wb.WillItFit")
    handle = cell.locator(".noUi-handle").first
    handle.focus()
    notebook.page.keyboard.press("Home")
    notebook.until(SAYS, "the first turn is shown", [cell.element_handle(), "Turn 0, system"])
    cell.locator(".jupyter-widgets.widget-play button").first.click()
    turns = "([cell]) => Number((cell.textContent.match(/Turn (\\d+),/) || [0, 0])[1]) > 20"
    notebook.until(turns, "the session goes on by itself", [cell.element_handle()])
    cell.locator(".jupyter-widgets.widget-play button").first.click()


def test_a_guess_is_locked_and_more_sessions_need_more_cards(notebook):
    cell = notebook.cell('wb.Prediction("Sessions of 1,048,576')
    cell.scroll_into_view_if_needed()
    notebook.press(cell, "Lock my guess and show")
    cell.locator(".jp-RenderedPlotly .main-svg").nth(1).wait_for()
    assert "Your guess" in cell.inner_text()
    notebook.screenshot("sessions_prediction_light")
    table = notebook.cell("cards = wb.CardsNeeded")
    table.scroll_into_view_if_needed()
    notebook.screenshot("cards_needed_light")
    assert "for 8 sessions of 1,048,576 tokens" in table.inner_text()
    table.locator(".noUi-handle").nth(1).focus()
    notebook.page.keyboard.press("ArrowRight")
    notebook.until(SAYS, "the table is of twice as many sessions", [table.element_handle(), "for 16 sessions"])
