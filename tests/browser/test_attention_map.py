"""Another part of the attention map in a real JupyterLab: wheel, drag, rubber band, keys, typed ranges, and the way back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.browser.lab import Browser, write_notebook

CELLS = ("import workbench as wb", "explorer = wb.AttentionExplorer(wb.Trace.load('needle'))\nexplorer")
WARM, MOVES, PAGE_BYTES = 100, 1000, 30_000_000


@pytest.fixture(scope="module")
def notebook_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_notebook(tmp_path_factory.mktemp("notebook"), *CELLS)


class Map:
    """The explorer's map, and what its line of Python says is shown."""

    def __init__(self, browser: Browser) -> None:
        self.browser, self.page = browser, browser.page
        self.cell = browser.cell("AttentionExplorer(")
        self.picture, self.box = self.cell.locator(".wb-picture"), self.cell.locator(".wb-box")
        browser.until("document.querySelector('.wb-picture')?.dataset.sequence > 0", "the map is drawn")
        browser.until("document.querySelector('.jp-RenderedPlotly .main-svg')", "the chart beside it is drawn")
        self.picture.evaluate("e => e.scrollIntoView({block: 'center'})")

    def shown(self) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Rows and columns; None for all."""
        numbers = re.search(r"rows=\((\d+), (\d+)\), columns=\((\d+), (\d+)\)", self.line())
        if not numbers:
            return None
        a, b, c, d = map(int, numbers.groups())
        return (a, b), (c, d)

    def line(self) -> str:
        return self.cell.get_by_label("This view").input_value()

    def after(self, act: Any, what: str) -> Any:
        """What is shown once the picture has been drawn anew after ``act()``."""
        drawn, line = self.picture.get_attribute("data-sequence"), self.line()
        act()
        self.browser.until(
            "([cell, drawn, line]) => Number(cell.querySelector('.wb-picture').dataset.sequence) > Number(drawn) &&"
            " [...cell.querySelectorAll('input')].every((e) => e.value != line)",
            what,
            [self.cell.element_handle(), drawn, line],
        )
        return self.shown()

    def pixel(self, y: float, x: float) -> tuple[float, float]:
        """The place on the page at these shares of the picture's sides."""
        area = self.box.bounding_box()
        assert area is not None
        return area["x"] + x * area["width"], area["y"] + y * area["height"]

    def drag(self, start: tuple[float, float], stop: tuple[float, float]) -> None:
        self.page.mouse.move(*self.pixel(*start))
        self.page.mouse.down()
        self.page.mouse.move(*self.pixel(*stop), steps=6)

    def labels(self, side: str) -> list[str]:
        return self.cell.locator(f".wb-{side}-labels span").all_inner_texts()


