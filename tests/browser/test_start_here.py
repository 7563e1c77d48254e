"""The first notebook in a real JupyterLab: everything runs, the three pictures follow a run, and nothing goes wrong unseen."""

from __future__ import annotations

import re
from typing import Any

from tests.browser.lab import ROOT, Browser, browse, serve

NOTEBOOK = ROOT / "notebooks" / "00_start_here.ipynb"
PROMPT = "A silver piano stands in the garden"
ENOUGH_TOKENS = "4000"  # a run that is still going when Pause is pressed


def test_on_a_slow_processor_in_the_dark_theme_every_widget_starts_and_answers(driver, chromium_path, tmp_path):
    """Widgets that start late may be drawn once and then ignore the kernel (anywidget gives up after two seconds)."""
    with serve(NOTEBOOK, tmp_path, "JupyterLab Dark") as url, browse(driver, chromium_path, tmp_path, slowdown=4) as browser:
        browser.open_and_run_all(url)
        browser.until("document.body.dataset.jpThemeLight == 'false'", "the dark theme is on")
        cells = [browser.cell(source) for source in ('wb.Trace.load("needle")', "wb.HideANeedle(", "wb.RunControls(")]
        for cell in cells:
            drawn = cell.locator(".wb-picture").get_attribute("data-sequence")
            button = cell.locator("button[data-token='layer:3']")
            button.click()
            browser.until(
                "([cell, drawn]) => cell.querySelector('.wb-picture').dataset.sequence != drawn",
                "a picture answers",
                [cell.element_handle(), drawn],
            )
            cell.locator("button[data-token='layer:3'][aria-pressed=true]").wait_for()
        cells[0].locator("button[data-token='layer:1']").click()
        cells[0].locator("button[data-token='layer:1'][aria-pressed=true]").wait_for()
        cells[0].get_by_text("layer 1 (CSA").first.evaluate("e => e.scrollIntoView()")
        browser.screenshot("start_here_dark")
        assert browser.problems == []


def test_every_cell_runs_without_a_warning_and_the_first_picture_is_there(notebook):
    notebook.check_that_all_ran()
    first = notebook.cell('wb.Trace.load("needle")')
    assert "recorded" in first.inner_text() and "toy, trained" in first.inner_text()
    notebook.until("document.querySelector('.wb-picture img')?.naturalWidth > 100", "the recorded attention map is drawn")
    notebook.until("document.querySelector('.jp-RenderedPlotly .main-svg')", "the recorded query's chart is drawn")
    first.locator(".jp-OutputArea").first.scroll_into_view_if_needed()
    first.get_by_text("layer 1 (CSA").first.evaluate("e => e.scrollIntoView()")
    notebook.screenshot("start_here_light")


class Together:
    """The cell with RunControls and the three pictures of one session."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.cell = browser.cell("wb.RunControls(")
        self.text = self.cell.locator(".wb-pointer.wb-text").last
        self.map = self.cell.locator(".wb-picture")

    def tokens(self) -> int:
        """How many the status line counts."""
        return int(re.search(r"Run \w+, ([\d,]+) tokens", self.cell.inner_text())[1].replace(",", ""))

    def pictures(self) -> dict[str, Any]:
        """Something of each picture that changes with every redrawing."""
        charts = self.cell.locator(".jp-RenderedPlotly")
        return {
            "attention": self.map.get_attribute("data-sequence"),
            "cache": charts.filter(has_text="KV cache of one").inner_text(),
            "timeline": charts.filter(has_text="Step ").filter(has_text="ms since").inner_text(),
        }

    def wait_until(self, condition: str, what: str, argument: Any = None) -> None:
        """Wait until a JavaScript condition on ``cell`` holds, with ``lines``, the cell's text, at hand."""
        handle = self.cell.element_handle()
        script = f"([cell, argument]) => {{ const lines = cell.innerText; return {condition}; }}"
        self.browser.until(script, what, [handle, argument])

    def wait_for_state(self, state: str) -> None:
        self.wait_until("lines.includes(argument)", f"the run is {state}", f"Run {state}, ")

    def step_shown(self, step: int) -> None:
        """All step sliders, the cache's mark and the timeline's title show ``step``."""
        self.wait_until("lines.includes(`step ${argument}: `)", f"the cache chart marks step {step}", step)
        self.wait_until("lines.includes(`Step ${argument}: `)", f"the timeline shows step {step}", step)
        sliders = "[...cell.querySelectorAll('.widget-slider')].filter((e) => e.innerText.startsWith('Step'))"
        self.wait_until(
            f"{sliders}.length == 3 && {sliders}.every((e) => e.querySelector('.widget-readout').innerText == argument)",
            f"all step sliders stand at {step}",
            str(step),
        )


