"""What all browser tests share: one driver, a notebook with all its cells run, and that nothing goes wrong unseen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.lab import Browser, browse, serve

if TYPE_CHECKING:
    from playwright.sync_api import Playwright


@pytest.fixture(scope="module")
def driver(chromium_path: str) -> Iterator[Playwright]:
    from playwright.sync_api import sync_playwright  # chromium_path has skipped the test if it is missing

    with sync_playwright() as started:
        yield started


@pytest.fixture(scope="module")
def notebook_file(request: pytest.FixtureRequest) -> Path:
    """The notebook that a file of tests is about, its NOTEBOOK; one that writes its own has a fixture of this name."""
    return request.module.NOTEBOOK


@pytest.fixture(scope="module")
def notebook(
    driver: Playwright, chromium_path: str, notebook_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Browser]:
    """That notebook with all cells run, in the light theme: one server and one kernel for the tests of a file."""
    folder = tmp_path_factory.mktemp("lab")
    with serve(notebook_file, folder) as url, browse(driver, chromium_path, folder) as browser:
        browser.open_and_run_all(url)
        yield browser


@pytest.fixture(autouse=True)
def _nothing_goes_wrong_unseen(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "notebook" in request.fixturenames:
        assert request.getfixturevalue("notebook").problems == []
