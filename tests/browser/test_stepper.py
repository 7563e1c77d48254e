"""The Stepper in a real JupyterLab: buttons, keyboard, the list of steps and autoplay, in both themes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser.lab import Browser, browse, serve, write_notebook

CELLS = (
    "import workbench as wb",
    "model = wb.load('tiny-v4')\nrun = wb.run(model, wb.sample_text()[:900], max_new_tokens=0)\nrun.wait()",
    "stepper = wb.Stepper(run, topic='csa')\nstepper",
)


@pytest.fixture(scope="module")
def notebook_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_notebook(tmp_path_factory.mktemp("notebook"), *CELLS)


def shows(browser: Browser, step: int) -> None:
    cell = browser.cell("stepper = wb.Stepper")
    drawn = "cell.querySelector('.wb-walk h4')?.innerText.startsWith(`${n} of `)"
    listed = "cell.querySelector('.wb-walk li.q').dataset.token == String(n - 1)"
    browser.until(f"([cell, n]) => {drawn} && {listed}", f"step {step} is shown", [cell.element_handle(), step])


def test_buttons_arrow_keys_and_the_list_walk_through_the_steps(notebook):
    cell = notebook.cell("stepper = wb.Stepper")
    shows(notebook, 1)
    notebook.press(cell, "Next")
    shows(notebook, 2)
    cell.locator(".wb-pointer.wb-text").focus()
    notebook.page.keyboard.press("ArrowRight")
    shows(notebook, 3)
    notebook.page.keyboard.press("ArrowLeft")
    shows(notebook, 2)
    cell.locator(".wb-walk li[data-token='13']").click()
    shows(notebook, 14)
    notebook.press(cell, "Back")
    shows(notebook, 13)
    assert "workbench/model/" in cell.locator(".wb-walk .place").inner_text()
    cell.locator(".jp-OutputArea").first.evaluate("e => e.scrollIntoView()")
    notebook.screenshot("stepper_csa_light")


def test_autoplay_goes_on_by_itself_from_the_step_shown(notebook):
    cell = notebook.cell("stepper = wb.Stepper")
    cell.locator(".wb-walk li[data-token='4']").click()
    shows(notebook, 5)
    play = cell.locator(".widget-play button, .jupyter-widget-play button")
    play.first.click()
    shows(notebook, 6)
    shows(notebook, 7)
    play.first.click()  # pauses


def test_topic_and_token_choosers_change_the_walk(notebook):
    cell = notebook.cell("stepper = wb.Stepper")
    cell.get_by_label("Walk through", exact=True).select_option(label="mHC residual streams")
    shows(notebook, 1)
    cell.locator(".wb-walk li[data-token='5']").click()
    shows(notebook, 6)
    assert "column sums − 1" in cell.locator(".wb-walk .step").inner_text()
    cell.locator(".jp-OutputArea").first.evaluate("e => e.scrollIntoView()")
    notebook.screenshot("stepper_mhc_light")
    token = cell.get_by_label("Token", exact=True)
    token.fill("20")
    token.press("Enter")
    notebook.until(
        "cell => cell.querySelector('.wb-walk .head').innerText.includes('token 20 ')",
        "token 20 is walked",
        cell.element_handle(),
    )
    shows(notebook, 6)


def test_in_the_dark_theme_everything_is_drawn_too(driver, chromium_path, notebook_file, tmp_path):
    with (
        serve(notebook_file, tmp_path, "JupyterLab Dark") as url,
        browse(driver, chromium_path, tmp_path) as browser,
    ):
        browser.open_and_run_all(url)
        browser.until("document.body.dataset.jpThemeLight == 'false'", "the dark theme is on")
        cell = browser.cell("stepper = wb.Stepper")
        for number in (7, 15):
            cell.locator(f".wb-walk li[data-token='{number - 1}']").click()
            shows(browser, number)
            cell.locator(".jp-OutputArea").first.evaluate("e => e.scrollIntoView()")
            browser.screenshot(f"stepper_{number}_dark")
        assert browser.problems == []
