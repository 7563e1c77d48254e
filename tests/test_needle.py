"""Hiding a needle, finding it again in a trace, and how often that works, on a shipped model and on made-up traces."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

import workbench as wb
from tests.synthetic import synthetic_trace
from workbench.checkpoint import load, shipped_names
from workbench.errors import InputError, WorkbenchError
from workbench.live import encode, run
from workbench.needle import chance, find_needle, hide_needle, needle_rates, needle_trials, sample_text, untrained_twin
from workbench.trace import Trace
from workbench.trace_files import SHIPPED
from workbench.training import sample, score, tasks

TEXT = "The quick brown fox jumps over the lazy dog. " * 60


@pytest.fixture(scope="module", params=shipped_names())
def model(request):
    return load(request.param, device="cpu")


@pytest.fixture(scope="module")
def one():
    """Any shipped model: for what depends on its tokenizer only."""
    return load("tiny-v4", device="cpu")


def text_of(model, ids) -> str:
    return model.tokenizer.decode(list(ids))


# --- hiding ---


@pytest.mark.parametrize("depth", [0.0, 0.31, 1.0])
def test_the_sentence_stands_at_its_depth_between_whole_words_and_the_question_ends_the_prompt(one, depth):
    needle = hide_needle(one, TEXT, "river", "52", depth, tokens=211)
    text = text_of(one, needle.ids)
    assert len(needle.ids) <= 211 and text.endswith(" The code of river is")
    assert text_of(one, [needle.ids[needle.position]]) == " 52" == text_of(one, needle.value_ids)
    assert text.replace(" The code of river is 52.", "").replace(" The code of river is", "") in TEXT
    assert needle.position / 211 == pytest.approx(depth, abs=0.07)  # a sentence of 7 tokens, a question of 5, up to 8 to a word
    assert [text_of(one, [needle.ids[t]]) for t in needle.queries] == [" is", " river"]


def test_other_words_and_values_of_several_tokens_are_found_where_they_stand(one):
    needle = hide_needle(
        one, TEXT, "apple", "843", 0.5, 97, sentence=" {value} it is, for {key}.", question=" So {key} has the code"
    )
    first = needle.position
    assert len(needle.value_ids) > 1 and needle.ids[first : first + len(needle.value_ids)] == needle.value_ids
    assert text_of(one, needle.value_ids) == " 843" and text_of(one, needle.ids).endswith(" So apple has the code")
    assert text_of(one, [needle.ids[needle.queries[-1]]]) == " apple"


def test_without_a_length_the_text_stays_whole_up_to_the_limit(one):
    assert len(hide_needle(one, TEXT).ids) == len(encode(one, TEXT)) + 12
    with pytest.raises(InputError, match=r"the text has [\d]+ tokens, and with the needle at most 4084 fit"):
        hide_needle(one, TEXT * 8)
    assert len(hide_needle(one, "", tokens=12).ids) == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": " "}, "give the needle a key and a value"),
        ({"value": ""}, "give the needle a key and a value"),
        ({"depth": 1.01}, "depth must lie between 0 .* got 1.01"),
        ({"tokens": 11}, "at most 0 fit"),
        ({"sentence": " The code of {key}."}, "must say {value}"),
    ],
)
def test_what_cannot_be_hidden_is_refused(one, change, message):
    with pytest.raises(InputError, match=message):
        hide_needle(one, TEXT, **{"tokens": 97} | change)


def test_the_sample_text_is_longer_than_any_prompt(one):
    assert len(encode(one, sample_text())) > 2 * 4096


# --- finding ---


def noted(trace: Trace, **changes) -> Trace:
    """``trace`` with a needle at token 21, asked for by its last two prompt tokens; the answer is what the trace chose."""
    end = trace.prompt_length - 1
    told = {"position": 21, "key": "k", "value": "v", "queries": [end, end - 1]}
    chosen = [int(i) for i in trace.next_ids[trace.step_of_token(end) :][:1]]
    return replace(trace, notes={"needle": told | {"value_ids": chosen} | changes})


def test_a_needle_is_ranked_by_index_score_and_found_when_its_entry_is_kept():
    trace = noted(synthetic_trace(97, seed=11, needle=21))
    found = find_needle(trace)
    for layer in found["layers"]:
        record = trace.layer(layer["layer"])
        kept, scores = record.selected[layer["query"]], record.index_scores(layer["query"])
        assert layer["entries"] == [21 // record.ratio, 21 // record.ratio + 1] and layer["visible"] == len(scores)
        order = np.argsort(-scores).tolist()
        assert layer["rank"] == 1 + min(order.index(e) for e in layer["entries"])
        assert layer["found"] == bool(set(layer["entries"]) & set(kept.tolist())) and layer["found"]
        assert layer["best_head_probability"] > 0
    assert found["best_layer"] in [layer["layer"] for layer in found["layers"]] and found["right"]
    assert [layer["layer"] for layer in found["layers"]] == [x.layer for x in trace.layers if x.kind == "csa"]


def test_an_entry_the_indexer_leaves_out_is_not_found_and_gets_no_attention():
    trace = noted(synthetic_trace(97, seed=11, needle=21), position=61)
    left_out = [layer for layer in find_needle(trace)["layers"] if not layer["found"]]
    assert left_out and all(layer["best_head_probability"] == 0 and layer["rank"] > 5 for layer in left_out)


def test_a_needle_in_an_unfinished_block_has_no_entry_yet():
    trace = synthetic_trace(97, seed=11, needle=21, prompt_length=74)
    found = find_needle(noted(trace, position=73))
    assert all(layer["rank"] is None and not layer["found"] and layer["chance"] == 0 for layer in found["layers"])
    assert found["best_layer"] is None and found["best_query"] == 73


def test_a_wrong_answer_and_a_missing_one_are_told_apart():
    trace = synthetic_trace(97, seed=11, needle=21)
    wrong = find_needle(noted(trace, value_ids=[-7]))
    assert not wrong["right"] and wrong["answer"] == trace.token_texts[trace.prompt_length].strip()
    silent = replace(trace, next_ids=np.full_like(trace.next_ids, -1))
    assert find_needle(noted(silent, value_ids=[1]))["answer"] is None


@pytest.mark.parametrize("notes", [{}, {"needle": "lost"}, {"needle": {"position": 3}}])
def test_a_trace_without_a_needle_says_so(notes):
    with pytest.raises(InputError, match="this trace has no needle"):
        find_needle(replace(synthetic_trace(47), notes=notes))


@pytest.mark.parametrize(
    ("visible", "kept", "right"), [(7, 3, 2), (11, 1, 2), (5, 5, 2), (4, 3, 2), (9, 4, 1), (6, 2, 0), (0, 0, 0)]
)
def test_chance_counts_all_ways_to_draw(visible, kept, right):
    draws = list(combinations(range(visible), kept))
    lucky = sum(any(entry < right for entry in draw) for draw in draws)
    assert chance(visible, kept, right) == pytest.approx(lucky / len(draws))


# --- how often ---


def test_a_trained_model_finds_needles_even_with_one_entry_and_an_untrained_one_does_not(model):
    least = 1 if model.config.index_topk else None  # GQA attends to every token
    trained, one_entry = needle_rates(model, sequences=6), needle_rates(model, least, sequences=6)
    untrained = needle_rates(untrained_twin(model), least, sequences=6)
    assert trained["recall"] > 0.8 and one_entry["recall"] > 0.8 and untrained["recall"] < 0.2
    if least is None:
        assert trained["hits"] == {} and trained["hit_chance"] is None
        return
    look = max(one_entry["hits"], key=one_entry["hits"].get)
    assert one_entry["hits"][look] > 0.8 and untrained["hits"][look] < 0.4  # chance is about 6 %, of some 20 questions
    assert one_entry["hit_chance"] < trained["hit_chance"] < 0.7 and one_entry["recall_chance"] == pytest.approx(1 / 90)
    assert untrained["model"].startswith(f"{model.name} untrained (toy, untrained), measured on CPU")


def test_trials_find_the_trained_wording_and_lose_some_other(model):
    said, asked = tasks.needle("{key}", "{value}"), tasks.question("{key}")
    as_trained = needle_trials(model, trials=6)
    assert as_trained["recall"] > 0.8
    assert max(as_trained["hits"].values()) > 0.8 if model.config.index_topk else not as_trained["hits"]
    others = [
        needle_trials(model, said, " What is the code of {key}? It is", trials=6),
        needle_trials(model, " {value} is the code of {key}.", asked, trials=6),
        needle_trials(model, said, asked, 3, trials=6),
    ]
    assert min(other["recall"] for other in others) < 0.4
    assert others[-1]["recall_chance"] == pytest.approx(1 / 900)


@pytest.mark.parametrize("name", sorted({*shipped_names()} - {"tiny-gqa"}))
def test_trials_are_the_same_for_the_same_seed_and_count_like_a_run(name):
    model = load(name, device="cpu")
    seven = needle_trials(model, trials=5, tokens=151, topk=2, seed=3)
    assert seven == needle_trials(model, trials=5, tokens=151, topk=2, seed=3)
    rng, hits, right = np.random.default_rng(3), 0, 0
    text, far = sample_text(), score.far_distance(model)
    for trial in range(5):  # the slow way: one recorded run after another
        start, key = int(rng.integers(len(text) - 8 * 151)), str(rng.choice(tasks.KEYS))
        value, depth = str(int(10 + rng.random() * 90)), (trial + 0.5) / 5 * (1 - 2 * far / 151)
        needle = hide_needle(model, text[start : start + 8 * 151], key, value, depth, 151)
        live = run(model, needle.ids, max_new_tokens=1, topk=2)
        assert live.wait(60) and live.state == "done"
        layer = next(x for x in live.trace.layers if x.indexes)
        own = needle.position // layer.ratio
        wanted = {own, own + 1} if layer.kind == "csa" else {own}
        hits += bool(wanted & set(layer.selected[len(needle.ids) - 1].tolist()))
        right += find_needle(live.trace, needle)["right"]
    assert (seven["hits"][f"{layer.layer} end"], seven["recall"]) == (hits / 5, right / 5)


@pytest.mark.parametrize("change", [{"trials": 0}, {"digits": 0}, {"tokens": 50}])
def test_trials_that_mean_nothing_are_refused(one, change):
    with pytest.raises(InputError, match="needs at least 1 trial, 1 digit and"):
        needle_trials(one, **change)


def test_rates_need_a_tokenizer(one):
    silent = untrained_twin(one)
    silent.tokenizer = None
    with pytest.raises(InputError, match="no tokenizer"):
        needle_rates(silent)


# --- the recorded trace that ships ---


def test_the_shipped_trace_shows_a_needle_that_is_found_far_beyond_the_window():
    trace = wb.Trace.load("needle")
    assert sum(path.stat().st_size for path in (SHIPPED / "needle").iterdir()) <= 500_000
    assert trace.origin == "recorded" and trace.what == "toy, trained" and "toy, trained" in trace.label
    found, note = find_needle(trace), trace.notes["needle"]
    assert found["right"] and trace.prompt_length - note["position"] > 5 * trace.config["sliding_window"]
    best = next(layer for layer in found["layers"] if layer["layer"] == found["best_layer"])
    assert best["found"] and best["best_head_probability"] > 0.5
    assert trace.notes["look_at"] == {"token": found["best_query"], "layer": found["best_layer"]}


def test_a_shipped_trace_is_loaded_by_name_unless_a_folder_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    synthetic_trace(47).save(tmp_path / "needle")
    assert wb.Trace.load("needle").model == "synthetic-v4"
    with pytest.raises(InputError, match=r"no trace 'nothing': give a folder .* a shipped trace .*'needle'"):
        wb.Trace.load("nothing")


def test_recording_the_sample_saves_a_trace_with_its_needle(tmp_path, one):
    trace = sample.record_sample(one.name, tmp_path / "again")
    again = wb.Trace.load(tmp_path / "again")
    assert again.token_texts == trace.token_texts and find_needle(again)["right"]


def test_a_model_that_misses_the_sample_saves_nothing(tmp_path, one, monkeypatch):
    monkeypatch.setattr(sample, "load", lambda name, device: untrained_twin(one))
    with pytest.raises(WorkbenchError, match="nothing was saved"):
        sample.record_sample("any", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_sample_is_plain_prose():
    text = sample.prose("A first\nsentence.\n\n   code = 1\n\n# A comment.\n\nno capital.\n\nA rule ::= x.\n\nThe end.")
    assert text == "A first sentence. The end."
