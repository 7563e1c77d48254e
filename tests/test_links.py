"""Every link of the README, docs/ and the notebooks leads somewhere: files and headings of this checkout, looked up offline."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "notebooks").rglob("*.ipynb"))]
LINK = re.compile(
    r"\]\(\s*<?([^)\s>]+)>?[^)]*\)|<(\w+:[^>\s]+)>|\b(?:href|src)\s*=\s*[\"']([^\"']+)|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE
)
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)


def prose(path: Path, code: str = r"`[^`\n]*`") -> str:
    """The page's Markdown without blocks of code and what matches ``code``: a bracket in it is no link."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return re.sub(rf"^```.*?^```|{code}", "", text, flags=re.DOTALL | re.MULTILINE)


def links(markdown: str) -> list[str]:
    return [next(part for part in found if part) for found in LINK.findall(markdown)]


def anchors(path: Path) -> set[str]:
    """What the headings of a page can be reached by: JupyterLab joins the words of a notebook's by dashes, GitHub lowers
    the others, drops what is no letter, digit, dash or space, and counts repeated ones."""
    titles = [re.sub(r"\[([^\]]*)\]\([^)]*\)|[*_`]", r"\1", title).strip() for title in HEADING.findall(prose(path, code="$^"))]
    if path.suffix == ".ipynb":
        return {title.replace(" ", "-") for title in titles}
    found: dict[str, int] = {}
    for title in titles:
        plain = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        found[plain] = found.get(plain, -1) + 1
        if found[plain]:
            found[f"{plain}-{found[plain]}"] = 0
    return set(found)


def broken(path: Path, root: Path = ROOT) -> list[str]:
    """The links of ``path`` that lead nowhere; those that leave the project only have to be https."""
    bad = []
    for link in links(prose(path)):
        scheme = re.match(r"(\w[\w+.-]*):", link)
        if scheme:
            bad += [] if scheme[1] == "https" else [link]
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (path.parent / name).resolve() if name else path
        there = target.is_relative_to(root.resolve()) and target.exists()
        if not there or (anchor and (target.suffix not in (".md", ".ipynb") or anchor not in anchors(target))):
            bad.append(link)
    return bad


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path):
    assert broken(path) == []


def test_the_readme_links_to_every_notebook_of_the_course():
    linked = {(ROOT / link).resolve() for link in links(prose(ROOT / "README.md")) if link.endswith(".ipynb")}
    assert linked == set((ROOT / "notebooks").glob("*.ipynb"))


def test_broken_links_are_found_and_good_ones_are_not(tmp_path):
    (tmp_path / "a.md").write_text(
        "# One `x` & two\n## Same\n## Same\n"
        "[1](#one-x--two) [2](#same-1) [3](b.ipynb#What-now?) [4](https://a.example/x) `[5](no)`\n```\n[6](no)\n```\n"
        "[7](#same-2) [8](c.md) [9](http://a.example) ![10](no.png) <http://b.example> [11](b.ipynb#what-now)\n"
        "[12](../a.md)\n<a href='d.md'>x</a>\n[13](b.ipynb \"title\")\n[14]: e.md\n"
    )
    cell = nbformat.v4.new_markdown_cell("# What now?\n[1](#What-now?) [2](a.md#same)")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "b.ipynb")
    assert broken(tmp_path / "b.ipynb", tmp_path) == []
    assert broken(tmp_path / "a.md", tmp_path) == [
        "#same-2", "c.md", "http://a.example", "no.png", "http://b.example", "b.ipynb#what-now", "../a.md", "d.md", "e.md"
    ]  # fmt: skip
