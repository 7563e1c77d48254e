"""The demo in a real JupyterLab: a clicker's keys, reset, and a live run in place of the recording."""

from __future__ import annotations

from tests.browser.lab import ROOT

NOTEBOOK = ROOT / "notebooks" / "demos" / "demo.ipynb"
ON_SLIDE = "([slide, number]) => slide.dataset.number === String(number)"
IN_STATE = "([slide, state]) => slide.dataset.state === state"


def test_keys_turn_slides_only_after_a_click_and_reset_starts_again(notebook):
    notebook.check_that_all_ran()
    cell = notebook.cell('wb.Demo("3 minutes")')
    cell.scroll_into_view_if_needed()
    slide = cell.locator(".wb-slide")
    cell.locator(".wb-picture img").first.wait_for()
    notebook.screenshot("demo_light")
    handle, press = slide.element_handle(), notebook.page.keyboard.press
    press("PageDown")  # the demo has no keys yet
    assert "use a clicker" in slide.inner_text()
    slide.locator(".wb-slide-title").click()
    assert "Keys are on" in slide.inner_text()
    press("PageDown")
    notebook.until(ON_SLIDE, "PageDown shows slide 2", [handle, 2])
    assert cell.locator(".wb-picture").count() == 0  # another picture
    press("ArrowRight")
    notebook.until(ON_SLIDE, "the right arrow shows slide 3", [handle, 3])
    cell.locator(".jp-RenderedPlotly .main-svg").first.wait_for()
    assert slide.get_by_role("button", name="Go live", exact=True).is_disabled()  # a formula
    press("ArrowLeft")
    notebook.until(ON_SLIDE, "the left arrow goes back", [handle, 2])
    press("PageUp")
    notebook.until(ON_SLIDE, "PageUp goes back", [handle, 1])
    press("PageDown")
    notebook.until(ON_SLIDE, "slide 2 again", [handle, 2])
    press("Home")
    notebook.until(ON_SLIDE, "Home starts again", [handle, 1])
    assert notebook.problems == []


def test_go_live_swaps_the_recording_for_a_run_and_reset_brings_it_back(notebook):
    cell = notebook.cell('wb.Demo("10 minutes")')
    cell.scroll_into_view_if_needed()
    slide = cell.locator(".wb-slide")
    handle = slide.element_handle()
    notebook.until(IN_STATE, "a demo begins recorded", [handle, "recorded"])
    notebook.press(cell, "Go live")
    notebook.until(IN_STATE, "the run takes the recording's place", [handle, "live"])
    said = "([cell, text]) => cell.textContent.includes(text)"
    notebook.until(said, "the pictures are of the run", [cell.element_handle(), "The code of river is 52"])
    notebook.screenshot("demo_live_light")
    notebook.until(said, "the run is over", [cell.element_handle(), "live: measured"])
    notebook.press(cell, "Reset")
    notebook.until(IN_STATE, "reset shows the recording again", [handle, "recorded"])
    notebook.until(said, "the recording's text", [cell.element_handle(), "The code of apple is 37"])
    assert notebook.problems == []


def test_large_type(notebook):
    slide = notebook.cell('wb.Demo("3 minutes")').locator(".wb-slide")
    sizes = {
        name: slide.locator(f".wb-slide-{name}").evaluate("(e) => parseFloat(getComputedStyle(e).fontSize)")
        for name in ("title", "said")
    }
    assert sizes["title"] >= 30 and sizes["said"] >= 20
