"""The lightning indexer of DeepSeek Sparse Attention: cheap scores that choose which compressed entries a query attends to.

V3.2 attends to tokens: there an entry is a token, and its index key comes from a projection instead of a compressor.
Letters: B batch, T queries, S compressed entries, H index heads, D index head dim, K kept entries.
(reference/deepseek-v4.md, sections 2.2 and 2.3)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from workbench.config import HybridConfig, LatentConfig
from workbench.errors import InputError
from workbench.model.compressor import Compressor
from workbench.model.kv_cache import GrowingRows, LayerCache, Rows
from workbench.model.layers import Tap, rotate, rotate_halves

SCORE_ELEMENTS = 2**22  # products held at once per query chunk and entry chunk


class Selection(NamedTuple):
    """Kept entries, best first: scores [B, T, K] float32 and entry numbers [B, T, K] int64, -1 where none is left."""

    scores: Tensor
    entries: Tensor


class IndexQueries(NamedTuple):
    """What scores are made of: q [B, T, H, D], head weights w [B, T, H] (scales folded in), keys k, rows [B, S, D]."""

    q: Tensor
    w: Tensor
    k: Rows | GrowingRows


def score_chunk(q: Tensor, w: Tensor, k: Tensor) -> Tensor:
    """I[t, s] = sum_h w[t, h] relu(q[t, h] . k[s]), float32 [B, T, S]."""
    products = torch.matmul(q.float().flatten(1, 2), k.float().transpose(1, 2)).relu()  # [B, T * H, S]
    return torch.matmul(w.float().unsqueeze(2), products.unflatten(1, q.shape[1:3])).squeeze(2)


def topk_lower_first(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best along the last axis, best first; of equal scores the lower entry number wins, everywhere alike.

    Sorting keys hold the order-preserving bits of the float in the high half and the reversed entry number in the low
    half, because ``topk`` alone breaks ties differently at different lengths.
    """
    bits = (scores.detach().float() + 0.0).view(torch.int32).to(torch.int64)  # adding 0.0 turns -0.0 into 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    reversed_entry = 0x7FFFFFFF - torch.arange(scores.shape[-1], device=scores.device)
    keys = (ordered << 32) | reversed_entry
    entries = 0x7FFFFFFF - (keys.topk(k, dim=-1).values & 0x7FFFFFFF)
    return scores.gather(-1, entries), entries


def select_entries(q: Tensor, w: Tensor, k: Rows | GrowingRows, closed: Tensor, topk: int) -> Selection:
    """Score the compressed entries for a chunk of queries and keep the best ``topk``.

    q [B, T, H, D]; w [B, T, H]; k rows [B, S, D], shared by all heads; closed [T] how many entries are complete before each
    query, the rest being in its future. Raises InputError if topk is not positive; a topk beyond S keeps all S.
    Scoring is T x S work by design; the caller chunks T, and this function S, so memory stays bounded.
    """
    if topk <= 0:
        raise InputError(f"topk must be positive, got {topk}")
    width = max(1, SCORE_ELEMENTS // max(1, q.shape[0] * q.shape[1] * q.shape[2]))
    parts = [score_chunk(q, w, k.read(first, first + width)) for first in range(0, k.length, width)]
    scores = torch.cat(parts, dim=-1)  # [B, T, S]
    visible = torch.arange(k.length, device=q.device) < closed.unsqueeze(-1)  # [T, S]
    best, entries = topk_lower_first(scores.masked_fill(~visible, -torch.inf), min(topk, k.length))
    return Selection(best, entries.masked_fill(best == -torch.inf, -1))


class Indexer(nn.Module):
    """Projects queries and head weights, and compresses its own keys; ``choose`` keeps the best entries of a chunk.

    It learns from its own KL loss only, so its inputs are detached from the model's graph.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.heads, self.width = config.index_n_heads, config.index_head_dim
        self.wq_b = nn.Linear(config.q_lora_rank, self.heads * self.width, bias=False)
        self.weights_proj = nn.Linear(config.hidden_size, self.heads, bias=False)
        self.compressor = Compressor(config, self.width, config.csa_ratio, overlapping=True)
        self.index_tap = Tap()

    def forward(self, x: Tensor, qr: Tensor, turns: Tensor, start: int, cache: LayerCache | None) -> IndexQueries:
        """x [B, T, C], low-rank queries qr [B, T, rank], turns [T, R / 2] -> queries, weights and all keys so far."""
        q = rotate(self.wq_b(qr.detach()).unflatten(-1, (self.heads, self.width)), turns.unsqueeze(1))
        w = self.weights_proj(x.detach()) * (self.width**-0.5 * self.heads**-0.5)
        keys = self.remember(x, start, cache)
        return self.index_tap(IndexQueries(keys.as_queries(q), w, keys))

    def remember(self, x: Tensor, start: int, cache: LayerCache | None) -> Rows | GrowingRows:
        """Take the tokens x [B, T, C] in; all index keys complete after them, [B, S, D]."""
        keys = self.compressor(x.detach(), start, cache.index_tail if cache else None)
        if cache is None or cache.index is None:
            return Rows(keys)
        cache.index.append(keys)
        return cache.index


class TokenIndexer(nn.Module):
    """V3.2's indexer: one layer-normed key per token. RoPE turns the leading channels in halves, unlike the attention's.

    Like V4's it learns from its own KL loss only, so its inputs are detached from the model's graph.
    """

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.heads, self.width = config.index_n_heads, config.index_head_dim
        self.wq_b = nn.Linear(config.q_lora_rank, self.heads * self.width, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.width, bias=False)
        self.k_norm = nn.LayerNorm(self.width, eps=1e-6)
        self.weights_proj = nn.Linear(config.hidden_size, self.heads, bias=False)
        self.index_tap = Tap()

    def forward(self, x: Tensor, qr: Tensor, turns: Tensor, cache: LayerCache | None) -> IndexQueries:
        """x [B, T, C], low-rank queries qr [B, T, rank], turns [T, R / 2] -> queries, weights and all keys so far."""
        q = rotate_halves(self.wq_b(qr.detach()).unflatten(-1, (self.heads, self.width)), turns.unsqueeze(1))
        w = self.weights_proj(x.detach()) * (self.width**-0.5 * self.heads**-0.5)
        keys = self.remember(x, turns, cache)
        return self.index_tap(IndexQueries(keys.as_queries(q), w, keys))

    def remember(self, x: Tensor, turns: Tensor, cache: LayerCache | None) -> Rows | GrowingRows:
        """Take the tokens x [B, T, C] in; all index keys so far, [B, S, D]."""
        keys = rotate_halves(self.k_norm(self.wk(x.detach())), turns)
        if cache is None or cache.index is None:
            return Rows(keys)
        cache.index.append(keys)
        return cache.index
