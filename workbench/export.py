"""Notebooks as one HTML file that works from disk: no kernel, no network, no script.

Charts and widgets are still pictures (`workbench.widgets.still`), text and code are set by tools that JupyterLab brings along.
The page's own policy forbids scripts and every request, so nothing that stands in an output can act.
"""

from __future__ import annotations

import base64
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import runtime
from workbench.errors import InputError, WorkbenchError

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_BYTES = 5_000_000
CELL_SECONDS = 600
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'"
Report = Callable[[float, str], None]  # share done, what is under way

_CSS = """
:root {color-scheme: light dark; --ground: #fff; --ink: #1a1a1a; --soft: #f4f4f4; --line: #bbb; --jp-ui-font-color1: #1a1a1a;
  --jp-content-font-color1: #1a1a1a; --jp-border-color1: #bbb; --jp-border-color2: #ccc; --jp-layout-color0: #fff;
  --jp-layout-color1: #fff; --jp-layout-color2: #eee; --jp-brand-color1: #0072b2; --jp-content-link-color: #0b61a4}
@media (prefers-color-scheme: dark) {:root {--ground: #151515; --ink: #e6e6e6; --soft: #242424; --line: #555;
  --jp-ui-font-color1: #e6e6e6; --jp-content-font-color1: #e6e6e6; --jp-border-color1: #555; --jp-border-color2: #444;
  --jp-layout-color0: #151515; --jp-layout-color1: #151515; --jp-layout-color2: #2c2c2c; --jp-brand-color1: #56b4e9;
  --jp-content-link-color: #7cc0f0}}
body {background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; margin: 0}
main {max-width: 1000px; margin: 0 auto; padding: 16px 20px 80px}
a {color: var(--jp-content-link-color)} a.anchor-link {display: none}
pre, code {font-family: ui-monospace, monospace; font-size: 13px}
pre {background: var(--soft); padding: 8px 12px; overflow-x: auto; border-radius: 3px; line-height: 1.4}
:not(pre) > code {background: var(--soft); padding: 1px 4px; border-radius: 3px}
.output {margin: 8px 0 20px; overflow-x: auto} .output pre {background: none; padding: 0; margin: 4px 0}
table {border-collapse: collapse} th, td {padding: 2px 10px; border-bottom: 1px solid #8886; vertical-align: top}
nav.contents {background: var(--soft); padding: 8px 20px; border-radius: 3px} nav.contents ol {margin: 4px 0}
section + section {border-top: 3px solid var(--line); margin-top: 60px; padding-top: 12px}
img, svg {max-width: 100%} .wb-map {max-width: none !important}
.wb-thumbs {display: flex; flex-wrap: wrap; gap: 6px; align-items: end; font-size: 11px}
.wb-thumbs button {pointer-events: none}
.wb-zoom {font-size: 13px; cursor: pointer; display: inline-block; margin: 2px 0}
.wb-larger {overflow: auto; max-height: 85vh; max-width: 100%}
label.wb-zoom:has(:checked) + .wb-larger > * {zoom: 2.5}
footer {margin-top: 60px; font-size: 13px; opacity: 0.8}
@media print {.wb-zoom {display: none} main {max-width: none}}
"""


def export(
    source: str | Path, target: str | Path, *, run: bool = True, most_bytes: int = MOST_BYTES, report: Report | None = None
) -> Path:
    """Write ``source`` as one HTML file, ``target``, and return its path.

    A notebook becomes a page; a folder one page of the notebooks in it, in the order of their names, under a table of contents.
    Cells are run first, in a copy, with the folder they lie in as working folder; with ``run=False``, or for a notebook that
    already has outputs, those are taken. ``report`` is told how far it is. InputError for a source or target that is none;
    WorkbenchError when a cell fails and when the page is larger than ``most_bytes``. Nothing is written then.
    """
    paths = _notebooks(Path(source))
    target = Path(target)
    if target.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"give an HTML file to write, such as {target.with_suffix('.html').name}; got {target.name!r}")
    if target.is_dir() or not target.parent.is_dir():
        raise InputError(f"{target} cannot be written: give a file in a folder that exists")
    sections = []
    for i, path in enumerate(paths):
        if report:
            report(i / len(paths), f"running {path.name}" if run else f"reading {path.name}")
        sections.append((path, *_section(path, run)))
    if len(sections) == 1:
        html = page(sections[0][1], sections[0][2])
    else:
        entries = "".join(
            f'<li><a href="#{escape(_anchor(p), quote=True)}">{escape(title)}</a></li>' for p, title, _ in sections
        )
        contents = f'<nav class="contents"><h2>Contents</h2><ol>{entries}</ol></nav>'
        bodies = "".join(
            f'<section id="{escape(_anchor(p), quote=True)}">{body}<p><a href="#top">Contents</a></p></section>'
            for p, _, body in sections
        )
        html = page(Path(source).resolve().name, contents + bodies)
    data = html.encode()
    if len(data) > most_bytes:
        raise WorkbenchError(
            f"the page would have {len(data):,} bytes, more than {most_bytes:,}; export fewer notebooks at once, or allow more "
            "with --max-bytes"
        )
    part = target.with_name(target.name + ".part")
    part.write_bytes(data)
    part.replace(target)
    return target


