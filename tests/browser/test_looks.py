"""How the views look in a real JupyterLab: contrast in both themes, nothing cut off at two widths, all controls by keyboard."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browser.lab import ROOT, Browser, browse, serve, write_notebook

CELLS = (
    "import workbench as wb\n\nmodel, trace = wb.load('tiny-v4'), wb.Trace.load('needle')",
    "wb.AttentionExplorer(trace)",
    "wb.KVCacheGrowth(trace)",
    "wb.OverlapTimeline(wb.Trace.load('growth'))",
    "wb.Microscope(trace, model=model)",
    "run = wb.run(model, wb.sample_text()[:900], max_new_tokens=0)\nrun.wait()\nwb.Stepper(run, topic='csa')",
    "wb.Demo('3 minutes')",
)
VIEWS = {"AttentionExplorer": 2, "KVCacheGrowth": 1, "OverlapTimeline": 1, "Microscope": 2, "Stepper": 0, "Demo": 2}  # charts
LOOKS = (ROOT / "tests" / "browser" / "looks.js").read_text(encoding="utf-8")
DRAWN = "([cell, charts]) => cell.querySelectorAll('.js-plotly-plot .main-svg').length >= charts"
# Told before Tab is pressed: that the page has laid itself out anew for the window's width.
SETTLED = """() => new Promise((done) => { let last = '', same = 0; const look = () => {
    const now = [...document.querySelectorAll('.js-plotly-plot')].map((e) => e.getBoundingClientRect().width).join();
    same = now === last ? same + 1 : 0; last = now; same > 10 ? done() : setTimeout(look, 100); }; look(); })"""


@pytest.fixture(scope="module", params=["Light", "Dark"])
def notebook(request, driver, chromium_path, tmp_path_factory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("lab")
    path = write_notebook(tmp_path_factory.mktemp("notebook"), *CELLS)
    with serve(path, folder, f"JupyterLab {request.param}") as url, browse(driver, chromium_path, folder) as browser:
        browser.open_and_run_all(url)
        browser.until(f"document.body.dataset.jpThemeLight == '{str(request.param == 'Light').lower()}'", "the theme is on")
        browser.page.evaluate(LOOKS)
        for view, charts in VIEWS.items():
            browser.until(DRAWN, f"{view} is drawn", [output(browser, view).element_handle(), charts])
        browser.until("document.querySelectorAll('.wb-walk .step').length", "the stepper is drawn")
        browser.theme = request.param.lower()
        yield browser


def output(browser: Browser, view: str):
    return browser.cell(f"wb.{view}(").locator(".jp-OutputArea-output").first


def test_text_has_the_contrast_wcag_asks_for(notebook):
    for view in VIEWS:
        pale = output(notebook, view).evaluate("e => wbLooks.pale(e)")
        assert pale["texts"] > 20 and pale["found"] == [], f"{view}: {pale}"


@pytest.mark.parametrize("width, height", [(900, 1000), (1920, 1080)])
def test_nothing_is_cut_off_or_lies_over_another(notebook, width, height):
    notebook.page.set_viewport_size({"width": width, "height": height})
    notebook.page.evaluate(SETTLED)
    for view in VIEWS:
        place = output(notebook, view)
        place.evaluate("e => e.scrollIntoView()")
        notebook.screenshot(f"{view.lower()}_{width}_{notebook.theme}")
        assert place.evaluate("e => wbLooks.wide(e)") == [], view
        assert place.evaluate("e => wbLooks.overlapping(e)") == [], view


def test_tab_reaches_every_control_of_the_explorer_and_shows_where_it_is(notebook):
    notebook.page.set_viewport_size({"width": 1280, "height": 1000})
    place = output(notebook, "AttentionExplorer")
    place.locator("button[data-token='layer:0']").focus()
    controls = place.evaluate("""e => [...e.querySelectorAll('button, select, input, textarea, [tabindex="0"]')].filter(
        (c) => c.checkVisibility() && !c.disabled && c.tabIndex >= 0).map((c, i) => { c.dataset.order = i; return i; })""")
    assert len(controls) > 14
    reached, unseen = set(), []
    for _ in range(len(controls) + 5):
        at = notebook.page.evaluate(
            "() => [document.activeElement.dataset.order, document.activeElement.outerHTML.slice(0, 90), wbLooks.focusRing()]"
        )
        if at[0] is not None:
            reached.add(int(at[0]))
            unseen += [] if at[2] else [at[1]]
        notebook.page.keyboard.press("Tab")
    assert reached == set(controls)
    assert unseen == []
    for name in (".wb-box", ".wb-pointer.wb-text[tabindex='0']", "select", "input"):  # the map, the text, menus, numbers
        assert set(place.locator(name).evaluate_all("all => all.map((e) => +e.dataset.order)")) <= reached


def test_what_this_file_asks_of_a_page_can_fail(notebook):
    """The three questions find what is wrong in an element made for it."""
    found = notebook.page.evaluate("""() => {
        const root = document.createElement("div");
        root.innerHTML = "<p style='color: #888; background: #fff'>pale</p><p style='margin-left: 120%; width: 9em'>wide</p>" +
            "<div class='widget-box'><b style='position: absolute'>one</b><b style='position: absolute'>two</b></div>";
        document.body.append(root);
        root.style.cssText = "position: absolute; top: 0; left: 0; width: 300px; z-index: 9";
        const asked = [wbLooks.pale(root).found, wbLooks.wide(root), wbLooks.overlapping(root)];
        root.remove();
        return asked;
    }""")
    assert "pale" in found[0][0] and "wide" in found[1][0] and "one" in found[2][0]
