"""The slots of one layer: what lies where follows live caches, and the page shows it escaped."""

from __future__ import annotations

import re

import pytest
import torch

from tests.synthetic import FAMILIES, synthetic_trace
from workbench.checkpoint import load
from workbench.errors import InputError
from workbench.figures.slots import cache_slots_html, slots_of

TRACE = synthetic_trace(97)


@pytest.mark.parametrize("length", [5, 16, 17, 39, 40, 127, 128, 131])
def test_slots_are_those_of_a_live_cache(length):
    model = load("tiny-v4", device="cpu")
    ids = torch.randint(model.config.vocab_size, (1, 160), generator=torch.Generator().manual_seed(0))
    trace = synthetic_trace(160, window=model.config.sliding_window, hca_ratio=128)
    cache, alone = model.new_cache(), model.new_cache()
    with torch.inference_mode():
        model(ids[:, :length], cache)
        for t in range(length):
            model(ids[:, t : t + 1], alone)
    for layer in trace.layers:
        slots, live = slots_of(layer, length), cache.layers[layer.layer]
        assert len(slots["window"]) == live.window.held
        assert len(slots["entries"]) == (live.compressed.length if live.compressed else 0)
        assert len(slots["open"]) == (live.tail.count if live.tail else 0)
        # the newest key is in the slot we name: it alone changes when one more token comes
        before = alone.layers[layer.layer].window._ring.clone()
        slot = slots_of(layer, length + 1)["window"].index(length)
        with torch.inference_mode():
            copy = model.new_cache()
            model(ids[:, : length + 1], copy)
        changed = (copy.layers[layer.layer].window._ring[0, : live.window.held] - before[0, : live.window.held]).abs().amax(-1)
        assert torch.nonzero(changed > 1e-3).flatten().tolist() == ([slot] if live.window.held == layer.window else [])


def cells(html: str) -> list[str]:
    return re.findall(r"class='c ([^']*)' title='([^']*)'", html)


def test_the_newest_token_and_the_slot_that_goes_next_stand_out():
    html = cache_slots_html(TRACE, 1, 40)  # window 7, CSA ratio 4
    marked = dict((title, marks) for marks, title in cells(html) if marks)
    assert marked["slot 4: token 39"] == "new" and marked["slot 5: token 33"] == "next"
    assert marked["entry 9, reads tokens 32 to 39"] == "new", "the token that fills a block makes its entry"
    assert "empty: its last token has just closed it" in html


def test_before_the_window_is_full_slots_are_free():
    html = cache_slots_html(TRACE, 1, 3)
    assert "3 of 7 slots filled" in html and html.count("class='c free'") == 4 + 1 and "none yet" in html


def test_an_open_block_shows_its_tokens():
    titles = [title for _, title in cells(cache_slots_html(TRACE, 2, 19))]  # HCA ratio 16
    assert [title for title in titles if title.startswith("place")][:4] == [
        "place 0: token 16", "place 1: token 17", "place 2: token 18", "place 3: free",
    ]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_picture(family):
    trace = synthetic_trace(40, kinds=FAMILIES[family])
    for layer in trace.layers:
        html = cache_slots_html(trace, layer.layer, 40)
        assert ("a row for every token: 40" in html) == layer.of_tokens
        assert len(html) < 40_000


def test_token_texts_are_escaped():
    html = cache_slots_html(TRACE, 1, 97) + cache_slots_html(TRACE, 1, 50)
    assert "<b>" not in html and "<small>" in html


@pytest.mark.parametrize("length", [0, 98, True, 3.0])
def test_a_length_the_trace_does_not_have_is_one_clear_error(length):
    with pytest.raises(InputError, match="1 to 97"):
        cache_slots_html(TRACE, 1, length)


def test_a_layer_it_does_not_have_is_one_clear_error():
    with pytest.raises(InputError, match="layers"):
        cache_slots_html(TRACE, 9, 5)
