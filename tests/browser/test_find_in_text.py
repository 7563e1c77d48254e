"""Searching the explorer's text in a real JupyterLab with the keyboard alone, in both themes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser.lab import Browser, browse, serve, write_notebook

CELLS = (
    "import workbench as wb",
    "model = wb.load('tiny-v4')\n"
    "words = 'The key of apple is 37. ' + wb.sample_text()[:4000] + ' שלום עולם, سلام, a key 🔑 and zebra. '\n"
    "run = wb.run(model, words + wb.sample_text()[4000:5200] + ' The key of apple is', max_new_tokens=3)\nrun.wait()",
    "explorer = wb.AttentionExplorer(run)\nexplorer",
)
# Whether the match lies in the part of the text that is seen, below the line that stays on top.
IN_SIGHT = """([cell, token]) => {
    const text = [...cell.querySelectorAll('.wb-pointer.wb-text')].at(-1), match = text.querySelector('[data-show]');
    if (!match || (token && match.dataset.token != token)) return false;
    const at = match.getBoundingClientRect(), seen = text.getBoundingClientRect();
    return at.top >= seen.top + text.querySelector('p').offsetHeight - 1 && at.bottom <= seen.bottom + 1;
}"""


@pytest.fixture(scope="module")
def notebook_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_notebook(tmp_path_factory.mktemp("notebook"), *CELLS)


class Finding:
    def __init__(self, browser: Browser) -> None:
        self.browser, self.keys = browser, browser.page.keyboard
        self.cell = browser.cell("explorer = wb.AttentionExplorer")
        self.field = self.cell.get_by_role("searchbox", name="Find in the text")

    def ask(self, text: str) -> None:
        """Type over whatever stands in the field."""
        self.field.focus()
        self.keys.press("Control+a")
        self.keys.type(text)

    def says(self, told: str) -> None:
        script = "([cell, told]) => cell.querySelector('.wb-find output').textContent == told"
        self.browser.until(script, f"the field says {told!r}", [self.cell.element_handle(), told])

    def match_in_sight(self, token: str = "") -> str:
        self.browser.until(IN_SIGHT, f"the match {token} is in sight", [self.cell.element_handle(), token])
        return self.cell.locator("[data-show]").get_attribute("data-token")

    def query(self) -> str:
        return self.cell.get_by_label("Query token").input_value()

    def prompt(self) -> str:
        return self.cell.locator(".jp-InputArea-prompt").first.inner_text()


def test_typing_finds_and_enter_goes_on_while_the_query_stays(notebook):
    here = Finding(notebook)
    query, prompt = here.query(), here.prompt()
    here.field.focus()
    here.keys.type("KEY OF")
    here.says("1 of 2")
    first = here.match_in_sight()
    here.keys.press("Enter")
    here.says("2 of 2")
    second = here.match_in_sight()
    assert int(first) < int(second)
    here.keys.press("Shift+Enter")
    here.says("1 of 2")
    assert here.match_in_sight() == first
    assert here.query() == query and here.prompt() == prompt  # Shift and Enter did not run the cell
    assert here.field.evaluate("e => e == document.activeElement")
    here.field.evaluate("e => e.scrollIntoView()")
    notebook.screenshot("find_light")


def test_what_is_not_there_is_said(notebook):
    here = Finding(notebook)
    here.ask("quagga(")
    here.says("not found")
    here.keys.press("Control+a")
    here.keys.press("Delete")
    here.says("")


def test_an_emoji_and_words_of_other_directions_are_found_and_stand_as_they_are_read(notebook):
    here = Finding(notebook)
    here.ask("🔑")
    here.says("1 of 1")
    here.match_in_sight()
    here.ask("שלום עולם")
    marked = "cell => [...cell.querySelectorAll('bdi.at')].map((e) => e.innerText).join('') == 'שלום·עולם'"
    notebook.until(marked, "the words are marked", here.cell.element_handle())
    here.match_in_sight()
    letters = here.cell.locator("bdi.at")
    places = letters.evaluate_all("all => all.map((e) => e.getBoundingClientRect().left)")
    assert places == sorted(places, reverse=True)  # from right to left
    here.field.evaluate("e => e.scrollIntoView()")
    notebook.screenshot("find_hebrew_light")


def test_the_match_becomes_the_query_with_a_button(notebook):
    here = Finding(notebook)
    here.ask("zebra")
    here.says("1 of 1")
    match = here.match_in_sight()
    for _ in range(4):  # past previous, next and the box
        here.keys.press("Tab")
    assert notebook.page.evaluate("document.activeElement.textContent") == "Make it the query"
    here.keys.press("Enter")
    script = "([cell, first]) => Number(cell.querySelector('.wb-text bdi.q[data-token]')?.dataset.token) >= first"
    notebook.until(script, "the match is the query", [here.cell.element_handle(), int(match)])
    assert int(here.query()) >= int(match)


def test_in_the_dark_theme_too(driver, chromium_path, notebook_file, tmp_path):
    with serve(notebook_file, tmp_path, "JupyterLab Dark") as url, browse(driver, chromium_path, tmp_path) as browser:
        browser.open_and_run_all(url)
        browser.until("document.body.dataset.jpThemeLight == 'false'", "the dark theme is on")
        here = Finding(browser)
        here.field.focus()
        here.keys.type("key")
        here.keys.press("Enter")  # sent at once
        browser.until(
            "cell => /of/.test(cell.querySelector('.wb-find output').textContent)", "found", here.cell.element_handle()
        )
        here.match_in_sight()
        here.field.evaluate("e => e.scrollIntoView()")
        browser.screenshot("find_dark")
        assert browser.problems == []
