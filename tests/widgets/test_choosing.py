"""TopkTrials: a guess is locked before its run, every try stays, and a failure can be tried again."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from workbench.choosing import Outcome
from workbench.widgets.choosing import GUESS_FIRST, TopkTrials


class FakeQuiz:
    """Answers right with a chance of k in 16, for certain shares."""

    def __init__(self) -> None:
        self.model, self.label = SimpleNamespace(config=SimpleNamespace(index_topk=16)), "toy <b>"
        self.asked: list[int] = []

    def outcome(self, topk: int) -> Outcome:
        self.asked.append(topk)
        return Outcome(f"top-{topk}", np.zeros(16), np.arange(16) < topk, self.label)


@pytest.fixture
def trials() -> TopkTrials:
    return TopkTrials(FakeQuiz())


def test_nothing_is_asked_before_the_guess_is_locked(trials):
    assert trials.quiz.asked == [] and GUESS_FIRST in trials.status.value and len(trials.figure.data[0].x) == 0
    trials.topk.value, trials.guess.value = 8, 90
    trials.run.click()
    assert trials.quiz.asked == [8] and trials.guesses == {8: 90.0}
    assert "your guess 90 %" in trials.status.value and "right 50 %" in trials.status.value
    assert list(trials.figure.data[0].y) == [50] and list(trials.figure.data[1].y) == [90]


def test_a_number_is_asked_once_and_its_guess_stays(trials):
    trials.run.click()
    assert trials.run.disabled and trials.guess.disabled
    trials.guess.value = 3
    trials.try_one()
    assert trials.quiz.asked == [4] and trials.guesses == {4: 50.0}
    trials.topk.value = 5
    assert not trials.run.disabled and GUESS_FIRST in trials.status.value
    trials.topk.value = 4
    assert trials.run.disabled and "has been run" in trials.status.value


def test_the_rest_fills_the_curve_from_windows_alone_to_the_models_own(trials):
    trials.run.click()
    trials.rest.click()
    assert list(trials.figure.data[0].x) == [0, 1, 2, 3, 4, 6, 8, 12, 16] and trials.guesses == {4: 50.0}
    assert trials.quiz.asked.count(4) == 1 and len(json.dumps(trials.view.outputs)) < 250_000
    assert "toy &lt;b&gt;" in trials.figure.layout.title.text


def test_a_failure_is_told_and_the_guess_is_not_lost(trials):
    trials.quiz.outcome = lambda topk: 1 / 0
    trials.run.click()
    assert "division by zero" in trials.status.value and trials.guesses == {} and not trials.run.disabled
    del trials.quiz.outcome
    trials.run.click()
    assert trials.guesses == {4: 50.0}
