"""`workbench export`: one file that holds everything, asks for nothing, and does nothing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest

import workbench as wb
from workbench import cli
from workbench.errors import InputError, WorkbenchError
from workbench.export import POLICY, export, page


class Read(HTMLParser):
    """Tags with their attributes, and the text, of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def notebook(path: Path, *cells: str, outputs: list[Any] | None = None) -> Path:
    """A file with a Markdown cell for every text that begins with a #, and code cells; the last one has ``outputs``."""
    made = nbformat.v4.new_notebook()
    made.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    for text in cells:
        kind = nbformat.v4.new_markdown_cell if text.startswith("#") else nbformat.v4.new_code_cell
        made.cells.append(kind(text))
    if outputs is not None:
        made.cells[-1].outputs = [nbformat.from_dict(output) for output in outputs]
    nbformat.write(made, path)
    return path


def shown(*data: tuple[str, Any]) -> dict[str, Any]:
    return {"output_type": "display_data", "data": dict(data), "metadata": {}}


def test_nothing_comes_from_elsewhere_and_no_script_is_part_of_the_page(tmp_path):
    path = notebook(tmp_path / "a.ipynb", "# Title?\n\n[a link](https://example.org) and `code`", "1 + 1", outputs=[])
    html = export(path, tmp_path / "a.html", run=False).read_text(encoding="utf-8")
    read = Read(html)
    assert "Title?" in read.text and ("meta", {"http-equiv": "Content-Security-Policy", "content": POLICY}) in read.tags
    assert not [tag for tag, _ in read.tags if tag in ("script", "link", "iframe", "object")]
    assert all(str(a.get("src", "data:")).startswith("data:") for _, a in read.tags) and "url(" not in html
    assert "default-src 'none'" in POLICY and "script-src" not in POLICY  # so no script at all


def test_printed_text_is_escaped(tmp_path):
    output = {"output_type": "stream", "name": "stdout", "text": "<script>alert(1)</script>"}
    path = notebook(tmp_path / "a.ipynb", "# T", "print(x)", outputs=[output])
    read = Read(export(path, tmp_path / "a.html").read_text(encoding="utf-8"))
    assert "script" not in [tag for tag, _ in read.tags] and "<script>alert(1)</script>" in "".join(read.text)


def test_stored_outputs_are_taken_and_nothing_is_run(tmp_path):
    path = notebook(tmp_path / "a.ipynb", "# T", "raise SystemExit", outputs=[shown(("text/plain", "from before"))])
    assert "from before" in export(path, tmp_path / "a.html").read_text(encoding="utf-8")


def test_a_chart_without_a_widget_is_drawn_and_a_widget_without_a_picture_comes_from_its_state(tmp_path):
    from workbench.widgets.render import CHART_MIME
    from workbench.widgets.still import VIEW_MIME

    chart = json.loads(wb.query_strip(wb.Trace.load("needle"), 1, 318).to_json())
    outputs = [shown((CHART_MIME, chart)), shown((VIEW_MIME, {"model_id": "m"}))]
    path = notebook(tmp_path / "a.ipynb", "# T", "x", outputs=outputs)
    made = nbformat.read(path, as_version=4)
    state = {"m": {"model_name": "HTMLModel", "state": {"_model_name": "HTMLModel", "value": "<i>kept</i>"}}}
    made.metadata.widgets = {"application/vnd.jupyter.widget-state+json": {"state": state}}
    nbformat.write(made, path)
    html = export(path, tmp_path / "a.html").read_text(encoding="utf-8")
    assert html.count("<svg ") >= 1 and "data:image/svg+xml" not in html and "<i>kept</i>" in html


def test_damaged_outputs_are_one_clear_error(tmp_path):
    from workbench.widgets.still import VIEW_MIME

    path = notebook(tmp_path / "a.ipynb", "# T", "x", outputs=[shown((VIEW_MIME, {"model_id": "m"}))])
    made = nbformat.read(path, as_version=4)
    state = {"m": {"state": {"mode": "picture", "png": "x", "html": "", "width": "wide", "sequence": 1}}}
    made.metadata.widgets = {"application/vnd.jupyter.widget-state+json": {"state": state}}
    nbformat.write(made, path)
    with pytest.raises(WorkbenchError, match="a.ipynb has outputs that cannot be pictured"):
        export(path, tmp_path / "a.html")


