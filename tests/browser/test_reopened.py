"""A notebook that was run, saved and opened again in a real JupyterLab shows pictures without running anything."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat

from tests.browser.lab import Browser, browse, serve
from workbench.cli import LAB_CONFIG

CELLS = ("import workbench as wb\n\ntrace = wb.Trace.load('needle')", "wb.AttentionExplorer(trace)", "wb.KVCacheGrowth(trace)")
READY = "window.jupyterapp?.shell?.currentWidget?.sessionContext"
SAVE = "async () => { await window.jupyterapp.shell.currentWidget.context.save(); }"
SHUT_DOWN = "async () => { await window.jupyterapp.serviceManager.sessions.shutdownAll(); }"
CUT_OFF = ("ERR_ABORTED", "Canceled future")  # requests to page and kernel under way when this test leaves and shuts down
LOADED = "[...document.querySelectorAll('img.wb-map, img.wb-chart')].length >= 2 && " \
    "[...document.querySelectorAll('img.wb-map, img.wb-chart')].every((e) => e.complete && e.naturalWidth > 0)"  # fmt: skip


def small_notebook(folder: Path) -> Path:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    notebook.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    path = folder / "small.ipynb"
    nbformat.write(notebook, path)
    return path


def reopen(browser: Browser, url: str) -> None:
    browser.page.evaluate(SHUT_DOWN)
    browser.page.goto("about:blank")
    browser.page.goto(url)
    browser.page.wait_for_function(READY)


def test_a_saved_notebook_shows_its_widgets_again_and_a_foreign_one_their_pictures(
    driver, chromium_path, tmp_path, monkeypatch
):
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", str(LAB_CONFIG))  # as `workbench lab` does
    path = small_notebook(tmp_path)
    folder = tmp_path / "lab"
    folder.mkdir()
    with serve(path, folder) as url, browse(driver, chromium_path, folder) as browser:
        browser.open_and_run_all(url)
        browser.page.locator(".wb-picture img").first.wait_for()
        browser.page.evaluate(SAVE)
        saved = folder / "root" / "small.ipynb"
        size = saved.stat().st_size
        assert size < 3_000_000
        reopen(browser, url)
        browser.page.locator(".wb-picture img").first.wait_for()
        browser.page.locator(".jp-RenderedPlotly .main-svg").first.wait_for()
        assert "model not found" not in browser.page.locator("body").inner_text()
        browser.screenshot("reopened_light")

        # The same notebook without the state of its widgets, as somebody else's: JupyterLab does not trust it.
        notebook = json.loads(saved.read_text(encoding="utf-8"))
        notebook["metadata"].pop("widgets")
        notebook["cells"][0]["source"] = "# changed by another hand"
        for cell in notebook["cells"]:
            cell["metadata"].pop("trusted", None)
        (folder / "root" / "foreign.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
        reopen(browser, url.replace("small.ipynb", "foreign.ipynb"))
        browser.until(LOADED, "still pictures stand in for the widgets")
        assert "model not found" not in browser.page.locator("body").inner_text()
        browser.screenshot("foreign_light")
        assert [problem for problem in browser.problems if not any(cut in problem for cut in CUT_OFF)] == []
