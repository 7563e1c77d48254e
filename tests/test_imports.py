"""The layers of the project, held by reading every import: the core runs without Jupyter, and pictures never see torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "workbench"
CORE = {"numpy", "safetensors", "tokenizers", "torch"}
# Layer (first part of a module's name below workbench) -> packages it may import beside the standard library.
ALLOWED = {
    "": set(),  # workbench/__init__.py
    "__main__": set(),
    "errors": set(),
    "transcript": set(),
    "config": set(),
    "presets": set(),
    "devices": set(),
    "sources": set(),
    "weights": set(),
    "intervals": {"numpy"},
    "scoring": {"numpy"},
    "trace": {"numpy"},
    "trace_check": {"numpy"},
    "trace_files": {"numpy"},
    "decoded": set(),
    "captures": {"numpy", "tokenizers"},
    "ask_server": set(),
    "profile": {"numpy"},
    "chrome_trace": {"numpy"},
    "cost": {"numpy"},
    "schedule": {"numpy"},
    "measurements": set(),
    "progress": set(),
    "engram": CORE,  # torch only inside engram_effect
    "walk": CORE,  # its records without torch, see RECORDS below
    "claims": set(),
    "agent": set(),
    "sharing": {"numpy"},
    "prefills": CORE,
    "exercises": {"numpy"},
    "glossary": set(),
    "caches": CORE,  # torch only where a model is fed
    "choosing": CORE,
    "compressing": CORE,
    "mixing": CORE,  # torch only where a model runs
    "rounding": CORE,  # likewise
    "frontier": set(),
    "runtime": {"torch"},
    "model": CORE,
    "checkpoint": CORE,
    "memory": CORE,
    "recorder": CORE,
    "attached": CORE,
    "live": CORE,
    "needle": CORE,
    "microscope": CORE,
    "ways_to_choose": CORE,
    "beside": CORE,
    "differences": {"numpy"},
    "true_size": CORE,
    "training": CORE | {"dask", "distributed"},  # these two only inside training.sweep.sweep
    "figures": {"numpy", "plotly", "PIL"},
    "widgets": {"numpy", "plotly", "PIL", "ipywidgets", "anywidget", "traitlets", "IPython"},
    "frontend": {"jupyter_core", "jupyter_client"},  # only when asked what is there
    "export": {"nbformat", "nbclient", "nbconvert", "pygments"},
    "cli": {"jupyterlab"},
}
# What loading a layer may pull in, through any chain of imports at the top of files.
NEVER_LOADED = {
    **dict.fromkeys(
        (
            *("", "errors", "transcript", "config", "presets", "devices", "sources", "weights", "trace", "cost", "schedule"),
            *("intervals", "scoring", "profile", "chrome_trace"),
            *("measurements", "progress", "runtime", "cli", "engram", "claims", "export", "frontier", "ask_server"),
            *("exercises", "glossary", "caches", "captures", "decoded", "frontend", "agent", "sharing", "mixing", "rounding"),
        ),
        {"torch", "plotly"},
    ),
    **dict.fromkeys(
        ("model", "checkpoint", "memory", "recorder", "attached", "live", "training", "true_size", "prefills"),
        {"plotly", "PIL", "ipywidgets", "distributed"},
    ),
    **dict.fromkeys(("figures", "widgets"), {"torch"}),
}


def name_of(path: Path) -> str:
    """Dotted name below workbench: "model.layers", and "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


RECORDS = {"walk", "walk.lines"}  # modules of a layer with torch that load without it, for pictures and widgets
MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(node: ast.AST, module: str, top_only: bool) -> Iterator[str]:
    """Dotted names imported under ``node``, leaving out `if TYPE_CHECKING`; ``top_only`` leaves out function bodies too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if top_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, f"workbench.{module} has a relative import; write it in full"
            # `from workbench.training import tasks` may name a module: both readings are reported
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from imports(child, module, top_only)


@cache
def imported_by(module: str, top_only: bool = False) -> frozenset[str]:
    return frozenset(imports(ast.parse(MODULES[module].read_text(encoding="utf-8")), module, top_only))


def loaded_by(module: str) -> set[str]:
    """Packages outside workbench that importing ``module`` loads, directly or through other modules of the project."""
    seen: set[str] = set()
    outside: set[str] = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for name in imported_by(current, top_only=True):
            first, *rest = name.split(".")
            if first != "workbench":
                outside.add(first)
            else:  # every package on the way and the module itself are loaded; the last part may be a function's name
                waiting += [part for end in range(len(rest) + 1) if (part := ".".join(rest[:end])) in MODULES]
    return outside


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_layer_may(module):
    layer = module.split(".")[0]
    assert layer in ALLOWED, f"workbench/{layer} is in no layer yet: say in this test what it may import"
    foreign = {name.split(".")[0] for name in imported_by(module)} - set(sys.stdlib_module_names) - {"workbench"}
    assert foreign <= ALLOWED[layer]
    assert not loaded_by(module) & ({"torch", "plotly"} if module in RECORDS else NEVER_LOADED.get(layer, set()))


def test_importing_workbench_loads_neither_torch_nor_plotly():
    code = "import sys, workbench, workbench.trace, workbench.cost; print(sorted({'torch', 'plotly'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert out.stdout.strip() == "[]"