def page(title: str, body: str) -> str:
    """A whole page around ``body``, which is HTML; scripts and requests are forbidden in it."""
    try:
        from nbconvert.filters.highlight import Highlight2HTML  # noqa: F401
        from pygments.formatters import HtmlFormatter

        code = HtmlFormatter(style="default").get_style_defs(".highlight")
        dark = HtmlFormatter(style="native").get_style_defs(".highlight")
        colours = f"{code}\n@media (prefers-color-scheme: dark) {{{dark}}}\n.highlight {{background: var(--soft) !important}}"
    except ImportError:
        colours = ""
    return (
        f'<!DOCTYPE html>\n<html lang="en" id="top"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_CSS}{colours}</style></head><body><main>{_opened_pictures(_enlargeable(body))}"
        "<footer>Exported by the DeepSeek-V4 workbench: still pictures of what the notebook showed, without kernel or network."
        "</footer></main></body></html>\n"
    )


def _notebooks(source: Path) -> list[Path]:
    if source.is_dir():
        found = sorted(source.glob("*.ipynb"))
        if not found:
            raise InputError(f"folder {source} holds no notebook (*.ipynb); give one that does, or a notebook")
        return found
    if not source.is_file():
        raise InputError(f"there is no notebook or folder {source}")
    if source.suffix != ".ipynb":
        raise InputError(f"{source.name} is no notebook: give a file that ends in .ipynb, or a folder")
    return [source]


def _section(path: Path, run: bool) -> tuple[str, str]:
    """Title and HTML of one notebook."""
    notebook = _read(path)
    if run and not any(cell.get("outputs") for cell in notebook.cells):
        _execute(notebook, path)
    try:
        return _title(notebook, path), _body(notebook, path)
    except WorkbenchError:
        raise
    except Exception as error:  # whatever outputs that no workbench has written provoke
        said = f"{type(error).__name__}: {' '.join(str(error).split()):.120}"
        raise WorkbenchError(f"{path.name} has outputs that cannot be pictured ({said}); clear them and export again") from None


def _read(path: Path) -> Any:
    try:
        import nbconvert  # noqa: F401
        import nbformat
    except ImportError:
        raise WorkbenchError("exporting needs nbconvert, which comes with JupyterLab: pip install -e .") from None
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except Exception as error:  # whatever a damaged file provokes in the readers of JSON and of notebooks
        reason = " ".join(str(error).split())
        raise InputError(f"{path.name} is no notebook that can be read ({type(error).__name__}: {reason:.120})") from None
    return notebook


@contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """What a kernel started meanwhile inherits: this package, and no profile of the user's."""
    places = [str(runtime.CHECKOUT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    wanted = {"PYTHONPATH": os.pathsep.join(p for p in places if p), "IPYTHONDIR": str(folder), "WORKBENCH_EXPORTING": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _execute(notebook: Any, path: Path) -> None:
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    resources = {"metadata": {"path": str(path.parent.resolve())}}
    quiet = ["--IPKernelApp.log_level=40"]  # its warnings about ports say nothing about the notebook
    client = NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="python3", resources=resources, extra_arguments=quiet)
    with tempfile.TemporaryDirectory() as folder, _environment(Path(folder)):
        try:
            client.execute()
        except CellExecutionError as error:
            said = f"{error.ename}: {error.evalue}"
            raise WorkbenchError(f"{path.name} was not exported, because a cell failed ({said:.200})") from None
        except (CellTimeoutError, DeadKernelError) as error:
            raise WorkbenchError(f"{path.name} was not exported ({type(error).__name__}); run it in JupyterLab first") from None


def _title(notebook: Any, path: Path) -> str:
    first = notebook.cells[0].source.splitlines() if notebook.cells else []
    return first[0].lstrip("# ").strip() if first and first[0].startswith("# ") else path.stem


def _anchor(path: Path) -> str:
    return re.sub(r"[^\w-]", "-", path.stem)


def _body(notebook: Any, path: Path) -> str:
    from nbconvert.filters.highlight import Highlight2HTML

    from workbench.widgets.still import html_of_outputs, html_of_states, saved_states

    states = saved_states(notebook.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}))
    highlight = Highlight2HTML()
    names = {p.name for p in path.parent.glob("*.ipynb")}
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(_markdown(cell.source, names))
        elif cell.cell_type == "code" and cell.source.strip():
            parts.append(highlight(cell.source, language="ipython3"))
            shown = html_of_outputs(cell.outputs, lambda model_id: html_of_states(states, model_id))
            parts.append(f'<div class="output">{shown}</div>' if shown else "")
    return "".join(parts)


def _markdown(source: str, notebooks: set[str]) -> str:
    """As HTML; a link to a notebook beside this one goes to its part of the page, if it has one."""
    from nbconvert.filters.markdown import markdown2html

    html = markdown2html(source)
    for name in notebooks:
        html = html.replace(f'href="{name}"', f'href="#{_anchor(Path(name))}"')
    return html


_IMAGE = re.compile(r'<img class="wb-chart" style="([^"]*)" alt="([^"]*)" src="data:image/svg\+xml;base64,([\w+/=]+)">')
_MAP = re.compile(r'<div class="wb-picture".*?<!--/wb-picture--></div>', re.DOTALL)


def _opened_pictures(html: str) -> str:
    """Charts as elements of the page: a third smaller, and their numbers show under the pointer."""

    def opened(found: re.Match[str]) -> str:
        svg = base64.b64decode(found[3]).decode()
        return re.sub(r"^<svg ", f'<svg style="{found[1]};height:auto" ', svg, count=1)

    return _IMAGE.sub(opened, html)


def _enlargeable(html: str) -> str:
    """Attention maps with a box to tick that shows them larger, by style alone."""

    def with_box(found: re.Match[str]) -> str:
        box = '<label class="wb-zoom"><input type="checkbox"> larger</label>'
        return f'<div>{box}<div class="wb-larger">{found[0]}</div></div>'

    return _MAP.sub(with_box, html)
