"""The Microscope in a real JupyterLab: entries are pressed with the mouse and the keyboard, in both themes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.lab import Browser, browse, serve

CELLS = (
    "import workbench as wb",
    "model = wb.load('tiny-v4')\nneedle = wb.hide_needle(model, wb.sample_text(), 'apple', '37', 0.4, tokens=600)",
    "run = wb.run(model, needle.ids, max_new_tokens=2)\nrun.wait()",
    "scope = wb.Microscope(run)\nscope.session.layer = 1\nscope.session.choose_token(needle.queries[-1])\nscope",
    "curve = wb.selection_curve(model, 'needles', lines=4, tokens=256, draws=2)\nwb.selection_chart(curve)",
)


@pytest.fixture(scope="module")
def notebook_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("notebook") / "microscope.ipynb"
    cells = [
        {"cell_type": "code", "id": f"c{i}", "metadata": {}, "source": source, "outputs": [], "execution_count": None}
        for i, source in enumerate(CELLS)
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.write_text(json.dumps({"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}))
    return path


@pytest.fixture(scope="module")
def notebook(driver, chromium_path, notebook_file, tmp_path_factory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("lab")
    with serve(notebook_file, folder) as url, browse(driver, chromium_path, folder) as browser:
        browser.open_and_run_all(url)
        yield browser


def edited(browser: Browser, state: str, entry: str) -> None:
    cell = browser.cell("scope = wb.Microscope")
    condition = "([cell, s, e]) => cell.querySelector(`.wb-entries button[data-token='${e}']`)?.className == s"
    browser.until(condition, f"entry {entry} is {state}", [cell.element_handle(), state, entry])


def drawn(browser: Browser) -> None:
    cell = browser.cell("scope = wb.Microscope").element_handle()
    browser.until("cell => cell.querySelectorAll('.js-plotly-plot .bars path').length >= 16", "both distributions", cell)


def test_pressing_entries_drops_and_forces_them_and_the_chart_follows(notebook):
    cell = notebook.cell("scope = wb.Microscope")
    drawn(notebook)
    kept = cell.locator(".wb-entries button.kept").first
    number = kept.get_attribute("data-token")
    kept.click()
    edited(notebook, "dropped", number)
    out = cell.locator(".wb-entries button.out").first
    other = out.get_attribute("data-token")
    out.focus()
    notebook.page.keyboard.press("Enter")
    edited(notebook, "forced", other)
    status = cell.locator("[role=status]").first.inner_text()
    assert "KL" in status and "Forked and read in" in status
    drawn(notebook)
    cell.locator(".jp-OutputArea").first.evaluate("e => e.scrollIntoView()")
    notebook.screenshot("microscope_light")
    notebook.press(cell, "Undo all")
    edited(notebook, "kept", number)


def test_the_curve_is_drawn(notebook):
    cell = notebook.cell("curve = wb.selection_curve").element_handle()
    notebook.until("cell => cell.querySelectorAll('.js-plotly-plot .scatterlayer .trace').length == 6", "six lines", cell)
    notebook.cell("curve = wb.selection_curve").locator(".jp-OutputArea").first.evaluate("e => e.scrollIntoView()")
    notebook.screenshot("curve_light")


def test_in_the_dark_theme_everything_is_drawn_too(driver, chromium_path, notebook_file, tmp_path):
    with (
        serve(notebook_file, tmp_path, "JupyterLab Dark") as url,
        browse(driver, chromium_path, tmp_path) as browser,
    ):
        browser.open_and_run_all(url)
        browser.until("document.body.dataset.jpThemeLight == 'false'", "the dark theme is on")
        cell = browser.cell("scope = wb.Microscope")
        drawn(browser)
        number = cell.locator(".wb-entries button.kept").first.get_attribute("data-token")
        cell.locator(".wb-entries button.kept").first.click()
        edited(browser, "dropped", number)
        drawn(browser)
        cell.locator(".jp-OutputArea").first.evaluate("e => e.scrollIntoView()")
        browser.screenshot("microscope_dark")
        browser.cell("curve = wb.selection_curve").locator(".jp-OutputArea").first.evaluate("e => e.scrollIntoView()")
        browser.screenshot("curve_dark")
        assert browser.problems == []
