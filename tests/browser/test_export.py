"""An exported file in a real browser that has no network: pictures are there, nothing is asked for, nothing acts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import nbformat

import workbench as wb
from tests.browser.lab import ROOT, Browser, browse
from tests.synthetic import synthetic_trace
from workbench.export import MOST_BYTES, export

EVIL = "<p id='evil'>shown</p><script>window.acted = 1</script><img src='{}' onerror='window.acted = 2'>"
LARGEST = "[...document.querySelectorAll('svg[role=img]')].filter((e) => e.getBoundingClientRect().height > 100).length"


@contextmanager
def heard() -> Iterator[tuple[str, list[str]]]:
    """A server's address, and the paths it was asked for."""
    requests: list[str] = []

    class Listen(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Listen)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


def open_offline(browser: Browser, path: Path) -> list[str]:
    """The page of a file, without network; gives the list of what it asks for beside itself."""
    asked: list[str] = []
    browser.page.on("request", lambda request: asked.append(request.url))
    browser.page.context.set_offline(True)
    browser.page.goto(path.as_uri())
    return asked


def test_the_exported_demo_works_from_disk(driver, chromium_path, tmp_path):
    target = export(ROOT / "notebooks" / "demos" / "demo.ipynb", tmp_path / "demo.html")
    assert target.stat().st_size <= MOST_BYTES
    with browse(driver, chromium_path, tmp_path) as browser:
        asked = open_offline(browser, target)
        page = browser.page
        assert page.evaluate(LARGEST) >= 15  # charts of three demos
        maps = page.locator("img.wb-map")
        assert maps.count() >= 3
        assert maps.first.evaluate("(e) => e.complete && e.naturalWidth > 50")
        before = maps.first.bounding_box()
        page.locator(".wb-zoom input").first.check()
        after = maps.first.bounding_box()
        assert after["width"] > 2 * before["width"]
        page.locator("summary").first.click()
        assert "Point at the tall bar" in page.locator("details[open]").first.inner_text()
        browser.screenshot("exported_light")
        page.emulate_media(color_scheme="dark")
        browser.screenshot("exported_dark")
        assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
        assert [p for p in browser.problems if not p.startswith("foreign: file://")] == []


def test_what_stands_in_outputs_cannot_act(driver, chromium_path, tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# T"), nbformat.v4.new_code_cell("x")])
    with heard() as (address, requests), browse(driver, chromium_path, tmp_path) as browser:
        for name, policy in (("evil", True), ("without", False)):
            html = EVIL.format(f"{address}/{name}.png")
            notebook.cells[1].outputs = [nbformat.v4.new_output("display_data", data={"text/html": html})]
            nbformat.write(notebook, tmp_path / "evil.ipynb")
            target = export(tmp_path / "evil.ipynb", tmp_path / f"{name}.html")
            if not policy:  # so that the test would notice
                text = target.read_text(encoding="utf-8")
                target.write_text(text.replace("Content-Security-Policy", "nothing"), encoding="utf-8")
            browser.page.goto(target.as_uri())
            assert browser.page.locator("#evil").inner_text() == "shown"
            assert (browser.page.evaluate("window.acted") is None) is policy
        assert requests == ["/without.png"]


def test_the_last_label_of_an_axis_is_not_cut_off(driver, chromium_path, tmp_path):
    explorer = wb.AttentionExplorer(synthetic_trace(2048, kinds=("window", "csa"), heads=1, prefill_chunk=512))
    explorer.look(1, token=2000)
    target = wb.save_picture(explorer, tmp_path / "view.html")
    with browse(driver, chromium_path, tmp_path) as browser:
        browser.page.goto(target.as_uri())
        cut = browser.page.evaluate(
            """() => [...document.querySelectorAll(".wb-larger")].flatMap((box) => [...box.querySelectorAll("span")].filter(
                (s) => s.getBoundingClientRect().right > box.getBoundingClientRect().right + 1).map((s) => s.textContent))"""
        )
        assert cut == []
