"""One entry dropped, forced in or swapped: held against a slow oracle, exact where nothing changes, and the run untouched."""

from __future__ import annotations

import threading
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

import workbench as wb
from tests.slow_reference import CONFIG, SlowV4, random_ids, random_model
from workbench.errors import InputError
from workbench.microscope import Edit, Forks
from workbench.model import one_token
from workbench.model.selection_edits import edited_selections, editing

MODEL = random_model(replace(CONFIG, hc_mult=4))
IDS = random_ids(CONFIG, 1, 34)[0].tolist()
CSA, QUERY = 3, 30
SHIPPED = {name: wb.load(name, device="cpu") for name in ("tiny-v4", "tiny-v41", "tiny-mla-dsa")}
TEXT = wb.sample_text()[:2500]


class EditedSlowV4(SlowV4):
    """The slow model, told what some queries of some layers attend to."""

    told: dict = {}

    def _chosen(self, layer, t, visible):
        return self.told.get((layer, t), visible)


@pytest.fixture(scope="module")
def slow():
    """Before the query is read."""
    model = EditedSlowV4(MODEL)
    model.read(torch.tensor(IDS[:QUERY]))
    return model


def slow_probs(slow, layer, entries, read_at):
    model = deepcopy(slow)
    model.told = {(layer, QUERY): entries}
    logits = model.read(torch.tensor(IDS[QUERY : read_at + 1]))[-1]
    return torch.softmax(torch.from_numpy(logits), -1).numpy()


@pytest.mark.parametrize("read_at", [QUERY, QUERY + 2])
@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("what", ["drop", "drop all", "force", "swap"])
def test_an_edit_is_what_the_slow_model_does_when_told(slow, what, layer, read_at):
    scope = Forks(MODEL, IDS)
    choice = scope.choice(layer, QUERY)
    assert len(choice.kept) == 3 and choice.visible == 7
    out = choice.best_left_out(2)
    drop, force = {
        "drop": (choice.kept[:1], ()),
        "drop all": (choice.kept, ()),
        "force": ((), tuple(out)),
        "swap": (choice.kept[1:2], tuple(out[:1])),
    }[what]
    change = scope.change(Edit(layer, QUERY, drop, force), read_at)
    left = [e for e in choice.kept if e not in drop] + list(force)
    assert sorted(change.kept) == sorted(left)
    np.testing.assert_allclose(change.before, slow_probs(slow, layer, list(choice.kept), read_at), atol=1e-5)
    np.testing.assert_allclose(change.after, slow_probs(slow, layer, left, read_at), atol=1e-5)
    if layer == 3 and read_at > QUERY:  # what the last layer makes of a token reaches no later one
        np.testing.assert_allclose(change.before, change.after, atol=1e-6)
    else:
        assert change.kl_nats > 1e-6


@pytest.mark.parametrize("name", SHIPPED)
def test_an_edit_of_nothing_changes_nothing_to_the_bit(name):
    model = SHIPPED[name]
    scope = Forks(model, TEXT)
    for layer in scope.layers:
        change = scope.change(Edit(layer, 200), read_at=203)
        assert np.array_equal(change.before, change.after) and change.kl_nats == 0
        swapped_back = scope.choice(layer, 200)
        assert change.kept == swapped_back.kept
    with torch.inference_mode():
        plain = torch.softmax(model(torch.tensor([scope.ids[:204]]), logits="last")[0, -1], -1).numpy()
    np.testing.assert_allclose(change.before, plain, atol=1e-5)


@pytest.mark.parametrize("name", SHIPPED)
def test_forcing_in_all_that_was_left_out_is_keeping_everything(name):
    model = SHIPPED[name]
    scope = Forks(model, TEXT)
    layer, query = scope.layers[-1], 150
    choice = scope.choice(layer, query)
    left_out = tuple(choice.best_left_out(choice.visible))
    assert left_out and len(left_out) + len(choice.kept) == choice.visible
    change = scope.change(Edit(layer, query, force=left_out))
    by_entry = np.zeros(choice.visible)
    by_entry[list(change.kept)] = change.mass
    np.testing.assert_allclose(by_entry, choice.mass, atol=1e-5)
    assert 0 < choice.missed_mass < 1
    assert choice.mass[left_out[0]] == max(choice.mass[list(left_out)])


