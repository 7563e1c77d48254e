"""Dense attention, MHA and GQA: every query attends to every token before it and to itself.

Letters: B batch, T new tokens, S tokens in all, H query heads, N KV heads, G query heads per KV head, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.config import DenseConfig
from workbench.model.attention.hybrid import CHUNK_ELEMENTS, MAX_QUERIES, Attention
from workbench.model.kv_cache import GrowingRows, LayerCache, Rows
from workbench.model.layers import Tap, rotate_halves


@dataclass(frozen=True, slots=True)
class TokenPositions:
    """Where the new tokens stand, worked out once for all layers that are alike: turns [T, R / 2]."""

    start: int
    turns: Tensor
    topk: int | None = None  # tokens to keep instead of the configured number


class AttendedAll(NamedTuple):
    """out [B, T, H, V]; probs [B, T, H, S] where they were asked for."""

    out: Tensor
    probs: Tensor | None


def attend_all(q: Tensor, keys: Tensor, values: Tensor, start: int, scale: float, want_probs: bool) -> AttendedAll:
    """softmax(scale q . k) v over tokens 0..t for each query position t = start..start+T-1.

    q [B, T, H, D]; keys [B, S, N, D] and values [B, S, N, V], S = start + T or more. The G = H / N query heads of one KV head
    are handled as further queries, so keys are read once and never repeated. Work and memory are T x S: the caller chunks T.
    """
    t, length, heads = q.shape[1], start + q.shape[1], q.shape[2]
    groups = heads // keys.shape[2]
    keys, values = keys[:, :length].transpose(1, 2), values[:, :length].transpose(1, 2)  # [B, N, S, D]
    q = q.unflatten(2, (-1, groups)).permute(0, 2, 1, 3, 4).flatten(2, 3)  # [B, N, T * G, D]
    hidden = None
    if t > 1:  # a single query sees everything
        future = torch.arange(length, device=q.device) > torch.arange(start, length, device=q.device).unsqueeze(1)  # [T, S]
        hidden = future.repeat_interleave(groups, dim=0)
    if want_probs or keys.shape[-1] != values.shape[-1]:  # fused kernels want equal widths
        logits = torch.matmul(q, keys.transpose(2, 3)).float() * scale
        if hidden is not None:
            logits = logits.masked_fill(hidden, -torch.inf)
        probs = torch.softmax(logits, dim=-1)
        out = torch.matmul(probs.to(values.dtype), values)
    else:
        out = F.scaled_dot_product_attention(q, keys, values, None if hidden is None else ~hidden, scale=scale)

    def by_token(x: Tensor) -> Tensor:
        return x.unflatten(2, (t, groups)).permute(0, 2, 1, 3, 4).flatten(2, 3)

    return AttendedAll(by_token(out), by_token(probs) if want_probs else None)


class DenseAttention(nn.Module):
    """Multi-head attention whose query heads share KV heads in groups; the cache holds a token's keys, then its values."""

    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        self.kind = config.layer_kinds[0]
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.wq = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.attention_tap = Tap()

    def forward(self, x: Tensor, at: TokenPositions, cache: LayerCache | None) -> Tensor:
        """x [B, T, C] -> [B, T, C]; the cache, if given, takes in the T tokens."""
        rows = self.remember(x, at, cache)
        q = rotate_halves(self.wq(x).unflatten(-1, (self.heads, self.head_dim)), at.turns.unsqueeze(1))
        listening = self.attention_tap.listening
        keys, values = rows.read().to(q.dtype).unflatten(-1, (2, self.kv_heads, self.head_dim)).unbind(2)  # [B, S, N, D]
        outputs = []
        step = max(1, min(MAX_QUERIES, CHUNK_ELEMENTS // max(1, x.shape[0] * self.heads * rows.length)))
        for first in range(0, x.shape[1], step):
            start = at.start + first
            done = attend_all(q[:, first : first + step], keys, values, start, self.head_dim**-0.5, listening)
            outputs.append(done.out)
            if done.probs is not None:
                self.attention_tap(everything_seen(start, done.probs))
        return self.wo(torch.cat(outputs, dim=1).flatten(2))

    def remember(self, x: Tensor, at: TokenPositions, cache: LayerCache | None) -> Rows | GrowingRows:
        """Take tokens x [B, T, C] in without attending; all rows so far, [B, S, 2 N D]."""
        keys = rotate_halves(self.wk(x).unflatten(-1, (self.kv_heads, self.head_dim)), at.turns.unsqueeze(1))
        new = torch.cat([keys.flatten(2), self.wv(x)], dim=-1)
        if cache is None or cache.kv is None:
            return Rows(new)
        cache.kv.append(new)
        return cache.kv


def everything_seen(start: int, probs: Tensor) -> Attention:
    """The record of queries that attend to every token before them, probs [B, T, H, S]: no window and no sink."""
    return Attention(start, probs[..., :0], torch.zeros_like(probs[..., 0]), probs)
