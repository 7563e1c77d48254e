"""Recall streams checked with made-up text: token ids from TEXT on, counting up, so that text is known at sight."""

import numpy as np
import pytest
from tokenizers import Tokenizer

from workbench.errors import InputError, WorkbenchError
from workbench.model.engram import canonical_ids
from workbench.training import tasks
from workbench.training.tasks import KEYS, VALUES, RecallBatch, RecallStream

TEXT = 100_000
TEXT_IDS = TEXT + np.arange(20_011, dtype=np.int32)
LENGTHS = (64, 257, 2053, 8192)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tasks.train_tokenizer([tasks.heldout_sample(120_000)])


def one_token(tokenizer: Tokenizer, text: str) -> int:
    (token,) = tokenizer.encode(text).ids
    return token


def same(a: RecallBatch, b: RecallBatch) -> bool:
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in ("ids", "text_mask", "read_mask", "needle_position"))


def test_training_and_heldout_text_share_no_topic_or_module():
    train, held = tasks.corpus()
    for group in tasks._documents():
        assert any(map(tasks.held_out, group)) and not all(map(tasks.held_out, group))
        for name, text in group.items():
            if len(text) > 200:  # a few lines can occur inside another document
                assert (text in train, text in held) == (not tasks.held_out(name), tasks.held_out(name))
    assert tasks.corpus() == (train, held)


