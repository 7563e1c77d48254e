"""The coloured text: the right tokens, the right strength, and nothing a token holds gets out of its place."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.synthetic import synthetic_trace
from workbench.errors import InputError
from workbench.figures import style
from workbench.figures.query import describe
from workbench.figures.text import painted_mass, text_view
from workbench.widgets.attention import AttentionExplorer

TRACE = synthetic_trace(97, seed=6, needle=21)
VIEW_BYTES = 250_000


class Tokens(HTMLParser):
    """Every element that carries ``data-token``, with its text, and every tag seen."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: dict[int, dict[str, str]] = {}
        self.tags: set[str] = set()
        self._open: int | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        named = {name: value or "" for name, value in attrs}
        if "data-token" in named:
            self._open = int(named["data-token"])
            self.found[self._open] = named | {"text": "", "tag": tag}

    def handle_endtag(self, tag: str) -> None:
        if tag == "bdi":
            self._open = None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.found[self._open]["text"] += data


def test_every_token_is_shown_escaped_and_isolated():
    page = Tokens(text_view(TRACE, 1, "max", 90))
    assert list(page.found) == list(range(97))
    for t, token in page.found.items():
        assert token["tag"] == "bdi" and token["text"].strip("·⏎").strip() == TRACE.token_texts[t].strip()
    assert page.tags <= {"style", "div", "p", "bdi", "i", "br", "span"}


def test_a_hostile_token_stays_text():
    texts = ("<script>alert(1)</script>", "\"><img src=x onerror='alert(1)'>", "\u202eabc", "&lt;", *TRACE.token_texts[4:])
    page = text_view(replace(TRACE, token_texts=texts), 1, "max", 90)
    tokens = Tokens(page)
    assert tokens.tags <= {"style", "div", "p", "bdi", "i", "br", "span"} and "\u202e" not in page
    assert tokens.found[0]["text"] == texts[0] and tokens.found[3]["text"] == "&lt;"
    assert set(tokens.found[1]) <= {"data-token", "class", "style", "title", "text", "tag"}


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("head", ["mean", 1])
def test_a_tokens_mass_is_its_window_share_and_that_of_its_entries(layer, head):
    record, query = TRACE.layer(layer), 90
    window, entries = painted_mass(record, head, query)
    for t in range(97):
        assert window[t] == pytest.approx(describe(TRACE, layer, head, query, t)["probability"])
    expected = np.zeros(97)
    for entry in range(record.visible_entries(query)):
        told = describe(TRACE, layer, head, query, 97 + entry)
        expected[list(told["sources"])] += told["probability"]
    np.testing.assert_allclose(entries, expected, atol=1e-6)


def test_hca_entries_recorded_pooled_are_painted_over_all_they_stand_for():
    trace = synthetic_trace(4409, seed=7, kinds=("hca",), heads=1, window=3, hca_ratio=64)
    _, entries = painted_mass(trace.layer(0), 0, 4400)
    np.testing.assert_allclose(entries[:256], float(trace.layer(0).entry_probs[4400, 0, 0]), atol=1e-6)
    assert not entries[64 * trace.layer(0).visible_entries(4400) :].any()


def test_the_needle_is_coloured_as_an_entry_and_stronger_than_the_rest():
    page = Tokens(text_view(TRACE, 1, "max", 90))
    strength = {t: int(match[1]) for t, x in page.found.items() if (match := re.match(r"--a:(\d+)", x.get("style", "")))}
    assert max(strength, key=lambda t: strength[t]) in range(16, 24) and strength[21] == max(strength.values())
    assert page.found[21]["class"] == "e" and "q" in page.found[90]["class"] and page.found[95]["class"] == "f"


def test_a_long_text_shows_the_query_the_sources_and_says_what_it_leaves_out():
    trace = synthetic_trace(4409, seed=8, kinds=("csa",), heads=1, window=3, needle=1001)
    page = text_view(trace, 0, "max", 3000)
    shown = Tokens(page).found
    assert {1001, 2400, 3000, 3600} <= set(shown) and not {2399 - 600, 3601} & set(shown)
    left_out = sum(int(count.replace(",", "")) for count in re.findall(r"… ([\d,]+) tokens left out", page))
    assert left_out + len(shown) == 4409