def test_the_map_is_moved_by_wheel_drag_keys_and_typed_ranges_and_back(notebook):
    here, page = Map(notebook), notebook.page
    assert here.shown() is None and here.cell.get_by_role("button", name="Back", exact=True).is_disabled()
    cells, scrolled = page.locator(".jp-Cell").count(), "document.querySelector('.jp-WindowedPanel-outer').scrollTop"

    # The wheel: with Ctrl it zooms around the pointer, without it the notebook scrolls.
    page.mouse.move(*here.pixel(0.25, 0.25))
    page.keyboard.down("Control")
    here.after(lambda: page.mouse.wheel(0, -300), "Ctrl and the wheel zoom")
    page.keyboard.up("Control")
    (top, bottom), (left, right) = here.shown()
    assert bottom - top < 200 and right - left < 250 and top <= 80 < bottom and left <= 100 < right
    line, before = here.line(), page.evaluate(scrolled)
    page.mouse.wheel(0, 40)
    notebook.until(f"before => {scrolled} != before", "the notebook scrolls", before)
    assert here.line() == line
    page.keyboard.press("Escape")
    assert here.after(lambda: notebook.press(here.cell, "Back"), "Back shows the whole map") is None

    # However fast it turns, one part is asked for at a time; all of one turning is one step back.
    drawn = int(here.picture.get_attribute("data-sequence"))
    here.box.evaluate(
        """box => {
            const area = box.getBoundingClientRect(), middle = { clientX: area.x + 100, clientY: area.y + 100 };
            const turn = { deltaY: -100, ctrlKey: true, bubbles: true, cancelable: true, ...middle };
            for (let i = 0; i < 30; i++) box.dispatchEvent(new WheelEvent("wheel", turn));
        }"""
    )
    one_row = r"cell => /rows=\((\d+), (\d+)\)/.exec([...cell.querySelectorAll('input')].at(-1).value)"
    notebook.until(f"{one_row}?.slice(1).reduce((a, b) => b - a) == 1", "one row fills the map", here.cell.element_handle())
    assert int(here.picture.get_attribute("data-sequence")) - drawn <= 8  # two requests, not thirty
    assert here.after(lambda: notebook.press(here.cell, "Back"), "Back shows the whole map") is None

    # Shift and a drag choose a part, with a band around it; no cell of the notebook is selected.
    page.keyboard.down("Shift")
    here.drag((0.2, 0.3), (0.5, 0.1))
    band = here.cell.locator(".wb-band").bounding_box()
    area = here.box.bounding_box()
    assert band["height"] == pytest.approx(0.3 * area["height"], abs=3)
    assert band["width"] == pytest.approx(0.2 * area["width"], abs=3)
    (rows, columns) = here.after(page.mouse.up, "the part is shown")
    page.keyboard.up("Shift")
    assert rows == pytest.approx((64, 160), abs=2) and columns == pytest.approx((40, 120), abs=2)
    assert here.cell.locator(".wb-band").is_hidden() and page.locator(".jp-mod-multiSelected").count() == 0
    assert "100" in here.labels("row") and "0" not in here.labels("row")

    # A drag moves the picture at once, and asks for the part that belongs there; it chooses no query.
    query = here.cell.get_by_label("Query token").input_value()
    here.drag((0.5, 0.5), (0.25, 0.75))
    image = here.box.locator("img")
    assert re.fullmatch(r"2\d(\.\d+)?% -2\d(\.\d+)?%", image.evaluate("e => e.style.translate"))
    moved = here.after(page.mouse.up, "the dragged part is shown")
    assert moved[0] == pytest.approx((rows[0] + 24, rows[1] + 24), abs=2)
    assert moved[1] == pytest.approx((columns[0] - 20, columns[1] - 20), abs=2)
    notebook.until("image => image.style.translate == ''", "the new picture stands where it belongs", image.element_handle())
    assert here.cell.get_by_label("Query token").input_value() == query

    # Keys move by half of what is shown, zoom, and go back; the notebook gets none of them.
    page.mouse.move(*here.pixel(0.5, 0.5))
    here.after(lambda: page.mouse.click(*here.pixel(0.5, 0.5)), "a press without a move chooses the query")
    assert here.cell.get_by_label("Query token").input_value() != query
    half = (moved[0][1] - moved[0][0]) // 2
    down = here.after(lambda: page.keyboard.press("PageDown"), "Page down moves down")
    assert down == ((moved[0][0] + half, moved[0][1] + half), moved[1])
    wide = (moved[1][1] - moved[1][0]) // 2
    right = here.after(lambda: page.keyboard.press("Alt+ArrowRight"), "Alt and an arrow move")
    assert right == (down[0], (moved[1][0] + wide, moved[1][1] + wide))
    closer = here.after(lambda: page.keyboard.press("+"), "plus zooms in")
    assert closer[0][1] - closer[0][0] == half
    before = page.evaluate(scrolled)
    here.after(lambda: page.mouse.wheel(0, 200), "the wheel zooms a map that has the keyboard")
    assert page.evaluate(scrolled) == before
    assert here.after(lambda: page.keyboard.press("Backspace"), "Backspace goes back") == closer
    assert here.after(lambda: page.keyboard.press("b"), "b goes back") == right
    assert here.after(lambda: page.keyboard.press("b"), "b goes back further") == down
    assert page.locator(".jp-Cell").count() == cells

    # Typed ranges; a bad one is answered and changes nothing.
    rows_field, columns_field = here.cell.get_by_label("Rows", exact=True), here.cell.get_by_label("Columns", exact=True)
    assert rows_field.input_value() == f"{down[0][0]}:{down[0][1]}"
    rows_field.fill("310:3x0")
    line = here.line()
    rows_field.press("Enter")
    alert = here.cell.get_by_role("alert")
    alert.wait_for()
    assert alert.inner_text() == "Rows: type first:stop within 0:320, or nothing for all; got '310:3x0'" and here.line() == line
    rows_field.fill("300:320")
    typed = here.after(lambda: rows_field.press("Enter"), "typed rows are shown")
    assert typed == ((300, 320), down[1]) and alert.count() == 0
    assert len(here.labels("row")) == 20 and here.labels("row")[0].startswith("300 ")  # rows this large carry their token
    columns_field.fill("310:e10")
    assert here.after(lambda: columns_field.press("Enter"), "typed columns are shown") == ((300, 320), (310, 330))
    assert "entry 9" in here.labels("column")
    notebook.screenshot("attention_map_part")

    # All the way back.
    back = here.cell.get_by_role("button", name="Back", exact=True)
    for _ in range(20):
        if back.is_disabled():
            break
        here.after(back.click, "Back goes back")
    assert here.shown() is None and back.is_disabled()


