"""What a choice is worth: masses beside a slow count, vetoes that only forbid, and prices that rise with what is missed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.slow_reference import CONFIG, random_model
from workbench.checkpoint import load
from workbench.choosing import Majorities, entry_masses, mass_kept, miss_cost, without_entries
from workbench.errors import InputError
from workbench.live import run
from workbench.training import score, tally
from workbench.training.recipes import RECIPES

LENGTH = 61


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(3).integers(0, CONFIG.vocab_size, LENGTH).tolist()


@pytest.fixture(scope="module")
def everything(model, ids):
    live = run(model, ids, max_new_tokens=0, topk=LENGTH)
    assert live.wait(60) and live.error is None
    return live.trace


def test_masses_are_those_of_the_heads_by_entry_number(everything):
    record, token = everything.layer(1), LENGTH - 1
    seen = entry_masses(everything, 1, token)
    assert seen.scores.shape == seen.masses.shape == (LENGTH // CONFIG.csa_ratio,)
    for place, entry in enumerate(record.selected[token]):
        assert seen.masses[entry] == pytest.approx(record.selected_probs[token, :, place].astype(float).mean())
        assert seen.scores[entry] == pytest.approx(record.selected_scores[token, place], abs=1e-4)
    assert set(np.flatnonzero(seen.kept)) == set(record.selected[token, : CONFIG.index_topk])


def test_shares_kept_are_sums_over_the_best_divided_by_all(everything):
    tokens = [40, 50, 60]
    kept = mass_kept(everything, 3, tokens, most=20)
    best = worst = total = luck = 0.0
    for token in tokens:
        seen = entry_masses(everything, 3, token)
        best += seen.masses[np.argsort(-seen.scores)[:2]].sum()
        worst += sorted(seen.masses)[-1] + sorted(seen.masses)[-2]
        luck += 2 / len(seen.masses) * seen.masses.sum()
        total += seen.masses.sum()
    assert kept.indexer[1] == pytest.approx(best / total) and kept.oracle[1] == pytest.approx(worst / total)
    assert kept.random[1] == pytest.approx(luck / total)
    assert (kept.oracle >= kept.indexer - 1e-12).all(), "nothing beats knowing the attention"
    for curve in (kept.indexer, kept.oracle, kept.random):
        assert (np.diff(curve) >= -1e-12).all() and curve[-1] == pytest.approx(1.0), "20 are more than there are"
    assert kept.topk == CONFIG.index_topk and kept.queries == 3 and kept.k[0] == 1


def test_masses_ask_for_a_run_that_left_nothing_out(model, ids, everything):
    few = run(model, ids, max_new_tokens=0)
    few.wait(60)
    with pytest.raises(InputError, match=f"topk={LENGTH}"):
        entry_masses(few.trace, 1, LENGTH - 1)
    with pytest.raises(InputError, match="does not choose"):
        entry_masses(everything, 2, 10)
    with pytest.raises(InputError, match="tokens 0"):
        entry_masses(everything, 1, LENGTH)
    with pytest.raises(InputError, match="sees an entry"):
        mass_kept(everything, 1, [0, 1])


def selected(model, ids):
    return score.selected_entries(model, torch.tensor([ids, ids[::-1]]))


@pytest.mark.parametrize("kind", ["csa", "mla-dsa"])
def test_withheld_entries_are_replaced_by_the_next_best_and_nothing_else_changes(kind, model, ids):
    if kind == "mla-dsa":
        config = replace(RECIPES["tiny-mla-dsa"].config(53), num_hidden_layers=2, index_topk=5)
        model = random_model(config)
    layer = score.selecting_layers(model.config)[0]
    before = selected(model, ids)[layer]
    gone = [[int(before[row, -1, 1])] for row in (0, 1)]
    with without_entries(model, {layer: gone}):
        after = selected(model, ids)[layer]
    k = before.shape[2]
    with torch.inference_mode():
        wider = score.selected_entries(model, torch.tensor([ids, ids[::-1]]), topk=k + 1)[layer]
    for row in (0, 1):
        assert gone[row][0] not in after[row, -1]
        assert after[row, -1].tolist() == [e for e in wider[row, -1] if e != gone[row][0]]
    assert np.array_equal(selected(model, ids)[layer], before), "the veto ends with the block"


def test_a_veto_is_for_layers_that_score_and_for_this_thread(model, ids):
    with pytest.raises(InputError, match="layer 0"), without_entries(model, {0: [[1]]}):
        pass
    import threading

    before, found = selected(model, ids), {}
    with without_entries(model, {1: [[int(before[1][0, -1, 0])]] * 2}):
        other = threading.Thread(target=lambda: found.update(selected(model, ids)))
        other.start()
        other.join()
    assert np.array_equal(found[1], before[1])


def test_missing_the_needle_costs_and_missing_other_entries_does_not():
    outcomes = {o.condition: o for o in miss_cost(load("tiny-v4", device="cpu"), 4, tokens=192)}
    as_it_is, other = outcomes["as it is"], outcomes["other kept entries withheld"]
    missed = outcomes["needle's entries withheld in every layer"]
    assert as_it_is.share_right == other.share_right == 1.0 and missed.share_right == 0.0
    assert other.mean_nats < 0.5 < 3.0 < missed.mean_nats
    assert outcomes["windows alone"].mean_nats > 3.0 and len(as_it_is.nats) == 4
    with pytest.raises(InputError, match="tokens"):
        miss_cost(load("tiny-v4", device="cpu"), 4, tokens=50)
    with pytest.raises(InputError, match="indexer"):
        miss_cost(load("tiny-gqa", device="cpu"), 4)


@pytest.fixture(scope="module")
def quiz():
    return Majorities(load("tiny-v4-tally", device="cpu"), 4)


def test_an_example_names_the_places_of_its_own_key(quiz):
    example = quiz.example(1)
    decode = quiz.model.tokenizer.decode
    answer, other = example.records.values()
    assert len(answer) == max(tally.TEST_COUNTS) and len(answer) + len(other) == sum(tally.TEST_COUNTS)
    assert {decode([example.ids[t]]).strip() for t in answer} == {example.answer}
    assert example.answer not in {decode([example.ids[t]]).strip() for t in other}
    assert {decode([example.ids[t - 2]]).strip() for t in answer + other} == {example.key}
    assert decode([example.ids[example.query]]).strip() == example.key and example.query == len(example.ids) - 2
    with pytest.raises(InputError, match="sequences"):
        quiz.example(4)


def test_more_entries_answer_more_and_each_number_is_asked_once(quiz):
    alone, one, own = (quiz.outcome(k) for k in (0, 1, 16))
    assert alone.share_right <= one.share_right < own.share_right and own.share_right > 0.9
    assert len(alone.nats) == len(own.nats) == quiz.questions == 16 and quiz.outcome(16) is own
    assert own.share_right == score.recall(quiz.model, quiz.batches, topk=16)["all"]
    with pytest.raises(InputError, match="topk"):
        quiz.outcome(-1)


def test_each_missed_record_costs_and_the_majority_turns(quiz):
    whole, all_gone = quiz.missing(0), quiz.missing(4)
    assert whole.share_right == 1.0 and all_gone.share_right == 0.0 and all_gone.mean_nats > whole.mean_nats + 3
    with pytest.raises(InputError, match="0 to 4"):
        quiz.missing(5)


def test_a_quiz_needs_a_model_that_can_take_it():
    with pytest.raises(InputError, match="tiny-v4-tally"):
        Majorities(load("tiny-gqa", device="cpu"))
    with pytest.raises(InputError, match="multiple of 4"):
        Majorities(load("tiny-v4-tally", device="cpu"), 5)
