"""Token-dimension compression: R tokens become one entry, gated per channel by a softmax over the tokens it reads.

CSA's blocks overlap: entry j reads the "a" series of block j-1 and the "b" series of block j. HCA's do not, nor do those of
V4.1's shared streams. Letters: B batch, T tokens, R ratio, D width of an entry.
(reference/deepseek-v4.md, sections 2.1 and 3; reference/deepseek-v41.md, section 3.1)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.config import HybridConfig, SharedStreamConfig
from workbench.model.kv_cache import BlockTail
from workbench.model.layers import RMSNorm, Rotary, rotate


class Compressor(nn.Module):
    """C_j = RoPE_{jR}(RMSNorm(sum_rows softmax_rows(Wgate x + ape) * Wkv x)), per channel over the rows entry j reads."""

    def __init__(self, config: HybridConfig, width: int, ratio: int, overlapping: bool) -> None:
        super().__init__()
        self.ratio, self.width, self.overlapping = ratio, width, overlapping
        series = 2 * width if overlapping else width
        self.wkv = nn.Linear(config.hidden_size, series, bias=False)
        self.wgate = nn.Linear(config.hidden_size, series, bias=False)
        self.ape = nn.Parameter(torch.zeros(ratio, series))
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.rotary = Rotary(config, compressed=True)

    def forward(self, x: Tensor, start: int, tail: BlockTail | None) -> Tensor:
        """x [B, T, C] at positions start..start+T-1 -> the entries these tokens complete, [B, n, D]; the tail moves on.

        Without a tail the call must begin a sequence (start 0) and the rest of an open block is dropped.
        """
        batch, ratio = x.shape[0], self.ratio
        weight_type = self.wkv.weight.dtype
        x = x.to(weight_type)
        ape = self._ape(start % ratio, x.shape[1]).float()
        pair = torch.stack([self.wkv(x).float(), self.wgate(x).float() + ape])  # values, scores [2, B, T, w]
        if tail is not None and tail.count + x.shape[1] < ratio:  # what most decoded tokens do
            tail.add(pair)
            return x.new_zeros(batch, 0, self.width)
        if tail is not None and tail.count:
            pair = torch.cat([tail.open, pair], dim=2)
        blocks = pair.shape[2] // ratio
        rest = pair[:, :, blocks * ratio :]
        closed = pair[:, :, : blocks * ratio].unflatten(2, (blocks, ratio))  # [2, B, n, R, w]
        if blocks == 0:  # and no tail to remember the tokens
            return x.new_zeros(batch, 0, self.width)
        finished_before = tail.blocks if tail is not None else 0
        rows = closed
        if self.overlapping:
            a, b = closed.split(self.width, dim=-1)
            before = tail.overlap.unsqueeze(2) if tail is not None else _nothing_before(a[:, :, :1])
            rows = torch.cat([torch.cat([before, a[:, :, :-1]], dim=2), b], dim=3)  # [2, B, n, 2R, D]
        if tail is not None:
            tail.keep(rest, closed[:, :, -1, :, : self.width] if self.overlapping else None, blocks)
        values, scores = rows
        pooled = self.norm((torch.softmax(scores, dim=2) * values).sum(2).to(weight_type))
        positions = torch.arange(finished_before, finished_before + blocks, device=x.device) * ratio
        return rotate(pooled, self.rotary(positions))

    def _ape(self, first: int, tokens: int) -> Tensor:
        """Position biases of ``tokens`` tokens from row ``first`` of a block on, [T, w]."""
        if first + tokens <= self.ratio:
            return self.ape[first : first + tokens]
        return self.ape[torch.arange(first, first + tokens, device=self.ape.device) % self.ratio]


def _nothing_before(a: Tensor) -> Tensor:
    """The missing predecessor of block 0: value 0 with score -inf, so it gets no weight. a [2, B, 1, R, D]."""
    values, scores = torch.zeros_like(a[0]), torch.full_like(a[1], -torch.inf)
    return torch.stack([values, scores])


class StreamCompressor(nn.Module):
    """c_i = RMSNorm(sum_rows softmax_rows(Wgate x) * Wkv x), per channel over the R tokens of block i; RMSNorm(Wkv x) at R = 1.

    No position bias, and not rotated: index keys are projected from this latent, and rotated by themselves.
    """

    def __init__(self, config: SharedStreamConfig, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.wkv = nn.Linear(config.hidden_size, config.head_dim, bias=False)
        if ratio > 1:
            self.wgate = nn.Linear(config.hidden_size, config.head_dim, bias=False)
        self.norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, tail: BlockTail | None) -> Tensor:
        """x [B, T, C] -> the latents of the blocks these tokens complete, [B, n, D]; the tail moves on.

        Without a tail the call must begin a sequence and the rest of an open block is dropped.
        """
        values = self.wkv(x)
        if self.ratio == 1:
            return self.norm(values)
        pair = torch.stack([values.float(), self.wgate(x).float()])  # values, scores [2, B, T, D]
        if tail is not None and tail.count:
            pair = torch.cat([tail.open, pair], dim=2)
        blocks = pair.shape[2] // self.ratio
        if tail is not None:
            tail.keep(pair[:, :, blocks * self.ratio :], None, blocks)
        closed_values, scores = pair[:, :, : blocks * self.ratio].unflatten(2, (blocks, self.ratio))
        return self.norm((torch.softmax(scores, dim=2) * closed_values).sum(2).to(values.dtype))
