"""V4's attention layers: sliding window alone, window + CSA entries chosen by the indexer, window + all HCA entries.

Prefill, chunked prefill and decode are this one code path. Letters: B batch, T new tokens, H heads, D head dim, S entries,
K kept entries. (reference/deepseek-v4.md, sections 1 to 4)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.config import HybridConfig
from workbench.model.attention.core import attend, attend_one, window_rows
from workbench.model.compressor import Compressor
from workbench.model.indexer import Indexer, IndexQueries, Selection, select_entries
from workbench.model.kv_cache import GrowingRows, LayerCache, Rows
from workbench.model.layers import GroupedProjection, RMSNorm, Tap, rms_norm, rotate
from workbench.model.selection_edits import SelectionEdit, edit_of

CHUNK_ELEMENTS = 2**21  # logits and gathered values held at once; the query chunk shrinks as the context grows
MAX_QUERIES = 512


@dataclass(frozen=True, slots=True)
class Attention:
    """What a recorder or a training loss sees of one chunk of queries, positions start..start+T-1.

    window_probs [B, T, H, W], column w being the key W - 1 - w tokens back; sink_probs [B, T, H]. CSA: selection (K entries,
    best first) with entry_probs [B, T, H, K] in the same order, and the runner-up, the best entry left out. HCA: entry_probs
    [B, T, H, S] over all entries.
    """

    start: int
    window_probs: Tensor
    sink_probs: Tensor
    entry_probs: Tensor
    selection: Selection | None = None
    runner_up: Selection | None = None


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """What attention is worked out from in one call, before anything is left out: for those who ask what else it could be.

    q [B, T, H, D] of positions from ``start``; all entries so far, [B, S, D] (MLA: its rows, q not absorbed yet); window keys
    [B, W - 1 + T, D], of which ``known`` before the new ones are real (one decoded token: [B, 1..W, D]), None without a window.
    """

    start: int
    q: Tensor
    entries: Rows | GrowingRows
    keys: Tensor | None = None
    known: int = 0


@dataclass(frozen=True, slots=True)
class Positions:
    """Where the new tokens stand, worked out once for all layers: turns [T, R / 2] of window-only and compressed layers."""

    start: int
    window_turns: Tensor
    compressed_turns: Tensor
    topk: int | None = None  # entries to keep instead of the configured number


class HybridAttention(nn.Module):
    """Shared-KV multi-query attention with partial interleaved RoPE, undone on the output, and grouped output projection."""

    def __init__(self, config: HybridConfig, kind: str) -> None:
        super().__init__()
        heads, d = config.num_attention_heads, config.head_dim
        self.kind, self.heads, self.head_dim, self.eps = kind, heads, d, config.rms_norm_eps
        self.window, self.topk = config.sliding_window, config.index_topk
        self.ratio = {"window": 0, "csa": config.csa_ratio, "hca": config.hca_ratio}[kind]
        self.wq_a = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
        self.q_norm = RMSNorm(config.q_lora_rank, self.eps)
        self.wq_b = nn.Linear(config.q_lora_rank, heads * d, bias=False)
        self.wkv = nn.Linear(config.hidden_size, d, bias=False)
        self.kv_norm = RMSNorm(d, self.eps)
        self.attn_sink = nn.Parameter(torch.zeros(heads))
        self.wo_a = GroupedProjection(config.o_groups, heads * d, config.o_lora_rank)
        self.wo_b = nn.Linear(config.o_groups * config.o_lora_rank, config.hidden_size, bias=False)
        if kind != "window":
            self.compressor = Compressor(config, d, self.ratio, overlapping=kind == "csa")
        if kind == "csa":
            self.indexer = Indexer(config)
        self.attention_tap, self.input_tap = Tap(), Tap()

    def forward(self, x: Tensor, at: Positions, cache: LayerCache | None) -> Tensor:
        """x [B, T, C] -> [B, T, C]; the cache, if given, takes in the T tokens."""
        turns = self._turns(at)
        qr = self.q_norm(self.wq_a(x))
        q = self.wq_b(qr).unflatten(-1, (self.heads, self.head_dim))
        q = rotate(rms_norm(q, self.eps), turns.unsqueeze(1))
        new = self._keys(x, turns)
        edit = edit_of(self) if self.kind == "csa" else None
        decoding = cache is not None and x.shape[1] == 1 and edit is None  # an edit may leave out any number of entries
        keys = self._keys_of_one(new, cache) if decoding and cache else self._with_past(new, cache)
        entries = self._entries(x, at.start, cache)
        index = None
        if self.kind == "csa":
            index = self.indexer(x, qr, turns, at.start, cache)
        self.input_tap(AttentionInputs(at.start, q, entries, keys, at.start))
        outputs = []
        step = self._queries_per_chunk(x.shape[0], entries.length, at.topk or self.topk, edit is not None)
        for first in range(0, x.shape[1], step):
            mine = slice(first, first + step)
            near = keys if decoding else keys[:, first : first + self.window - 1 + q[:, mine].shape[1]]
            outputs.append(self._attend(q[:, mine], near, at.start + first, entries, index, mine, at.topk, decoding, edit))
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return self.wo_b(self.wo_a(rotate(out, turns.conj().unsqueeze(1)).flatten(2)))

    def remember(self, x: Tensor, at: Positions, cache: LayerCache) -> None:
        """Take x [B, T, C] in as ``forward`` does, without attending: the same cache for the price of its keys alone."""
        assert cache.window is not None
        kept = min(x.shape[1], self.window)  # keys that this very call pushes out of the window again are left out
        cache.window.skip(x.shape[1] - kept)
        cache.window.append(self._keys(x[:, -kept:], self._turns(at)[-kept:]))
        self._entries(x, at.start, cache)
        if self.kind == "csa":
            self.indexer.remember(x, at.start, cache)

    def _turns(self, at: Positions) -> Tensor:
        return at.window_turns if self.kind == "window" else at.compressed_turns

    def _keys(self, x: Tensor, turns: Tensor) -> Tensor:
        """Window keys of the tokens x [B, T, C], which are their values too, [B, T, D]."""
        return rotate(self.kv_norm(self.wkv(x)), turns)

    def _with_past(self, new: Tensor, cache: LayerCache | None) -> Tensor:
        """[B, W - 1 + T, D]: the window keys before the new tokens, zeros where nothing had begun yet, and the new ones."""
        if cache is None:
            return F.pad(new, (0, 0, self.window - 1, 0))
        assert cache.window is not None
        past = cache.window.last(min(cache.window.length, self.window - 1)).to(new.dtype)
        new = cache.window.append(new).to(new.dtype)
        return torch.cat([F.pad(past, (0, 0, self.window - 1 - past.shape[1], 0)), new], dim=1)

    def _keys_of_one(self, new: Tensor, cache: LayerCache) -> Tensor:
        """The window keys one decoded token attends to, itself among them, [B, 1..W, D]; in token order if somebody listens."""
        assert cache.window is not None
        cache.window.append(new)
        return cache.window.read(in_order=self.attention_tap.listening).to(new.dtype)

    def _entries(self, x: Tensor, start: int, cache: LayerCache | None) -> Rows | GrowingRows:
        """All compressed entries complete after the new tokens, [B, S, D]; none in a window-only layer."""
        if self.kind == "window":
            return Rows(x.new_zeros(x.shape[0], 0, self.head_dim))
        entries = self.compressor(x, start, cache.tail if cache else None)
        if cache is None or cache.compressed is None:
            return Rows(entries)
        cache.compressed.append(entries)
        return cache.compressed

    def _queries_per_chunk(self, batch: int, entries: int, topk: int, edited: bool) -> int:
        kept = min(entries, topk) if self.kind == "csa" and not edited else entries
        gathered = kept * self.head_dim if kept < entries or edited else 0
        per_query = batch * (self.heads * (2 * self.window + kept) + gathered + (entries if self.kind == "csa" else 0))
        return max(1, min(MAX_QUERIES, CHUNK_ELEMENTS // max(1, per_query)))

    def _attend(
        self,
        q: Tensor,
        keys: Tensor,
        start: int,
        entries: Rows | GrowingRows,
        index: IndexQueries | None,
        mine: slice,
        topk: int | None,
        decoding: bool,
        edit: SelectionEdit | None,
    ) -> Tensor:
        """One chunk of queries from position ``start`` on; one that is ``decoding`` sees all its keys and all entries."""
        t, listening = q.shape[1], self.attention_tap.listening
        closed = None  # entries complete at each query
        if not decoding and self.ratio:
            closed = torch.arange(start + 1, start + t + 1, device=q.device) // self.ratio
        selection = runner_up = None
        kept = min(topk or self.topk, entries.length) if index is not None else entries.length
        if index is not None and entries.length:
            best = select_entries(index.q[:, mine], index.w[:, mine], index.k, closed, kept + 1 if listening else kept)
            selection = Selection(best.scores[..., :kept], best.entries[..., :kept])
            runner_up = Selection(best.scores[..., kept:], best.entries[..., kept:])
            if edit is not None:
                selection = edit(start, selection)
        gathering = selection is not None and (kept < entries.length or edit is not None)  # else nothing is left out
        if selection is not None and gathering:
            rows = entries.gather(selection.entries if decoding else selection.entries.clamp(min=0))  # [B, T, K, D]
        else:
            rows = entries.read()
        rows = rows.to(q.dtype)
        if decoding:
            done = attend_one(q, keys, rows, self.attn_sink)
        else:
            if selection is not None and gathering:
                visible = selection.entries >= 0
            elif closed is not None:
                visible = torch.arange(entries.length, device=q.device) < closed.unsqueeze(-1)
            else:
                visible = torch.ones(t, 0, dtype=torch.bool, device=q.device)
            done = attend(q, keys, self.window, start, rows, visible, self.attn_sink)
        if listening:
            entry_probs = done.entry_probs
            if selection is not None and not gathering:  # into the order of the selection
                order = selection.entries.clamp(min=0).unsqueeze(2).expand(-1, -1, self.heads, -1)
                entry_probs = entry_probs.gather(-1, order) * (selection.entries >= 0).unsqueeze(2)
            if decoding:
                near = F.pad(done.window_probs, (self.window - keys.shape[1], 0))
            else:
                near = window_rows(done.window_probs, self.window)
            self.attention_tap(Attention(start, near, done.sink_probs, entry_probs, selection, runner_up))
        return done.out
