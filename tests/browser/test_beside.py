"""Dense beside sparse in a real JupyterLab: maps are drawn, and a new reading, another layer and the other tab follow."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser.lab import write_notebook

CELLS = (
    "import workbench as wb",
    "model, ids = wb.load('tiny-v4'), wb.Trace.load('needle').token_ids.tolist()",
    "beside = wb.DenseBeside(model, ids)\nbeside",
    "few = wb.record_text(model, ids, topk=2)\ndiff = wb.DifferenceOfRuns(beside.found.trace, few)\ndiff",
)
DRAWN = "([cell, n]) => cell.querySelectorAll('.js-plotly-plot image').length == n"


@pytest.fixture(scope="module")
def notebook_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_notebook(tmp_path_factory.mktemp("notebook"), *CELLS)


def test_maps_are_drawn_and_a_new_reading_replaces_them(notebook):
    notebook.check_that_all_ran()
    cell = notebook.cell("beside = wb.DenseBeside")
    notebook.until(DRAWN, "both maps", [cell.element_handle(), 2])
    first = cell.locator(".js-plotly-plot image").nth(0).get_attribute("href")
    slider = cell.get_by_role("slider").first
    slider.focus()
    slider.press("Home")
    notebook.press(cell, "Read again")
    notebook.until("cell => cell.innerText.includes('top-1,')", "the reading with one entry", cell.element_handle())
    changed = "([cell, old]) => cell.querySelector('.js-plotly-plot image')?.getAttribute('href') != old"
    notebook.until(changed, "another sparse map", [cell.element_handle(), first])
    cell.get_by_role("tab", name="Reusing choices").click()
    assert cell.get_by_role("columnheader", name="missed when reused").is_visible()


def test_two_runs_are_one_picture_and_one_table(notebook):
    cell = notebook.cell("diff = wb.DifferenceOfRuns")
    notebook.until(DRAWN, "the difference", [cell.element_handle(), 1])
    assert cell.get_by_role("columnheader", name="attention moved").is_visible()
    before = cell.locator(".js-plotly-plot image").get_attribute("href")
    cell.get_by_role("combobox").first.select_option(label="3: CSA, 4 tokens per entry")
    changed = "([cell, old]) => cell.querySelector('.js-plotly-plot image')?.getAttribute('href') != old"
    notebook.until(changed, "another layer's map", [cell.element_handle(), before])
