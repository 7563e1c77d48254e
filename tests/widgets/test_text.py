"""The explorer's text without a browser: searching shows matches and leaves the query alone, choosing one moves it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.tiles import sparse_trace
from tests.synthetic import synthetic_trace
from tests.widgets.fakes import FakeRun, eventually
from workbench.decoded import NOTE
from workbench.figures.text import TEXT_BYTES
from workbench.widgets.attention import AttentionExplorer
from workbench.widgets.text import FindBar, TextPanel

LENGTH = 1999


@pytest.fixture
def explorer() -> AttentionExplorer:
    return explorer_of(with_words({40: " Zebra", 41: " crossing", 700: " zebra", 1990: " ZEBRA"}))


def with_words(words: dict[int, str]) -> Any:
    trace = synthetic_trace(LENGTH, seed=3, kinds=("csa",), heads=1)
    texts = list(trace.token_texts)
    for t, word in words.items():
        texts[t] = word
    return replace(trace, token_texts=tuple(texts))


def explorer_of(trace: Any) -> AttentionExplorer:
    widget = AttentionExplorer(trace)
    widget.session.choose_token(1400)
    return widget


def from_page(panel: TextPanel, **message: Any) -> None:
    panel.find._handle_custom_msg(message, [])


def shown(panel: TextPanel) -> str | None:
    """The token that the page scrolls to, if not the query."""
    found = re.findall(r'data-token="(\d+)"[^>]* data-show', panel.text.html)
    assert len(found) <= 1
    return found[0] if found else None


def test_typing_counts_the_matches_and_shows_the_first_without_moving_the_query(explorer):
    panel, state = explorer.text_panel, (explorer.session.token, explorer.map.sequence, explorer.line.value)
    assert 'data-token="40"' not in panel.text.html and not panel.find.found
    panel.find.needle = "zebra"
    assert panel.find.told == "1 of 3" and panel.find.found and shown(panel) == "40"
    assert (explorer.session.token, explorer.map.sequence, explorer.line.value) == state
    assert 'data-token="1400"' in panel.text.html  # the query's surroundings stay


def test_next_and_previous_go_round(explorer):
    panel = explorer.text_panel
    panel.find.needle = "zebra"
    seen = []
    for by in (1, 1, 1, -1, -1):
        from_page(panel, type="go", by=by)
        seen.append((panel.find.told, shown(panel)))
    assert seen == [("2 of 3", "700"), ("3 of 3", "1990"), ("1 of 3", "40"), ("3 of 3", "1990"), ("2 of 3", "700")]
    assert explorer.session.token == 1400


def test_a_match_may_span_tokens_and_case_may_matter(explorer):
    panel = explorer.text_panel
    panel.find.needle = "bra cross"
    assert panel.find.told == "1 of 1" and panel.matches == [(40, 41)]
    panel.find.needle = "ZEBRA"
    assert panel.find.told == "1 of 3"
    panel.find.match_case = True
    assert panel.find.told == "1 of 1" and shown(panel) == "1990"


def test_what_is_not_there_says_so_and_an_empty_field_says_nothing(explorer):
    panel = explorer.text_panel
    panel.find.needle = "quagga.*"
    assert (panel.find.told, panel.find.found, shown(panel)) == ("not found", False, None)
    from_page(panel, type="go", by=1)
    from_page(panel, type="choose")
    assert explorer.session.token == 1400
    panel.find.needle = ""
    assert (panel.find.told, shown(panel)) == ("", None)


def test_the_match_becomes_the_query_and_the_text_then_shows_the_query(explorer):
    panel = explorer.text_panel
    panel.find.needle = "zebra crossing"
    from_page(panel, type="choose")
    assert explorer.session.token == explorer.map.mark * explorer.tile.pooling[0] + 1 == 41
    assert shown(panel) is None and panel.find.told == "1 of 1"
    assert re.search(r'class="[^"]*m at[^"]*" data-token="40"', panel.text.html)  # still marked


def test_a_new_layer_or_head_keeps_the_match_in_sight_and_another_query_does_not():
    trace = synthetic_trace(97, seed=11)
    trace = replace(trace, token_texts=tuple(" zebra" if t == 9 else text for t, text in enumerate(trace.token_texts)))
    explorer = explorer_of(replace(trace))
    explorer.session.choose_token(90)
    panel = explorer.text_panel
    panel.find.needle = "zebra"
    explorer.layer.value, explorer.head.value = 2, 1
    assert shown(panel) == "9"
    panel.text._handle_custom_msg({"type": "click", "token": "80"}, [])
    assert shown(panel) is None and explorer.session.token == 80


def test_each_search_and_each_step_sends_the_text_once(explorer):
    panel = explorer.text_panel
    for act in (
        lambda: setattr(panel.find, "needle", "zebra"),
        lambda: from_page(panel, type="go", by=1),
        lambda: from_page(panel, type="choose"),
    ):
        before, strip = panel.text.sequence, explorer.strip.outputs
        act()
        assert panel.text.sequence == before + 1
    assert explorer.strip.outputs != strip  # choosing redraws what depends on the query


def test_in_a_growing_text_new_matches_are_counted_and_the_one_gone_to_stays():
    texts = [" zebra" if t in (10, 30, 45, 58) else " x" for t in range(62)]
    traces = {n: replace(synthetic_trace(n, seed=14), token_texts=tuple(texts[: n + 1])) for n in (41, 50, 61)}
    run = FakeRun(traces[41])
    explorer = AttentionExplorer(run)
    panel = explorer.text_panel
    panel.find.needle = "zebra"
    from_page(panel, type="go", by=1)
    assert (panel.find.told, shown(panel)) == ("2 of 2", "30")
    run.becomes(trace=traces[50])
    eventually(lambda: panel.find.told == "2 of 3", "the third match is counted")
    assert shown(panel) == "30" and explorer.session.token == 49  # the query follows the run, the text stays at the match
    run.becomes(trace=traces[61], state="done")
    eventually(lambda: panel.find.told == "2 of 4", "the fourth match is counted")


def test_arrow_keys_step_over_a_character_of_several_tokens():
    trace = synthetic_trace(31, seed=2)
    texts = list(trace.token_texts)
    texts[8:11] = ["\ufffd"] * 3
    explorer = AttentionExplorer(replace(trace, token_texts=tuple(texts), notes={NOTE: [[8, 10, "🚀"]]}))
    explorer.session.choose_token(7)
    tokens = []
    for by in (1, 1, -1, -1):
        explorer.text._handle_custom_msg({"type": "move", "by": by}, [])
        tokens.append(explorer.session.token)
    assert tokens == [10, 11, 10, 7]
    explorer.text_panel.find.needle = "🚀"
    assert shown(explorer.text_panel) == "10" and explorer.text_panel.find.told == "1 of 1"


def test_with_thousands_of_matches_in_a_long_text_the_view_stays_within_its_budget():
    explorer = AttentionExplorer(sparse_trace(65_536))
    panel = explorer.text_panel
    sizes = []
    for needle in ("e", "key of", "the"):
        panel.find.needle = needle
        from_page(panel, type="go", by=-1)  # the last one, far from the query
        explorer.session.choose_token(30_000)
        from_page(panel, type="go", by=1)
        sizes.append(len(panel.text.html.encode()))
        assert len(panel.matches) > 100 and panel.find.told.startswith("1 of ")
    assert max(sizes) <= TEXT_BYTES + 4_000  # and the style


def test_the_script_is_small_and_sets_text_as_text():
    assert len(FindBar._esm) < 3_500 and "innerHTML" not in FindBar._esm