@pytest.mark.parametrize("limit", [1009, 200_000])
def test_heldout_sample_mixes_prose_and_source_within_its_limit(limit):
    sample, held = tasks.heldout_sample(limit), tasks.corpus()[1]
    prose, code = ("\n".join(t for name, t in group.items() if tasks.held_out(name)) for group in tasks._documents())
    assert limit - 8 <= len(sample.encode()) <= limit
    splits = [n for n in range(len(sample) + 1) if prose.startswith(sample[:n]) and code.startswith(sample[n:])]
    assert splits and splits[0] >= min(len(prose), limit // 2 - 4)  # at most a cut character short of half
    assert sample[: splits[0]] in held and sample[splits[0] :] in held


def test_keys_and_values_are_distinct_plain_words():
    assert len(set(KEYS)) == len(KEYS) and all(k.isascii() and k.isalpha() and k.islower() and 3 <= len(k) <= 8 for k in KEYS)
    assert len(set(VALUES)) == 90 and {len(v) for v in VALUES} == {2} and (VALUES[0], VALUES[-1]) == ("10", "99")


def test_every_word_of_a_needle_is_one_token(tokenizer):
    for number, key in enumerate(KEYS):
        value = VALUES[number % len(VALUES)]
        asked, told = tokenizer.encode(tasks.question(key)).tokens, tokenizer.encode(tasks.needle(key, value)).tokens
        assert told == ["ĠThe", "Ġcode", "Ġof", f"Ġ{key}", "Ġis", f"Ġ{value}", "."] and asked == told[:5]
    assert len({one_token(tokenizer, f" {v}") for v in VALUES}) == len(VALUES)


def test_a_vocabulary_too_small_for_the_needles_is_refused():
    with pytest.raises(WorkbenchError, match="vocab_size 300 leaves .* enlarge it"):
        tasks.train_tokenizer(["some text"], vocab_size=300)


def test_any_text_round_trips(tokenizer):
    texts = [
        "",
        " ",
        "  two\r\n\tlines ",
        "naïve e\u0301 漢字 ﷽ \u202eabc\u202c \x00",
        "👩‍🔬 <b onclick='x'>&amp;</b>",
        "\ue000 ^ $",
    ]
    assert [tokenizer.decode(tokenizer.encode(text).ids) for text in texts] == texts


def test_the_reserved_token_is_number_zero_and_never_added(tokenizer):
    assert tokenizer.token_to_id(tasks.BOS) == 0
    assert 0 not in tokenizer.encode("The code of apple").ids


def test_training_the_tokenizer_twice_gives_the_same_one():
    text = tasks.heldout_sample(20_000)
    assert tasks.train_tokenizer([text]).to_str() == tasks.train_tokenizer([text]).to_str()


def test_canonical_ids_are_dense_and_numbered_as_they_appear(tokenizer):
    canonical = canonical_ids(tokenizer)
    assert canonical.dtype == np.int64 and canonical.shape == (tokenizer.get_vocab_size(),)
    seen = np.maximum.accumulate(canonical)
    assert canonical[0] == 0 and np.all(np.diff(seen) <= 1) and seen[-1] + 1 == len(set(canonical)) < len(canonical)


def test_canonical_ids_fold_case_and_space_and_keep_partial_characters_apart():
    tokenizer = tasks.train_tokenizer(["the The THE  \n\n\t é É e ﬁ fi " * 4000])
    canonical, vocab = canonical_ids(tokenizer), tokenizer.get_vocab()
    number = lambda text: canonical[one_token(tokenizer, text)]  # noqa: E731
    assert number(" The") == number(" the") == number(" THE")
    assert number("A") == number("a") and number("\n") == number("\t") == number(" ") != number("a")
    assert number(" é") == number(" É") == number(" e") and number(" ﬁ") == number(" fi")
    bytes_of_characters = [canonical[vocab[piece]] for piece in "ÃÂãâ"]  # shown as letters, but single bytes of UTF-8
    assert len(set(bytes_of_characters)) == 4 and number("a") not in bytes_of_characters
    assert len({number(f" {word}") for word in (*KEYS, *VALUES)}) == len(KEYS) + len(VALUES)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("reread", [True, False])
def test_text_runs_on_behind_each_record_and_its_mask_never_touches_one(tokenizer, length, reread):
    batch = RecallStream(tokenizer, TEXT_IDS, reread=reread).batch(np.random.default_rng(3), 3, length)
    assert batch.ids.shape == (3, length) and batch.ids.dtype == np.int64
    for ids, mask in zip(batch.ids, batch.text_mask, strict=True):
        text = ids >= TEXT
        assert np.all(np.diff(ids[text]) == 1) and 0 < text.sum() < length
        np.testing.assert_array_equal(mask, np.append(text[:-1] & text[1:], False))
        changes = np.flatnonzero(np.diff(np.concatenate([[0], text, [0]])))
        runs = (changes[1::2] - changes[::2])[:-1]  # all but the last, which may be cut
        assert np.all(runs % tasks.SLOT == 0)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("reread", [True, False])
def test_each_question_points_at_the_last_place_its_value_stood(tokenizer, length, reread):
    batch = RecallStream(tokenizer, TEXT_IDS, reread=reread).batch(np.random.default_rng(5), 5, length)
    key_ids = {one_token(tokenizer, f" {k}") for k in KEYS}
    value_ids = {one_token(tokenizer, f" {v}") for v in VALUES}
    the_is = one_token(tokenizer, " is")
    assert np.array_equal(batch.needle_position >= 0, batch.read_mask) and batch.read_mask.any()
    for ids, read, needle in zip(batch.ids, batch.read_mask, batch.needle_position, strict=True):
        last: dict[int, int] = {}  # key -> where its value stood last
        for t in np.flatnonzero(ids[:-1] == the_is):
            key = int(ids[t - 1])
            assert key in key_ids and ids[t + 1] in value_ids
            assert read[t] == (key in last)  # a key is written once; every later sentence about it is a question
            if read[t]:
                assert needle[t] == last[key] < t and ids[needle[t]] == ids[t + 1] and ids[needle[t] - 2] == key
            last[key] = t + 1
        assert read.sum() == read[ids == the_is].sum()


def test_without_rereading_every_key_stands_at_most_twice(tokenizer):
    """A question for scoring has one needle: the sentence that wrote its key."""
    stream = RecallStream(tokenizer, TEXT_IDS, reread=False)
    ids = stream.batch(np.random.default_rng(0), 1, 8192).ids[0]
    counts = [int((ids == key).sum()) for key in stream.keys]
    assert max(counts) == 2


def test_when_the_keys_run_out_text_and_questions_go_on(tokenizer):
    stream = RecallStream(tokenizer, TEXT_IDS, write_prob=0.5, read_prob=0.3)
    batch = stream.batch(np.random.default_rng(2), 1, 8192)
    second_half = slice(4096, None)
    assert np.isin(stream.keys, batch.ids[0, :4096]).all()
    assert batch.text_mask[0, second_half].any() and batch.read_mask[0, second_half].any()


def test_questions_ask_near_and_far(tokenizer):
    """Near ones teach matching early, far ones are what compressed entries are for."""
    batch = RecallStream(tokenizer, TEXT_IDS).batch(np.random.default_rng(4), 101, 257)
    row, t = np.nonzero(batch.read_mask)
    distance = t - batch.needle_position[row, t]
    counts = np.histogram(distance, bins=[0, tasks.FAR + 1, 65, 257])[0]
    assert counts.min() > 100  # of about 1,500: no band is left out
    assert np.mean(distance > tasks.FAR) > 0.5


def test_slots_come_in_the_shares_asked_for(tokenizer):
    stream = RecallStream(tokenizer, TEXT_IDS, write_prob=0.1, read_prob=0.3)
    batch = stream.batch(np.random.default_rng(6), 31, 521)
    records = (batch.ids == one_token(tokenizer, " code")).sum()
    fillers = (batch.ids >= TEXT).sum() / tasks.SLOT
    reads = batch.read_mask.sum()
    assert reads / (records + fillers) == pytest.approx(
        0.3, abs=0.05
    )  # 2,200 slots: standard error 0.01, and reads wait for a write
    assert (records - reads) / (records + fillers) == pytest.approx(0.1, abs=0.03)


def test_a_batch_follows_from_its_seed_alone(tokenizer):
    stream = RecallStream(tokenizer, TEXT_IDS)
    first, again, other = (stream.batch(np.random.default_rng(seed), 3, 257) for seed in (11, 11, 12))
    assert same(first, again) and not same(first, other)
    assert same(*(tasks.plain_batch(np.random.default_rng(11), TEXT_IDS, 3, 257) for _ in range(2)))
    assert len({int(row[row >= TEXT][0]) for row in first.ids}) == 3  # each sequence starts elsewhere in the text


def test_a_plain_batch_is_text_throughout():
    batch = tasks.plain_batch(np.random.default_rng(1), TEXT_IDS, 5, 67)
    assert batch.ids.shape == (5, 67) and np.all(np.diff(batch.ids) == 1)
    assert batch.text_mask[:, :-1].all() and not batch.text_mask[:, -1].any()
    assert not batch.read_mask.any() and np.all(batch.needle_position == -1)


@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_a_haystack_has_one_needle_at_its_depth_and_ends_with_the_question(tokenizer, depth):
    ids, needle = tasks.haystack(tokenizer, TEXT_IDS, np.random.default_rng(8), 1013, "river", "37", depth)
    text = ids[ids >= TEXT]
    assert len(ids) == 1013 and np.all(np.diff(text) == 1)
    assert needle - 5 == round(depth * len(text))  # the value is the sixth token of its sentence
    assert tokenizer.decode(ids[needle - 5 : needle + 2]) == tasks.needle("river", "37")
    assert tokenizer.decode(ids[-5:]) == tasks.question("river")
    assert ids[needle] == one_token(tokenizer, " 37")


@pytest.mark.parametrize(("length", "depth"), [(11, 0.5), (64, -0.1), (64, 1.1)])
def test_a_haystack_too_short_or_too_deep_is_refused(tokenizer, length, depth):
    with pytest.raises(InputError, match="need a length of at least 12 and a depth in 0..1"):
        tasks.haystack(tokenizer, TEXT_IDS, np.random.default_rng(0), length, "apple", "10", depth)
