"""What one entry is worth: a run is forked at a query, an entry dropped, forced in or swapped, and the next token compared.

Forks copy a cache of their own, so neither the run nor the model changes. The same edits choose the entries of a whole text by
attention mass or at random, to see what the indexer's choice is worth beside them.
Letters: B lines, T tokens, H heads, K kept entries, S entries, V words. (reference/deepseek-v4.md, section 2)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.errors import InputError, whole_number
from workbench.live import encode
from workbench.model.attention.hybrid import Attention
from workbench.model.indexer import IndexQueries, Selection, score_chunk
from workbench.model.kv_cache import KVCache, Mark
from workbench.model.language_model import LanguageModel
from workbench.model.selection_edits import SelectionEdit, edited_selections
from workbench.runtime import device_name
from workbench.trace import INDEXING, SELECTING

LEAST = 1e-300  # of a probability in a logarithm
MARK_EVERY = 128  # tokens between the places to which a text is read again when an earlier query is chosen


@dataclass(frozen=True, slots=True)
class Edit:
    """What is different for one query of one layer: kept entries to ``drop``, others to ``force`` in; both make a swap."""

    layer: int
    query: int
    drop: tuple[int, ...] = ()
    force: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """What one layer chose for one query, and what it would attend to if nothing were left out.

    ``kept`` entries, best first; ``scores`` [S] of the indexer that chose, ``mass`` [S] the mean over heads of the attention
    each visible entry would get beside all others, ``kept_mass`` [K] what the kept ones do get.
    """

    layer: int
    query: int
    kept: tuple[int, ...]
    kept_mass: np.ndarray
    scores: np.ndarray
    mass: np.ndarray

    @property
    def visible(self) -> int:
        return len(self.mass)

    @property
    def missed_mass(self) -> float:
        """The attention that entries left out would get, mean over heads, 0 to 1."""
        return float(self.mass.sum() - self.mass[list(self.kept)].sum())

    def best_left_out(self, count: int) -> list[int]:
        """Entries that were not kept, those that would get most attention first."""
        kept = set(self.kept)
        return [int(e) for e in np.argsort(-self.mass, kind="stable") if int(e) not in kept][:count]


@dataclass(frozen=True, slots=True)
class Change:
    """The distribution of the token after ``read_at`` without and with an edit, ``before`` and ``after`` [V] float64.

    ``kept`` entries and their ``mass``, the mean over heads of the attention they get, with the edit.
    """

    edit: Edit
    read_at: int
    before: np.ndarray
    after: np.ndarray
    kept: tuple[int, ...]
    mass: np.ndarray
    seconds: float

    @property
    def kl_nats(self) -> float:
        """KL(before || after), how much the edit changes what comes next; 0 if nothing."""
        p, q = self.before, np.maximum(self.after, LEAST)
        seen = p > 0
        return float(max(0.0, (p[seen] * np.log(p[seen] / q[seen])).sum()))  # rounding may put equal ones just below 0

    def nats_lost(self, token: int) -> float:
        """How much less likely ``token`` has become: ln(before / after), negative if it gained."""
        return float(np.log(max(self.before[token], LEAST) / max(self.after[token], LEAST)))

    def likeliest(self, count: int) -> list[int]:
        """Token ids most likely before or after, best first."""
        return [int(i) for i in np.argsort(-np.maximum(self.before, self.after), kind="stable")[:count]]


class Forks:
    """A text as a model has read it, ready to be forked at any of its tokens.

    ``ids`` is text or token ids, ``topk`` what the run kept instead of the model's own number. Raises InputError for a model in
    which no layer chooses entries.
    """

    def __init__(self, model: LanguageModel, ids: str | Sequence[int], topk: int | None = None) -> None:
        self.model, self.ids, self.topk = model, encode(model, ids), topk
        kinds = enumerate(model.config.layer_kinds)
        self.layers = [layer for layer, kind in kinds if kind in SELECTING]
        if not self.layers:
            raise InputError(f"{model.name} attends to every token, so there is no choice to edit; take another model")
        self._trunk = model.new_cache()
        self._marks: list[Mark] = [self._trunk.mark()]
        self._known: dict[tuple[int, ...], Any] = {}

    def read(self, ids: Sequence[int]) -> None:
        """Look at ``ids`` from now on; what was read of a text that begins alike is not read again."""
        different = next(
            (i for i, (a, b) in enumerate(zip(self.ids, ids, strict=False)) if a != b), min(len(self.ids), len(ids))
        )
        if different < len(self.ids):
            self._known.clear()
            self._rewind(different)
        self.ids = list(ids)

    def _rewind(self, t: int) -> None:
        """The cache back to the last mark at or before ``t`` tokens, if it is beyond them."""
        if self._trunk.length > t:
            self._marks = [mark for mark in self._marks if mark["length"] <= t]
            self._trunk.rewind(self._marks[-1])

    def choice(self, layer: int, query: int) -> Choice:
        """What ``layer`` chose for token ``query``. Raises InputError where nothing was chosen."""
        self._check(layer, query, query)
        key = (layer, query)
        if key not in self._known:
            _, seen, index = self._run(layer, query, query, lambda start, chosen: chosen)
            ratio = self.model.config.compress_ratios[layer]
            _, everything, _ = self._run(layer, query, query, keep_all(ratio))
            kept, kept_mass = _row(seen, 0)
            every, mass = _row(everything, 0)
            by_entry = np.zeros(len(every), np.float32)
            by_entry[list(every)] = mass
            scores = score_chunk(index.q, index.w, index.k.read(0, len(every)))[0, 0].cpu().numpy()
            self._known[key] = Choice(layer, query, kept, kept_mass, scores, by_entry)
        return self._known[key]

    def change(self, edit: Edit, read_at: int | None = None) -> Change:
        """What ``edit`` does to the token after ``read_at``, the edited query itself unless a later token is given.

        Tokens between the two are read by the fork, too. An edit without entries changes nothing, to the bit. Raises InputError
        for entries that cannot be dropped or forced in, and layers or tokens that are not there.
        """
        read_at = edit.query if read_at is None else read_at
        self._check(edit.layer, edit.query, read_at)
        self._check_entries(edit)
        key = (edit.layer, edit.query, read_at)
        if key not in self._known:
            self._known[key], _, _ = self._run(*key, lambda start, chosen: chosen)
        begun = time.perf_counter()
        after, seen, _ = self._run(*key, of_query(edit.query, edit.drop, edit.force))
        kept, mass = _row(seen, 0)
        return Change(edit, read_at, self._known[key], after, kept, mass, time.perf_counter() - begun)

    def _check(self, layer: int, query: int, read_at: int) -> None:
        if layer not in self.layers:
            raise InputError(f"layers {self.layers} choose entries, layer {layer} does not; take one of them")
        if not 0 <= whole_number("query", query) <= whole_number("read_at", read_at) < len(self.ids):
            raise InputError(f"expected 0 <= query <= read_at < {len(self.ids)} (the text's tokens), got {query} and {read_at}")

    def _check_entries(self, edit: Edit) -> None:
        kept = self.choice(edit.layer, edit.query).kept
        visible = self.choice(edit.layer, edit.query).visible
        where = f"layer {edit.layer} at query {edit.query}"
        for name, entries in (("drop", edit.drop), ("force", edit.force)):
            if not isinstance(entries, list | tuple):
                raise InputError(f"{name} is a tuple of entries, got {entries!r:.60}")
            if any(entry in entries[:i] for i, entry in enumerate(entries)):
                raise InputError(f"each entry can be named once, got {name}={entries}")
        if strange := [e for e in edit.drop if e not in kept]:
            raise InputError(f"{where} keeps entries {sorted(kept)}, so {strange} cannot be dropped; drop one of those")
        if strange := [e for e in edit.force if not 0 <= whole_number("an entry to force", e) < visible]:
            raise InputError(f"{where} may look at entries 0..{visible - 1}, so {strange} cannot be forced in")
        if twice := [e for e in edit.force if e in kept]:
            raise InputError(f"{where} keeps entries {twice} already; force in one that it left out")
        if not self.model.config.sliding_window and len(edit.drop) == len(kept) and not edit.force:
            raise InputError(f"{where} has neither a window nor a sink and must keep one entry; drop fewer")

    def _run(self, layer: int, query: int, read_at: int, edit: SelectionEdit) -> tuple[np.ndarray, Attention, IndexQueries]:
        """A fork that reads tokens ``query``..``read_at``: probabilities after them, and what the layer's attention saw."""
        with torch.inference_mode():
            cache = self._cache_at(query).fork()
            line = torch.tensor([self.ids[query : read_at + 1]], device=self.model.device)
            attention = self.model.blocks[layer].attn
            with edited_selections({attention: edit}), listened(self.model, [layer], indexer=True) as heard:
                logits = self.model(line, cache, logits="last", topk=self.topk)[0, -1]
            return torch.softmax(logits.cpu().double(), -1).numpy(), heard.attention[layer][0], heard.index[0]

    def _cache_at(self, t: int) -> KVCache:
        """The cache of the first ``t`` tokens, for others to copy."""
        self._rewind(t)
        while self._trunk.length < t:
            done = self._trunk.length
            stop = min(t, (done // MARK_EVERY + 1) * MARK_EVERY)
            line = torch.tensor([self.ids[done:stop]], device=self.model.device)
            self.model(line, self._trunk, logits="last", topk=self.topk)
            if stop % MARK_EVERY == 0:
                self._marks.append(self._trunk.mark())
        return self._trunk


@dataclass(slots=True)
class Heard:
    """What attention layers saw in calls of one thread: by layer, chunk by chunk; and index queries, in order."""

    attention: dict[int, list[Attention]]
    index: list[IndexQueries]


@contextmanager
def listened(model: LanguageModel, layers: Sequence[int], *, indexer: bool = False) -> Iterator[Heard]:
    """Note what the attention of ``layers`` sees in this thread; and what the indexer scores that chooses for the first."""
    thread, heard = threading.get_ident(), Heard({layer: [] for layer in layers}, [])

    def note(into: list[Any]) -> Any:
        return lambda _module, _inputs, record: into.append(record) if threading.get_ident() == thread else None

    hooks = [model.blocks[i].attn.attention_tap.register_forward_hook(note(heard.attention[i])) for i in layers]
    if indexer:
        chooser = max(i for i, kind in enumerate(model.config.layer_kinds[: layers[0] + 1]) if kind in INDEXING)
        hooks.append(model.blocks[chooser].attn.indexer.index_tap.register_forward_hook(note(heard.index)))
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _row(seen: Attention, t: int) -> tuple[tuple[int, ...], np.ndarray]:
    """Entries that query ``t`` of a chunk attends to, and the mean over heads of what they get."""
    if seen.selection is None:
        return (), np.zeros(0, np.float32)
    entries = seen.selection.entries[0, t]
    mass = seen.entry_probs[0, t].float().mean(0)
    there = entries >= 0
    return tuple(entries[there].tolist()), mass[there].cpu().numpy()


# Edits: functions of the position of the first query and its selection, see ``workbench.model.selection_edits``.


def of_query(query: int, drop: Sequence[int] = (), force: Sequence[int] = ()) -> SelectionEdit:
    """Drops and forces entries of one query; others keep what they chose. Nothing to do returns the selection itself."""

    def edit(start: int, chosen: Selection) -> Selection:
        t = query - start
        if not (drop or force) or not 0 <= t < chosen.entries.shape[1]:
            return chosen
        width = chosen.entries.shape[-1]
        entries = torch.nn.functional.pad(chosen.entries, (0, len(force)), value=-1)
        scores = torch.nn.functional.pad(chosen.scores, (0, len(force)), value=-torch.inf)
        row = entries[:, t, :width]
        row.masked_fill_(torch.isin(row, torch.tensor(list(drop), dtype=row.dtype, device=row.device)), -1)
        entries[:, t, width:] = torch.tensor(list(force), dtype=row.dtype, device=row.device)
        return Selection(scores, entries)

    return edit


def closed_entries(start: int, chosen: Selection, ratio: int) -> Tensor:
    """How many entries each of the T queries may look at, [T, 1]."""
    t = torch.arange(start + 1, start + 1 + chosen.entries.shape[1], device=chosen.entries.device)
    return (t // ratio).unsqueeze(-1)


def keep_all(ratio: int) -> SelectionEdit:
    """Every entry that is complete, in order: dense attention with the same weights."""

    def edit(start: int, chosen: Selection) -> Selection:
        closed = closed_entries(start, chosen, ratio)
        numbers = torch.arange(int(closed.max()), device=closed.device)
        entries = numbers.where(numbers < closed, -1).expand(chosen.entries.shape[0], -1, -1)
        return Selection(torch.zeros_like(entries, dtype=torch.float32), entries)

    return edit


def label(model: LanguageModel) -> str:
    return f"{model.name} ({model.what}), measured on {device_name(str(model.device))}"
