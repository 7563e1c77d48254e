"""Charts of choices: marks are the entries, filled where kept; curves and bars have the numbers given, named and labelled."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.synthetic import synthetic_trace
from workbench.choosing import MassKept, Outcome, ScoredEntries
from workbench.cost import decode_flops
from workbench.errors import InputError
from workbench.figures.choosing import (
    index_choice,
    mass_kept_chart,
    outcome_bars,
    score_against_mass,
    topk_curve,
    wilson,
    work_shares,
)

TRACE = synthetic_trace(97)
OUTCOMES = [
    Outcome("as <it> is", np.array([0.0, 0.5]), np.array([True, True]), "toy & co"),
    Outcome("missed", np.array([4.0, 6.0]), np.array([False, True]), "toy & co"),
]


def test_every_entry_is_one_mark_at_its_block_and_the_kept_ones_are_filled():
    fig = index_choice(TRACE, 1, 90)
    left_out, kept = fig.data
    record = TRACE.layer(1)
    scores = record.index_scores(90)
    own = set(record.selected[90].tolist()) - {-1}
    assert {point[0] for point in kept.customdata} == own and kept.marker.symbol == "diamond"
    assert len(left_out.x) + len(kept.x) == len(scores) == 91 // 4
    for mark in fig.data:
        for x, y, (entry, first, last) in zip(mark.x, mark.y, mark.customdata, strict=True):
            assert x == 4 * entry and y == pytest.approx(scores[entry]) and (first, last) == record.entry_tokens(entry)
    assert f"{len(own)} of {len(scores)}" in fig.layout.title.text


def test_groups_colour_the_entries_that_hold_their_tokens_the_first_group_first():
    fig = index_choice(TRACE, 1, 90, {"a <b>": [40], "c": [44]})
    of = {}
    for mark in fig.data:
        for entry, _, _ in mark.customdata if mark.customdata is not None else ():
            of[entry] = mark.name.split(":")[0]
    assert of[10] == of[11] == "a &lt;b&gt;" and of[12] == "c" and of[9] == "other text" and len(of) == 22
    assert len({mark.marker.color for mark in fig.data}) == 3


def test_choices_that_cannot_be_shown_are_refused():
    for layer, token, groups, words in (
        (1, 97, None, "tokens 0"),
        (1, 2, None, "sees no entry"),
        (0, 90, None, "no lightning indexer"),
        (1, 90, dict.fromkeys("abcde", [1]), "at most 4"),
    ):
        with pytest.raises(InputError, match=words):
            index_choice(TRACE, layer, token, groups)


def test_scores_stand_against_masses_and_nothing_falls_off_the_logarithmic_axis():
    seen = ScoredEntries(
        "toy", 1, "csa", 9, "<b>", np.array([1.0, -2, 3]), np.array([0.1, 0, 0.8]), np.array([False, False, True])
    )
    left_out, kept = score_against_mass(seen).data
    assert list(kept.x) == [3.0] and list(kept.y) == [0.8] and sorted(left_out.x) == [-2.0, 1.0]
    assert min(left_out.y) == 1e-5 and 0 in left_out.customdata[:, 1] and score_against_mass(seen).layout.yaxis.type == "log"


def test_kept_mass_has_a_panel_each_and_marks_the_models_own_number():
    curves = np.array([0.2, 0.5]), np.array([0.3, 0.6]), np.array([0.1, 0.2])
    found = {"<a>": MassKept("toy", 1, "csa", 2, 5, *curves), "b": MassKept("toy", 3, "csa", 9, 5, *curves)}
    fig = mass_kept_chart(found)
    drawn = {data.name: list(data.y) for data in fig.data[:4]}
    assert drawn["k best by index score"] == [20, 50] and drawn["k best by attention itself"] == [30, 60]
    assert drawn["k at random"] == [10, 20] and drawn["the model's own k"] == [50]
    assert list(fig.data[7].x) == [2], "a top-k beyond the curve is marked at its end"
    assert fig.layout.annotations[0].text == "&lt;a&gt;" and sum(data.showlegend for data in fig.data) == 4
    with pytest.raises(InputError, match="mass_kept"):
        mass_kept_chart({})


def test_a_curve_has_what_was_tried_with_its_interval_and_the_guesses_as_stars():
    fig = topk_curve({4: OUTCOMES[1], 0: OUTCOMES[0]}, {4: 70.0}, "toy", 8)
    curve, stars = fig.data
    assert list(curve.x) == [0, 4] and list(curve.y) == [100, 50] and "2 questions" in fig.layout.title.text
    low, high = wilson(OUTCOMES[1].right)
    assert curve.error_y.array[1] == pytest.approx(100 * high - 50) and curve.error_y.arrayminus[1] == pytest.approx(
        50 - 100 * low
    )
    assert list(stars.x) == [4] and list(stars.y) == [70] and "alone" in fig.layout.xaxis.ticktext[0]
    assert "nothing tried" in topk_curve({}, {}, "toy", 8).layout.title.text


def test_wilsons_interval_as_in_the_books():
    assert wilson(np.array([True] * 8 + [False] * 2)) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert wilson(np.ones(5, bool))[1] == 1.0 and wilson(np.zeros(5, bool))[0] == 0.0


def test_prices_are_means_with_the_share_that_was_right():
    fig = outcome_bars(OUTCOMES, guess_among=90)
    bars, line = fig.data
    assert list(bars.x) == [0.25, 5.0] and list(bars.y) == ["as &lt;it&gt; is", "missed"]
    assert bars.text[1] == "5 nats, 50% right" and line.x[0] == pytest.approx(np.log(90)) and "&amp;" in fig.layout.title.text
    assert len(outcome_bars(OUTCOMES).data) == 1
    with pytest.raises(InputError, match="outcome"):
        outcome_bars([])


def test_shares_of_work_add_up_and_are_those_of_the_formula():
    fig = work_shares(["v3.2", "v4-pro"], 2**20)
    assert np.allclose(np.sum([bar.x for bar in fig.data], axis=0), 100)
    work = decode_flops("v4-pro", 2**20)
    assert fig.data[0].x[1] == pytest.approx(100 * work["indexer"] / work["total"]) and "modelled" in fig.layout.title.text
    assert all(bar.marker.pattern.bgcolor == bar.marker.color for bar in fig.data)
    with pytest.raises(InputError, match="presets"):
        work_shares([], 100)


def test_a_long_text_stays_a_small_view():
    long = synthetic_trace(3000, kinds=("csa",), topk=64)
    assert len(json.dumps(json.loads(index_choice(long, 0, 2999).to_json()))) < 250_000
