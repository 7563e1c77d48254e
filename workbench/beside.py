"""Dense attention beside the sparse one: what the same weights would look at with nothing left out, and what a choice misses.

The model runs as it is. Where a layer is about to choose, the same queries also meet every entry that is complete, with the
same window and sink; what comes out goes into a small picture and a few sums, and nowhere else. So later layers see what they
always see, and what is held at once is a block of queries times the entries, never L x L. On the way it is counted how far a
choice agrees with an earlier layer's or an earlier query's, and what would be missed if that one were used instead.
Letters: L tokens, T queries, H heads, W window, S entries, K kept entries, P cells. (reference/deepseek-v4.md, section 2)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.differences import common_entries
from workbench.errors import InputError, WorkbenchError, whole_number
from workbench.live import PREFILL_CHUNK, best_guesses, encode, token_texts
from workbench.model.attention.core import attend, window_rows
from workbench.model.attention.hybrid import Attention, AttentionInputs
from workbench.model.kv_cache import KVCache
from workbench.model.language_model import LanguageModel
from workbench.progress import Report, reporting
from workbench.recorder import Recorder
from workbench.runtime import device_name, threads_for_run, use_threads
from workbench.trace import INDEXING, OVERLAPPING, SELECTING, Trace

BLOCK_VALUES = 2**21  # probabilities over window and entries worked out at once
MAP_PIXELS = 520  # cells a side of a pooled picture, at most
MOST_PIXELS = 2048  # of a side that may be asked for
LAGS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True, eq=False)
class DenseMap:
    """One layer with nothing left out, given the inputs it had; rows and columns of the pictures are tokens.

    ``most`` [H, P, P] float32: the largest probability in each cell of ``pooling`` x ``pooling`` tokens, head by head, ``mean``
    [P, P] that of the mean over heads; an entry is painted over all tokens it was made from. ``missed`` [L, H] float32 is the
    attention that entries left out would get, of 1 for a query; ``on_entries`` [L, H] what all entries would. ``deviation``:
    shared out anew among what was kept, this is the attention the layer had, and so far the two lie apart at most.
    """

    layer: int
    kind: str
    pooling: int
    most: np.ndarray
    mean: np.ndarray
    missed: np.ndarray
    on_entries: np.ndarray
    deviation: float


@dataclass(frozen=True, slots=True)
class Reuse:
    """A layer's choice beside one made earlier: by layer ``source`` for the same query, or by itself ``lag`` tokens before.

    Means over ``queries`` that leave something out. ``overlap``: the share of kept entries that the earlier choice has too;
    ``by_chance``: the share it would have by luck; ``missed``: the attention (0 to 1, mean over heads) that is missed as it is,
    and ``missed_reusing`` if the earlier choice were used. ``same_choice`` where the model reuses it anyway (V4.1).
    """

    layer: int
    source: int
    lag: int
    queries: int
    overlap: float
    by_chance: float
    missed: float
    missed_reusing: float
    same_choice: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Beside:
    """A text as ``model`` read it, recorded in ``trace``, and beside it by layer what dense attention would be.

    ``layer_reuse`` are pairs of layers whose entries have one ratio, ``step_reuse`` a layer and itself some tokens earlier.
    ``index_bytes``: layer -> bytes of index keys it read for the last token, ``bytes_read`` all bytes of the cache that token
    read, both as counted by the cache itself (measured), stored as ``trace.storage`` says.
    """

    trace: Trace
    dense: dict[int, DenseMap]
    layer_reuse: tuple[Reuse, ...]
    step_reuse: tuple[Reuse, ...]
    index_bytes: dict[int, int]
    bytes_read: int
    topk: int
    pixels: int = MAP_PIXELS

    def layer(self, number: int) -> DenseMap:
        """InputError for a layer that was not looked at."""
        if number not in self.dense:
            raise InputError(f"dense attention was worked out for layers {sorted(self.dense)}, got {number}")
        return self.dense[number]


def dense_beside(
    model: LanguageModel,
    text: str | Sequence[int],
    layers: Sequence[int] | None = None,
    *,
    topk: int | None = None,
    window: int | None = None,
    storage: str = "fp32",
    pixels: int = MAP_PIXELS,
    progress: Report | None = None,
    stop: Callable[[], bool] | None = None,
) -> Beside:
    """Read ``text`` (or token ids) once and see what ``layers``, all that select, would attend to if they kept everything.

    ``topk`` keeps another number of entries and ``window`` is a smaller sliding window, in every layer: what the weights allow.
    Time grows with L x S, memory with L: at most ``BLOCK_VALUES`` probabilities at once and pictures of ``pixels`` a side.
    Raises InputError for a model or layers that choose nothing and settings that cannot be, WorkbenchError if ``stop`` says so.
    """
    ids = encode(model, text)
    kinds = model.config.layer_kinds
    choosing = [layer for layer, kind in enumerate(kinds) if kind in SELECTING]
    given = choosing if layers is None else layers if isinstance(layers, Sequence) else [layers]
    wanted = list(dict.fromkeys(whole_number("a layer", layer) for layer in given))
    if not choosing:
        raise InputError(f"{model.name} attends to every token already: there is nothing sparse to compare; take another model")
    if not wanted or set(wanted) - set(choosing):
        raise InputError(f"layers {choosing} of {model.name} choose entries, got {list(wanted)}")
    if not 1 <= whole_number("pixels", pixels) <= MOST_PIXELS:
        raise InputError(f"pixels must be from 1 to {MOST_PIXELS:,}, got {pixels}")
    model = with_window(model, window)
    listeners = {layer: _Layer(model, layer, len(ids), pixels if layer in wanted else 0) for layer in choosing}
    for later in wanted:
        mine = listeners[later]
        mine.earlier = [listeners[x] for x in choosing if x < later and listeners[x].ratio == mine.ratio]
    thread = threading.get_ident()

    def only_mine(do: Callable[[Any], None]) -> Any:
        return lambda _module, _inputs, record: do(record) if threading.get_ident() == thread else None

    hooks = []
    for layer, listener in listeners.items():
        attention = model.blocks[layer].attn
        hooks += [attention.attention_tap.register_forward_hook(only_mine(listener.attended))]
        hooks += [attention.input_tap.register_forward_hook(only_mine(listener.given))] if layer in wanted else []
    try:
        with reporting(progress, "dense attention beside") as report:
            trace, cache = _read(model, ids, topk, storage, report, stop)
    finally:
        for hook in hooks:
            hook.remove()
    by_layer, read = _bytes_of_last(model, ids, cache, topk)
    looked = [listeners[layer] for layer in sorted(wanted)]
    pairs = [reuse for listener in looked for reuse in listener.layer_reuse()]
    lags = [reuse for listener in looked for reuse in listener.step_reuse()]
    dense = {listener.layer: listener.map() for listener in looked}
    return Beside(trace, dense, tuple(pairs), tuple(lags), by_layer, read, int(topk or model.config.index_topk), pixels)


def record_text(
    model: LanguageModel,
    text: str | Sequence[int],
    *,
    topk: int | None = None,
    window: int | None = None,
    storage: str = "fp32",
    progress: Report | None = None,
    stop: Callable[[], bool] | None = None,
) -> Trace:
    """The recording of a text that is only read, in the caller's thread, so that ``wb.engram_off`` around it counts.

    ``storage`` is how the cache keeps its rows, the rest as in ``dense_beside``. For ``wb.difference_tile``.
    """
    ids = encode(model, text)
    with reporting(progress, "reading") as report:
        return _read(with_window(model, window), ids, topk, storage, report, stop)[0]


def with_window(model: LanguageModel, window: int | None) -> LanguageModel:
    """A model of the same weights, shared and not copied, with a smaller sliding window; the model itself for None or its own.

    InputError for a model without windows and for one larger than it was trained with.
    """
    if window is None or window == model.config.sliding_window:
        return model
    if not model.config.sliding_window:
        raise InputError(f"{model.name} has no sliding window to set; leave window out")
    if isinstance(window, bool) or not isinstance(window, int) or not 1 <= window < model.config.sliding_window:
        raise InputError(f"window must be 1 to {model.config.sliding_window}, as {model.name} was trained, got {window!r}")
    with torch.random.fork_rng(devices=[]):
        twin = type(model)(replace(model.config, sliding_window=window)).to(model.device)
    for name, part in model.named_children():
        if name != "layers":
            setattr(twin, name, part)
    for block, own in zip(twin.blocks, model.blocks, strict=True):
        for name, part in own.named_children():
            if name == "attn":  # the window is written into it
                block.attn.load_state_dict(part.state_dict(), assign=True)
            else:
                setattr(block, name, part)
    for name, buffer in model.named_buffers(recurse=False):
        setattr(twin, name, buffer)
    twin.tokenizer, twin.name, twin.what = model.tokenizer, f"{model.name}, window {window}", model.what
    return twin.eval()


@torch.inference_mode()
def _read(
    model: LanguageModel,
    ids: list[int],
    topk: int | None,
    storage: str,
    report: Report,
    stop: Callable[[], bool] | None,
) -> tuple[Trace, KVCache]:
    """The recording of ``ids`` and the cache they left. WorkbenchError if ``stop`` says so or the output is not finite."""
    if topk is not None:
        whole_number("topk", topk)
    cache, recorder, guesses = model.new_cache(storage=storage), Recorder(model), []
    use_threads(threads_for_run())
    with recorder:
        for first in range(0, len(ids), PREFILL_CHUNK):
            if stop is not None and stop():
                raise WorkbenchError(f"stopped after {first} of {len(ids)} tokens; nothing was kept")
            line = torch.tensor([ids[first : first + PREFILL_CHUNK]], device=model.device)
            logits = model(line, cache, logits="last", topk=topk)[0, -1]
            guesses.append(best_guesses(logits))
            recorder.finish_step(line.shape[1], cache)
            report((first + line.shape[1]) / len(ids))
    trace = Trace(
        model=model.name,
        what=model.what,
        device=device_name(str(model.device)),
        config=model.config.to_dict(),
        token_ids=np.asarray(ids, np.int32),
        token_texts=token_texts(model, ids),
        prompt_length=len(ids),
        top_ids=np.stack([ids for ids, _ in guesses]).astype(np.int32),
        top_probs=np.stack([probs for _, probs in guesses]),
        next_ids=np.full(len(guesses), -1, np.int32),
        storage=storage,
        notes={"topk": topk or model.config.index_topk or None},
        **recorder.snapshot(device_name(str(model.device))),
    )
    return trace, cache


@torch.inference_mode()
def _bytes_of_last(model: LanguageModel, ids: list[int], cache: KVCache, topk: int | None) -> tuple[dict[int, int], int]:
    """Index-key bytes each layer reads for one more decoded token, and all that token reads, by the cache's own counters."""
    if cache.length >= model.config.max_position_embeddings:
        return {}, 0
    indexing = [layer for layer, kind in enumerate(model.config.layer_kinds) if kind in INDEXING]
    before, by_layer = 0, {}
    thread = threading.get_ident()

    def begin(*_: Any) -> None:
        nonlocal before
        if threading.get_ident() == thread:
            before = cache.bytes_read_by_part()["index"]

    def end(layer: int, *_: Any) -> None:
        if threading.get_ident() == thread:
            by_layer[layer] = cache.bytes_read_by_part()["index"] - before

    hooks = [model.blocks[layer].register_forward_pre_hook(begin) for layer in indexing]
    hooks += [model.blocks[layer].register_forward_hook(partial(end, layer)) for layer in indexing]
    try:
        cache.reset_bytes_read()
        model(torch.tensor([ids[-1:]], device=model.device), cache, logits="last", topk=topk)
    finally:
        for hook in hooks:
            hook.remove()
    return by_layer, sum(cache.bytes_read_by_part().values())


