"""A task in which selection matters: a key is written many times, with several values, and asked for the most frequent one.

A single needle is found in one good entry. Here no record holds the answer: " The code of apple is 37." stands in four places,
other codes of apple in six more, and " The most frequent code of apple is" must be answered from all ten. Where scores are
taken, every record stands further back than the windows of all layers together carry anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from workbench.errors import InputError
from workbench.training import tasks

TEST_COUNTS = (4, 2, 1, 1, 1, 1)  # how often each value of a key is written where scores are taken
TRAIN_COUNTS = (
    *((1,), (2, 1), (3, 1, 1), (3, 2), (3, 1, 1, 1, 1), (3, 2, 1, 1), (3, 2, 2)),
    *((4, 2, 2, 1), (3, 2, 2, 2), (4, 2, 2, 2), (4, 3, 2), (4, 2, 1, 1, 1, 1)),
)
GAP = 64  # tokens of text between the last record and the first question where scores are taken; windows carry 60


def question(key: str) -> str:
    """What asks for the value that a key was given most often; the next token is the value."""
    return f" The most frequent code of {key} is"


class Line(NamedTuple):
    """Tokens of one line: text, or a record or question with its key and, if its value is the answer, where that stands."""

    ids: np.ndarray
    key: int | None = None
    answer_at: int | None = None


class TallyStream:
    """Makes sequences of text with many records per key, shuffled, and one question per key at the end.

    ``counts`` are the patterns that the records of a key may follow: (2, 1) writes one value twice and another once. ``keys``
    per sequence, fewer where they do not fit. ``gap`` tokens of text between records and questions, or anything below ``gap``
    if ``near``. ``short_share`` of the records are said in short. Everything follows from the generator given.
    Raises InputError for a pattern without a unique largest count.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        text_ids: np.ndarray,
        *,
        counts: Sequence[tuple[int, ...]] = (TEST_COUNTS,),
        keys: int = 4,
        gap: int = GAP,
        near: bool = False,
        short_share: float = 0.0,
    ) -> None:
        for pattern in counts:
            if not pattern or min(pattern) < 1 or pattern.count(max(pattern)) > 1:
                raise InputError(f"counts {pattern} have no value that is most frequent; give counts from 1 up, one largest")
        self.words = tasks.RecallStream(tokenizer, text_ids)  # keys, values and the two forms of a record
        self.asked = np.array(tokenizer.encode(question(tasks.KEYS[0]) + f" {tasks.VALUES[0]}.").ids)
        self.counts, self.keys, self.gap, self.near, self.short_share = tuple(counts), keys, gap, near, short_share

    @classmethod
    def to_learn_from(cls, tokenizer: Tokenizer, text_ids: np.ndarray, short_share: float) -> TallyStream:
        """Few and many records per key, clear majorities and narrow ones, questions near and far."""
        return cls(tokenizer, text_ids, counts=TRAIN_COUNTS, keys=6, near=True, short_share=short_share)

    def batch(self, rng: np.random.Generator, batch_size: int, length: int) -> tasks.RecallBatch:
        """``batch_size`` sequences of ``length`` tokens; ``needle_position`` is where the most frequent value stood last.

        Raises InputError if ``length`` is too short for one key, its records and its question, or the text shorter than that.
        """
        if len(self.words.text) < length:
            raise InputError(f"sequences of {length} tokens need more text than {len(self.words.text)} tokens; give more")
        return tasks.stack([self._sequence(rng, length) for _ in range(batch_size)])

    def _sequence(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, ...]:
        gap = int(rng.integers(self.gap)) if self.near else self.gap
        records: list[Line] = []
        questions: list[Line] = []
        left = length - gap
        for key in rng.permutation(self.words.keys)[: self.keys]:
            pattern = self.counts[int(rng.integers(len(self.counts)))]
            values = rng.permutation(self.words.values)[: len(pattern)]
            left -= len(self.asked) + sum(pattern) * len(self.words.forms[0].ids)
            if left < 0:
                break
            for value, count in zip(values, pattern, strict=True):
                records += [self._record(rng, key, value, wanted=count == max(pattern)) for _ in range(count)]
            ids = self.asked.copy()
            ids[-4], ids[-2] = key, values[np.argmax(pattern)]
            questions.append(Line(ids, key, len(ids) - 2))
        if not questions:
            raise InputError(f"{length} tokens are too few for the records of one key and a question; ask for more")
        return self._laid_out(rng, length, gap, records, questions)

    def _record(self, rng: np.random.Generator, key: int, value: int, wanted: bool) -> Line:
        form = self.words.forms[int(rng.random() < self.short_share)]
        ids = form.ids.copy()
        ids[form.key_at], ids[form.value_at] = key, value
        return Line(ids, key, form.value_at if wanted else None)

    def _laid_out(
        self, rng: np.random.Generator, length: int, gap: int, records: list[Line], questions: list[Line]
    ) -> tuple[np.ndarray, ...]:
        """Records and slots of text in random order, the gap, the questions: exactly ``length`` tokens."""
        filler = length - sum(len(line.ids) for line in (*records, *questions))
        slots, rest = divmod(filler - gap, tasks.SLOT)
        start = int(rng.integers(len(self.words.text) - filler + 1))
        text = iter(np.split(self.words.text[start : start + filler], np.arange(1, slots + 1) * tasks.SLOT))
        order = rng.permutation(len(records) + slots)
        lines = [records[i] if i < len(records) else Line(next(text)) for i in order]
        lines += [Line(next(text)), *questions]
        starts = np.cumsum([0, *(len(line.ids) for line in lines)])
        is_text = np.repeat([line.key is None for line in lines], np.diff(starts))
        read, twin = np.zeros(length, bool), np.full(length, -1, np.int64)
        last: dict[int, int] = {}  # key -> where its most frequent value stood last
        for number, line in enumerate(lines):
            if line.key is None or line.answer_at is None:
                continue
            value_at = int(starts[number]) + line.answer_at
            if number >= len(lines) - len(questions):
                read[value_at - 1], twin[value_at - 1] = True, last[line.key]
            last[line.key] = value_at
        return np.concatenate([line.ids for line in lines]), np.append(is_text[:-1] & is_text[1:], False), read, twin
