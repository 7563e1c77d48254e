"""Multi-head latent attention (MLA), alone or with DeepSeek Sparse Attention (DSA), which chooses the tokens to attend to.

A token leaves one row: a normed latent, from which every head's key and value are projected, and one rotated key part that all
heads share. Two forms compute the same: *naive* projects keys and values of all tokens, *absorbed* folds those projections into
queries and outputs and attends to the rows themselves, as multi-query attention with one KV head.
Letters: B batch, T new tokens, S tokens in all, H heads, K kept tokens, E row width = latent width + R rotary channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.config import LatentConfig
from workbench.model.attention.dense import (
    AttendedAll,
    TokenPositions,
    attend_all,
    everything_seen,
)
from workbench.model.attention.hybrid import CHUNK_ELEMENTS, MAX_QUERIES, Attention, AttentionInputs
from workbench.model.indexer import IndexQueries, Selection, TokenIndexer, select_entries
from workbench.model.kv_cache import GrowingRows, LayerCache, Rows
from workbench.model.layers import RMSNorm, Tap, rotate
from workbench.model.selection_edits import SelectionEdit, edit_of

INNER_EPS = 1e-6  # of the norms inside MLA, whatever the model's own
NAIVE_ELEMENTS = 2**24  # projected keys and values the naive form may hold at once


class LatentAttention(nn.Module):
    """MLA; with DSA where the configuration has a top-k. RoPE turns interleaved pairs of the trailing R channels."""

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.kind, self.topk, self.scale = config.layer_kinds[0], config.index_topk, config.softmax_scale
        self.heads, self.rank = config.num_attention_heads, config.kv_lora_rank
        self.nope, self.rotary, self.v_width = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.wq_a = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
        self.q_norm = RMSNorm(config.q_lora_rank, INNER_EPS)
        self.wq_b = nn.Linear(config.q_lora_rank, self.heads * (self.nope + self.rotary), bias=False)
        self.wkv_a = nn.Linear(config.hidden_size, self.rank + self.rotary, bias=False)
        self.kv_norm = RMSNorm(self.rank, INNER_EPS)
        self.wkv_b = nn.Linear(self.rank, self.heads * (self.nope + self.v_width), bias=False)
        self.wo = nn.Linear(self.heads * self.v_width, config.hidden_size, bias=False)
        if self.kind == "mla-dsa":
            self.indexer = TokenIndexer(config)
        self.attention_tap, self.input_tap = Tap(), Tap()

    def forward(self, x: Tensor, at: TokenPositions, cache: LayerCache | None) -> Tensor:
        """x [B, T, C] -> [B, T, C]; the cache, if given, takes in the T tokens."""
        qr = self.q_norm(self.wq_a(x))
        q = rotate(self.wq_b(qr).unflatten(-1, (self.heads, self.nope + self.rotary)), at.turns.unsqueeze(1))
        rows = self._rows(x, at, cache)
        index = self.indexer(x, qr, at.turns, cache) if self.kind == "mla-dsa" else None
        kept = rows.length if index is None else min(at.topk or self.topk, rows.length)
        edit = None if index is None else edit_of(self)
        self.input_tap(AttentionInputs(at.start, q, rows))
        outputs = []
        for first in range(0, x.shape[1], step := self._queries_per_chunk(x.shape[0], rows.length, kept, edit is not None)):
            mine = slice(first, first + step)
            if index is None:
                done = self._attend_to_all(q[:, mine], rows, at.start + first, self.attention_tap.listening)
                if done.probs is not None:
                    self.attention_tap(everything_seen(at.start + first, done.probs))
                outputs.append(done.out)
            else:
                outputs.append(self._attend_to_chosen(q[:, mine], rows, at.start + first, index, mine, kept, edit))
        return self.wo(torch.cat(outputs, dim=1).flatten(2))

    def remember(self, x: Tensor, at: TokenPositions, cache: LayerCache | None) -> Rows | GrowingRows:
        """Take tokens x [B, T, C] in without attending, index keys too; all rows so far, [B, S, E]."""
        if self.kind == "mla-dsa":
            self.indexer.remember(x, at.turns, cache)
        return self._rows(x, at, cache)

    def _rows(self, x: Tensor, at: TokenPositions, cache: LayerCache | None) -> Rows | GrowingRows:
        latent, key = self.wkv_a(x).split([self.rank, self.rotary], dim=-1)
        new = torch.cat([self.kv_norm(latent), rotate(key, at.turns)], dim=-1)
        if cache is None or cache.kv is None:
            return Rows(new)
        cache.kv.append(new)
        return cache.kv

    def _queries_per_chunk(self, batch: int, length: int, kept: int, edited: bool) -> int:
        width, kept = self.rank + self.rotary, length if edited else kept
        gathered = kept * width + length if kept < length or edited else 0  # rows per query, and index scores
        per_query = batch * (self.heads * (kept + width) + gathered)
        return max(1, min(MAX_QUERIES, CHUNK_ELEMENTS // max(1, per_query)))

    def _key_and_value_maps(self) -> tuple[Tensor, Tensor]:
        """The projections out of the latent, per head: keys [H, nope, rank] and values [H, v, rank]."""
        maps = self.wkv_b.weight.view(self.heads, self.nope + self.v_width, self.rank)
        return maps[:, : self.nope], maps[:, self.nope :]

    def naive(self, q: Tensor, rows: Tensor, start: int, want_probs: bool = False) -> AttendedAll:
        """q [B, T, H, nope + R] at positions from ``start``, rows [B, S, E]: projects all heads' keys and values."""
        latent, shared = rows.split([self.rank, self.rotary], dim=-1)
        keys, values = self.wkv_b(latent).unflatten(-1, (self.heads, -1)).split([self.nope, self.v_width], dim=-1)
        keys = torch.cat([keys, shared.unsqueeze(2).expand(-1, -1, self.heads, -1)], dim=-1)  # [B, S, H, nope + R]
        return attend_all(q, keys, values, start, self.scale, want_probs)

    def absorbed(self, q: Tensor, rows: Tensor, start: int, want_probs: bool = False) -> AttendedAll:
        """The same as ``naive`` without a key or value per head: all heads attend to the rows."""
        keys = rows.unsqueeze(2)  # [B, S, 1, E]
        done = attend_all(self.absorb(q), keys, keys[..., : self.rank], start, self.scale, want_probs)
        return AttendedAll(self.unfold(done.out), done.probs)

    def absorb(self, q: Tensor) -> Tensor:
        """Queries [B, T, H, nope + R] -> [B, T, H, E], whose products with rows are those with the heads' keys."""
        to_keys, _ = self._key_and_value_maps()
        still, moving = q.split([self.nope, self.rotary], dim=-1)
        return torch.cat([torch.einsum("bthn,hnr->bthr", still, to_keys), moving], dim=-1)

    def unfold(self, latents: Tensor) -> Tensor:
        """Mixed latents [B, T, H, rank] -> mixed values [B, T, H, v]."""
        return torch.einsum("bthr,hvr->bthv", latents, self._key_and_value_maps()[1])

    def _attend_to_all(self, q: Tensor, rows: Rows | GrowingRows, start: int, want_probs: bool) -> AttendedAll:
        """The form with fewer products: projecting each key once pays off when many queries share it."""
        t, length = q.shape[1], start + q.shape[1]
        saved = t * (2 * self.rank - self.nope - self.v_width)  # per token and head: products against the price of projecting
        fits = q.shape[0] * length * self.heads * (self.nope + self.rotary + self.v_width) <= NAIVE_ELEMENTS
        form = self.naive if fits and saved > self.rank * (self.nope + self.v_width) else self.absorbed
        return form(q, rows.read(0, length).to(q.dtype), start, want_probs)

    def _attend_to_chosen(
        self,
        q: Tensor,
        rows: Rows | GrowingRows,
        start: int,
        index: IndexQueries,
        mine: slice,
        kept: int,
        edit: SelectionEdit | None,
    ) -> Tensor:
        """One chunk of queries: the best ``kept`` of the tokens each may see, by index score, or what an edit makes of them."""
        t, everything, listening = q.shape[1], kept == rows.length and edit is None, self.attention_tap.listening
        if everything and not listening:  # nobody asks for the order, and nothing is left out
            return self._attend_to_all(q, rows, start, False).out
        visible = torch.arange(start + 1, start + t + 1, device=q.device)  # tokens each query may see, itself included
        best = select_entries(index.q[:, mine], index.w[:, mine], index.k, visible, kept + 1 if listening else kept)
        selection = Selection(best.scores[..., :kept], best.entries[..., :kept])
        if edit is not None:
            selection = edit(start, selection)
        there, numbers = selection.entries >= 0, selection.entries.clamp(min=0)
        if everything:
            out, probs = self._attend_to_all(q, rows, start, True)
            assert probs is not None
            in_order = probs.gather(-1, numbers.unsqueeze(2).expand(-1, -1, self.heads, -1))
            probs = in_order.masked_fill(~there.unsqueeze(2), 0.0)
        else:
            gathered = rows.gather(numbers).to(q.dtype)  # [B, T, K, E]
            logits = torch.matmul(self.absorb(q), gathered.transpose(2, 3)).float() * self.scale
            probs = torch.softmax(logits.masked_fill(~there.unsqueeze(2), -torch.inf), dim=-1)  # [B, T, H, K]
            out = self.unfold(torch.matmul(probs.to(q.dtype), gathered[..., : self.rank]))
        if listening:
            runner_up = Selection(best.scores[..., kept:], best.entries[..., kept:])
            none = torch.zeros_like(probs[..., 0])
            self.attention_tap(Attention(start, probs[..., :0], none, probs, selection, runner_up))
        return out
