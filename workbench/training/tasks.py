"""The data tiny models learn from: real text every Python has, with needles hidden in it and asked for later.

A *recall stream* is a line of slots: eight tokens of text, a needle (" The code of apple is 37."), or the same sentence again
for a key written earlier, whose value the model must recall. (reference/tiny-model.md, section 2)
"""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics as _topics
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from workbench.errors import InputError, WorkbenchError

_WORDS = """
apple river piano garden window bottle candle forest mirror pencil rabbit silver tunnel violin wallet zebra anchor
basket camera desert engine feather guitar hammer island jacket kitchen ladder magnet needle ocean parrot quilt rocket
saddle teapot umbrella valley wagon yacht acorn bridge castle dragon eagle falcon glacier harbor igloo jungle kettle
lantern meadow napkin orange pepper queen ribbon spider tiger uncle velvet walnut barrel button carpet dolphin elbow
flower goose helmet insect jewel kitten lemon monkey nest onion pillow quartz raven salmon tomato turtle vessel whale
almond beaver cactus donkey ember fabric ginger hornet ivory jasmine koala lizard marble nectar olive puzzle quiver
radish spoon thunder trumpet vase willow yogurt bamboo copper drum emerald fossil grape honey iron jelly kite lotus
melon noodle oyster peach rose
"""
KEYS = tuple(_WORDS.split())
VALUES = tuple(str(n) for n in range(10, 100))
SHORT = f" code {KEYS[0]} {VALUES[0]}."
SLOT = 8  # tokens of text in a filler slot
FAR, FAR_SHARE = 24, 0.75  # tokens beyond the tiny models' window; share of questions that reach beyond it where any can
HELD_OUT = 12  # about one in twelve topics and modules is never trained on
MAX_MODULE_BYTES = 150_000
BOS = "<|bos|>"


def needle(key: str, value: str) -> str:
    return f" The code of {key} is {value}."


def question(key: str) -> str:
    """The start of the needle's sentence; the next token is the value."""
    return f" The code of {key} is"


