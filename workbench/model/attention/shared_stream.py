"""V4.1's attention (CSA2): every layer has its own window; compressed entries and the choice among them are shared.

A Full layer makes a stream of entries with their index keys and chooses among them; a Reindex layer chooses anew, a Reuse layer
takes the latest choice. What they share is an immutable ``Stream`` that goes from layer to layer.
Letters: B batch, T new tokens, H heads, D head dim, S entries, K kept entries, N blocks of the candidate pool.
(reference/deepseek-v41.md, sections 1.1, 3 and 4)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.config import SharedStreamConfig
from workbench.model.attention.core import Attended, attend, window_rows
from workbench.model.attention.hybrid import CHUNK_ELEMENTS, MAX_QUERIES, Attention, AttentionInputs, Positions
from workbench.model.compressor import StreamCompressor
from workbench.model.indexer import (
    IndexQueries,
    Selection,
    StreamIndexer,
    candidate_blocks,
    keep_best,
    score_entries,
    select_candidates,
)
from workbench.model.kv_cache import GrowingRows, LayerCache, Rows
from workbench.model.layers import GroupedProjection, RMSNorm, Rotary, Tap, rotate
from workbench.model.selection_edits import edit_of


@dataclass(frozen=True, slots=True)
class Stream:
    """What a Full layer publishes for the layers after it, within one call of the model.

    ``entries`` [B, S, D] are key and value at once, ``keys`` [B, S, index head dim]. ``selection`` and ``runner_up``, the best
    entry left out, are the latest choice for the T queries of this call; ``whole`` says that nothing visible was left out.
    ``candidates`` [B, T, N] are the blocks that later layers may choose from, None without a pool.
    """

    ratio: int
    entries: Rows | GrowingRows
    keys: Rows | GrowingRows
    selection: Selection | None = None
    runner_up: Selection | None = None
    whole: bool = False
    candidates: Tensor | None = None


class SharedStreamAttention(nn.Module):
    """Shared-KV multi-query attention as in V4, without a norm on the heads' queries, over a window and a shared stream."""

    def __init__(self, config: SharedStreamConfig, layer: int) -> None:
        super().__init__()
        heads, d = config.num_attention_heads, config.head_dim
        self.kind, self.ratio = config.layer_kinds[layer], config.compress_ratios[layer]
        self.heads, self.head_dim, self.window, self.topk = heads, d, config.sliding_window, config.index_topk
        self.makes_pool = layer == config.candidate_source_layer_id
        self.pool = config.candidate_pool(layer)
        self.blocks, self.block = config.candidate_topk_blocks, config.candidate_block_size
        self.wq_a = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
        self.q_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.wq_b = nn.Linear(config.q_lora_rank, heads * d, bias=False)
        self.wkv = nn.Linear(config.hidden_size, d, bias=False)
        self.kv_norm = RMSNorm(d, config.rms_norm_eps)
        self.attn_sink = nn.Parameter(torch.zeros(heads))
        self.wo_a = GroupedProjection(config.o_groups, heads * d, config.o_lora_rank)
        self.wo_b = nn.Linear(config.o_groups * config.o_lora_rank, config.hidden_size, bias=False)
        if self.kind == "csa2-full":
            self.compressor = StreamCompressor(config, self.ratio)
            self.rotary = Rotary(config, compressed=True)
        if self.kind in ("csa2-full", "csa2-reindex"):
            self.indexer = StreamIndexer(config, owner=self.kind == "csa2-full")
        self.attention_tap, self.input_tap = Tap(), Tap()

    def forward(
        self, x: Tensor, at: Positions, cache: LayerCache | None, stream: Stream | None, *, publish: bool = True
    ) -> tuple[Tensor, Stream | None]:
        """x [B, T, C], the stream so far -> [B, T, C] and the stream for the next layer; the cache takes in the T tokens.

        ``publish=False``: a Full layer's entries of these tokens are in ``stream`` already.
        """
        turns = self._turns(at)
        if self.kind == "csa2-full" and publish:
            stream = self.publish(x, cache)
        qr = self.q_norm(self.wq_a(x))
        q = rotate(self.wq_b(qr).unflatten(-1, (self.heads, self.head_dim)), turns.unsqueeze(1))
        keys, known = self._window_keys(x, turns, cache)
        if self.kind in ("csa2-full", "csa2-reindex"):
            assert stream is not None
            stream = self._edited(self._choose(self.indexer(x, qr, turns, stream.keys), stream, at), at.start)
        mine = stream if self.ratio else None
        if self.kind == "csa2-reuse" and mine is not None:
            mine = self._edited(mine, at.start)  # here alone: later layers reuse the choice as it was made
        if mine is not None:
            self.input_tap(AttentionInputs(at.start, q, mine.entries, keys, known))
        outputs = []
        for first in range(0, x.shape[1], step := self._queries_per_chunk(x.shape[0], mine)):
            chunk = slice(first, first + step)
            near = keys[:, first : first + self.window - 1 + q[:, chunk].shape[1]]
            outputs.append(self._attend(q[:, chunk], near, known + first, at.start + first, mine, chunk))
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return self.wo_b(self.wo_a(rotate(out, turns.conj().unsqueeze(1)).flatten(2))), stream

    def remember(self, x: Tensor, at: Positions, cache: LayerCache) -> None:
        """Take x [B, T, C] into the cache, window and stream, without attending to anything."""
        assert cache.window is not None
        if self.kind == "csa2-full":
            self.publish(x, cache)
        kept = min(x.shape[1], self.window)  # keys that this very call pushes out of the window again are left out
        cache.window.skip(x.shape[1] - kept)
        cache.window.append(self._keys(x[:, -kept:], self._turns(at)[-kept:]))

    def publish(self, x: Tensor, cache: LayerCache | None) -> Stream:
        """A Full layer's stream with the entries and index keys that x [B, T, C] completes; nothing is chosen yet."""
        latents = self.compressor(x, cache.tail if cache else None)
        first = cache.compressed.length if cache and cache.compressed else 0
        numbers = torch.arange(first, first + latents.shape[1], device=x.device)
        turns = self.rotary(numbers * self.ratio)
        entries, keys = rotate(latents, turns), self.indexer.keys(latents, turns)
        if cache is None or cache.compressed is None or cache.index is None:
            return Stream(self.ratio, Rows(entries), Rows(keys))
        cache.compressed.append(entries)
        cache.index.append(keys)
        return Stream(self.ratio, cache.compressed, cache.index)

    def _turns(self, at: Positions) -> Tensor:
        return at.compressed_turns if self.ratio else at.window_turns

    def _keys(self, x: Tensor, turns: Tensor) -> Tensor:
        """Window keys of the tokens x [B, T, C], which are their values too, [B, T, D]."""
        return rotate(self.kv_norm(self.wkv(x)), turns)

    def _window_keys(self, x: Tensor, turns: Tensor, cache: LayerCache | None) -> tuple[Tensor, int]:
        """The W - 1 window keys before the new tokens, zeros where fewer are known, and theirs, [B, W - 1 + T, D]; how many."""
        new = self._keys(x, turns)
        if cache is None or cache.window is None:
            return F.pad(new, (0, 0, self.window - 1, 0)), 0
        known = min(cache.window.length, self.window - 1)
        past = cache.window.last(known).to(new.dtype)
        new = cache.window.append(new).to(new.dtype)
        return torch.cat([F.pad(past, (0, 0, self.window - 1 - known, 0)), new], dim=1), known

    def _choose(self, index: IndexQueries, stream: Stream, at: Positions) -> Stream:
        """The stream with this layer's selection; the candidate source adds the pool, a new stream comes without one."""
        entries, t = stream.keys.length, index.q.shape[1]
        if not entries:
            return stream
        kept, held, pool = min(at.topk or self.topk, entries), entries, None
        if self.pool and (at.topk is None or at.topk <= self.pool):  # who asks for more than the pool holds gets it
            pool = stream.candidates
            assert pool is not None
            kept = min(kept, pool.shape[-1] * self.block)
            held = min(entries, pool.shape[-1] * self.block) * index.q.shape[-1]
        listening = self.attention_tap.listening
        found, pools = [], []
        for first in range(0, t, step := max(1, min(MAX_QUERIES, CHUNK_ELEMENTS // (index.q.shape[0] * held)))):
            mine = slice(first, first + step)
            part = IndexQueries(index.q[:, mine], index.w[:, mine], index.k)
            closed = self._closed(at.start + first, part.q.shape[1], part.q.device)
            if pool is not None:
                found.append(select_candidates(part, pool[:, mine], self.block, closed, kept + listening))
                continue
            scores = score_entries(part.q, part.w, part.k, closed)
            found.append(keep_best(scores, kept + listening))
            if self.makes_pool:
                pools.append(candidate_blocks(scores, closed, self.blocks, self.block))
        best = Selection(*(torch.cat(parts, dim=1) for parts in zip(*found, strict=True)))
        return replace(
            stream,
            selection=Selection(best.scores[..., :kept], best.entries[..., :kept]),
            runner_up=Selection(best.scores[..., kept:], best.entries[..., kept:]) if listening else None,
            whole=kept == entries and pool is None,
            candidates=torch.cat(pools, dim=1) if pools else stream.candidates,
        )

    def _edited(self, stream: Stream, start: int) -> Stream:
        """The stream with its selection as an edit of this layer wants it; as it is without one."""
        edit = edit_of(self)
        if edit is None or stream.selection is None:
            return stream
        return replace(stream, selection=edit(start, stream.selection), whole=False)

    def _closed(self, start: int, t: int, device: torch.device) -> Tensor:
        """Entries complete at each of t queries, [T]."""
        return (torch.arange(start, start + t, device=device) + 1) // self.ratio

    def _queries_per_chunk(self, batch: int, stream: Stream | None) -> int:
        kept = stream.selection.entries.shape[-1] if stream and stream.selection else 0
        gathered = kept * self.head_dim if stream and not stream.whole else 0
        per_query = batch * (self.heads * (2 * self.window + kept) + gathered)
        return max(1, min(MAX_QUERIES, CHUNK_ELEMENTS // max(1, per_query)))

    def _attend(self, q: Tensor, keys: Tensor, known: int, start: int, stream: Stream | None, mine: slice) -> Tensor:
        """One chunk of queries from position ``start`` on, before which ``known`` window keys (or more) are there."""
        selection = runner_up = None
        if stream is None or stream.selection is None:
            nothing = q.new_zeros(q.shape[0], 0, self.head_dim)
            done = attend(q, keys, self.window, known, nothing, q.new_zeros(q.shape[1], 0, dtype=torch.bool), self.attn_sink)
        else:
            selection = Selection(*(part[:, mine] for part in stream.selection))
            if stream.runner_up is not None and self.kind != "csa2-reuse":
                runner_up = Selection(*(part[:, mine] for part in stream.runner_up))
            done = self._attend_to_stream(q, keys, known, start, stream, selection)
        if self.attention_tap.listening:
            near = window_rows(done.window_probs, self.window)
            self.attention_tap(Attention(start, near, done.sink_probs, done.entry_probs, selection, runner_up))
        return done.out

    def _attend_to_stream(
        self, q: Tensor, keys: Tensor, known: int, start: int, stream: Stream, selection: Selection
    ) -> Attended:
        """Entry probabilities come in the order of the selection, where somebody listens."""
        there = selection.entries >= 0
        if not stream.whole:
            gathered = stream.entries.gather(selection.entries.clamp(min=0)).to(q.dtype)  # [B, T, K, D]
            return attend(q, keys, self.window, known, gathered, there, self.attn_sink)
        closed = self._closed(start, q.shape[1], q.device)
        visible = torch.arange(stream.entries.length, device=q.device) < closed.unsqueeze(-1)
        done = attend(q, keys, self.window, known, stream.entries.read().to(q.dtype), visible, self.attn_sink)
        if not self.attention_tap.listening:
            return done
        order = selection.entries.clamp(min=0).unsqueeze(2).expand(-1, -1, self.heads, -1)
        return done._replace(entry_probs=done.entry_probs.gather(-1, order) * there.unsqueeze(2))
