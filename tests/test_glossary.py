"""The glossary: every term is complete and sourced, is found by any of its names, and an unknown one is one clear error."""

from __future__ import annotations

import re

import nbformat
import pytest

import workbench as wb
from workbench.errors import InputError
from workbench.glossary import _NAMES, TERMS, Term, glossary
from workbench.runtime import CHECKOUT
from workbench.widgets.glossary import GlossarySearch

WANTED = (
    "CSA HCA CSA2 MLA DSA GQA MHA mHC Sinkhorn-Knopp Engram n-gram prefill decode top-k UE8M0 MXFP4 RoPE YaRN MoE BF16 FLOP nat"
)
WANTED_PHRASES = (
    "router",
    "tail",
    "sink",
    "lightning indexer",
    "compressor",
    "compressed entry",
    "sliding window",
    "KV cache",
    "FP8 E4M3",
    "KL divergence",
    "tensor parallelism",
)
# Read as words by everybody, or the name of a model or a device that wb.presets or wb.devices explain.
EVERYDAY = {"CPU", "GPU", "GB", "SSD", "XOR", "V3", "V4", "H200"}
NOTEBOOKS = sorted((CHECKOUT / "notebooks").rglob("*.ipynb"))


@pytest.mark.parametrize("name", (*WANTED.split(), *WANTED_PHRASES))
def test_the_words_of_the_course_are_in_it(name):
    assert glossary(name).name == name


def abbreviations(markdown: str) -> set[str]:
    """Words of capitals and digits, a plural s aside, outside of code."""
    prose = re.sub(r"```.*?```|`[^`]*`", "", markdown, flags=re.DOTALL)
    return {word.removesuffix("s") for word in re.findall(r"\b[A-Z][A-Z0-9]+s?\b", prose)}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_abbreviation_a_notebook_uses_is_in_it(path):
    notebook = nbformat.read(path, as_version=4)
    used = set().union(*(abbreviations(cell.source) for cell in notebook.cells if cell.cell_type == "markdown"))
    unknown = {word for word in used - EVERYDAY if re.sub(r"[\W_]+", "", word.lower()) not in _NAMES}
    assert not unknown, f"explain them in workbench/glossary.py: {sorted(unknown)}"


def test_abbreviations_are_found_in_prose_and_not_in_code():
    assert abbreviations("The KV cache, FLOPs and (FP8) of `ABC`.\n```\nXYZ\n```") == {"KV", "FLOP", "FP8"}


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.name)
def test_a_term_is_one_sentence_with_an_equation_and_a_source(term):
    assert term.meaning.endswith(".") and not re.search(r"[.!?] [A-Z]", term.meaning) and len(term.meaning) < 180
    assert term.equation and re.search(r"reference/[\w-]+\.md|general knowledge", term.source)


def test_no_name_means_two_things():
    names = [re.sub(r"[\W_]+", "", name.lower()) for term in TERMS for name in (term.name, *term.also)]
    assert len(names) == len(set(names)) == len(_NAMES)


@pytest.mark.parametrize(
    ("said", "name"),
    [("csa", "CSA"), ("Top K", "top-k"), ("kv CACHE", "KV cache"), ("sinks", "sink"), ("Sinkhorn knopp", "Sinkhorn-Knopp"),
     ("compressed entries", "compressed entry"), ("FP4", "MXFP4"), ("mixture of experts", "MoE"), ("index_topk", "top-k")],
)  # fmt: skip
def test_case_dashes_plurals_and_other_names_do_not_matter(said, name):
    assert glossary(said).name == name


@pytest.mark.parametrize(
    ("said", "near"), [("indexr", "lightning indexer"), ("prefil", "prefill"), ("mantissa", "FP8 E4M3"), ("zzz", "wb.glossary"),
                       ("", "wb.glossary"), (7, "by its name")]
)  # fmt: skip
def test_an_unknown_word_is_one_clear_error_with_near_ones(said, near):
    with pytest.raises(InputError, match=re.escape(near)):
        glossary(said)


def test_it_shows_itself_escaped_and_as_plain_text():
    term = Term("<b>", "A & b.", "a < b", "general knowledge", ("x",))
    assert "&lt;b&gt;" in term._repr_html_() and "a &lt; b" in term._repr_html_() and "A &amp; b." in term._repr_html_()
    assert "<b> (x): A & b." in str(term)


def test_the_list_is_narrowed_by_what_is_typed_named_terms_first():
    widget = glossary()
    assert isinstance(widget, GlossarySearch) and set(widget.found) == set(TERMS)
    widget.query.value = "WINDOW"
    assert widget.found[0].name == "sliding window" and "CSA" not in [term.name for term in widget.found]
    assert {"ring"} <= {term.name for term in widget.found} < {term.name for term in TERMS}
    widget.query.value = "<i>nothing"
    assert widget.found == () and "&lt;i&gt;nothing" in widget.list.value
    assert f"0 of {len(TERMS)}" in widget.list.value


def test_the_public_name_is_the_function_whatever_was_imported_before():
    assert wb.glossary is glossary