def test_a_folder_becomes_one_page_with_contents_in_order(tmp_path):
    course = tmp_path / "course"
    course.mkdir()
    notebook(course / "01_b.ipynb", "# Second?\n\nsee [the first](00_a.ipynb)", "1", outputs=[])
    notebook(course / "00_a.ipynb", "# First <one>?", "1", outputs=[])
    (course / "deeper").mkdir()
    notebook(course / "deeper" / "x.ipynb", "# Not this", "1", outputs=[])
    html = export(course, tmp_path / "course.html", run=False).read_text(encoding="utf-8")
    read = Read(html)
    links = [a["href"] for tag, a in read.tags if tag == "a" and str(a.get("href", "")).startswith("#0")]
    assert links[:2] == ["#00_a", "#01_b"] and "#00_a" in links[2:]  # contents, then the link in the text
    assert {"00_a", "01_b"} <= {a.get("id") for tag, a in read.tags if tag == "section"}
    assert "First <one>?" in read.text and "Not this" not in "".join(read.text)


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        ("nowhere.ipynb", "a.html", "no notebook or folder"),
        ("text.txt", "a.html", "ends in .ipynb"),
        ("empty", "a.html", "holds no notebook"),
        ("damaged.ipynb", "a.html", "damaged.ipynb is no notebook"),
        ("foreign.ipynb", "a.html", "foreign.ipynb is no notebook"),
        ("good.ipynb", "a.pdf", "a.html; got 'a.pdf'"),
        ("good.ipynb", "nowhere/a.html", "folder that exists"),
    ],
)
def test_bad_input_is_one_clear_line_and_status_2(tmp_path, monkeypatch, capsys, source, target, said):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("x")
    Path("empty").mkdir()
    Path("damaged.ipynb").write_text('{"cells": [')
    Path("foreign.ipynb").write_text('{"a": 1}')
    notebook(Path("good.ipynb"), "# T", "1", outputs=[])
    status = cli.main(["export", source, "--html", target, "--no-run"])
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and said in error and not Path(target).exists()


def test_a_page_that_is_too_large_is_refused_and_an_older_file_stays(tmp_path):
    path = notebook(tmp_path / "a.ipynb", "# T", "1", outputs=[shown(("text/plain", "x" * 20_000))])
    target = tmp_path / "a.html"
    target.write_text("before")
    with pytest.raises(WorkbenchError, match="more than 10,000; .*--max-bytes"):
        export(path, target, most_bytes=10_000)
    assert target.read_text() == "before" and sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "a.ipynb"]


def test_maps_can_be_enlarged_and_charts_become_part_of_the_page():
    from workbench.widgets.still import still_html

    html = page("t", still_html(wb.AttentionExplorer(wb.Trace.load("needle"))))
    assert html.count('type="checkbox"') == 1 and len(re.findall(r"<svg style=", html)) == 1
    assert html.index('type="checkbox"') < html.index('wb-map"')


@pytest.mark.notebook
def test_a_cell_that_fails_is_one_error_and_nothing_is_written(tmp_path):
    path = notebook(tmp_path / "a.ipynb", "# T", "1 / 0")
    with pytest.raises(WorkbenchError, match="a.ipynb was not exported, because a cell failed .ZeroDivisionError"):
        export(path, tmp_path / "a.html")
    assert not (tmp_path / "a.html").exists()


@pytest.mark.notebook
def test_a_notebook_is_run_and_its_widgets_give_all_they_have(tmp_path):
    cells = (
        "# How much?",
        "import workbench as wb\n\nwb.KVCacheGrowth(wb.Trace.load('needle'))",
        "wb.Prediction('How many?', lambda: 68, high=100, unit='tokens')",
        "demo = wb.Demo('3 minutes')\ndemo",
    )
    path = notebook(tmp_path / "a.ipynb", *cells)
    before = path.read_bytes()
    html = export(path, tmp_path / "a.html").read_text(encoding="utf-8")
    assert path.read_bytes() == before  # the notebook itself stays without outputs
    text = "".join(Read(html).text)
    assert "KV cache of one sequence" in text and "68 tokens" in text and "Result, beside the guess" in text
    assert all(slide.title in text and slide.notes in text for slide in wb.Demo("3 minutes").slides)
    assert len(html) < 5_000_000


def test_an_unknown_script_names_those_there_are():
    with pytest.raises(InputError, match="'3 minutes', '10 minutes', '45 minutes', got 'an hour'"):
        wb.Demo("an hour")