def test_scores_are_those_that_chose():
    for model in (MODEL, SHIPPED["tiny-mla-dsa"]):
        scope = Forks(model, IDS)
        choice = scope.choice(scope.layers[-1], 33)
        best = sorted(range(choice.visible), key=lambda e: (-choice.scores[e], e))[: len(choice.kept)]
        assert list(choice.kept) == best


def test_a_reusing_layer_is_edited_alone_and_a_choosing_one_hands_its_edit_on():
    model = SHIPPED["tiny-v41"]
    kinds = list(model.config.layer_kinds)
    reuse = kinds.index("csa2-reuse")
    chooser = max(i for i in range(reuse) if kinds[i] in ("csa2-full", "csa2-reindex"))
    scope = Forks(model, TEXT)
    kept = scope.choice(reuse, 200).kept
    assert kept == scope.choice(chooser, 200).kept
    of_reuse, of_chooser = (scope.change(Edit(layer, 200, drop=kept[:3])) for layer in (reuse, chooser))
    assert of_reuse.kl_nats > 0 and of_chooser.kl_nats > 0 and not np.array_equal(of_reuse.after, of_chooser.after)


@pytest.mark.parametrize(
    ("edit", "read_at", "words"),
    [
        (Edit(0, QUERY), None, "layers .1, 3. choose entries"),
        (Edit(2, QUERY), None, "layers .1, 3. choose entries"),
        (Edit(CSA, 34), None, "the text's tokens"),
        (Edit(CSA, -1), None, "the text's tokens"),
        (Edit(CSA, QUERY), QUERY - 1, "the text's tokens"),
        (Edit(CSA, QUERY, drop=(99,)), None, "cannot be dropped"),
        (Edit(CSA, QUERY, force=(7,)), None, "cannot be forced in"),
        (Edit(CSA, QUERY, force=(-1,)), None, "cannot be forced in"),
        (Edit(CSA, QUERY, force=(1, 1)), None, "named once"),
        (Edit(CSA, QUERY, drop=None), None, "a tuple of entries"),
        (Edit(CSA, QUERY, drop=("a",)), None, "cannot be dropped"),
        (Edit(CSA, QUERY, drop=(3, np.int64(3))), None, "each entry can be named once"),
        (Edit(CSA, QUERY, force=("a",)), None, "an entry to force must be a whole number"),
        (Edit(CSA, 1.5), None, "query must be a whole number"),
        (Edit(CSA, QUERY), "a", "read_at must be a whole number"),
    ],
)
def test_what_cannot_be_edited_is_refused_in_one_line(edit, read_at, words):
    with pytest.raises(InputError, match=words) as error:
        Forks(MODEL, IDS).change(edit, read_at)
    assert "\n" not in str(error.value)


def test_a_kept_entry_cannot_be_forced_in_and_a_dense_model_not_be_looked_at():
    scope = Forks(MODEL, IDS)
    kept = scope.choice(CSA, QUERY).kept
    with pytest.raises(InputError, match="keeps entries .* already"):
        scope.change(Edit(CSA, QUERY, force=kept[:1]))
    with pytest.raises(InputError, match="attends to every token"):
        Forks(wb.load("tiny-gqa", device="cpu"), TEXT)


def test_the_last_token_of_a_model_without_a_window_stays():
    scope = Forks(SHIPPED["tiny-mla-dsa"], TEXT)
    with pytest.raises(InputError, match="must keep one entry"):
        scope.change(Edit(scope.layers[0], 3, drop=scope.choice(scope.layers[0], 3).kept))