@pytest.mark.slow
def test_a_thousand_moves_leave_the_page_as_it_is(notebook):
    """Query after query from the keyboard, each drawn before the next; what the page holds is counted after a collection."""
    here, page = Map(notebook), notebook.page
    page.evaluate(
        """() => {
            window.blobs = new Set();
            const [make, revoke] = [URL.createObjectURL, URL.revokeObjectURL];
            URL.createObjectURL = (of) => { const url = make.call(URL, of); window.blobs.add(url); return url; };
            URL.revokeObjectURL = (url) => { window.blobs.delete(url); revoke.call(URL, url); };
        }"""
    )
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable")
    devtools.send("HeapProfiler.enable")
    here.cell.get_by_label("Query token").fill("0")
    here.cell.get_by_label("Query token").press("Enter")
    held = []
    for moves in (WARM, MOVES):
        page.evaluate(
            """async ([cell, moves]) => {
                const picture = cell.querySelector(".wb-picture");
                const text = [...cell.querySelectorAll(".wb-pointer.wb-text")].at(-1);
                const press = (element, key) => element.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
                for (let move = 0; move < moves; move++) {
                    const before = picture.dataset.sequence;
                    press(text, Math.floor(move / 200) % 2 ? "ArrowLeft" : "ArrowRight");
                    if (move % 10 == 9) press(cell.querySelector(".wb-box"), "+-b0"[((move - 9) / 10) % 4]);
                    const late = performance.now() + 60000;
                    while (picture.dataset.sequence == before) {
                        if (performance.now() > late) throw new Error(`move ${move} was not drawn`);
                        await new Promise(requestAnimationFrame);
                    }
                }
            }""",
            [here.cell.element_handle(), moves],
        )
        page.wait_for_timeout(2000)
        for _ in range(3):
            devtools.send("HeapProfiler.collectGarbage")
        metrics = {m["name"]: m["value"] for m in devtools.send("Performance.getMetrics")["metrics"]}
        held.append((metrics["JSHeapUsedSize"], metrics["Nodes"], page.evaluate("window.blobs.size")))
    print("JS heap in bytes, document nodes, blob addresses after", WARM, "and", MOVES, "more moves:", held)
    (bytes_before, nodes_before, _), (bytes_after, nodes_after, blobs) = held
    assert bytes_after - bytes_before <= PAGE_BYTES, held
    assert nodes_after <= 1.2 * nodes_before + 200, held
    assert blobs <= 1, held
