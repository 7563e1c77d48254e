"""The curve of ways to choose: exact where it can be, and ordered as mass says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import workbench as wb
from tests.slow_reference import CONFIG, random_ids, random_model
from workbench.errors import InputError
from workbench.figures.microscope import curve_table, selection_chart
from workbench.microscope import Edit, Forks
from workbench.recorder import selecting_attention
from workbench.trace import INDEXING

MODEL = random_model(replace(CONFIG, hc_mult=4))
LINES = random_ids(CONFIG, 3, 40).tolist()


@pytest.fixture(scope="module")
def curve():
    return wb.selection_curve(MODEL, LINES, (1, 3, 10), draws=2)


def nll(ids, **settings):
    with torch.inference_mode():
        logits = MODEL(ids[:, :-1], **settings)
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1).double()


def test_the_indexers_loss_is_that_of_the_model_with_this_topk(curve):
    ids = torch.tensor(LINES)
    everything = nll(ids, topk=1000)
    np.testing.assert_allclose(curve["everything"], everything, atol=1e-5)
    for i, k in enumerate(curve["ks"]):
        np.testing.assert_allclose(curve["lost"]["indexer"][i], nll(ids, topk=k) - everything, atol=1e-5)


def test_where_nothing_is_left_out_all_ways_are_one(curve):
    assert curve["left_out"][2] == 0 and curve["recall"][2] == 1 and curve["missed_mass"][2] == 0
    for lost in curve["lost"].values():
        np.testing.assert_allclose(lost[2], 0.0, atol=1e-5)
    assert curve["lost"]["random"].shape == (3, 6) and curve["lost"]["mass"].shape == (3, 3)


def test_misses_are_counted_by_hand(curve):
    visible = (np.arange(39) + 1) // 4
    assert curve["left_out"][1] == pytest.approx(np.maximum(visible - 3, 0).mean())
    model = random_model(replace(CONFIG, layer_kinds=("window", "csa"), mlp_kinds=("score",) * 2))
    one = wb.selection_curve(model, LINES[:1], (2,))
    forks = Forks(model, LINES[0], topk=2)
    agreed, gone = [], []
    for choice in (forks.choice(1, t) for t in range(11, 39)):
        best = sorted(range(choice.visible), key=lambda e: -choice.mass[e])[:2]
        agreed.append(len(set(best) & set(choice.kept)) / 2)
        gone.append(choice.missed_mass)
    assert one["recall"][0] == pytest.approx(np.mean(agreed))
    assert one["missed_mass"][0] == pytest.approx(np.mean(gone), abs=1e-5)


def test_the_oracle_attends_to_the_most_mass_and_random_draws_follow_the_seed():
    model = wb.load("tiny-mla-dsa", device="cpu")
    settings = {"ks": (2, 8), "lines": 2, "tokens": 96, "draws": 1}
    first, again, other = (wb.selection_curve(model, seed=seed, **settings) for seed in (0, 0, 1))
    for method in ("indexer", "mass"):
        np.testing.assert_allclose(first["lost"][method], other["lost"][method], atol=1e-9)
    np.testing.assert_array_equal(first["lost"]["random"], again["lost"]["random"])
    assert not np.array_equal(first["lost"]["random"], other["lost"]["random"])
    assert first["lost"]["mass"].mean() < first["lost"]["random"].mean()
    assert first["lost"]["indexer"].mean() < first["lost"]["random"].mean()
    assert 0 < first["recall"][0] < 1 and first["missed_mass"][0] > first["missed_mass"][1] > 0


@pytest.mark.parametrize("text", ["needles", "tally"])
def test_questions_alone_count_where_they_are_asked(text):
    told: list[float] = []
    tokens = 256 if text == "needles" else 700
    curve = wb.selection_curve(
        wb.load("tiny-v4-tally", device="cpu"), text, (2,), lines=2, tokens=tokens, draws=1, progress=told.append
    )
    assert 0 < curve["tokens"] < 60 and curve["text"] == text and told[-1] == 1.0 and sorted(told) == told


def test_v41_layers_that_reuse_a_choice_follow():
    model = wb.load("tiny-v41", device="cpu")
    curve = wb.selection_curve(model, ks=(4,), lines=1, tokens=64, draws=1)
    assert curve["lost"]["random"][0].mean() > curve["lost"]["mass"][0].mean()


def test_an_edit_reaches_the_reusing_layers_of_v41():
    model = wb.load("tiny-v41", device="cpu")
    follower = list(model.config.layer_kinds).index("csa2-reuse")
    chooser = max(layer for layer, kind in enumerate(model.config.layer_kinds[:follower]) if kind in INDEXING)
    forks = Forks(model, wb.sample_text()[:400])
    with selecting_attention(model) as seen:
        change = forks.change(Edit(chooser, 60, drop=forks.choice(chooser, 60).kept[:2]))
    last = {layer: records[-1].selection.entries[0, 0].tolist() for layer, records in seen.items()}
    assert [e for e in last[follower] if e >= 0] == list(change.kept)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"text": "poems"}, "held-out text"),
        ({"text": [[1, 2, 3], [1, 2]]}, "one length"),
        ({"text": []}, "one length"),
        ({"text": LINES, "ks": (0,)}, "positive"),
        ({"text": LINES, "ks": ()}, "positive"),
        ({"text": LINES, "draws": 0}, "at least 1"),
        ({"text": "needles"}, "no tokenizer"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        wb.selection_curve(MODEL, **arguments)


def test_a_dense_model_has_nothing_to_choose():
    with pytest.raises(InputError, match="attends to every token"):
        wb.selection_curve(wb.load("tiny-gqa", device="cpu"))


def test_the_chart_shows_every_mean_and_its_spread(curve):
    figure = wb.selection_chart(curve)
    assert len(figure.data) == 6
    by_name = {(trace.name, trace.yaxis): trace for trace in figure.data}
    random = by_name["at random", "y"]
    np.testing.assert_allclose(random.y, curve["lost"]["random"].mean(1))
    np.testing.assert_allclose(random.error_y.array, curve["lost"]["random"].std(1))
    each = by_name["the indexer's choice", "y2"]
    np.testing.assert_allclose(each.y[:2], curve["lost"]["indexer"].mean(1)[:2] / np.array(curve["left_out"])[:2])
    assert np.isnan(each.y[2])  # nothing was missed
    rows = curve_table(curve)
    assert rows[0]["recall@k"] == curve["recall"][0]
    assert rows[1]["random: nats per missed entry"] == pytest.approx(curve["lost"]["random"][1].mean() / curve["left_out"][1])
    with pytest.raises(InputError, match="selection_curve"):
        selection_chart({"ks": []})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ks": 5}, "positive whole numbers"),
        ({"lines": 1.5}, "lines must be a whole number"),
        ({"tokens": None}, "tokens must be a whole number"),
        ({"draws": "a"}, "draws must be a whole number"),
        ({"seed": "a"}, "seed must be a whole number"),
        ({"text": 5}, "of one length"),
        ({"text": [[1, 2, 3]]}, "leave nothing to choose"),
    ],
)
def test_what_no_curve_can_be_drawn_from_is_refused_in_one_line(settings, words):
    with pytest.raises(InputError, match=words):
        wb.selection_curve(wb.load("tiny-v4"), **settings)