@dataclass(slots=True, eq=False)
class _Layer:
    """Listens to one layer while a text is read; ``pixels`` 0: only its choices are noted."""

    model: LanguageModel
    layer: int
    length: int
    pixels: int
    earlier: list[_Layer] = field(default_factory=list)
    inputs: AttentionInputs | None = None
    picture: _Picture | None = None
    selected: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int32))  # [L, K]
    missed: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    on_entries: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    reused: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)  # (source, lag) -> missed with that choice, [L]
    deviation: float = 0.0

    def __post_init__(self) -> None:
        self.selected = np.full((self.length, 0), -1, np.int32)
        if self.pixels:
            heads = self.model.config.num_attention_heads
            reach = self.ratio if self.kind == OVERLAPPING else 0
            self.picture = _Picture(self.length, heads, self.ratio, reach, self.pixels)
            self.missed, self.on_entries = (np.zeros((self.length, heads), np.float32) for _ in range(2))

    @property
    def kind(self) -> str:
        return str(self.model.config.layer_kinds[self.layer])

    @property
    def ratio(self) -> int:
        return int(self.model.config.compress_ratios[self.layer])

    def given(self, inputs: AttentionInputs) -> None:
        """What the layer is about to attend with, for one call of the model."""
        self.inputs = inputs

    def attended(self, record: Attention) -> None:
        """What the layer made of some of the call's queries."""
        t = record.sink_probs.shape[1]
        if record.selection is not None:
            entries = record.selection.entries[0]
            more = entries.shape[1] - self.selected.shape[1]
            if more > 0:
                self.selected = np.pad(self.selected, ((0, 0), (0, more)), constant_values=-1)
            self.selected[record.start : record.start + t, : entries.shape[1]] = entries.cpu().numpy()
        if self.pixels:
            entries_at_end = (record.start + t) // self.ratio
            values = self.model.config.num_attention_heads * (entries_at_end + 3 * self.model.config.sliding_window + 1)
            size = max(1, BLOCK_VALUES // values)
            for first in range(0, t, size):
                self._look(record, first, min(t, first + size))

    def _look(self, record: Attention, first: int, stop: int) -> None:
        """Dense attention of queries first..stop-1 of a record: painted, summed and forgotten."""
        assert self.inputs is not None and self.picture is not None
        start = record.start + first
        rows = slice(start, record.start + stop)
        near, entries, sink = dense_probs(self.model.blocks[self.layer].attn, self.inputs, start, stop - first)
        total = entries.sum(-1)  # [T, H]
        self.on_entries[rows] = total.cpu().numpy()
        if record.selection is not None:
            kept = _gathered(entries, record.selection.entries[0, first:stop])  # [T, H, K]
            missed = (total - kept.sum(-1)).clamp(min=0)
            shared = kept / (kept.sum(-1) + near.sum(-1) + sink).unsqueeze(-1)
            sparse = record.entry_probs[0, first:stop].float()
            self.deviation = max(self.deviation, _most(shared - sparse))
            self.missed[rows] = missed.cpu().numpy()
        for key, choice in self._other_choices(rows):
            there = torch.from_numpy(choice).to(entries.device)
            lost = (total - _gathered(entries, there).sum(-1)).mean(-1)
            self.reused.setdefault(key, np.zeros(self.length, np.float32))[rows] = lost.clamp(min=0).cpu().numpy()
        self.picture.paint(start, near.cpu().numpy(), entries.cpu().numpy())

    def _other_choices(self, rows: slice) -> list[tuple[tuple[int, int], np.ndarray]]:
        """(source, lag) -> entries [T, K] that were chosen earlier than those of ``rows``, -1 where there are none."""
        found = [((other.layer, 0), other.selected[rows]) for other in self.earlier]
        for lag in LAGS:
            old = self.selected[max(0, rows.start - lag) : max(0, rows.stop - lag)]
            gap = rows.stop - rows.start - len(old)
            found.append(((self.layer, lag), np.pad(old, ((gap, 0), (0, 0)), constant_values=-1)))
        return [(key, np.ascontiguousarray(choice, np.int64)) for key, choice in found]

    def _pool(self) -> int:
        """Entries that this layer's choice was made among, where a pool bounds them; else 0."""
        chooser = _choosers(self.model)[self.layer]
        within = self.model.config.layer_kinds[chooser] == "csa2-reindex"
        pool = int(self.model.config.candidate_pool(chooser) or 0) if within else 0
        return pool if self.selected.shape[1] <= pool else 0  # who asks for more than the pool holds chooses among all

    def map(self) -> DenseMap:
        assert self.picture is not None
        most, mean = self.picture.most[:-1], self.picture.most[-1]
        return DenseMap(
            self.layer, self.kind, self.picture.pooling, most, mean, self.missed, self.on_entries, self.deviation
        )  # fmt: skip

    def layer_reuse(self) -> list[Reuse]:
        chosen_for = _choosers(self.model)
        return [
            found
            for other in self.earlier
            if (found := self._reuse(other, 0, chosen_for[other.layer] == chosen_for[self.layer])) is not None
        ]

    def step_reuse(self) -> list[Reuse]:
        return [found for lag in LAGS if (found := self._reuse(self, lag, False)) is not None]

    def _reuse(self, other: _Layer, lag: int, same: bool) -> Reuse | None:
        """Over queries that leave something out, now and ``lag`` tokens before; None if there is none."""
        tokens = np.arange(lag, self.length)
        visible, kept = (tokens + 1) // self.ratio, (self.selected >= 0).sum(1)
        before = (other.selected >= 0).sum(1)[: self.length - lag] if lag < self.length else np.zeros(0, np.int64)
        left_out = (visible > kept[lag:]) & ((tokens - lag + 1) // self.ratio > before) & (before > 0)
        if not left_out.any():
            return None
        at = tokens[left_out]
        common = common_entries(self.selected[at], other.selected[at - lag])
        pool = self._pool()
        reach = np.minimum(visible[left_out], pool) if pool else visible[left_out]
        chance = np.minimum(before[left_out] / reach, 1.0)
        missed = self.missed[at].mean(1)
        with_other = self.reused[other.layer, lag][at]
        overlap, by_chance, own, others = (float(x.mean()) for x in (common / kept[at], chance, missed, with_other))
        return Reuse(self.layer, other.layer, lag, len(at), overlap, by_chance, own, others, same)


def _choosers(model: LanguageModel) -> dict[int, int]:
    """Layer -> the layer whose indexer chose for it."""
    found, last = {}, -1
    for layer, kind in enumerate(model.config.layer_kinds):
        last = layer if kind in INDEXING else last
        if kind in SELECTING:
            found[layer] = last
    return found


def _gathered(probs: Tensor, entries: Tensor) -> Tensor:
    """Probabilities [T, H, S] of the entries [T, K], 0 for -1: [T, H, K]."""
    if not probs.shape[-1]:
        return probs.new_zeros(*probs.shape[:2], entries.shape[1])
    where = entries.clamp(min=0).unsqueeze(1).expand(-1, probs.shape[1], -1)
    return probs.gather(-1, where) * (entries >= 0).unsqueeze(1)


def _most(difference: Tensor) -> float:
    return float(difference.abs().max()) if difference.numel() else 0.0


def dense_probs(attention: Any, inputs: AttentionInputs, start: int, t: int) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of queries start..start+t-1 with every complete entry kept: window [t, H, W], entries [t, H, S], sink [t, H].

    ``inputs`` are what the layer was given in a call that holds these queries, of one sequence.
    """
    first = start - inputs.start
    q = inputs.q[:, first : first + t]
    if inputs.keys is None:  # MLA: rows are tokens, there is neither window nor sink
        rows = inputs.entries.read(0, start + t).to(q.dtype)
        probs = attention.absorbed(q, rows, start, want_probs=True).probs[0]
        return probs[..., :0], probs, probs.new_zeros(probs.shape[:2])
    window = attention.window
    keys = inputs.keys if inputs.q.shape[1] > 1 else F.pad(inputs.keys, (0, 0, window - inputs.keys.shape[1], 0))
    closed = torch.arange(start + 1, start + t + 1, device=q.device) // attention.ratio
    rows = inputs.entries.read(0, int(closed[-1])).to(q.dtype)
    visible = torch.arange(rows.shape[1], device=q.device) < closed.unsqueeze(-1)
    near = keys[:, first : first + window - 1 + t]
    done = attend(q, near, window, inputs.known + first, rows, visible, attention.attn_sink)
    return window_rows(done.window_probs, window)[0], done.entry_probs[0], done.sink_probs[0]


class _Picture:
    """The largest probability per cell of a token axis, for each head and for their mean, painted block by block."""

    def __init__(self, length: int, heads: int, ratio: int, look_back: int, pixels: int) -> None:
        self.length, self.ratio, self.look_back = length, ratio, look_back
        self.pooling = -(-length // pixels)
        cells = -(-length // self.pooling)
        self.most = np.zeros((heads + 1, cells, cells), np.float32)

    def paint(self, start: int, near: np.ndarray, entries: np.ndarray) -> None:
        """near [T, H, W], column w being W - 1 - w tokens back; entries [T, H, S], 0 where invisible."""
        tokens = start + np.arange(len(entries))
        cells = tokens // self.pooling
        edges = np.flatnonzero(np.diff(cells, prepend=-1))  # where a new row of cells begins
        self._paint_window(tokens, cells, near)
        left = self.pooling * np.arange(self.most.shape[2])
        low = left // self.ratio  # the entries whose tokens lie in a column of cells
        high = (np.minimum(left + self.pooling, self.length) - 1) // self.ratio + 1 + bool(self.look_back)
        seen = low < entries.shape[2]
        if not seen.any():
            return
        bounds = np.stack([low[seen], np.minimum(high[seen], entries.shape[2])], axis=1).reshape(-1)
        for part, of in ((slice(0, -1), entries), (slice(-1, None), entries.mean(1, keepdims=True))):
            rows = np.maximum.reduceat(of, edges, axis=0) if len(edges) < len(cells) else of
            padded = np.pad(rows, ((0, 0), (0, 0), (0, 1)))  # so that the end of the last column is a valid index
            most = np.maximum.reduceat(padded, bounds, axis=2)[..., ::2].transpose(1, 0, 2)  # [H, cells, columns]
            at = np.ix_(np.arange(len(self.most))[part], cells[edges], np.flatnonzero(seen))
            self.most[at] = np.maximum(self.most[at], most)

    def _paint_window(self, tokens: np.ndarray, cells: np.ndarray, near: np.ndarray) -> None:
        if not near.shape[2]:
            return
        columns = tokens[:, None] - near.shape[2] + 1 + np.arange(near.shape[2])  # [T, W]
        inside = columns >= 0
        flat = (cells[:, None] * self.most.shape[2] + columns // self.pooling)[inside]
        for head in range(len(self.most)):
            values = near[:, head] if head < near.shape[1] else near.mean(1)
            np.maximum.at(self.most[head].reshape(-1), flat, values[inside])