def test_before_the_first_entry_there_is_nothing_to_edit():
    choice = Forks(MODEL, IDS).choice(CSA, 2)
    assert choice.kept == () and choice.visible == 0 and choice.missed_mass == 0 and choice.best_left_out(3) == []


def test_queries_may_be_looked_at_in_any_order_and_the_text_may_grow():
    scope, order = Forks(SHIPPED["tiny-v4"], TEXT), [300, 40, 301, 130, 129]
    seen = {q: scope.change(Edit(1, q, drop=scope.choice(1, q).kept[:2])) for q in order}
    for q in order:
        fresh = Forks(SHIPPED["tiny-v4"], scope.ids[: q + 1])
        change = fresh.change(Edit(1, q, drop=fresh.choice(1, q).kept[:2]))
        np.testing.assert_allclose(change.after, seen[q].after, atol=1e-5)
    grown, other = [*scope.ids, 5, 6], [7, *scope.ids[1:]]
    for ids in (grown, other, scope.ids[:200]):
        scope.read(ids)
        fresh = Forks(SHIPPED["tiny-v4"], ids)
        np.testing.assert_allclose(scope.change(Edit(1, 199)).before, fresh.change(Edit(1, 199)).before, atol=1e-5)


def test_a_live_run_is_the_same_with_and_without_a_look_beside_it():
    model = SHIPPED["tiny-v4"]
    alone = wb.run(model, TEXT[:600], max_new_tokens=6)
    alone.wait()
    run = wb.run(model, TEXT[:600], max_new_tokens=6)
    run.pause()
    scope = Forks(model, TEXT[:600])
    choice = scope.choice(1, 120)
    assert scope.change(Edit(1, 120, drop=choice.kept)).kl_nats > 0
    run.resume()
    scope.change(Edit(1, 121, drop=scope.choice(1, 121).kept))
    run.wait()
    a, b = alone.trace, run.trace
    assert np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.top_probs, b.top_probs)
    for one, other in zip(a.layers, b.layers, strict=True):
        assert np.array_equal(one.window_probs, other.window_probs)
        if one.selected is not None:
            assert np.array_equal(one.selected, other.selected)


def test_edits_hold_in_their_thread_and_block_alone(monkeypatch):
    calls, run = [], one_token.run_layers
    monkeypatch.setattr(one_token, "run_layers", lambda *a: calls.append(1) or run(*a))
    attention, cache, told = MODEL.blocks[CSA].attn, MODEL.new_cache(), []

    def decode() -> None:
        with torch.inference_mode():
            MODEL(torch.tensor([[3]]), cache)

    with torch.inference_mode():
        MODEL(torch.tensor([IDS]), cache)
    with edited_selections({attention: lambda start, chosen: told.append(start) or chosen}):
        decode()
        assert told == [34] and not calls  # the general form
        thread = threading.Thread(target=decode)
        thread.start()
        thread.join()
        assert told == [34] and len(calls) == 1
    assert not editing()
    decode()
    assert told == [34] and len(calls) == 2


def test_a_forked_cache_shares_nothing_and_a_mark_brings_back_what_was():
    for model in (random_model(), SHIPPED["tiny-v41"], SHIPPED["tiny-mla-dsa"], wb.load("tiny-v4-engram", device="cpu")):
        ids = random_ids(model.config, 1, 40)
        cache = model.new_cache()
        with torch.inference_mode():
            model(ids[:, :23], cache)
            mark, before, fork = cache.mark(), cache.nbytes_by_part(), cache.fork()
            expected = model(ids[:, 23:], fork)
            held = fork.nbytes_by_part()
            assert cache.length == 23 and cache.nbytes_by_part() == before != held
            model(ids[:, :17], cache)  # something else
            cache.rewind(mark)
            assert torch.equal(model(ids[:, 23:], cache), expected) and cache.nbytes_by_part() == held
