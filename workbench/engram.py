"""What Engram does to one text: which n-grams read which table rows, where different n-grams share one, and what it changes.

`Ngrams` is worked out from a recorded trace, `engram_effect` needs the model. Letters: L tokens, N largest n-gram, K hash
heads, R = (N - 1) K rows per token, V words, G guesses. (reference/engram-and-overlap.md, section 1)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.config import EngramConfig, read_config
from workbench.errors import InputError
from workbench.trace import EngramTrace, Trace

if TYPE_CHECKING:
    from workbench.model.language_model import LanguageModel

NO_ENGRAM = "This model has no Engram, so there are no n-grams to show: choose tiny-v4-engram."
GUESSES, CHUNK = 10, 256


@dataclass(frozen=True, slots=True)
class RowUse:
    """One table row an n-gram reads, and the other tokens of the text whose n-gram is another one and reads it too."""

    head: int
    row: int
    shared_with: tuple[int, ...]  # a collision, unless empty


@dataclass(frozen=True, slots=True)
class Ngram:
    """The last ``order`` tokens as Engram hashes them, oldest first; positions below 0 lie before the text."""

    order: int
    tokens: tuple[int, ...]
    repeats: tuple[int, ...]  # other tokens that end the same n-gram; its rows are theirs by right
    uses: tuple[RowUse, ...]

    @property
    def collides(self) -> bool:
        return any(use.shared_with for use in self.uses)


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Of one layer and text: reads, distinct rows among them, and rows that different n-grams share."""

    reads: int
    rows: int
    shared: int


