"""What an indexer's choice is worth: how much attention it keeps, how often a majority is named, and what a miss costs.

Models are run live; records are plain numbers and arrays. A choice is changed from outside, by one more index head that votes
against entries, so that the model's own code chooses among the rest. (reference/deepseek-v4.md, section 2.2;
reference/tiny-model.md, sections 3 and 5)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from workbench.errors import InputError
from workbench.live import encode, token_texts
from workbench.model.indexer import IndexQueries
from workbench.model.kv_cache import Rows
from workbench.model.language_model import LanguageModel
from workbench.needle import sample_text
from workbench.runtime import device_name, threads_for_run, use_threads
from workbench.trace import LayerTrace, Trace
from workbench.training import score, tally, tasks

VETO = 1e6  # far beyond any index score
NEEDLE_TOKENS = 512
TOGETHER = 8  # questions run in one call


@dataclass(frozen=True, slots=True)
class MassKept:
    """Share of the attention on entries that k kept entries would have, k from 1 on, over some queries of one layer.

    ``indexer`` takes the k best by index score, ``oracle`` those that attention goes to most, ``random`` is what drawing them
    would keep on average; each [K] float64. ``topk`` is the model's own number.
    """

    label: str
    layer: int
    kind: str
    topk: int
    queries: int
    indexer: np.ndarray
    oracle: np.ndarray
    random: np.ndarray

    @property
    def k(self) -> np.ndarray:
        return np.arange(1, len(self.indexer) + 1)


@dataclass(frozen=True, slots=True)
class ScoredEntries:
    """Of every entry that one query sees, by number: index score and attention mass (mean over the heads), both [S].

    ``kept`` [S] marks those that the model's own top-k would keep.
    """

    label: str
    layer: int
    kind: str
    token: int
    text: str
    scores: np.ndarray
    masses: np.ndarray
    kept: np.ndarray


def entry_masses(trace: Trace, layer: int, token: int) -> ScoredEntries:
    """What the indexer thought of each entry beside what attention did with it.

    Raises InputError unless the layer chooses for itself and the run left nothing out: ``wb.run(..., topk=`` the length or
    more ``)``, because where an entry was not kept nobody knows what attention it would have had.
    """
    record = _complete(trace, layer, token)
    assert record.selected is not None and record.selected_probs is not None
    scores = record.index_scores(token)
    best_first = record.selected[token, : len(scores)]
    masses, kept = np.zeros(len(scores)), np.zeros(len(scores), bool)
    masses[best_first] = record.selected_probs[token, :, : len(scores)].astype(np.float64).mean(0)
    kept[best_first[: int(trace.config["index_topk"])]] = True
    return ScoredEntries(trace.label, layer, record.kind, token, trace.token_texts[token], scores, masses, kept)


def mass_kept(trace: Trace, layer: int, tokens: Sequence[int] | None = None, most: int = 64) -> MassKept:
    """``MassKept`` for k up to ``most``, the masses of all ``tokens`` (those of the last half) added up before dividing.

    InputError as in ``entry_masses``, and if no entry is visible.
    """
    tokens = range(trace.length // 2, trace.length) if tokens is None else tokens
    kept, best, drawn = np.zeros(most), np.zeros(most), np.zeros(most)
    total = 0.0
    for token in tokens:
        seen = entry_masses(trace, layer, token)
        mass = seen.masses
        kept += _first(mass[np.argsort(-seen.scores, kind="stable")], most)
        best += _first(np.sort(mass)[::-1], most)
        drawn += np.minimum(np.arange(1, most + 1) / max(1, len(mass)), 1.0) * mass.sum()
        total += mass.sum()
    if not total:
        raise InputError(f"none of these {len(tokens)} tokens sees an entry of layer {layer}; choose later ones")
    record = trace.layer(layer)
    own = int(trace.config["index_topk"])
    return MassKept(trace.label, layer, record.kind, own, len(tokens), kept / total, best / total, drawn / total)


def _first(masses: np.ndarray, most: int) -> np.ndarray:
    """What the first 1, 2, ... ``most`` of them add up to."""
    return np.cumsum(np.pad(masses[:most], (0, max(0, most - len(masses)))))


def _complete(trace: Trace, layer: int, token: int) -> LayerTrace:
    record = trace.layer(layer)
    if not record.indexes or record.selected is None:
        raise InputError(f"layer {layer} is a {record.kind} layer and does not choose; take one that does")
    if not 0 <= token < trace.length:
        raise InputError(f"the trace has tokens 0..{trace.length - 1}, got {token}")
    if int((record.selected[token] >= 0).sum()) < record.visible_entries(token):
        raise InputError(f"this run kept fewer entries than token {token} sees; run it with topk={trace.length}")
    return record


@contextmanager
def without_entries(model: LanguageModel, entries: Mapping[int, Sequence[Sequence[int]]]) -> Iterator[None]:
    """In this thread's calls no query keeps these entries, while others are left: layer -> entry numbers of each sequence.

    The indexer gets one more head, which sees nothing but these entries and votes against them. Raises InputError for a layer
    that does not score entries.
    """
    for layer in entries:
        if layer not in score.selecting_layers(model.config):
            raise InputError(f"layer {layer} of {model.name} does not choose; those are {score.selecting_layers(model.config)}")
    thread = threading.get_ident()

    def veto(own: Sequence[Sequence[int]]) -> Any:
        def change(_module: Any, _inputs: Any, index: IndexQueries) -> IndexQueries | None:
            if threading.get_ident() != thread:
                return None
            keys = index.k.read()  # [B, S, D]
            against = keys.new_zeros(*keys.shape[:2], 1)
            for row, numbers in enumerate(own):
                against[row, [n for n in numbers if n < keys.shape[1]]] = 1.0
            q = F.pad(index.q, (0, 1, 0, 1))  # one more channel and one more head
            q[..., -1, -1] = 1.0
            w = F.pad(index.w, (0, 1), value=-VETO)
            return IndexQueries(q, w, Rows(torch.cat([keys, against], dim=-1)))

        return change

    hooks = [model.blocks[layer].attn.indexer.index_tap.register_forward_hook(veto(own)) for layer, own in entries.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a model made of some questions under one condition: nats its answer cost each, and which it got right, [N]."""

    condition: str
    nats: np.ndarray
    right: np.ndarray
    label: str

    @property
    def mean_nats(self) -> float:
        return float(self.nats.mean())

    @property
    def share_right(self) -> float:
        return float(self.right.mean())