def test_a_prompt_of_ones_own_drives_all_three_pictures(notebook):
    here = Together(notebook)
    here.cell.locator("textarea").fill(PROMPT)
    tokens = here.cell.get_by_label("New tokens")
    tokens.fill(ENOUGH_TOKENS)
    tokens.press("Enter")
    before = here.pictures()
    notebook.press(here.cell, "Start")
    here.wait_for_state("running")
    here.wait_until(
        "[...cell.querySelectorAll('.wb-text')].at(-1).innerText.includes(argument)", "the text is the prompt", PROMPT
    )
    notebook.press(here.cell, "Pause")
    here.wait_for_state("paused")
    after = here.pictures()
    assert all(after[name] != before[name] for name in before), "a picture did not follow the run"

    paused_at = here.tokens()
    notebook.press(here.cell, "Step")
    here.wait_until("lines.includes(argument)", "one step more is done", f"Run paused, {paused_at + 1:,} tokens.")
    last = int(re.search(r"step (\d+): ", here.pictures()["cache"])[1])
    here.text.locator(f"bdi[data-token='{paused_at - 5}']").click()  # one of the latest; a step makes one token
    here.step_shown(last - 5)
    slider = here.cell.locator(".widget-slider").filter(has_text="Step").first
    slider.locator(".noUi-handle").focus()
    notebook.page.keyboard.press("ArrowRight")
    here.step_shown(last - 4)
    here.wait_until("cell.querySelector('bdi.q[data-token]').dataset.token == argument", "the text follows", paused_at - 4)
    assert here.cell.get_by_label("Query token").input_value() == str(paused_at - 4)

    drawn = here.map.get_attribute("data-sequence")
    here.cell.locator("button[data-token='layer:3']").click()
    here.wait_until("cell.querySelector('.wb-picture').dataset.sequence != argument", "another layer is drawn", drawn)
    notebook.press(here.cell, "logarithmic")
    here.wait_until("/parts|10k|100k/.test(lines) && !lines.includes('leave this axis')", "the bytes axis is logarithmic")

    notebook.press(here.cell, "Resume")
    here.wait_until("!lines.includes(argument)", "the run goes on", f"{paused_at + 1:,} tokens.")
    notebook.press(here.cell, "Stop")
    here.wait_for_state("stopped")
    assert here.cell.get_by_role("button", name="Start", exact=True).is_enabled()


def test_a_needle_hidden_in_the_page_is_found_and_an_untrained_model_stands_beside(notebook):
    cell = notebook.cell("wb.HideANeedle(")
    code = cell.get_by_label("Code")
    code.fill("61")
    code.press("Tab")
    cell.get_by_label("also ask an untrained model").check()
    drawn = cell.locator(".wb-picture").get_attribute("data-sequence")
    notebook.press(cell, "Hide and ask")
    found = cell.locator("table").filter(has_text="untrained")
    found.wait_for()
    rows = found.inner_text()
    assert "“61”: right" in rows and "kept" in rows and "wrong" in rows
    notebook.until(
        "([cell, drawn]) => cell.querySelector('.wb-picture').dataset.sequence != drawn",
        "the attention map follows",
        [cell.element_handle(), drawn],
    )
    cell.scroll_into_view_if_needed()


def test_the_comparison_shows_both_ways_and_names_its_table(notebook):
    here = Together(notebook)
    notebook.press(here.cell, "Compare serial / prefetched")
    here.wait_until("/Looking up ahead (saves|costs)/.test(lines)", "serial and prefetched stand above each other")
    assert "made for timing" in here.cell.inner_text()
