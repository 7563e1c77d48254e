"""Searching a trace's text finds what a naive search finds, and characters spelled by several tokens are put together."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

import workbench as wb
from tests.synthetic import synthetic_trace
from workbench.decoded import NOTE, Decoded, SpelledCharacters, decoded

# Letters that fold to several or to others, that combine, join or run from right to left, and what must not be a pattern.
LETTERS = ("a", "A", "b", "ß", "ẞ", "s", "S", "İ", "i", "I", "ı", "\u0307", "e", "é", "e\u0301", "ﬃ", "f", "ς", "Σ", "σ")
LETTERS += ("ש", "ל", "س", "لا", "👩\u200d🚀", "🔑", "🚀", " ", "\n", ".", "*", "\\", "\ufffd", "ǰ")
TRACE = synthetic_trace(41, seed=1)


def of_texts(texts, notes=None):
    ids = np.zeros(len(texts), np.int32)
    return wb.Trace("bare", "no model", "CPU", {}, ids, tuple(texts), len(texts), notes=notes or {})


def naive(texts: list[str], needle: str, match_case: bool) -> list[tuple[int, int]]:
    """Every character by itself: from each place on, the shortest stretch whose folded characters are the folded needle."""
    owner = [t for t, text in enumerate(texts) for _ in text]
    whole = "".join(texts)

    def same(text: str) -> str:
        return text if match_case else "".join(c.casefold() for c in text)

    found, at = [], 0
    while needle and at < len(whole):
        end = next((e for e in range(at + 1, len(whole) + 1) if same(whole[at:e]) == same(needle)), None)
        if end is None:
            at += 1
            continue
        found.append((owner[at], owner[end - 1]))
        at = end
    return found


@pytest.mark.parametrize("seed", range(60))
def test_it_finds_what_a_naive_search_finds(seed):
    rng = np.random.default_rng(seed)
    some = [LETTERS[i] for i in rng.choice(len(LETTERS), rng.integers(2, 7), replace=False)]
    texts = ["".join(rng.choice(some, rng.integers(0, 4))) for _ in range(23)]
    text = Decoded(of_texts(texts))
    whole = "".join(texts)
    for _ in range(12):
        first = int(rng.integers(0, max(1, len(whole))))
        cut = whole[first : first + int(rng.integers(0, 5))]
        drawn = "".join(rng.choice(some, rng.integers(1, 4)))
        for needle in (cut, cut.upper(), cut.swapcase(), drawn):
            for match_case in (False, True):
                assert text.find(needle, match_case) == naive(texts, needle, match_case), (texts, needle)


def test_letters_that_fold_to_two_are_found_whole_or_not_at_all():
    text = Decoded(of_texts([" Stra", "ße", " İz", "mir"]))
    assert text.find("STRASSE") == text.find("straße") == [(0, 1)] and text.find("strasse", True) == []
    assert text.find("s") == [(0, 0)]  # not half of the ß
    assert text.find("iz") == [] and text.find("i\u0307zmir") == text.find("İZMIR") == [(2, 3)]


def test_nothing_is_found_of_nothing_and_a_pattern_is_no_pattern():
    text = Decoded(of_texts(["a.b", "", "", "c.*", "(d"]))
    assert text.find("") == [] and text.find("zebra") == [] and text.find("a.b" * 50) == []
    assert text.find("b" + "c") == [(0, 3)] and text.find(".*(") == [(3, 4)] and text.find(".") == [(0, 0), (3, 3)]
    assert text.find("[a-z]") == []


def spelled_out(text: str) -> tuple[list[int], list[str]]:
    """Bytes as tokens, as a tokenizer without merges has them."""
    ids = list(text.encode())
    return ids, [decode([i]) for i in ids]


def decode(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def spell(ids, texts):
    spelled = SpelledCharacters(decode)
    for length in range(0, len(ids) + 1, 3):  # as it grows
        spelled.update(ids[:length], texts[:length])
    spelled.update(ids, texts)
    return spelled.found


@pytest.mark.parametrize("text", ["a🔑b", "👩\u200d🚀", "e\u0301 שלום سلام", "naïve ß", "plain", "🇩🇪🚀"])
def test_bytes_are_put_together_to_what_was_written_and_found(text):
    ids, texts = spelled_out(text)
    trace = of_texts(texts, {NOTE: spell(ids, texts)})
    read = Decoded(trace)
    assert read.whole == text
    for character in text:
        (first, last), *_ = read.find(character, match_case=True)
        assert decode(ids[first : last + 1]) == character and read.unit(last) == (first, last)
    assert read.find(text) == [(0, len(ids) - 1)]


def test_bytes_that_spell_nothing_stay_and_do_not_swallow_what_follows():
    ids = [0xF0, 0x9F, ord("a"), 0xFF, *"🔑".encode(), *"\ufffd".encode(), ord("b"), 0xC3]
    texts = [decode([i]) for i in ids]
    assert spell(ids, texts) == [[4, 7, "🔑"]]


def test_a_run_notes_what_its_tokens_spell_and_a_saved_trace_keeps_it(tmp_path):
    model = wb.load("tiny-v4", device="cpu")
    prompt = "The שלום key 🔑 is é"
    run = wb.run(model, prompt, max_new_tokens=1)
    assert run.wait(120)
    loaded = wb.Trace.load(run.trace.save(tmp_path / "trace"))
    for trace in (run.trace, loaded):
        assert "\ufffd" in "".join(trace.token_texts) and decoded(trace).whole.startswith(prompt)
        (first, last), *_ = decoded(trace).find("🔑")
        assert last > first and decoded(trace) is decoded(trace)


@pytest.mark.parametrize(
    "noted", [7, "x", [[1, 2]], [[5, 3, "x"]], [[1, 99, "x"]], [[-4, 2, "x"]], [["a", 2, "x"]], [[1, 2, 3]]]
)
def test_notes_of_a_foreign_trace_that_make_no_sense_are_left_alone(noted):
    assert Decoded(replace(TRACE, notes={NOTE: noted})).whole == "".join(TRACE.token_texts[:41])


def test_characters_that_overlap_are_taken_once():
    read = Decoded(of_texts(["\ufffd"] * 6, {NOTE: [[0, 2, "🔑"], [2, 3, "x"], [4, 5, "é"]]}))
    assert read.whole == "🔑\ufffdé" and [read.unit(t) for t in range(6)] == [(0, 2)] * 3 + [(3, 3)] + [(4, 5)] * 2


def test_a_search_in_a_long_text_costs_less_than_joining_it_anew():
    """The text is joined and folded once; what comes after is a plain search in it."""
    read = Decoded(of_texts(["The", " Key", " of", " box"] * 16_384))
    start = time.perf_counter()
    assert len(read.find("key of")) == 16_384
    first = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(5):
        assert read.find("zebra") == []
    assert (time.perf_counter() - start) / 5 < first
