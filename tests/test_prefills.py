"""Exact and replayed prefill side by side, live: what is shared is exact, what is counted is counted, and all is repeatable."""

from __future__ import annotations

import pytest
import torch

import workbench as wb
from workbench.errors import InputError
from workbench.prefills import MODES, compare_prefills, needles_both_ways


@pytest.fixture(scope="module")
def model():
    return wb.load("tiny-v41")


@pytest.fixture(scope="module")
def found(model):
    return compare_prefills(model, [(11 * i) % 1000 for i in range(211)], follow=5)


def test_streams_and_encoder_windows_are_exact_decoder_windows_are_not(found):
    assert found.split == 2 and set(found.stream_gaps) == {1, 2} and set(found.window_gaps) == {0, 1, 2, 3, 4}
    assert max(found.stream_gaps.values()) == 0
    assert all(found.window_gaps[layer] == 0 for layer in (0, 1, 2))  # layer 2's keys are made of the encoder's output
    assert min(found.window_gaps[layer] for layer in (3, 4)) > 1e-4


def test_work_and_time_are_there_for_both(found):
    assert found.work_share == pytest.approx((2 * 211 + 3 * 16) / (5 * 211))
    assert set(found.seconds) == set(MODES) and min(found.seconds.values()) > 0 and "measured on" in found.label


def test_what_follows_an_exact_prefill_is_what_the_model_generates(model, found):
    ids = [(11 * i) % 1000 for i in range(211)]
    with torch.inference_mode():
        for _ in range(5):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert found.following["exact"] == tuple(ids[-5:]) and 0 <= found.same <= 5


def test_a_prompt_inside_the_window_is_the_same_both_ways(model):
    found = compare_prefills(model, list(range(5, 18)), follow=3)
    assert found.work_share == 1 and max(found.window_gaps.values()) < 1e-5 and found.logit_gap < 1e-4 and found.same == 3


def test_needles_are_asked_both_ways_and_repeatable(model):
    first = needles_both_ways(model, trials=2, tokens=160, seed=3)
    assert set(first) == set(MODES) and first == needles_both_ways(model, trials=2, tokens=160, seed=3)
    assert first["exact"] == 2  # the shipped model answers such short ones


def test_what_cannot_be_compared_is_one_clear_error(model):
    with pytest.raises(InputError, match="only V4.1 has a replayed prefill"):
        compare_prefills(wb.load("tiny-v4"), [1, 2, 3])
    with pytest.raises(InputError, match="at least one token"):
        compare_prefills(model, [])
    with pytest.raises(InputError, match="follow >= 0"):
        compare_prefills(model, [1], follow=-1)
    with pytest.raises(InputError, match="at least one trial"):
        needles_both_ways(model, trials=0)