def test_long_tokens_do_not_break_the_byte_budget():
    trace = synthetic_trace(1999, seed=9, kinds=("csa",), heads=1)
    page = text_view(replace(trace, token_texts=("<&>\"'" * 80,) * 1999), 0, "max", 1000)
    assert len(page.encode()) <= VIEW_BYTES and 1000 in Tokens(page).found


def test_matches_are_marked_and_the_one_gone_to_is_shown_though_far_away():
    trace = synthetic_trace(4409, seed=8, kinds=("csa",), heads=1, window=3, needle=1001)
    matches = [(2, 3), (3000, 3000), (4400, 4402)]
    page = text_view(trace, 0, "max", 3000, matches, 2, show_match=True)
    shown = Tokens(page).found
    marked = {t: token["class"].split() for t, token in shown.items() if "m" in token.get("class", "").split()}
    assert set(marked) == {3000, 4400, 4401, 4402} and "q" in marked[3000]  # the first is far from all that is shown
    assert [t for t, classes in marked.items() if "at" in classes] == [4400, 4401, 4402]
    assert [t for t, token in shown.items() if "data-show" in token] == [4400]
    assert "data-show" not in text_view(trace, 0, "max", 3000, matches, 2) and 2 not in shown
    plain = Tokens(text_view(trace, 0, "max", 3000)).found
    assert not {4400, 4402} & set(plain) and "m" not in plain[3000]["class"].split()


def test_a_match_as_long_as_the_text_does_not_break_the_budget():
    trace = replace(synthetic_trace(4409, seed=8, kinds=("csa",), heads=1), token_texts=("<&>\"'" * 8,) * 4410)
    assert len(text_view(trace, 0, "max", 4400, [(0, 4408)], 0).encode()) <= VIEW_BYTES


def test_tokens_that_spell_a_character_together_are_shown_as_one():
    texts = ("\ufffd",) * 4 + TRACE.token_texts[4:]
    notes = {"characters": [[0, 2, "🔑"]]}
    page = text_view(replace(TRACE, token_texts=texts, notes=notes), 1, "max", 1)
    shown = Tokens(page).found
    assert list(shown) == list(range(2, 97)) and shown[2]["text"] == "🔑" and shown[3]["text"] == "\ufffd"
    assert "q" in shown[2]["class"].split() and "tokens 0–2" in shown[2]["title"]


def test_halves_of_characters_and_controls_make_a_page_that_can_be_sent():
    odd = ("\ud83d", "\udfff x", "\x00", "\x1b[31m", "\u2066", "<b>\ud800")
    trace = replace(TRACE, token_texts=tuple(odd[i % len(odd)] for i in range(98)), model="\ud800")
    for layer in range(4):
        page = text_view(trace, layer, "max", 90)
        assert page.encode() and "<b>\ufffd" not in page and "\x00" not in page and "\x1b" not in page
    explorer = AttentionExplorer(trace)
    explorer.look(1, "max", 90)
    for shown in (explorer.text_panel.text.html, explorer.title.value, explorer.facts.value, str(explorer.strip.outputs)):
        shown.encode()


def test_a_token_the_trace_does_not_have_is_refused():
    with pytest.raises(InputError, match=r"0\.\.96, got 97"):
        text_view(TRACE, 1, "max", 97)


def test_white_space_and_controls_are_made_visible_on_one_line():
    assert style.visible_text(" a\tb\n\u202e\x00") == "·a⇥b⏎\ufffd\ufffd"
    assert style.visible_text("abcdef", 4) == "abc…" and style.visible_text("👩\u200d🚀") == "👩\u200d🚀"


def test_the_colour_map_only_gets_brighter():
    luminance = style.colour_map(255).astype(float) @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(luminance) > -0.5).all() and luminance[-1] - luminance[0] > 150
