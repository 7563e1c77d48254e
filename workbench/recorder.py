"""Listening to a model while it runs: taps in, numpy out, one clock for all threads.

A Recorder hooks the taps of one model and notes only what its own thread computes, so two runs of one model do not mix. During
a step it keeps references (nearly free); tensors become arrays when a snapshot asks for them or the step was a long one.
Letters: L tokens, H heads, W window, K kept entries, S entries.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.memory.executors import NAMES, executor_name, finish_compute
from workbench.memory.prefetch import Lookup
from workbench.model.attention.hybrid import Attention
from workbench.model.engram import EngramGates
from workbench.model.indexer import IndexQueries
from workbench.model.kv_cache import GrowingRows, KVCache, Rows
from workbench.model.language_model import LanguageModel
from workbench.trace import (
    ATTENDING_TO_ALL,
    FULL_ROW_TOKENS,
    INDEXING,
    SELECTING,
    EngramTrace,
    LayerTrace,
    Span,
    Timeline,
    entry_pooling,
    row_tokens,
)

PENDING_STEPS = 64  # decoded tokens whose tensors wait to be turned into arrays together
PENDING_VALUES = 2**22  # at most in rows over all entries that wait, layer by layer


class Column:
    """Rows [n, ...] appended in order; the array doubles when full. Wider rows widen it, narrower are padded with ``fill``."""

    def __init__(self, dtype: type, fill: float = 0) -> None:
        self.dtype, self.fill, self.length = dtype, fill, 0
        self._array: np.ndarray | None = None

    def append(self, rows: np.ndarray) -> None:
        if self._array is None:
            self._array = _filled((max(64, len(rows)), *rows.shape[1:]), self.fill, self.dtype)
        needed, width = self.length + len(rows), max(self._array.shape[-1], rows.shape[-1]) if rows.ndim > 1 else 0
        if needed > len(self._array) or (rows.ndim > 1 and width > self._array.shape[-1]):
            capacity = len(self._array) if needed <= len(self._array) else max(needed, 2 * len(self._array))
            shape = (capacity, *rows.shape[1:-1], width) if rows.ndim > 1 else (capacity,)
            grown = _filled(shape, self.fill, self.dtype)
            held = self._array[: self.length]
            grown[(slice(0, self.length), *(slice(0, n) for n in held.shape[1:]))] = held
            self._array = grown
        self._array[(slice(self.length, needed), *(slice(0, n) for n in rows.shape[1:]))] = rows
        self.length = needed

    def rows(self) -> np.ndarray:
        """The rows so far; later appends do not change what was handed out, because finished rows are never rewritten."""
        if self._array is None:
            return np.zeros((0,), self.dtype)
        return self._array[: self.length]


def _filled(shape: tuple[int, ...], fill: float, dtype: type) -> np.ndarray:
    """Room that takes no memory until it is written to, where it holds zeros."""
    return np.full(shape, fill, dtype) if fill else np.zeros(shape, dtype)


_COLUMNS: dict[str, tuple[type, float]] = {
    "window_probs": (np.float16, 0),
    "sink_probs": (np.float16, 0),
    "selected": (np.int32, -1),
    "selected_scores": (np.float32, np.nan),
    "selected_probs": (np.float16, 0),
    "runner_up": (np.int32, -1),
    "runner_up_scores": (np.float32, np.nan),
    "index_queries": (np.float32, 0),
    "index_weights": (np.float32, 0),
    "entry_probs": (np.float16, 0),
}


class LayerRecord:
    """Columns of one attention layer, and the tensors that wait to become rows."""

    def __init__(self, layer: int, kind: str, ratio: int) -> None:
        self.layer, self.kind, self.ratio = layer, kind, ratio
        self.row_tokens = FULL_ROW_TOKENS  # the width that rows over all entries are pooled to; less as the text gets long
        self.columns = {name: Column(*how) for name, how in _COLUMNS.items()}
        self.pending: list[Attention | IndexQueries] = []
        self.waiting = 0  # values of rows over all entries among them
        self.index_keys: Rows | GrowingRows | None = None

    def note(self, record: Attention | IndexQueries) -> None:
        self.pending.append(record)
        if self.kind in ATTENDING_TO_ALL and isinstance(record, Attention):
            self.waiting += record.entry_probs.numel()
            if self.waiting > PENDING_VALUES:
                self.flush()  # rows over a long context are pooled early: until the step's end they would take gigabytes

    def flush(self) -> None:
        pending, self.pending, self.waiting = self.pending, [], 0
        attention = [p for p in pending if isinstance(p, Attention)]
        index = [p for p in pending if isinstance(p, IndexQueries)]
        for run in _alike(attention):
            self._append("window_probs", [a.window_probs for a in run])
            self._append("sink_probs", [a.sink_probs for a in run])
            if self.kind in SELECTING:
                self._append_selection(run)
            elif self.kind in ATTENDING_TO_ALL:
                for a in run:
                    self.columns["entry_probs"].append(pooled_rows(a.entry_probs[0], a.start, self.ratio, self.row_tokens))
        for queries in index:
            self._append("index_queries", [queries.q])
            self._append("index_weights", [queries.w])

    def _append_selection(self, run: list[Attention]) -> None:
        if run[0].selection is None:  # no entry was complete yet
            t, heads = sum(a.sink_probs.shape[1] for a in run), run[0].sink_probs.shape[2]
            for name in ("selected", "selected_scores"):
                self.columns[name].append(np.zeros((t, 0), np.float32))
            self.columns["selected_probs"].append(np.zeros((t, heads, 0), np.float32))
            self.columns["runner_up"].append(np.full(t, -1, np.int32))
            self.columns["runner_up_scores"].append(np.full(t, np.nan, np.float32))
            return
        self._append("selected", [a.selection.entries for a in run if a.selection])
        self._append("selected_scores", [_finite(a.selection.scores) for a in run if a.selection])
        self._append("selected_probs", [a.entry_probs for a in run])
        rows = [(a.runner_up, a.sink_probs[..., 0]) for a in run]  # a layer that reuses a choice has no runner-up of its own
        entries = [_first(r.entries, -1) if r else torch.full_like(like, -1) for r, like in rows]
        scores = [_first(_finite(r.scores), np.nan) if r else torch.full_like(like, np.nan) for r, like in rows]
        self._append("runner_up", entries)
        self._append("runner_up_scores", scores)

    def _append(self, name: str, tensors: list[Tensor]) -> None:
        self.columns[name].append(torch.cat([t[0] for t in tensors]).float().cpu().numpy())

    def settle(self, length: int) -> None:
        """Pool the rows further if ``length`` finished tokens ask for it."""
        while self.kind in ATTENDING_TO_ALL and self.row_tokens > row_tokens(length, self.ratio):
            self.row_tokens //= 2
            self.columns["entry_probs"] = pooled_further(self.columns["entry_probs"], self.row_tokens, self.ratio)

    def snapshot(self, length: int) -> LayerTrace:
        self.flush()
        names = ["window_probs", "sink_probs"]
        if self.kind in SELECTING:
            names += ["selected", "selected_scores", "selected_probs", "runner_up", "runner_up_scores"]
        elif self.kind in ATTENDING_TO_ALL:
            names += ["entry_probs"]
        if self.kind in INDEXING:
            names += ["index_queries", "index_weights"]
        arrays = {name: self.columns[name].rows()[:length] for name in names}
        if self.index_keys is not None:
            arrays["index_keys"] = self.index_keys.read(0, length // self.ratio)[0].float().cpu().numpy()
        return LayerTrace(self.layer, self.kind, self.ratio, **arrays)


def _alike(records: list[Attention]) -> list[list[Attention]]:
    """Neighbouring records whose rows have equal widths, so that each group becomes one concatenation."""
    groups: list[list[Attention]] = []
    shape = None
    for record in records:
        mine = (record.entry_probs.shape[-1], record.selection is None)
        if mine != shape:
            groups.append([])
        groups[-1].append(record)
        shape = mine
    return groups


def _finite(scores: Tensor) -> Tensor:
    return scores.masked_fill(scores == -torch.inf, torch.nan)


def _first(values: Tensor, missing: float) -> Tensor:
    """[B, T, 0 or 1] -> [B, T]."""
    return values[..., 0] if values.shape[-1] else values.new_full(values.shape[:-1], missing)


def pooled_rows(probs: Tensor, start: int, ratio: int, width: int = FULL_ROW_TOKENS) -> np.ndarray:
    """Probabilities over all entries [T, H, S] -> at most ``width`` tokens' worth of columns, max-pooled as LayerTrace says."""
    columns = -(-width // ratio)  # rounded up: a ratio that does not divide leaves a last, narrower column
    t, heads, entries = probs.shape
    out = np.zeros((t, heads, min(columns, entries)), np.float16)
    edges = [0]
    while edges[-1] < t:  # stretches of queries that share one pooling factor
        pooling = entry_pooling(start + edges[-1], width)
        edges.append(min(t, pooling * width - start))
        part = probs[edges[-2] : edges[-1]]
        if pooling > 1:
            part = torch.nn.functional.pad(part, (0, -entries % pooling)).unflatten(-1, (-1, pooling)).amax(-1)
        part = part[..., : out.shape[-1]]
        out[edges[-2] : edges[-1], :, : part.shape[-1]] = part.cpu().numpy()
    return out


def pooled_further(column: Column, width: int, ratio: int) -> Column:
    """Rows of 2 ``width`` tokens' worth of columns pooled to ``width``, in pairs; the first queries see no more anyway."""
    rows, out = column.rows(), Column(column.dtype, column.fill)
    if rows.ndim < 3:
        return column  # no row yet
    out.append(rows[:width, :, : -(-width // ratio)])
    for start in range(width, len(rows), FULL_ROW_TOKENS):
        even, odd = (rows[start : start + FULL_ROW_TOKENS, :, first::2] for first in (0, 1))
        even = even.copy()
        np.maximum(even[..., : odd.shape[-1]], odd, out=even[..., : odd.shape[-1]])
        out.append(even)
    return out


@contextmanager
def selecting_attention(model: LanguageModel) -> Iterator[dict[int, list[Attention]]]:
    """What the attention of each layer that selects entries sees in this thread's calls: layer -> records, gradients and all.

    For losses and scores; a Recorder keeps more, as arrays. The hooks go when the block ends.
    """
    thread = threading.get_ident()
    seen: dict[int, list[Attention]] = {i: [] for i, kind in enumerate(model.config.layer_kinds) if kind in SELECTING}

    def note(records: list[Attention], record: Attention) -> None:
        if threading.get_ident() == thread:
            records.append(record)

    taps = {layer: model.blocks[layer].attn.attention_tap for layer in seen}
    hooks = [tap.register_forward_hook(lambda _m, _i, record, to=seen[layer]: note(to, record)) for layer, tap in taps.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class Recorder:
    """Use as a context around the calls of one thread; ``step`` before each call of the model, ``finish_step`` after it."""

    def __init__(self, model: LanguageModel, *, spans_only: bool = False) -> None:
        """``spans_only`` times blocks and lookups and leaves attention alone."""
        self.model, self.spans_only = model, spans_only
        config = model.config
        kinds = zip(config.layer_kinds, config.compress_ratios, strict=True)
        self.layers = [LayerRecord(i, kind, ratio) for i, (kind, ratio) in enumerate(kinds)]
        engram_layers = config.engram.layer_ids if config.engram else ()
        self.engram = {layer: (Column(np.int64), Column(np.float16)) for layer in engram_layers}
        self.canonical_ids = Column(np.int32)  # what Engram hashes
        self.spans: list[Span] = []
        self.cache_bytes: dict[str, Column] = {}  # by part, those the model's cache has
        self.cache_reserved = Column(np.int64)
        self.step_starts = Column(np.int32)
        self.length = 0
        self._zero = time.perf_counter()
        self._thread = 0
        self._hooks: list[Any] = []
        self._steps = 0
        self._ids_noted = False  # the span of this step's token ids
        self._block_from = 0.0
        self._lookup: Lookup | None = None  # of the block under way
        self.alignment_error_s = 0.0  # of spans timed on a device, on the host's clock
        self._lock = threading.Lock()  # a snapshot may be asked for while the run works

    def __enter__(self) -> Recorder:
        self._thread = threading.get_ident()
        if self.engram and not self.spans_only:
            self._hook(self.model.canonical_tap.register_forward_hook, self._on_canonical_ids)
        for i, block in enumerate(self.model.blocks):
            if not self.spans_only:
                self._hook(block.attn.attention_tap.register_forward_hook, self._on_attention(self.layers[i]))
            if self.layers[i].kind in INDEXING and not self.spans_only:
                self._hook(block.attn.indexer.index_tap.register_forward_hook, self._on_index(self.layers[i]))
            if i in self.engram:
                if not self.spans_only:
                    self._hook(block.engram.gate_tap.register_forward_hook, self._on_gates(i))
                self._hook(block.lookup_tap.register_forward_hook, self._on_lookup)
            self._hook(block.register_forward_pre_hook, self._on_block_start)
            self._hook(block.register_forward_hook, self._on_block_end(i))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hook(self, register: Any, callback: Any) -> None:
        def only_mine(*args: Any) -> None:
            if threading.get_ident() == self._thread:
                with self._lock:
                    callback(*args)

        self._hooks.append(register(only_mine))

    def _on_attention(self, layer: LayerRecord) -> Any:
        return lambda _module, _inputs, record: layer.note(record)

    def _on_index(self, layer: LayerRecord) -> Any:
        def note(_module: Any, _inputs: Any, index: IndexQueries) -> None:
            layer.index_keys = index.k
            layer.note(index)

        return note

    def _on_gates(self, layer: int) -> Any:
        def note(_module: Any, _inputs: Any, seen: EngramGates) -> None:
            rows, gates = self.engram[layer]
            rows.append(seen.rows[0].cpu().numpy())
            gates.append(seen.gates[0].float().cpu().numpy())

        return note

    def _on_canonical_ids(self, _module: Any, _inputs: Any, ids: Tensor) -> None:
        self.canonical_ids.append(ids[0].numpy())

    def _on_lookup(self, _module: Any, _inputs: Any, lookup: Lookup) -> None:
        self._lookup = lookup

    def _on_block_start(self, _module: Any, _inputs: Any) -> None:
        self._block_from = time.perf_counter()
        self._lookup = None

    def _on_block_end(self, layer: int) -> Any:
        def note(_module: Any, _inputs: Any, _out: Any) -> None:
            finish_compute(self.model.device)  # so that a span ends when the work does; copies for later layers go on
            lookup, self._lookup = self._lookup, None
            after, start = ((), self._block_from) if lookup is None else self._lookup_spans(lookup)
            end = time.perf_counter()
            self._span("compute", f"layer {layer}", min(max(self._block_from, start), end), end, after=after)

        return note

    def _lookup_spans(self, lookup: Lookup) -> tuple[tuple[str, ...], float]:
        """Token ids -> hash -> gather -> copy, if there is one -> the layer's stall, if it had to wait: what the layer comes
        after, and when it could begin."""
        if not lookup.looked_up:
            return (), self._block_from
        name = f"layer {lookup.layer}"
        if not self._ids_noted:  # once a step: the lookups of all layers start from them
            self._ids_noted = True
            self._span("ids", "token ids", lookup.ids_from_s, lookup.asked_s)
        self._span("lookup", f"{name} hash", lookup.started_s, lookup.hashed_s, after=("token ids",))
        self._span("lookup", f"{name} gather", lookup.gather_from_s, lookup.gathered_s, after=(f"{name} hash",))
        last, there, free = f"{name} gather", lookup.gathered_s, lookup.wait_to_s
        copied = lookup.copied()
        if copied is not None:
            self._span("transfer", f"{name} copy", copied.start_s, copied.end_s, after=(last,))
            self.alignment_error_s = max(self.alignment_error_s, copied.error_s)
            last, there, free = f"{name} copy", copied.end_s, max(free, copied.end_s)
        if there <= lookup.wait_from_s:
            return (last,), self._block_from
        self._span("stall", f"{name} waits", lookup.wait_from_s, free, after=(last,))  # not there when the layer asked
        return (last,), free

    def _span(self, lane: str, name: str, start: float, end: float, after: tuple[str, ...] = ()) -> None:
        self.spans.append(Span(lane, name, self._steps, start - self._zero, end - self._zero, "measured", after))

    def finish_step(self, tokens: int, cache: KVCache) -> None:
        """Note what one call of the model left: its tokens and the bytes its cache holds now."""
        with self._lock:
            self.step_starts.append(np.array([self.length]))
            self.length += tokens
            self._steps += 1
            self._ids_noted = False
            for part, held in cache.nbytes_by_part().items():
                self.cache_bytes.setdefault(part, Column(np.int64)).append(np.array([held]))
            self.cache_reserved.append(np.array([cache.nbytes_reserved]))
            for layer in self.layers:
                if tokens > 1 or self._steps % PENDING_STEPS == 0:
                    layer.flush()
                layer.settle(self.length)

    @property
    def note(self) -> str:
        """What a reader of the spans must know: what a span is, and who computed."""
        note = f"one forward pass a step; compute lane: blocks as a whole; executor {NAMES[executor_name(self.model.device)]}"
        if self.alignment_error_s:
            note += f"; the device's clock is aligned to within {1e6 * self.alignment_error_s:.0f} us"
        return note

    def timeline_since(self, start: float) -> tuple[Span, ...]:
        """All spans with their times counted from ``start`` (``time.perf_counter`` seconds), for a single measured call."""
        shift = start - self._zero
        return tuple(replace(s, start_s=max(0.0, s.start_s - shift), end_s=max(0.0, s.end_s - shift)) for s in self.spans)

    def snapshot(self, device: str) -> dict[str, Any]:
        """Fields of a Trace for all finished steps; safe to call from another thread while the run works."""
        with self._lock:
            length, steps = self.length, self._steps
            spans = tuple(span for span in self.spans if span.step < steps)
            return {
                "layers": tuple(layer.snapshot(length) for layer in self.layers) if length else (),
                "engram": self._engram_snapshot(length) if length else (),
                "timeline": Timeline("measured", spans, device, self.note),
                "step_starts": self.step_starts.rows()[:steps],
                "cache_bytes": {part: column.rows()[:steps] for part, column in self.cache_bytes.items()},
                "cache_reserved": self.cache_reserved.rows()[:steps],
            }

    def _engram_snapshot(self, length: int) -> tuple[EngramTrace, ...]:
        if not self.engram or self.spans_only:
            return ()
        ids = self.canonical_ids.rows()[:length]
        pad = int(self.model.engram_canonical_ids[self.model.config.engram.pad_token_id])
        return tuple(
            EngramTrace(layer, rows.rows()[:length], gates.rows()[:length], ids, pad)
            for layer, (rows, gates) in self.engram.items()
        )