def _label(model: LanguageModel) -> str:
    return f"{model.name} ({model.what}), measured on {device_name(str(model.device))}"


def miss_cost(model: LanguageModel, questions: int = 24, *, tokens: int = NEEDLE_TOKENS, seed: int = 0) -> list[Outcome]:
    """What it costs, in nats of the right answer, when the indexer misses the entries that hold a far needle.

    The same questions under each condition: nothing changed; other entries than the needle's withheld, as many of those that
    the question's key had kept; the needle's own in one choosing layer and in all of them; and nothing but what windows reach.
    Withheld entries are replaced by the next best. Raises InputError for a model that does not choose or has no tokenizer, and
    texts too short to be far.
    """
    layers = score.selecting_layers(model.config)
    if not layers or model.tokenizer is None:
        raise InputError(f"{model.name} cannot be asked: it needs a tokenizer and an indexer; load a shipped model")
    far = score.far_distance(model)
    if questions < 1 or tokens < 4 * far:
        raise InputError(f"needs at least 1 question in {4 * far} tokens, got {questions} in {tokens}")
    use_threads(threads_for_run())
    rng, held = np.random.default_rng(seed), np.asarray(encode(model, sample_text()))
    lines, needles = [], []
    for trial in range(questions):
        key, value = str(rng.choice(np.array(tasks.KEYS))), str(rng.choice(np.array(tasks.VALUES)))
        depth = (trial + 0.5) / questions * (1 - 2 * far / tokens)
        line, position = tasks.haystack(model.tokenizer, held, rng, tokens, key, value, depth)
        lines.append(line)
        needles.append(position)
    ids, asked = np.stack(lines), np.full(questions, tokens - 1)
    answers = ids[np.arange(questions), needles]
    own = {layer: [score.entries_of(model.config, layer, position) for position in needles] for layer in layers}
    kept = score.selected_entries(model, torch.from_numpy(ids))
    others = {layer: [_drawn(rng, kept[layer][i, -2], own[layer][i]) for i in range(questions)] for layer in layers}
    conditions: dict[str, dict[int, list[list[int]]]] = {"as it is": {}, "other kept entries withheld": others}
    if len(layers) < 4:
        conditions |= {f"needle's entries withheld in layer {layer}": {layer: own[layer]} for layer in layers}
    conditions["needle's entries withheld in every layer"] = own
    found = [_asked(name, model, ids, asked, answers, change) for name, change in conditions.items()]
    if model.config.sliding_window:
        found.append(_asked("windows alone", model, ids[:, -score.window_reach(model) :], None, answers, {}))
    return found


