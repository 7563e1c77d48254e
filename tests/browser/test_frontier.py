"""The notebook on the frontier in a real JupyterLab: the picture at once, and a point of one's own that lands in it."""

from __future__ import annotations

from tests.browser.lab import ROOT

NOTEBOOK = ROOT / "notebooks" / "11_train_your_own.ipynb"
SAYS = "([cell, text]) => cell.textContent.includes(text)"


def test_every_cell_runs_and_the_frontier_is_there_at_once(notebook):
    notebook.check_that_all_ran()
    assert notebook.page.locator(".wb-check").count() == 2
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
