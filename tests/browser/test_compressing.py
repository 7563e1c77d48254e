"""The notebook on compressing in a real JupyterLab: entries by keyboard, a locked guess, two walks that move together."""

from __future__ import annotations

import re

from tests.browser.lab import ROOT

NOTEBOOK = ROOT / "notebooks" / "03_what_compressing_keeps.ipynb"
SAYS_STEP = "([cell, text]) => cell.querySelector('.wb-walk h4')?.innerText.startsWith(text)"
SAYS = "([cell, text]) => cell.textContent.includes(text)"


def test_every_cell_runs_and_every_exercise_asks_its_question(notebook):
    notebook.check_that_all_ran()
    assert notebook.page.locator(".wb-check").count() == 4


def test_the_slider_goes_from_entry_to_entry_by_keyboard(notebook):
    cell = notebook.cell("wb.EntryWeights(model")
    cell.scroll_into_view_if_needed()
    title = cell.locator(".gtitle")
    title.wait_for()
    number = int(re.search(r"Entry (\d+) of layer 1 \(csa\)", title.text_content())[1])
    cell.locator(".noUi-handle").first.focus()
    notebook.page.keyboard.press("ArrowRight")
    after = f"Entry {number + 1} of layer 1 (csa)"
    notebook.until(SAYS, "the next entry is drawn", [cell.element_handle(), after])
    cell.locator(".heatmaplayer image").nth(1).wait_for(state="attached")  # both blocks
    notebook.screenshot("entry_weights_light")


def test_another_layer_shows_an_entry_of_many_tokens(notebook):
    cell = notebook.cell("wb.EntryWeights(model")
    cell.locator("select").first.select_option("2: hca")
    notebook.until(SAYS, "the HCA layer's entry is drawn", [cell.element_handle(), "of layer 2 (hca)"])
    assert "series a" not in cell.text_content()


def test_a_guess_is_locked_and_shown_in_the_chart(notebook):
    cell = notebook.cell('wb.Prediction(f"Effective tokens')
    cell.scroll_into_view_if_needed()
    assert cell.locator(".jp-RenderedPlotly").count() == 0
    notebook.press(cell, "Lock my guess and show")
    cell.locator(".jp-RenderedPlotly .main-svg").first.wait_for()
    assert "your guess: 4.5 tokens" in cell.text_content() and "result 5." in cell.text_content()
    assert cell.get_by_role("button", name="Guess locked", exact=True).is_disabled()


def test_both_walks_are_of_one_token_and_go_on_by_themselves(notebook):
    csa, hca = notebook.cell('csa = wb.Stepper(run, topic="csa")'), notebook.cell('hca = wb.Stepper(run, topic="hca")')
    for cell, topic in ((csa, "CSA attention, layer 1"), (hca, "HCA attention, layer 2")):
        cell.scroll_into_view_if_needed()
        notebook.until(SAYS, f"the walk through {topic} is shown", [cell.element_handle(), topic])
    notebook.press(csa, "Next")
    notebook.until(SAYS_STEP, "the second step is shown", [csa.element_handle(), "2 of "])
    assert hca.locator(".wb-walk h4").inner_text().startswith("1 of ")
    token = csa.get_by_label("Token", exact=True)
    token.fill("150")
    token.press("Enter")
    for cell in (csa, hca):
        notebook.until(SAYS, "both walks go to the token", [cell.element_handle(), "token 150 "])
    notebook.screenshot("compressing_walks_light")
