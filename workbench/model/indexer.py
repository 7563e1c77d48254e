"""The lightning indexer of DeepSeek Sparse Attention: cheap scores that choose which compressed entries a query attends to.

V3.2 attends to tokens: there an entry is a token, and its index key comes from a projection instead of a compressor.
Letters: B batch, T queries, S compressed entries, H index heads, D index head dim, K kept entries, P entries of a candidate
pool, N blocks of it. (reference/deepseek-v4.md, sections 2.2 and 2.3; reference/deepseek-v41.md, section 4)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.config import HybridConfig, LatentConfig, SharedStreamConfig
from workbench.errors import InputError
from workbench.model.compressor import Compressor
from workbench.model.kv_cache import GrowingRows, LayerCache, Rows
from workbench.model.layers import RMSNorm, Tap, rotate, rotate_halves

SCORE_ELEMENTS = 2**22  # products held at once on an accelerator: queries x heads x entries
CACHED_ELEMENTS = 2**18  # the same on a CPU: what is multiplied, rectified and summed stays in its second-level cache
CACHED_QUERIES = 16
FOLD = 8  # entries of which only the best is looked at first, where there are many


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
    products = torch.matmul(q.float().flatten(1, 2), k.float().transpose(1, 2)).relu_()  # [B, T * H, S]
    return torch.matmul(w.float().unsqueeze(2), products.unflatten(1, q.shape[1:3])).squeeze(2)


def topk_lower_first(scores: Tensor, k: int, least: float | None = None) -> tuple[Tensor, Tensor]:
    """The k best along the last axis, best first; of equal scores the lower entry number wins, everywhere alike.

    Plain ``topk`` breaks ties differently at different lengths, but where the k + 1 best are all different there is nothing
    to break; the rows that have a tie, few in practice, are done again by keys that leave none. Of scores equal to ``least``,
    where given, any may come first.
    """
    detached = scores.detach()
    if not scores.shape[-1]:
        return scores, torch.zeros_like(scores, dtype=torch.int64)
    best, entries = _topk_folded(detached, k + 1)
    tied = best[..., 1:] == best[..., :-1]
    tied = (tied if least is None else tied & (best[..., 1:] > least)).any(-1)
    entries = entries[..., :k]
    if tied.any():
        rows = tied.nonzero(as_tuple=True)
        entries = entries.index_put(rows, _topk_by_keys(detached[rows], k))
    return scores.gather(-1, entries), entries


def _topk_folded(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``topk`` over the last axis, on a CPU three times as fast where rows are long: the k best lie in the k groups of FOLD
    entries whose best are the best. Of equal scores any may win; a group left out holds nothing better than what is kept."""
    length = scores.shape[-1]
    stride = length // FOLD  # what is left over, fewer than FOLD entries, is looked at in any case
    if not scores.is_cpu or scores.dim() != 3 or scores.shape[1] == 1 or stride < 4 * k:
        return scores.topk(min(k, length), dim=-1)
    folded = scores[..., : FOLD * stride].unflatten(-1, (FOLD, stride))
    groups = folded.amax(-2).topk(k, dim=-1, sorted=False).indices.unsqueeze(-2)  # [B, T, 1, k]
    members = folded.gather(-1, groups.expand(-1, -1, FOLD, -1)).flatten(-2)  # [B, T, FOLD * k]
    best, places = torch.cat([members, scores[..., FOLD * stride :]], dim=-1).topk(k, dim=-1)
    left_over = places - FOLD * k
    member = groups.squeeze(-2).gather(-1, places % k) + places // k * stride
    return best, torch.where(left_over < 0, member, FOLD * stride + left_over)


def _topk_by_keys(scores: Tensor, k: int) -> Tensor:
    """Entry numbers [N, k] of the k best of scores [N, S]: keys hold the order-preserving bits of the float in the high half
    and the reversed entry number in the low half, so no two are equal."""
    bits = (scores.float() + 0.0).view(torch.int32).to(torch.int64)  # adding 0.0 turns -0.0 into 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    reversed_entry = 0x7FFFFFFF - torch.arange(scores.shape[-1], device=scores.device)
    keys = (ordered << 32) | reversed_entry
    return 0x7FFFFFFF - (keys.topk(k, dim=-1).values & 0x7FFFFFFF)


