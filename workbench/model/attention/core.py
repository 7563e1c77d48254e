"""The shared attention core: one softmax over a sliding window, compressed entries and a learned sink.

Keys and values are the same tensor and one KV head serves all query heads. Letters: B batch, T queries, H heads, D head
dim, W window, S entries, K entries gathered per query. (reference/deepseek-v4.md, section 1.2)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Attended(NamedTuple):
    """out [B, T, H, D]; probabilities over window keys (block layout, see ``window_rows``), entries and the sink [B, T, H]."""

    out: Tensor
    window_probs: Tensor  # [B, T, H, J]
    entry_probs: Tensor  # [B, T, H, S or K]
    sink_probs: Tensor


def attend(q: Tensor, keys: Tensor, window: int, start: int, entries: Tensor, visible: Tensor, sinks: Tensor) -> Attended:
    """p = softmax([q . k / sqrt(D) over window and visible entries ; sink]);  out = sum p k, the sink having value 0.

    q [B, T, H, D] for positions start..start+T-1; keys [B, W - 1 + T, D], the window keys of the W - 1 positions before
    ``start`` (anything where they lie before 0) and the new ones; entries [B, S, D] shared by all queries with visible
    [T, S], or gathered per query [B, T, K, D] with visible [B, T, K]. Windows are done in blocks of W queries by 2 W - 1 keys.
    """
    batch, t, heads, d = q.shape
    block = min(window, t)
    blocks = -(-t // block)
    padding = blocks * block - t
    span = block + window - 1
    pad_queries = (0, 0, 0, 0, 0, padding)
    scaled = q * d**-0.5
    queries = F.pad(scaled, pad_queries).view(batch, blocks, block * heads, d)
    near = F.pad(keys, (0, 0, 0, padding)).unfold(1, span, block)  # [B, n, D, J]
    window_logits = torch.matmul(queries, near).view(batch, blocks, block, heads, span).float()
    window_logits += outside_window(block, window, q.device).unsqueeze(1)  # several times faster than a masked fill
    window_logits[:, 0, ..., : max(0, window - 1 - start)] = -torch.inf  # keys before position 0
    window_logits = window_logits.flatten(1, 2)[:, :t]
    shared = entries.dim() == 3
    if shared:
        entry_logits = torch.matmul(scaled.flatten(1, 2), entries.transpose(1, 2)).view(batch, t, heads, -1)
        visible = visible.unsqueeze(0)
    else:
        entry_logits = torch.matmul(scaled, entries.transpose(2, 3))
    entry_logits = entry_logits.float().masked_fill_(~visible.unsqueeze(2), -torch.inf)
    sink_logits = sinks.float().view(1, 1, heads, 1).expand(batch, t, heads, 1)
    probs = torch.softmax(torch.cat([window_logits, entry_logits, sink_logits], dim=-1), dim=-1)
    window_probs, entry_probs, sink_probs = probs.split([span, entry_logits.shape[-1], 1], dim=-1)
    weights = F.pad(window_probs.to(q.dtype), pad_queries).reshape(batch, blocks, block * heads, span)
    out = torch.matmul(weights, near.transpose(2, 3)).view(batch, blocks * block, heads, d)[:, :t]
    if entry_logits.shape[-1]:
        p = entry_probs.to(q.dtype)
        out = out + (torch.matmul(p.flatten(1, 2), entries).view_as(out) if shared else torch.matmul(p, entries))
    return Attended(out, window_probs, entry_probs, sink_probs.squeeze(-1))


def attend_one(q: Tensor, keys: Tensor, entries: Tensor, sinks: Tensor) -> Attended:
    """``attend`` for one query that may see every row given: what decoding comes down to, without windows and masks.

    q [B, 1, H, D]; keys [B, J, D], in any order; entries [B, S, D] or [B, 1, K, D]. Probabilities come in the rows' order.
    """
    batch, _, heads, d = q.shape
    entries = entries.flatten(1, 2) if entries.dim() == 4 else entries
    queries = q[:, 0] * d**-0.5
    logits = [
        torch.matmul(queries, keys.mT),
        torch.matmul(queries, entries.mT),
        sinks.to(q.dtype).expand(batch, heads).unsqueeze(-1),
    ]
    probs = torch.softmax(torch.cat(logits, dim=-1), dim=-1, dtype=torch.float32).unsqueeze(1)
    window_probs, entry_probs, sink_probs = probs.split([keys.shape[1], entries.shape[1], 1], dim=-1)
    out = torch.matmul(window_probs[:, 0].to(q.dtype), keys)
    if entries.shape[1]:
        out = torch.baddbmm(out, entry_probs[:, 0].to(q.dtype), entries)
    return Attended(out.unsqueeze(1), window_probs, entry_probs, sink_probs.squeeze(-1))


def outside_window(block: int, window: int, device: torch.device) -> Tensor:
    """[block, J] what is added to the logits of a block's queries: 0 where key column j lies in a query's window, else -inf.

    Query i of a block sees columns i..i+W-1, the last one itself.
    """
    seen = torch.ones(block, block + window - 1, dtype=torch.bool, device=device).triu_().tril_(window - 1)
    return torch.zeros(seen.shape, device=device).masked_fill_(~seen, -torch.inf)


def window_rows(window_probs: Tensor, window: int) -> Tensor:
    """Straighten block columns into [B, T, H, W]: column w is the key W - 1 - w tokens before the query."""
    t = window_probs.shape[1]
    if t == 1:  # one query's block is its window already
        return window_probs
    block = min(window, t)
    first = torch.arange(t, device=window_probs.device) % block
    columns = first.unsqueeze(1) + torch.arange(window, device=window_probs.device)  # [T, W]
    return window_probs.gather(-1, columns.view(1, t, 1, window).expand(*window_probs.shape[:3], window))
