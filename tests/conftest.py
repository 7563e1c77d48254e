"""What every test stands on: one torch thread, no downloads, and one policy for what a machine may lack.

A test that needs ``transformers``, ``nemo-automodel`` or a browser asks for the fixture ``transformers_oracle``,
``nemo_oracle`` or ``chromium_path`` and is marked by it. Without them it is skipped with the reason; with CI=true it fails
instead, so that CI cannot quietly test less.
"""

import importlib
import os
from types import ModuleType
from typing import NoReturn

import pytest

# Before anything imports torch; kernels and servers that tests start inherit both.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

MARK_OF_FIXTURE = {"transformers_oracle": "oracle", "nemo_oracle": "oracle", "chromium_path": "browser"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture in MARK_OF_FIXTURE.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(MARK_OF_FIXTURE[fixture])


@pytest.fixture(scope="session")
def transformers_oracle() -> ModuleType:
    """The ``transformers`` package, whose ``deepseek_v4`` model the workbench is compared with."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        missing(f'transformers cannot be imported ({error}); pip install -e ".[test]"')


@pytest.fixture(scope="session")
def nemo_oracle(transformers_oracle: ModuleType) -> ModuleType:
    """The V4.1 model of ``nemo-automodel``, which stands on ``transformers``."""
    try:
        return importlib.import_module("nemo_automodel.components.models.deepseek_v41.model")
    except ImportError as error:
        missing(f"nemo-automodel cannot be imported ({error}); pip install --no-deps nemo-automodel==0.7.0")


@pytest.fixture(scope="session")
def chromium_path() -> str:
    """Path of the browser that playwright drives."""
    from workbench.runtime import find_chromium

    path = find_chromium()
    if path is None:
        missing("no chromium on this machine; on Debian: apt-get install chromium")
    try:
        importlib.import_module("playwright.sync_api")
    except ImportError as error:
        missing(f'playwright cannot be imported ({error}); pip install -e ".[test]"')
    return path


def missing(reason: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason} (with CI=true this is a failure, not a skip)", pytrace=False)
    pytest.skip(reason)