def _drawn(rng: np.random.Generator, kept: np.ndarray, but: Sequence[int]) -> list[int]:
    """As many of the kept entries as there are in ``but``, none of which is among them."""
    pool = np.setdiff1d(kept[kept >= 0], but)
    return [int(e) for e in rng.permutation(pool)[: len(but)]]


@torch.inference_mode()
def _asked(
    condition: str,
    model: LanguageModel,
    ids: np.ndarray,
    asked: np.ndarray | None,
    answers: np.ndarray,
    withheld: Mapping[int, Sequence[Sequence[int]]],
    topk: int | None = None,
) -> Outcome:
    """One question a row of ids [N, T], at token ``asked`` (None: the last)."""
    nats, right = [], []
    for first in range(0, len(ids), TOGETHER):
        mine = slice(first, first + TOGETHER)
        with without_entries(model, {layer: own[mine] for layer, own in withheld.items()}):
            logits = model(torch.from_numpy(ids[mine]).to(model.device), topk=topk)
        at = torch.full((logits.shape[0],), logits.shape[1] - 1) if asked is None else torch.from_numpy(asked[mine])
        rows = torch.arange(logits.shape[0])
        said, wanted = logits[rows, at].log_softmax(-1).cpu(), torch.from_numpy(answers[mine])
        nats.append(-said[rows, wanted].numpy())
        right.append((said.argmax(-1) == wanted).numpy())
    return Outcome(condition, np.concatenate(nats), np.concatenate(right), _label(model))


@dataclass(frozen=True, slots=True)
class Majority:
    """A prompt that ends with the question for a key's most frequent value, and where the key's records have their values."""

    ids: tuple[int, ...]
    key: str
    answer: str
    query: int  # the question's key, which looks the records up
    records: dict[str, tuple[int, ...]]  # "of the answer" and "of other values" -> tokens


