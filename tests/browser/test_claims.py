"""The claims notebook in a real JupyterLab: the Engram explorer by keyboard, the meters, the table, in both themes."""

from __future__ import annotations

from tests.browser.lab import ROOT, browse, serve

NOTEBOOK = ROOT / "notebooks" / "10_claims.ipynb"


def test_every_cell_runs_and_the_first_picture_is_there(notebook):
    notebook.check_that_all_ran()
    first = notebook.cell("meters = wb.MemoryMeters()")
    first.locator(".jp-RenderedPlotly .main-svg").first.wait_for()
    first.scroll_into_view_if_needed()
    notebook.screenshot("claims_meters_light")


def test_unticking_moves_the_tables_onto_the_device(notebook):
    cell = notebook.cell("meters = wb.MemoryMeters()")
    chart = cell.locator(".jp-RenderedPlotly")
    assert "Engram tables in host memory" in chart.inner_text()
    assert "203 GB" in chart.inner_text() and "510 GB" not in chart.inner_text()
    cell.get_by_label("Engram tables in host memory").uncheck()
    notebook.until(
        "cell => cell.querySelector('.jp-RenderedPlotly').textContent.includes('510 GB')",
        "the device's bar holds the tables",
        cell.element_handle(),
    )
    cell.get_by_label("Engram tables in host memory").check()


def test_the_explorer_answers_to_arrow_keys_clicks_and_the_colour_menu(notebook):
    cell = notebook.cell("wb.EngramExplorer(run)")
    handle, text = cell.element_handle(), cell.locator(".wb-pointer.wb-text")
    assert "n-grams that end here" in cell.inner_text()

    def shows(token: int) -> None:
        everywhere = "cell.querySelector('bdi.q[data-token]').dataset.token == t && cell.innerText.includes(`Token ${t} `)"
        chart = "cell.querySelector('.jp-RenderedPlotly').textContent.includes(`After token ${t} `)"
        notebook.until(f"([cell, t]) => {everywhere} && {chart}", f"token {token} is shown everywhere", [handle, token])

    text.locator("bdi[data-token='200']").click()
    shows(200)
    text.focus()
    notebook.page.keyboard.press("ArrowLeft")
    shows(199)
    assert cell.get_by_label("Token", exact=True).input_value() == "199"
    before = text.get_attribute("data-sequence")
    cell.get_by_label("Colour", exact=True).select_option(label="what switching Engram off changes (KL)")
    notebook.until(
        "([cell, before]) => cell.querySelector('.wb-text').dataset.sequence != before && cell.innerText.includes('in nats')",
        "the text is coloured by the effect",
        [handle, before],
    )
    text.evaluate("e => e.scrollIntoView()")
    notebook.screenshot("claims_explorer_light")


def test_the_table_has_every_claim_and_folds_out_its_numbers(notebook):
    cell = notebook.cell("wb.ClaimsTable(claims)")
    table = cell.locator("table")
    assert table.locator("tbody tr").count() == 13 and "wrong for V4" in table.inner_text()
    table.get_by_text("7 numbers").first.click()
    table.get_by_text("KV bytes of V3.2 / V4-Pro").wait_for()
    table.evaluate("e => e.scrollIntoView()")
    notebook.screenshot("claims_table_light")


def test_in_the_dark_theme_everything_is_drawn_too(driver, chromium_path, tmp_path):
    with serve(NOTEBOOK, tmp_path, "JupyterLab Dark") as url, browse(driver, chromium_path, tmp_path) as browser:
        browser.open_and_run_all(url)
        browser.until("document.body.dataset.jpThemeLight == 'false'", "the dark theme is on")
        for name, source in (("meters", "meters = wb.MemoryMeters()"), ("explorer", "wb.EngramExplorer(run)")):
            cell = browser.cell(source)
            cell.locator(".jp-RenderedPlotly .main-svg").first.wait_for()
            cell.locator(".jp-OutputArea").first.evaluate("e => e.scrollIntoView()")
            browser.screenshot(f"claims_{name}_dark")
        browser.cell("wb.ClaimsTable(claims)").locator("table").evaluate("e => e.scrollIntoView()")
        browser.screenshot("claims_table_dark")
        assert browser.problems == []
