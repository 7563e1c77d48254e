"""The made-up text of the light recipe: records, questions and a rule that n-grams can know."""

import numpy as np
import pytest

from workbench.training import light


@pytest.fixture(scope="module")
def batch():
    return light.batch(np.random.default_rng(3), 16, 256)


def test_every_question_has_the_value_last_written_for_its_key(batch):
    asked = list(zip(*np.nonzero(batch.read_mask), strict=True))
    assert len(asked) > 100
    for row, t in asked:
        ids, place = batch.ids[row], batch.needle_position[row, t]
        assert ids[t - 1] == light.QUESTION and ids[t + 1] == ids[place] and ids[place - 1] == ids[t]
        assert ids[place - 2] in (light.RECORD, light.QUESTION) and place < t
        later = ids[place + 1 : t]
        assert ids[t] not in later  # nowhere nearer
    assert (batch.needle_position[~batch.read_mask] == -1).all()


def test_questions_reach_from_the_window_to_far_beyond_it(batch):
    row, t = np.nonzero(batch.read_mask)
    distance = t - batch.needle_position[row, t]
    assert (distance <= 16).mean() > 0.05 and (distance > light.FAR).mean() > 0.3


def test_the_rule_decides_the_filler_that_is_asked_for(batch):
    row, t = np.nonzero(batch.text_mask)
    before, now, after = (batch.ids[row, t + step] - light.FIRST_FILLER for step in (-1, 0, 1))
    assert min(before.min(), now.min(), after.min()) >= 0  # filler, all three
    share = (light.rules()[before, now] == after).mean()
    assert abs(share - (light.RULED + (1 - light.RULED) / light.FILLERS)) < 0.02


def test_the_best_loss_is_that_of_the_rule_itself():
    drawn = np.random.default_rng(0)
    right = light.RULED + (1 - light.RULED) / light.FILLERS
    hits = drawn.random(200_000) < right
    measured = -np.where(hits, np.log(right), np.log((1 - light.RULED) / light.FILLERS)).mean()
    assert light.best_text_loss() == pytest.approx(measured, abs=0.02)


def test_a_batch_follows_from_its_generator_alone_and_fits_the_model():
    one, other = (light.batch(np.random.default_rng(7), 3, 100) for _ in range(2))
    assert (one.ids == other.ids).all() and one.ids.shape == (3, 100)
    assert one.ids.min() >= 0 and one.ids.max() < light.VOCAB
    assert not (light.batch(np.random.default_rng(8), 3, 100).ids == one.ids).all()
    assert not one.read_mask[:, -1].any() and not one.text_mask[:, -1].any()  # nothing comes after the last
