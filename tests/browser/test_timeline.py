"""OverlapTimeline in a real JupyterLab: files go in and out, a large trace does not hold up the page, the overlap breaks."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.browser.lab import Browser, write_notebook
from tests.profiler_traces import cuda_trace, large_trace
from workbench import chrome_trace
from workbench.trace import Trace

CELL = 'import workbench as wb\nwidget = wb.OverlapTimeline(wb.Trace.load("needle"))\nwidget'
# Notes how long the page's own clock stood still at most; a page that is held up misses its turns.
WATCH = """() => { window.longest = 0; let last = performance.now();
    const tick = () => { const now = performance.now(); window.longest = Math.max(window.longest, now - last); last = now; };
    window.watch = setInterval(tick, 20); }"""
TAB_TO = "(name) => document.activeElement.textContent.trim() == name"


@pytest.fixture(scope="module")
def notebook_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_notebook(tmp_path_factory.mktemp("notebook"), CELL)


@pytest.fixture(scope="module")
def page(notebook: Browser) -> Browser:
    notebook.press(notebook.page.locator(".jp-CodeCell"), "Import or export a trace")
    notebook.until("document.querySelector('.wb-files button')", "the buttons are there")
    return notebook


def give(page: Browser, path: Path) -> None:
    page.page.locator(".wb-files input").set_input_files(path)


def cell_says(page: Browser, text: str) -> None:
    page.until("text => document.querySelector('.jp-CodeCell').innerText.includes(text)", f"the cell says {text!r}", text)


def test_an_imported_trace_is_drawn_by_streams(page, tmp_path):
    path = tmp_path / "cuda <b>.json"
    path.write_text(json.dumps(cuda_trace()), encoding="utf-8")
    give(page, path)
    cell_says(page, "Imported cuda <b>.json")
    cell_says(page, "stream 20: copies")
    page.until("document.querySelector('.jp-RenderedPlotly .barlayer path')", "bars are drawn")
    cell_says(page, "-20.0 to +5.0 us")
    page.press(page.page.locator(".jp-CodeCell"), "Zoom in")
    cell_says(page, "0.26")  # the middle half of 0.35 ms ends at 0.2625
    page.screenshot("timeline_profile_light")


@pytest.mark.parametrize("megabytes", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_a_large_trace_opens_while_the_page_goes_on(page, tmp_path, megabytes):
    path = tmp_path / f"large{megabytes}.json"
    path.write_bytes(large_trace(megabytes))
    page.page.evaluate(WATCH)
    began = time.monotonic()
    give(page, path)
    cell_says(page, f"Imported large{megabytes}.json")  # within the limit of every wait, two minutes
    took = time.monotonic() - began
    longest = page.page.evaluate("() => { clearInterval(window.watch); return window.longest; }") / 1000
    print(f"{megabytes} MB took {took:.1f} s, the page stood still for {longest:.2f} s at most")
    assert longest < max(2.0, took / 2), f"the page stood still for {longest:.2f} s of {took:.2f} s"
    cell_says(page, "50%")


def test_what_is_on_show_is_downloaded_and_reads_back(page, tmp_path):
    page.page.get_by_label("Show", exact=True).select_option("this run")
    page.until("!document.querySelectorAll('.wb-files button')[1].disabled", "a run can be exported")
    with page.page.expect_download() as download:
        page.press(page.page.locator(".jp-CodeCell"), "Export as Chrome trace")
    assert download.value.suggested_filename == "timeline.json"
    download.value.save_as(tmp_path / "down.json")
    got, expected = chrome_trace.load(tmp_path / "down.json"), Trace.load("needle").timeline
    assert [s.name for s in got.spans] == [s.name for s in expected.spans]
    assert [s.start_s for s in got.spans] == pytest.approx([s.start_s for s in expected.spans], abs=1e-9)


def test_a_file_that_is_no_trace_is_one_line(page, tmp_path):
    path = tmp_path / "notes.json"
    path.write_text("not a trace", encoding="utf-8")
    give(page, path)
    cell_says(page, "notes.json is no JSON")


def test_the_overlap_is_broken_with_the_keyboard_alone(page):
    page.page.get_by_role("button", name="Break the overlap (modelled)").focus()
    page.page.keyboard.press("Enter")
    cell_says(page, "100% of the fetching is hidden")
    page.page.get_by_role("button", name="It hides", exact=True).focus()
    for _ in range(4):  # past three other scenarios to the last
        page.page.keyboard.press("Tab")
    assert page.page.evaluate(TAB_TO, "NVMe")
    page.page.keyboard.press("Enter")
    cell_says(page, "55% of the fetching is hidden")
    cell_says(page, "rows from NVMe Gen4")
    handle = page.page.locator(".widget-slider").filter(has_text="Hit rate, %").locator(".noUi-handle")
    handle.focus()
    page.page.keyboard.press("ArrowRight")
    cell_says(page, "56% of the fetching is hidden")
    page.page.get_by_text("Break the overlap (modelled: a virtual").evaluate("e => e.scrollIntoView()")
    page.screenshot("timeline_what_if_light")
