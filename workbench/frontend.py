"""Why a widget may stay blank: what JupyterLab needs to show one, looked for in this environment (``workbench doctor``)."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

Check = tuple[str, str]  # level (ok, warning, MISSING) and what to do
# What the page loads to show widgets -> the package that brings it.
SCRIPTS = {"@jupyter-widgets/jupyterlab-manager": "jupyterlab-widgets", "anywidget": "anywidget"}
# Where people open notebooks -> what we know of it; the README's second table says what each needs.
FRONT_ENDS = {"JupyterLab 4": "tested", "Notebook 7": "tested"} | dict.fromkeys(
    ("VS Code", "Colab", "Voila"), "documented, not tested here"
)
KERNEL = "python3"  # which the notebooks name


def widget_checks() -> list[Check]:
    """One line for each thing that leaves widgets blank when it is missing; the README's table has the same order."""
    shown = [("ok", f"widgets in {name}: {how}") for name, how in FRONT_ENDS.items()]
    return [*(_script(name, package) for name, package in SCRIPTS.items()), _kernel(), _server(), *shown]


def _script(name: str, package: str) -> Check:
    from jupyter_core.paths import jupyter_path

    for folder in jupyter_path("labextensions"):
        manifest = Path(folder) / name / "package.json"
        try:
            version = json.loads(manifest.read_text(encoding="utf-8"))["version"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return "ok", f"widget script {name} {version}"
    again = f"pip install --force-reinstall {package}, then start JupyterLab again and reload the page"
    return "MISSING", f"widget script {name} is not where JupyterLab looks, widgets stay blank: {again}"


def _kernel() -> Check:
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    again = "python -m ipykernel install --sys-prefix"
    try:
        program = KernelSpecManager().get_kernel_spec(KERNEL).argv[0]
    except (NoSuchKernel, OSError, ValueError, IndexError):
        return "MISSING", f"there is no kernel {KERNEL!r} for the notebooks: {again}"
    here = {"python", "python3", f"python{sys.version_info.major}.{sys.version_info.minor}"}  # names the server's own Python
    if program in here or _same(program, sys.executable):
        return "ok", f"kernel {KERNEL} runs this Python"
    return "warning", f"kernel {KERNEL} runs {program}, where the workbench may be missing: {again}"


def _server() -> Check:
    found = shutil.which("jupyter")
    if found is None or _same(Path(found).parent, Path(sys.executable).parent):
        return "ok", "`workbench lab` starts this environment's JupyterLab"
    return "warning", f"another Jupyter comes first ({found}); it may lack the widget scripts: start with `workbench lab`"


def _same(one: str | Path, other: str | Path) -> bool:
    """Names of one place. Links are not followed: a virtual environment's Python is one to another Python."""
    return Path(one).absolute() == Path(other).absolute()
