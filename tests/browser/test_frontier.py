"""The notebook on the frontier in a real JupyterLab: the picture at once, and a point of one's own that lands in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.browser.lab import ROOT, Browser, browse, serve

if TYPE_CHECKING:
    from playwright.sync_api import Playwright

NOTEBOOK = ROOT / "notebooks" / "11_train_your_own.ipynb"
FAILED_OUTPUTS = "[data-mime-type='application/vnd.jupyter.stderr'], [data-mime-type='application/vnd.jupyter.error']"
SAYS = "([cell, text]) => cell.textContent.includes(text)"


@pytest.fixture(scope="module")
def driver(chromium_path: str) -> Iterator[Playwright]:
    from playwright.sync_api import sync_playwright  # chromium_path has skipped the test if it is missing

    with sync_playwright() as started:
        yield started


@pytest.fixture(scope="module")
def notebook(driver: Playwright, chromium_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("lab")
    with serve(NOTEBOOK, folder) as url, browse(driver, chromium_path, folder) as browser:
        browser.open_and_run_all(url)
        yield browser


@pytest.fixture(autouse=True)
def _nothing_goes_wrong_unseen(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "notebook" in request.fixturenames:
        assert request.getfixturevalue("notebook").problems == []


def test_every_cell_runs_and_the_frontier_is_there_at_once(notebook):
    assert all(re.fullmatch(r"\[\d+\]:", prompt) for prompt in notebook.prompts())
    assert notebook.page.locator(FAILED_OUTPUTS).count() == 0 and notebook.page.locator(".wb-check").count() == 2
    cell = notebook.cell("points = wb.frontier_points()")
    cell.scroll_into_view_if_needed()
    cell.locator(".main-svg").first.wait_for()
    assert "front: nothing cheaper is as good" in cell.inner_text()
    notebook.screenshot("frontier_light")


def test_a_guess_is_shown_beside_what_came_out(notebook):
    cell = notebook.cell("wb.Prediction(question")
    cell.scroll_into_view_if_needed()
    notebook.press(cell, "Lock my guess and show")
    cell.locator(".jp-RenderedPlotly .main-svg").nth(1).wait_for()
    assert "Your guess 50 %" in cell.inner_text()


def test_a_point_of_ones_own_lands_in_the_picture_and_another_is_stopped(notebook):
    cell = notebook.cell("own = wb.TrainYourOwn(points)")
    cell.scroll_into_view_if_needed()
    cell.get_by_label("HCA in").select_option("both layers")
    cell.get_by_label("Steps").select_option(index=0)
    assert "yours" not in cell.inner_text()
    notebook.press(cell, "Train this point")
    notebook.until(SAYS, "the point was scored", [cell.element_handle(), "recalled"])
    notebook.until(SAYS, "the point is in the picture", [cell.element_handle(), "yours"])
    notebook.screenshot("frontier_own_light")
    cell.get_by_label("Steps").select_option(index=3)
    notebook.press(cell, "Train this point")
    notebook.until(SAYS, "training is under way", [cell.element_handle(), "Training: step"])
    notebook.press(cell, "Stop training")
    notebook.until(SAYS, "training has stopped", [cell.element_handle(), "was stopped after"])
