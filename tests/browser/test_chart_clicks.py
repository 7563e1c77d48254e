"""Clicks on the KV chart and on the timeline choose a token in all views, in JupyterLab and in Notebook 7; keys still do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browser.lab import Browser, browse, serve, write_notebook
from tests.browser.test_notebook7 import KNOWN
from workbench.trace import Trace

TRACE = Trace.load("growth")
CELLS = (
    "import ipywidgets as ipw\nimport workbench as wb\n\ntrace = wb.Trace.load('growth')",
    "explorer = wb.AttentionExplorer(trace)\nexplorer",
    "growth = wb.KVCacheGrowth(trace)\ngrowth",
    "wb.OverlapTimeline(trace)",
    "heard = ipw.Label()\n"
    "explorer.session.clicks.on_msg(lambda _, message, __: setattr(heard, 'value', heard.value + f'{message}; '))\nheard",
)
# Where on the page a place of a chart's axes is; y is a share of its plot area, from the top.
PLACE = """([cell, axis, x, y]) => {
    const chart = cell.querySelector('.js-plotly-plot'), area = chart.getBoundingClientRect(), layout = chart._fullLayout;
    const across = layout['xaxis' + axis], down = layout['yaxis' + axis];
    return [area.left + across._offset + across.d2p(x), area.top + down._offset + y * down._length]; }"""
CHOSEN = """([explorer, token, rows]) => {
    const mark = explorer.querySelector('.wb-mark');
    return explorer.querySelector('bdi.q[data-token]')?.dataset.token === String(token)
        && Math.abs(parseFloat(mark.style.top) - (100 * (token + 0.5)) / rows) < 0.5 }"""
SAYS = "([cell, text]) => [...cell.querySelectorAll('.js-plotly-plot text')].some((e) => e.textContent === text)"


@pytest.fixture(scope="module", params=["jupyterlab", "notebook"])
def notebook(request, driver, chromium_path, tmp_path_factory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("clicks")
    path = write_notebook(tmp_path_factory.mktemp("cells"), *CELLS)
    with serve(path, folder, program=request.param) as url, browse(driver, chromium_path, folder) as browser:
        browser.harmless |= KNOWN if request.param == "notebook" else {}
        browser.program = request.param
        browser.open_and_run_all(url)
        for cell in CELLS[2:4]:
            browser.until(
                "cell => cell.querySelector('.wb-clicks')?.textContent",
                "a hint is there",
                chart(browser, cell).element_handle(),
            )
        yield browser


def chart(browser: Browser, cell: str):
    return browser.cell(cell.splitlines()[0])


def click(browser: Browser, cell, axis: str, x: float, y: float) -> None:
    cell.locator(".js-plotly-plot .nsewdrag").last.scroll_into_view_if_needed()
    at = browser.page.evaluate(PLACE, [cell.element_handle(), axis, x, y])
    browser.page.mouse.click(*at)


def all_show(browser: Browser, token: int) -> None:
    explorer, growth, timeline = (chart(browser, cell) for cell in CELLS[1:4])
    step = TRACE.step_of_token(token)
    end = TRACE.step_end(step)
    within = "" if token == end - 1 else f"; token {token} chosen"
    browser.until(CHOSEN, f"text and map show token {token}", [explorer.element_handle(), token, TRACE.length])
    browser.until(SAYS, "the KV chart shows it", [growth.element_handle(), f"step {step}: {end} tokens{within}"])
    browser.until(SAYS, "the timeline shows it", [timeline.element_handle(), f"step {step}: token {token}"])


def heard(browser: Browser) -> list[str]:
    return browser.cell("heard = ipw").locator(".widget-label").inner_text().split(";")[:-1]


def test_clicks_on_both_charts_choose_a_token_in_all_views_each_with_one_message(notebook):
    notebook.check_that_all_ran()
    growth, timeline = (chart(notebook, cell) for cell in CELLS[2:4])
    click(notebook, growth, "", 120, 0.9)  # on the areas
    all_show(notebook, 119)
    click(notebook, growth, "", 42, 0.1)  # within the prompt, where no bytes were held yet
    all_show(notebook, 41)
    notebook.screenshot(f"clicks_growth_{notebook.program}_light")
    click(notebook, timeline, "", 30, 0.35)  # the second of four lanes, compute: a span of the step of the prompt
    all_show(notebook, 99)
    click(notebook, timeline, "2", 7, 0.1)  # above the bar of a step
    all_show(notebook, 106)
    notebook.screenshot(f"clicks_timeline_{notebook.program}_light")
    click(notebook, timeline, "", 30, 0.99)  # the lane of stalls, where there is none
    click(notebook, growth, "", 140, 0.5)
    all_show(notebook, 139)
    messages = heard(notebook)
    assert len(messages) == 5 and max(map(len, messages)) < 90, messages


def test_keys_on_the_slider_choose_a_step_in_all_views(notebook):
    growth = chart(notebook, CELLS[2])
    slider = growth.locator(".widget-slider").filter(has_text="Step").first
    before = int(slider.locator(".widget-readout").inner_text())
    slider.locator(".noUi-handle").focus()
    notebook.page.keyboard.press("ArrowLeft")
    all_show(notebook, TRACE.step_end(before - 1) - 1)


def test_a_chart_drawn_for_another_reason_still_hears_clicks(notebook):
    growth = chart(notebook, CELLS[2])
    growth.get_by_role("button", name="logarithmic", exact=True).click()
    logarithmic = "cell => cell.querySelector('.js-plotly-plot')?._fullLayout?.yaxis?.type === 'log'"
    notebook.until(logarithmic, "the axis is logarithmic", growth.element_handle())
    click(notebook, growth, "", 110, 0.5)
    all_show(notebook, 109)


def test_arrow_keys_move_a_slider_of_notebook_7_where_it_stands_alone(driver, chromium_path, tmp_path):
    """Without a widget of ours that keeps them, the keys would go to the notebook's cells."""
    path = write_notebook(tmp_path, "import workbench as wb", "wb.KVCacheGrowth(wb.Trace.load('growth'))")
    (folder := tmp_path / "notebook7").mkdir()
    with serve(path, folder, program="notebook") as url, browse(driver, chromium_path, folder) as browser:
        browser.harmless |= KNOWN
        browser.open_and_run_all(url)
        cell = browser.cell("KVCacheGrowth")
        browser.until("e => e.querySelector('.wb-clicks')?.textContent", "the hint is there", cell.element_handle())
        slider = cell.locator(".widget-slider").filter(has_text="Step").first
        step = int(slider.locator(".widget-readout").inner_text())
        slider.locator(".noUi-handle").focus()
        for key, now in (("ArrowLeft", step - 1), ("ArrowDown", step - 2), ("ArrowUp", step - 1)):
            browser.page.keyboard.press(key)
            title = f"step {now}: {TRACE.step_end(now)} tokens"
            browser.until(SAYS, f"{key} shows step {now}", [cell.element_handle(), title])
        assert browser.problems == []
