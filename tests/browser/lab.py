"""A real JupyterLab (or Notebook 7) and a real Chromium for the browser tests, isolated from what else runs on the machine.

The server has its own Jupyter folders, a random token and listens on this machine only; the page writes down every error, and
every request that leaves the machine. Everything waits on conditions, with limits generous enough for a busy two-core machine.
"""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page, Playwright

ROOT = Path(__file__).parents[2]
LIMIT_MS = 120_000
FOLDERS = ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR", "LAB_SETTINGS_DIR", "LAB_WORKSPACES_DIR")
CHROMIUM = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# Program -> the name of its settings and where it opens a notebook.
PROGRAMS = {"jupyterlab": ("LabApp", "lab/tree"), "notebook": ("JupyterNotebookApp", "notebooks")}
LOCAL = ("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:")
# Runs all cells once the kernel has answered: before that the command reports success and cells stay unexecuted.
RUN_ALL = """async () => {
    const panel = window.jupyterapp.shell.currentWidget;
    await panel.context.ready;
    await panel.sessionContext.ready;
    await panel.sessionContext.session.kernel.info;
    window.ranAll = null;
    window.jupyterapp.commands.execute("notebook:run-all-cells").then((ok) => { window.ranAll = String(ok); });
}"""
HIDE_FILES = """() => {
    const commands = window.jupyterapp.commands;
    if (commands.hasCommand("application:toggle-left-area")) commands.execute("application:toggle-left-area");
}"""  # Notebook 7 shows none
FAILED_OUTPUTS = "[data-mime-type='application/vnd.jupyter.stderr'], [data-mime-type='application/vnd.jupyter.error']"
PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].map((e) => e.innerText.trim())"


def write_notebook(folder: Path, *cells: str) -> Path:
    """A notebook of those code cells in ``folder``, for ``serve``."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = folder / "cells.ipynb"
    nbformat.write(notebook, path)
    return path


@contextmanager
def serve(notebook: Path, folder: Path, theme: str = "JupyterLab Light", program: str = "jupyterlab") -> Iterator[str]:
    """A JupyterLab over a copy of ``notebook``; gives the address that opens it, token included, and stops it at the end.

    ``program`` "notebook" starts Notebook 7 instead, which reads the same settings and has the same commands.
    """
    root = folder / "root"
    root.mkdir()
    shutil.copy(notebook, root)  # JupyterLab saves into the file it opened
    places = {f"JUPYTER_{name}".replace("JUPYTER_LAB_", "JUPYTERLAB_"): folder / name.lower() for name in FOLDERS}
    environment = {**os.environ, **{name: str(path) for name, path in places.items()}, "IPYTHONDIR": str(folder / "ipython")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    settings = places["JUPYTERLAB_SETTINGS_DIR"] / "@jupyterlab"
    for plugin, values in {
        "notebook-extension/tracker": {"windowingMode": "none"},  # every cell is attached, also those off screen
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
        "apputils-extension/themes": {"theme": theme},
    }.items():
        path = settings / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    settings_of, place = PROGRAMS[program]
    command = [sys.executable, "-m", program, "--no-browser", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"]
    command += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}"]
    command += [f"--{settings_of}.expose_app_in_browser=True", *(["--allow-root"] if os.geteuid() == 0 else [])]
    log = folder / "server.log"
    with log.open("wb") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=folder)
        try:
            _wait_for_server(f"http://127.0.0.1:{port}/api/status?token={token}", server, log)
            yield f"http://127.0.0.1:{port}/{place}/{notebook.name}?token={token}"
        finally:
            server.terminate()  # it ends its kernels, too
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def _wait_for_server(url: str, server: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + LIMIT_MS / 1000
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            alive = server.poll() is None
            assert alive and time.monotonic() < end, f"the server did not start: {log.read_text(errors='replace')[-2000:]}"
            time.sleep(0.2)


class Browser:
    """One page of one notebook, and everything that went wrong in it (``problems``)."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.problems: list[str] = []
        # Part of a console message or page error -> why it does not matter here. Anything else fails the test.
        self.harmless: dict[str, str] = {}
        page.set_default_timeout(LIMIT_MS)
        page.on("pageerror", lambda error: self._note(f"page error: {error}"))
        page.on("console", lambda message: self._note(f"console: {message.text}") if message.type == "error" else None)
        page.on("requestfailed", lambda request: self._note(f"failed request: {request.url} ({request.failure})"))
        page.on("request", lambda request: None if request.url.startswith(LOCAL) else self._note(f"foreign: {request.url}"))

    def _note(self, problem: str) -> None:
        if not any(known in problem for known in self.harmless):
            self.problems.append(problem)

    def open_and_run_all(self, url: str) -> None:
        """Open the notebook and return when all its cells have run."""
        self.page.goto(url)
        self.page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.sessionContext")
        self.page.evaluate(RUN_ALL)
        self.page.wait_for_function("window.ranAll !== null")
        self.page.evaluate(HIDE_FILES)

    def check_that_all_ran(self) -> None:
        """Every code cell has run, and none left an error or a warning behind."""
        prompts = self.page.evaluate(PROMPTS)
        assert prompts and all(re.fullmatch(r"\[\d+\]:", prompt) for prompt in prompts), prompts
        assert self.page.locator(FAILED_OUTPUTS).all_inner_texts() == []

    def cell(self, source: str) -> Locator:
        """The code cell whose source contains ``source``."""
        return self.page.locator(".jp-CodeCell").filter(has=self.page.locator(".cm-content", has_text=source)).first

    def until(self, condition: str, what: str, argument: Any = None) -> None:
        """Wait until a JavaScript condition holds; fails saying ``what`` did not happen."""
        from playwright.sync_api import TimeoutError as TooLate

        try:
            self.page.wait_for_function(condition, arg=argument)
        except TooLate:
            raise AssertionError(f"did not happen: {what}; problems so far: {self.problems}") from None

    def press(self, scope: Locator, name: str) -> None:
        scope.get_by_role("button", name=name, exact=True).first.click()

    def screenshot(self, name: str) -> None:
        """As a PNG into the folder that WORKBENCH_SCREENSHOTS names, if it is set: those in docs/ are made that way."""
        folder = os.environ.get("WORKBENCH_SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            picture = Image.open(io.BytesIO(self.page.screenshot()))
            picture.convert("RGB").save(Path(folder) / f"{name}.png", optimize=True)


@contextmanager
def browse(driver: Playwright, chromium: str, folder: Path, slowdown: float = 1) -> Iterator[Browser]:
    """A fresh Chromium profile with one page; ``slowdown`` 4 makes its processor four times slower."""
    context = driver.chromium.launch_persistent_context(
        str(folder / "profile"),
        headless=True,
        executable_path=chromium,
        args=[*CHROMIUM, *(["--no-sandbox"] if os.geteuid() == 0 else [])],
        viewport={"width": 1280, "height": 1000},
    )
    try:
        page = context.pages[0]
        if slowdown != 1:
            context.new_cdp_session(page).send("Emulation.setCPUThrottlingRate", {"rate": slowdown})
        yield Browser(page)
    finally:
        context.close()