class Ngrams:
    """The n-grams of a recorded text, held against the rows they read.

    Two places have the same n-gram if the same canonical ids were hashed there. A recording without these ids counts n-grams as
    the same when they agree in every row of every layer, which different ones do by a chance of about 1 / rows per head.
    Raises InputError for a trace without Engram.
    """

    def __init__(self, trace: Trace) -> None:
        if not trace.engram:
            raise InputError(NO_ENGRAM)
        self.length, self.layers = trace.length, {memory.layer: memory for memory in trace.engram}
        self.config = _engram_config(trace)
        self.orders = tuple(range(2, self.config.max_ngram_size + 1))
        self._same = np.stack([self._numbered(order, trace.engram) for order in self.orders], axis=1)  # [L, N - 1]
        self._shared = {layer: self._find_shared(memory.rows) for layer, memory in self.layers.items()}

    def _numbered(self, order: int, memories: Sequence[EngramTrace]) -> np.ndarray:
        """A number for each token's n-gram of ``order``: [L], equal where the n-grams are."""
        ids = memories[0].ids
        if ids is None:
            heads = self.config.n_heads
            columns = slice((order - 2) * heads, (order - 1) * heads)
            told = np.concatenate([memory.rows[:, columns] for memory in memories], axis=1)
        else:
            line = np.concatenate([np.full(order - 1, -1), ids])
            told = np.stack([line[order - 1 - back : len(line) - back] for back in range(order)], axis=1)
            stopped = np.logical_or.accumulate(told < 0, axis=1)  # looking back ends for good at a gap
            told = np.where(stopped, memories[0].pad, told)
        return np.unique(told, axis=0, return_inverse=True)[1].reshape(-1)

    def _find_shared(self, rows: np.ndarray) -> np.ndarray:
        """[L, R]: whether another n-gram of the text reads this row."""
        shared = np.zeros(rows.shape, bool)
        for column in range(rows.shape[1]):
            same = self._same[:, column // self.config.n_heads]
            readers = np.unique(np.stack([rows[:, column], same], axis=1), axis=0)[:, 0]  # each row once per n-gram
            several, counts = np.unique(readers, return_counts=True)
            shared[:, column] = np.isin(rows[:, column], several[counts > 1])
        return shared

    def of(self, layer: int, token: int) -> tuple[Ngram, ...]:
        """The n-grams that end at ``token``, shortest first, with their rows in ``layer``. InputError if there is none."""
        rows = self._memory(layer).rows
        if not 0 <= token < self.length:
            raise InputError(f"the trace has tokens 0..{self.length - 1}, got {token}")
        found = []
        for i, order in enumerate(self.orders):
            same = self._same[:, i]
            uses = []
            for head in range(self.config.n_heads):
                column = i * self.config.n_heads + head
                others = np.flatnonzero((rows[:, column] == rows[token, column]) & (same != same[token]))
                uses.append(RowUse(head, int(rows[token, column]), tuple(others.tolist())))
            repeats = tuple(t for t in np.flatnonzero(same == same[token]).tolist() if t != token)
            found.append(Ngram(order, tuple(range(token - order + 1, token + 1)), repeats, tuple(uses)))
        return tuple(found)

    def collided(self, layer: int) -> np.ndarray:
        """[L]: how many of each token's rows are shared with a different n-gram of the text."""
        self._memory(layer)
        return self._shared[layer].sum(axis=1)

    def counts(self, layer: int) -> RowCounts:
        rows = self._memory(layer).rows
        return RowCounts(rows.size, len(np.unique(rows)), len(np.unique(rows[self._shared[layer]])))

    def _memory(self, layer: int) -> EngramTrace:
        if layer not in self.layers:
            raise InputError(f"the trace has Engram layers {list(self.layers)}, got {layer}")
        return self.layers[layer]


def _engram_config(trace: Trace) -> EngramConfig:
    engram: Any = read_config(trace.config).engram
    rows = engram.rows_per_token if engram else 0
    if any(memory.rows.shape[1] != rows for memory in trace.engram):
        raise InputError(f"the trace's Engram rows are not the {rows} a token that its configuration says")
    return engram


@dataclass(frozen=True, slots=True)
class EngramEffect:
    """The next-token distribution after each of L tokens, with Engram at work and with its values switched off.

    ``on_ids`` [L, G] are the likeliest tokens with Engram, ``on_probs`` their probability with it and ``on_probs_off`` without;
    ``off_ids``, ``off_probs`` and ``off_probs_on`` the other way round. ``kl`` [L] is KL(with || without) in nats. ``on_loss``
    and ``off_loss`` [L - 1] are the losses, in nats, of the token that followed. ``texts`` names every token id among them.
    """

    label: str
    token_ids: np.ndarray
    on_ids: np.ndarray
    on_probs: np.ndarray
    on_probs_off: np.ndarray
    off_ids: np.ndarray
    off_probs: np.ndarray
    off_probs_on: np.ndarray
    kl: np.ndarray
    on_loss: np.ndarray
    off_loss: np.ndarray
    texts: dict[int, str]

    @property
    def length(self) -> int:
        return len(self.token_ids)


def engram_effect(model: LanguageModel, prompt: str | Sequence[int], guesses: int = GUESSES) -> EngramEffect:
    """Read ``prompt`` twice, with Engram and with its contribution switched off; both measured, the model stays as it is.

    Raises InputError for a model without Engram, a prompt it cannot read, and ``guesses`` below 1.
    """
    import torch  # not needed to look at n-grams

    from workbench.live import encode, token_texts
    from workbench.model.engram import engram_off
    from workbench.runtime import device_name, threads_for_run, use_threads

    if guesses < 1:
        raise InputError(f"guesses must be at least 1, got {guesses}")
    with engram_off(model):  # says so if there is none
        pass
    ids = encode(model, prompt)
    guesses = min(guesses, model.config.vocab_size)
    use_threads(threads_for_run())
    line = torch.tensor([ids], device=model.device)
    caches = model.new_cache(), model.new_cache()
    parts: dict[str, list[Any]] = {}
    with torch.inference_mode():
        for start in range(0, len(ids), CHUNK):
            chunk = line[:, start : start + CHUNK]
            on = model(chunk, caches[0])[0].double().log_softmax(-1)  # [T, V]
            with engram_off(model):
                off = model(chunk, caches[1])[0].double().log_softmax(-1)
            follow = line[0, start + 1 : start + CHUNK + 1].unsqueeze(-1)
            for name, mine, other in (("on", on, off), ("off", off, on)):
                best = mine.topk(guesses, dim=-1)
                parts.setdefault(f"{name}_ids", []).append(best.indices.cpu().numpy())
                parts.setdefault(f"{name}_probs", []).append(best.values.exp().cpu().numpy())
                at_other = other.gather(-1, best.indices).exp()
                parts.setdefault(f"{name}_probs_{'off' if name == 'on' else 'on'}", []).append(at_other.cpu().numpy())
                parts.setdefault(f"{name}_loss", []).append(-mine[: len(follow)].gather(-1, follow)[:, 0].cpu().numpy())
            parts.setdefault("kl", []).append((on.exp() * (on - off)).sum(-1).clamp(min=0).cpu().numpy())
    arrays = {name: np.concatenate(chunks) for name, chunks in parts.items()}
    shown = sorted({*arrays["on_ids"].flatten().tolist(), *arrays["off_ids"].flatten().tolist(), *ids})
    return EngramEffect(
        label=f"{model.name} ({model.what}), measured on {device_name(str(model.device))}",
        token_ids=np.asarray(ids, np.int32),
        texts=dict(zip(shown, token_texts(model, shown), strict=True)),
        **arrays,
    )
