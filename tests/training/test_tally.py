"""Tally sequences checked by counting: what is written where, which value is most frequent, and that nothing else tells.

Text is made up, token ids from TEXT on, so that a line is known at sight.
"""

from collections import Counter

import numpy as np
import pytest

import workbench as wb
from workbench.errors import InputError
from workbench.live import encode
from workbench.needle import sample_text
from workbench.training import score, tally, tasks

TEXT = 100_000
TEXT_IDS = TEXT + np.arange(20_011, dtype=np.int32)
REACH = 61  # tokens that four windows of 16 carry to the last of them


@pytest.fixture(scope="module")
def model():
    return wb.load("tiny-v4", device="cpu")


@pytest.fixture(scope="module")
def words(model):
    return tasks.RecallStream(model.tokenizer, TEXT_IDS)


def written(ids, key, words) -> list[tuple[int, int]]:
    """(place of the value, value) of every record of a key, whole or short, by reading the tokens one after the other."""
    whole, short = words.forms[0].ids, words.forms[1].ids
    found = []
    for at in np.flatnonzero(ids == key):
        if list(ids[at - 3 : at]) == list(whole[:3]) and list(ids[[at + 1, at + 3]]) == list(whole[[4, 6]]):
            found.append((int(at) + 2, int(ids[at + 2])))
        elif ids[at - 1] == short[0] and ids[at + 2] == short[3]:
            found.append((int(at) + 1, int(ids[at + 1])))
    return found


@pytest.mark.parametrize("length", [257, 1013, 4099])
@pytest.mark.parametrize("learn", [True, False])
def test_the_answer_is_the_one_value_of_its_key_written_most_often(model, words, length, learn):
    stream = tally.TallyStream(model.tokenizer, TEXT_IDS)
    if learn:
        stream = tally.TallyStream.to_learn_from(model.tokenizer, TEXT_IDS, short_share=0.3)
    batch = stream.batch(np.random.default_rng(3), 5, length)
    assert batch.ids.shape == (5, length) and batch.ids.dtype == np.int64
    assert np.array_equal(batch.needle_position >= 0, batch.read_mask)
    patterns = set()
    for ids, read, needle in zip(batch.ids, batch.read_mask, batch.needle_position, strict=True):
        first = np.flatnonzero(read)[0]
        assert 1 <= read.sum() <= (6 if learn else 4) and len(set(ids[read.nonzero()[0] - 1])) == read.sum()
        for t in np.flatnonzero(read):
            key, answer = int(ids[t - 1]), int(ids[t + 1])
            records = written(ids[: first - 9], key, words)
            (most, times), *others = Counter(value for _, value in records).most_common()
            assert answer == most and answer in words.values and all(count < times for _, count in others)
            assert needle[t] == max(at for at, value in records if value == answer)
            patterns.add(tuple(sorted((times, *(count for _, count in others)), reverse=True)))
    assert patterns <= set(tally.TRAIN_COUNTS) if learn else patterns == {tally.TEST_COUNTS}
    assert len(patterns) > 3 or not learn


def test_a_question_reads_as_a_sentence_with_its_answer_behind_it(model):
    batch = tally.TallyStream(model.tokenizer, np.asarray(encode(model, sample_text()))).batch(np.random.default_rng(1), 2, 512)
    for ids, read in zip(batch.ids, batch.read_mask, strict=True):
        for t in np.flatnonzero(read):
            said = model.tokenizer.decode(ids[t - 10 : t + 3])
            key, value = said.split()[5], said.split()[-1][:-1]
            assert said == tally.question(key) + f" {value}." and key in tasks.KEYS and value in tasks.VALUES


@pytest.mark.parametrize("length", [512, 1024])
def test_text_runs_on_around_the_records_and_its_mask_never_touches_one(model, length):
    batch = tally.TallyStream.to_learn_from(model.tokenizer, TEXT_IDS, 0.5).batch(np.random.default_rng(9), 7, length)
    for ids, mask in zip(batch.ids, batch.text_mask, strict=True):
        text = ids >= TEXT
        assert np.all(np.diff(ids[text]) == 1) and 0 < text.sum() < length
        np.testing.assert_array_equal(mask, np.append(text[:-1] & text[1:], False))


def test_where_scores_are_taken_every_record_lies_beyond_what_the_windows_carry(model, words):
    assert score.window_reach(model) == REACH <= tally.GAP
    for batch in score.tally_batches(model, TEXT_IDS, 8):
        row, t, place = score.all_records(batch)
        assert len(row) == batch.read_mask.sum() * sum(tally.TEST_COUNTS)
        assert (t - place).min() >= REACH
        for r, at in zip(*np.nonzero(batch.read_mask), strict=True):
            mine = place[(row == r) & (t == at)]
            assert mine.tolist() == [p for p, _ in written(batch.ids[r, : at - 9], batch.ids[r, at - 1], words)]


def test_windows_shown_a_record_answer_and_windows_shown_none_do_not(model):
    held = np.asarray(encode(model, sample_text()))
    one = {"counts": ((1,),), "keys": 1}
    near, far = (
        [tally.TallyStream(model.tokenizer, held, gap=gap, **one).batch(np.random.default_rng(0), 8, length)]
        for gap, length in ((0, REACH + 2), (REACH, 131))
    )
    assert score.window_recall(model, near) > 0.9 and score.window_recall(model, far) < 0.3
    assert score.recall(model, far)["all"] > 0.9  # the needle is there, only not for the windows


def test_batches_follow_from_their_seed_alone(model):
    stream = tally.TallyStream.to_learn_from(model.tokenizer, TEXT_IDS, 0.3)
    first, again, other = (stream.batch(np.random.default_rng(seed), 3, 509) for seed in (11, 11, 12))
    for name in ("ids", "text_mask", "read_mask", "needle_position"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.ids, other.ids)


@pytest.mark.parametrize("pattern", [(), (2, 2), (1, 2, 2), (0,), (3, -1)])
def test_counts_without_a_most_frequent_value_are_refused(model, pattern):
    with pytest.raises(InputError, match="have no value that is most frequent"):
        tally.TallyStream(model.tokenizer, TEXT_IDS, counts=(pattern,))


def test_a_sequence_too_short_for_one_key_or_too_long_for_the_text_is_refused(model):
    stream = tally.TallyStream(model.tokenizer, TEXT_IDS)
    shortest = tally.GAP + 13 + 7 * sum(tally.TEST_COUNTS)
    assert stream.batch(np.random.default_rng(0), 1, shortest).read_mask.sum() == 1
    with pytest.raises(InputError, match=f"{shortest - 1} tokens are too few"):
        stream.batch(np.random.default_rng(0), 1, shortest - 1)
    with pytest.raises(InputError, match="20012 tokens need more text than 20011"):
        stream.batch(np.random.default_rng(0), 1, 20_012)