class Majorities:
    """Questions for the most frequent of several values, as ``tiny-v4-tally`` was trained to answer; made once, asked often.

    Each key stands in ten records, one of its values in four; all lie beyond what windows reach. ``outcome(topk)`` runs the
    model, ``missing(n)`` withholds n of the four from every choosing layer. Results are remembered. InputError for a model
    without tokenizer or CSA layers.
    """

    def __init__(self, model: LanguageModel, sequences: int = 16) -> None:
        if model.tokenizer is None or not model.config.sliding_window or not score.selecting_layers(model.config):
            raise InputError(f"{model.name} has no windows, no indexer or no tokenizer; load tiny-v4-tally")
        if sequences < 4 or sequences % 4:
            raise InputError(f"sequences must be a multiple of 4, got {sequences}")
        held = np.asarray(encode(model, sample_text()))
        self.model, self.batches = model, score.tally_batches(model, held, sequences)
        self.label, self.entries = _label(model), score.TALLY_LENGTH // model.config.csa_ratio
        self.questions = int(sum(batch.read_mask.sum() for batch in self.batches))
        self._outcomes: dict[tuple[str, int], Outcome] = {}

    def outcome(self, topk: int) -> Outcome:
        """All questions with ``topk`` entries kept a query; 0: nothing but what windows reach."""
        if isinstance(topk, bool) or not isinstance(topk, int) or topk < 0:
            raise InputError(f"topk must be 0 (windows alone) or more, got {topk!r}")
        if ("topk", topk) not in self._outcomes:
            use_threads(threads_for_run())
            self._outcomes["topk", topk] = self._windows_alone() if topk == 0 else self._chosen(topk)
        return self._outcomes["topk", topk]

    def missing(self, missed: int) -> Outcome:
        """One question a sequence, with the entries of ``missed`` of its answer's records withheld, those written first."""
        most = max(tally.TEST_COUNTS)
        if isinstance(missed, bool) or not isinstance(missed, int) or not 0 <= missed <= most:
            raise InputError(f"an answer has {most} records, so 0 to {most} can be missed, got {missed!r}")
        if ("missed", missed) not in self._outcomes:
            use_threads(threads_for_run())
            self._outcomes["missed", missed] = self._without(missed)
        return self._outcomes["missed", missed]

    def example(self, sequence: int = 0) -> Majority:
        """The first question of one of the sequences. InputError for one there is not."""
        many = sum(len(batch.ids) for batch in self.batches)
        if isinstance(sequence, bool) or not isinstance(sequence, int) or not 0 <= sequence < many:
            raise InputError(f"there are sequences 0..{many - 1}, got {sequence!r}")
        batch, line = self.batches[sequence // 4], sequence % 4
        last = int(np.flatnonzero(batch.read_mask[line])[0])
        row, t, position = score.all_records(batch)
        own = position[(row == line) & (t == last)]
        answers = batch.ids[line, own] == batch.ids[line, last + 1]
        tokens = {name: tuple(map(int, np.sort(own[mask]))) for name, mask in (("answer", answers), ("other", ~answers))}
        key, answer = (token_texts(self.model, [int(i)])[0].strip() for i in batch.ids[line, [last - 1, last + 1]])
        records = {"a record of the answer": tokens["answer"], "a record of another value": tokens["other"]}
        return Majority(tuple(map(int, batch.ids[line, : last + 1])), key, answer, last - 1, records)

    def _chosen(self, topk: int) -> Outcome:
        nats, right = [], []
        for batch in self.batches:
            with torch.inference_mode():
                logits = self.model(torch.from_numpy(batch.ids).to(self.model.device), topk=topk).cpu()
            row, t = np.nonzero(batch.read_mask)
            said, wanted = logits[row, t].log_softmax(-1), torch.from_numpy(batch.ids[row, t + 1])
            nats.append(-said[torch.arange(len(row)), wanted].numpy())
            right.append((said.argmax(-1) == wanted).numpy())
        return Outcome(f"top-{topk}", np.concatenate(nats), np.concatenate(right), self.label)

    def _windows_alone(self) -> Outcome:
        reach, lines, answers = score.window_reach(self.model), [], []
        for batch in self.batches:
            for row, t in zip(*np.nonzero(batch.read_mask), strict=True):
                lines.append(batch.ids[row, t + 1 - reach : t + 1])
                answers.append(batch.ids[row, t + 1])
        return _asked("windows alone", self.model, np.stack(lines), None, np.array(answers), {})

    def _without(self, missed: int) -> Outcome:
        config, layers = self.model.config, score.selecting_layers(self.model.config)
        lines, asked, answers = [], [], []
        withheld: dict[int, list[list[int]]] = {layer: [] for layer in layers}
        for batch in self.batches:
            row, t, position = score.all_records(batch)
            for line in range(len(batch.ids)):
                last = int(np.flatnonzero(batch.read_mask[line])[-1])
                answer = batch.ids[line, last + 1]
                own = sorted(position[(row == line) & (t == last) & (batch.ids[line, position] == answer)])
                lines.append(batch.ids[line])
                asked.append(last)
                answers.append(answer)
                for layer in layers:
                    withheld[layer].append([e for p in own[:missed] for e in score.entries_of(config, layer, int(p))])
        return _asked(f"{missed} missed", self.model, np.stack(lines), np.array(asked), np.array(answers), withheld)