def _scores(q: Tensor, w: Tensor, k: Rows | GrowingRows, entries: int) -> Tensor:
    """Scores of the first ``entries`` entries, float32 [B, T, entries], a tile of queries and entries at a time."""
    batch, t, heads = q.shape[:3]
    room = CACHED_ELEMENTS if q.is_cpu else SCORE_ELEMENTS
    queries = min(t, CACHED_QUERIES) if q.is_cpu else t
    width = max(1, room // max(1, batch * queries * heads))
    if width >= entries and queries == t:
        return score_chunk(q, w, k.read(0, entries))
    columns = []
    for first in range(0, entries, width):
        keys = k.read(first, min(first + width, entries)).float()
        tiles = [score_chunk(q[:, i : i + queries], w[:, i : i + queries], keys) for i in range(0, t, queries)]
        columns.append(torch.cat(tiles, dim=1))
    return torch.cat(columns, dim=-1)


def select_entries(q: Tensor, w: Tensor, k: Rows | GrowingRows, closed: Tensor | None, topk: int) -> Selection:
    """Score the compressed entries for a chunk of queries and keep the best ``topk``.

    q [B, T, H, D]; w [B, T, H]; k rows [B, S, D], shared by all heads; closed [T] how many entries are complete before each
    query, the rest being in its future; None where every query may see them all. Raises InputError if topk is not positive; a
    topk beyond S keeps all S. Scoring is T x S work by design; the caller chunks T, and ``score_entries`` S, so memory stays
    bounded.
    """
    if topk <= 0:
        raise InputError(f"topk must be positive, got {topk}")
    kept = min(topk, k.length)
    if closed is None:
        return keep_best(_scores(q, w, k, k.length), kept)
    seen = int(closed.max())  # nobody here sees further, so nothing further is scored
    best, entries = keep_best(_hide_(_scores(q, w, k, seen), closed), kept)
    if seen < kept:
        best, entries = F.pad(best, (0, kept - seen), value=-torch.inf), F.pad(entries, (0, kept - seen), value=-1)
    return Selection(best, entries)


def score_entries(q: Tensor, w: Tensor, k: Rows | GrowingRows, closed: Tensor) -> Tensor:
    """Scores of all entries, float32 [B, T, S], -inf where one lies in the query's future; shapes as ``select_entries``."""
    seen = int(closed.max())
    return F.pad(_hide_(_scores(q, w, k, seen), closed), (0, k.length - seen), value=-torch.inf)


def _hide_(scores: Tensor, closed: Tensor) -> Tensor:
    """-inf, in place, where an entry lies in a query's future; entries that every query may see are not touched."""
    first = int(closed.min())
    hidden = torch.arange(first, scores.shape[-1], device=scores.device) >= closed.unsqueeze(-1)  # [T, S - first]
    scores[..., first:].masked_fill_(hidden, -torch.inf)
    return scores


def keep_best(scores: Tensor, topk: int) -> Selection:
    """The ``topk`` best of scores [B, T, S], or all S; -inf means there is no such entry."""
    best, entries = topk_lower_first(scores, min(topk, scores.shape[-1]), least=-torch.inf)
    return Selection(best, entries.masked_fill(best == -torch.inf, -1))


def candidate_blocks(scores: Tensor, closed: Tensor, blocks: int, size: int) -> Tensor:
    """The pool later layers choose from: of the blocks of ``size`` entries, the ``blocks`` that hold the best scores.

    scores [B, T, S], -inf where invisible; closed [T]. The block of the newest visible entry is always kept; of equal blocks
    the lower one wins. Returns block numbers [B, T, N] in ascending order, then -1 where fewer are visible.
    """
    best = F.pad(scores, (0, -scores.shape[-1] % size), value=-torch.inf).unflatten(-1, (-1, size)).amax(-1)
    total = best.shape[-1]
    newest = torch.arange(total, device=scores.device) == (closed.unsqueeze(-1) - 1) // size  # [T, blocks]; none: -1
    best, numbers = topk_lower_first(best.masked_fill(newest, torch.inf), min(blocks, total))
    numbers = numbers.masked_fill(best == -torch.inf, total).sort(dim=-1).values
    return numbers.masked_fill(numbers == total, -1)


def select_candidates(index: IndexQueries, pool: Tensor, size: int, closed: Tensor, topk: int) -> Selection:
    """Score and keep the ``topk`` best of each query's own pool, block numbers [B, T, N] of ``size`` entries each.

    A cache much longer than the pool is not read: keys of the pool alone are gathered, so the cost of a query stays the same
    however long the context. A short one is scored as a whole, which needs no gathering, and masked.
    """
    width = min(pool.shape[-1] * size, index.k.length)  # so many are kept at most, whichever way they are found
    if index.k.length <= 2 * pool.shape[-1] * size:
        scores = score_entries(index.q, index.w, index.k, closed)
        held = scores.new_zeros(*scores.shape[:2], -(-index.k.length // size) + 1, dtype=torch.bool)
        held.scatter_(-1, pool.masked_fill(pool < 0, held.shape[-1] - 1), True)  # the last column takes what is no block
        inside = held[..., :-1].repeat_interleave(size, dim=-1)[..., : index.k.length]
        return keep_best(scores.masked_fill(~inside, -torch.inf), min(topk, width))
    members = (pool.unsqueeze(-1) * size + torch.arange(size, device=pool.device)).flatten(-2)  # [B, T, P]
    there = (pool >= 0).repeat_interleave(size, dim=-1) & (members < closed.view(1, -1, 1))
    keys = index.k.gather(members.clamp(0, index.k.length - 1)).float()  # [B, T, P, D]
    products = torch.matmul(index.q.float(), keys.transpose(2, 3)).relu()  # [B, T, H, P]
    scores = torch.matmul(index.w.float().unsqueeze(2), products).squeeze(2).masked_fill(~there, -torch.inf)
    best = keep_best(scores, min(topk, width))
    entries = members.gather(-1, best.entries.clamp(min=0)).masked_fill(best.entries < 0, -1)
    return Selection(best.scores, entries)


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


class StreamIndexer(nn.Module):
    """V4.1's indexer: index keys are projected from the unrotated entries of a shared stream, by the layer that makes it.

    Layers that choose anew among another layer's entries have queries and head weights of their own and no keys. Like
    ``Indexer`` it learns from its own loss only.
    """

    def __init__(self, config: SharedStreamConfig, owner: bool) -> None:
        super().__init__()
        self.heads, self.width = config.index_n_heads, config.index_head_dim
        self.wq_b = nn.Linear(config.q_lora_rank, self.heads * self.width, bias=False)
        self.weights_proj = nn.Linear(config.hidden_size, self.heads, bias=False)
        if owner:
            self.wk = nn.Linear(config.head_dim, self.width, bias=False)
            self.k_norm = RMSNorm(self.width, config.rms_norm_eps)
        self.index_tap = Tap()

    def keys(self, latents: Tensor, turns: Tensor) -> Tensor:
        """Unrotated entries [B, n, head_dim], turns [n, R / 2] -> index keys [B, n, D]."""
        return rotate(self.k_norm(self.wk(latents.detach())), turns)

    def forward(self, x: Tensor, qr: Tensor, turns: Tensor, keys: Rows | GrowingRows) -> IndexQueries:
        """x [B, T, C], low-rank queries qr [B, T, rank], turns [T, R / 2], all keys of the stream."""
        q = rotate(self.wq_b(qr.detach()).unflatten(-1, (self.heads, self.width)), turns.unsqueeze(1))
        w = self.weights_proj(x.detach()) * (self.width**-0.5 * self.heads**-0.5)
        return self.index_tap(IndexQueries(q, w, keys))


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