def _documents() -> tuple[dict[str, str], dict[str, str]]:
    """Documentation topics and standard-library sources of this Python, by name."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = [p for p in sorted(folder.glob("*.py")) if p.stat().st_size <= MAX_MODULE_BYTES]
    paths = [p for p in paths if not p.name.startswith("_sysconfigdata")]  # that one describes a machine, not Python
    return dict(sorted(_topics.topics.items())), {p.name: p.read_text(encoding="utf-8", errors="ignore") for p in paths}


def held_out(name: str) -> bool:
    """Whether a topic or module is never trained on; its name decides, so that every Python version holds out the same."""
    return zlib.crc32(name.encode()) % HELD_OUT == 0


def corpus() -> tuple[str, str]:
    """(training text, held-out text): whole topics and modules, never parts of one in both."""
    documents = [document for group in _documents() for document in group.items()]
    train = "\n".join(text for name, text in documents if not held_out(name))
    return train, "\n".join(text for name, text in documents if held_out(name))


def heldout_sample(text_limit: int = 200_000) -> str:
    """At most ``text_limit`` UTF-8 bytes of held-out text, half documentation and half source where there is enough."""
    prose, code = ("\n".join(text for name, text in group.items() if held_out(name)) for group in _documents())
    first = _cut(prose, text_limit // 2)
    return first + _cut(code, text_limit - len(first.encode()))


def _cut(text: str, limit: int) -> str:
    return text.encode()[:limit].decode(errors="ignore")


def train_tokenizer(texts: Sequence[str], vocab_size: int = 1536) -> Tokenizer:
    """Byte-level BPE in which every key, value and word of the needle sentence is one token; any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Words that must become single tokens are shown more often than anything else.
    words = "".join(needle(k, VALUES[i % len(VALUES)]) + f" {VALUES[(i * 7) % len(VALUES)]}" for i, k in enumerate(KEYS))
    often = max(1, sum(map(len, texts)) // 2000)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(BOS, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *[words] * often], trainer)
    pieces = [" The", " code", " of", " is", ".", *(f" {k}" for k in KEYS), *(f" {v}" for v in VALUES)]
    broken = [piece for piece in pieces if len(tokenizer.encode(piece).ids) != 1]
    if broken:
        raise WorkbenchError(
            f"vocab_size {vocab_size} leaves {len(broken)} needle words in pieces, such as {broken[:3]}; enlarge it"
        )
    return tokenizer


@dataclass(frozen=True, slots=True)
class RecallBatch:
    """ids [B, T] int64. Position t is about predicting ids[t + 1]: ``text_mask`` where both are untouched text, ``read_mask``
    where a value must be recalled, which stood last at ``needle_position`` (-1 elsewhere)."""

    ids: np.ndarray
    text_mask: np.ndarray
    read_mask: np.ndarray
    needle_position: np.ndarray


class Form(NamedTuple):
    """A way to say a needle: its tokens, and where the key and the value stand in them."""

    ids: np.ndarray
    key_at: int
    value_at: int


class RecallStream:
    """Makes batches of text with needles and questions; everything follows from the generator given."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        text_ids: np.ndarray,
        *,
        write_prob: float = 0.25,
        read_prob: float = 0.5,
        reread: bool = True,
        short_share: float = 0.0,
    ) -> None:
        """``reread=False`` asks for each key once, so that a question has one needle only.

        ``short_share`` of the sentences are said in short (" code apple 37."), where the value follows its key at once: finding
        the key is learned there first, and carries over to the whole sentence.
        """
        one = lambda text: tokenizer.encode(text).ids  # noqa: E731
        self.text = np.asarray(text_ids, np.int64)
        self.write_prob, self.read_prob, self.reread = write_prob, read_prob, reread
        self.keys = np.array([one(f" {k}")[0] for k in KEYS])
        self.values = np.array([one(f" {v}")[0] for v in VALUES])
        # Each form with the places of its key and value.
        self.forms = (Form(np.array(one(needle(KEYS[0], VALUES[0]))), 3, 5), Form(np.array(one(SHORT)), 1, 2))
        self.short_share = short_share
        if [len(form.ids) for form in self.forms] != [7, 4]:
            raise InputError("this tokenizer splits the needle sentence; use one made by train_tokenizer")

    def batch(self, rng: np.random.Generator, batch_size: int, length: int) -> RecallBatch:
        """``batch_size`` streams of ``length`` tokens. Raises InputError if the text is shorter than one sequence."""
        if len(self.text) <= length + SLOT:
            raise InputError(
                f"sequences of {length} tokens need more text than {len(self.text)} tokens; give more or ask for less"
            )
        return stack([self._sequence(rng, length) for _ in range(batch_size)])

    @classmethod
    def asked_once(cls, tokenizer: Tokenizer, text_ids: np.ndarray) -> RecallStream:
        """The stream that scores are taken on: few questions, each key asked once, so that distances spread over the length."""
        return cls(tokenizer, text_ids, write_prob=0.3, read_prob=0.15, reread=False)

    def _sequence(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, ...]:
        slots = length // min(len(form.ids) for form in self.forms) + 2
        kinds = rng.random(slots)
        keys = rng.permutation(len(self.keys))
        values = self.values[rng.integers(len(self.values), size=slots)]
        picks = rng.random((slots, 3))
        text_at = int(rng.integers(max(1, len(self.text) - length - SLOT)))
        total = slots * max(SLOT, *(len(form.ids) for form in self.forms))
        ids, text = np.zeros(total, np.int64), np.zeros(total, bool)
        read, twin = np.zeros(total, bool), np.full(total, -1, np.int64)
        written: list[list[int]] = []  # key, value, where the value stood last
        at = asked = 0
        for slot in range(slots):
            if at >= length:
                break
            record = None
            is_read = False
            if kinds[slot] < self.write_prob and len(written) + asked < len(keys):
                record = [int(self.keys[keys[len(written) + asked]]), int(values[slot]), -1]
                written.append(record)
            elif self.write_prob <= kinds[slot] < self.write_prob + self.read_prob and written:
                far = [r for r in written if at - r[2] > FAR]
                pool = far if far and picks[slot, 0] < FAR_SHARE else written
                record, is_read = pool[int(picks[slot, 1] * len(pool))], True
            if record is None:
                ids[at : at + SLOT] = self.text[text_at : text_at + SLOT]
                text[at : at + SLOT] = True
                text_at, at = text_at + SLOT, at + SLOT
                continue
            form = self.forms[int(picks[slot, 2] < self.short_share)]
            end = at + len(form.ids)
            ids[at:end] = form.ids
            ids[at + form.key_at], ids[at + form.value_at] = record[:2]
            if is_read:
                read[at + form.value_at - 1] = True
                twin[at + form.value_at - 1] = record[2]
                if not self.reread:
                    written.remove(record)
                    asked += 1
            record[2] = at + form.value_at
            at = end
        ids, text, read, twin = ids[:length], text[:length], read[:length], twin[:length]
        text_pairs = np.append(text[:-1] & text[1:], False)
        read[-1] = False
        return ids, text_pairs, read, np.where(read, twin, -1)


def stack(rows: list[tuple[np.ndarray, ...]]) -> RecallBatch:
    return RecallBatch(*(np.stack(column) for column in zip(*rows, strict=True)))


def plain_batch(rng: np.random.Generator, text_ids: np.ndarray, batch_size: int, length: int) -> RecallBatch:
    """Text alone, from random places. Raises InputError if the text is shorter than one sequence."""
    if len(text_ids) <= length:
        raise InputError(f"sequences of {length} tokens need more text than {len(text_ids)} tokens; give more or ask for less")
    starts = rng.integers(len(text_ids) - length, size=batch_size)
    ids = np.stack([text_ids[s : s + length] for s in starts]).astype(np.int64)
    mask = np.ones(ids.shape, bool)
    mask[:, -1] = False
    return RecallBatch(ids, mask, np.zeros(ids.shape, bool), np.full(ids.shape, -1, np.int64))


def haystack(
    tokenizer: Tokenizer, text_ids: np.ndarray, rng: np.random.Generator, length: int, key: str, value: str, depth: float
) -> tuple[np.ndarray, int]:
    """Exactly ``length`` tokens of text with one needle at ``depth`` (0 start, 1 end) and its question at the end.

    Returns the ids and the position of the value token.
    """
    record, asked = tokenizer.encode(needle(key, value)).ids, tokenizer.encode(question(key)).ids
    filler = length - len(record) - len(asked)
    if filler < 0 or not 0 <= depth <= 1:
        raise InputError(f"need a length of at least {len(record) + len(asked)} and a depth in 0..1, got {length} and {depth}")
    if len(text_ids) < filler:
        raise InputError(f"a haystack of {length} tokens needs {filler} tokens of text, got {len(text_ids)}")
    start = int(rng.integers(max(1, len(text_ids) - filler)))
    text = np.asarray(text_ids[start : start + filler])
    cut = round(depth * filler)
    ids = np.concatenate([text[:cut], record, text[cut:], asked]).astype(np.int64)
    return ids, cut + len(record) - 2
