"""mHC, manifold-constrained hyper-connections: M residual streams, mixed by nearly doubly stochastic matrices.

V4 reads the streams with the weights a sublayer has just worked out; V4.1's single pass with those of the sublayer before.
Letters: B batch, T tokens, M streams, C model dim.
(reference/deepseek-v4.md, section 8; arXiv 2512.24880; reference/deepseek-v41.md, section 5)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.config import DeepSeekV4Config, HybridConfig
from workbench.model.layers import Tap


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Sinkhorn-Knopp: [N, M, M] logits -> matrices whose columns sum to one and whose rows nearly do.

    Starts from a row softmax plus eps and ends on a column step, so rows are only approximately one.
    """
    a = torch.softmax(logits, dim=-1) + eps
    # Sums over tiny trailing axes are slow; with the many matrices last, every operation runs along long contiguous rows.
    a = a.permute(1, 2, 0).contiguous()  # [row, column, N]
    a = a / (a.sum(0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        a = a / (a.sum(1, keepdim=True) + eps)
        a = a / (a.sum(0, keepdim=True) + eps)
    return a.permute(2, 0, 1)


def collapse(streams: Tensor, pre: Tensor) -> Tensor:
    """sum_m pre_m X_m: streams [B, T, M, C] read with weights [B, T, M] -> [B, T, C]."""
    return (pre.to(streams.dtype).unsqueeze(-1) * streams).sum(2)


class HyperConnection(nn.Module):
    """How one sublayer reads from and writes to the M streams: weights pre, post and the residual mix."""

    def __init__(self, config: DeepSeekV4Config) -> None:
        super().__init__()
        m = self.streams = config.hc_mult
        self.eps, self.rms_eps, self.iterations = config.hc_eps, config.rms_norm_eps, config.hc_sinkhorn_iters
        self.fn = nn.Parameter(0.02 * torch.randn(m * m + 2 * m, m * config.hidden_size))
        self.base = nn.Parameter(torch.zeros(m * m + 2 * m))
        self.scale = nn.Parameter(torch.full((3,), 0.1))
        with torch.no_grad():  # start with streams that mostly keep to themselves
            self.base[2 * m :] = 2.0 * torch.eye(m).flatten()
        self.mix_tap = Tap()

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """streams [B, T, M, C] -> the sublayer's input [B, T, C], post [B, T, M] and mix [B, T, M, M]."""
        pre, post, mix = self.weights(streams)
        return collapse(streams, pre), post, mix

    def weights(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """streams [B, T, M, C] -> pre [B, T, M], post [B, T, M] and mix [B, T, M, M], float32."""
        m = self.streams
        flat = streams.flatten(2).float()
        flat = F.rms_norm(flat, flat.shape[-1:], eps=self.rms_eps)
        pre, post, mix = F.linear(flat, self.fn.float()).split([m, m, m * m], dim=-1)
        pre_base, post_base, mix_base = self.base.split([m, m, m * m])
        pre = torch.sigmoid(self.scale[0] * pre + pre_base) + self.eps
        post = 2 * torch.sigmoid(self.scale[1] * post + post_base)
        logits = (self.scale[2] * mix + mix_base).view(-1, m, m)
        mix = sinkhorn(logits, self.iterations, self.eps).view(*streams.shape[:2], m, m)
        return pre, post, self.mix_tap(mix)

    def write(self, streams: Tensor, y: Tensor, post: Tensor, mix: Tensor) -> Tensor:
        """X'_k = post_k y + sum_j mix[j, k] X_j: the sublayer's output y [B, T, C] joins the mixed streams."""
        mixed = torch.einsum("btjk,btjc->btkc", mix.to(streams.dtype), streams)
        return mixed + post.to(streams.dtype).unsqueeze(-1) * y.unsqueeze(-2)


class HyperHead(nn.Module):
    """Merges the M streams into one vector after the last layer; no Sinkhorn here."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.eps, self.rms_eps = config.hc_eps, config.rms_norm_eps
        self.fn = nn.Parameter(0.02 * torch.randn(config.hc_mult, config.hc_mult * config.hidden_size))
        self.base = nn.Parameter(torch.zeros(config.hc_mult))
        self.scale = nn.Parameter(torch.full((1,), 0.1))

    def forward(self, streams: Tensor) -> Tensor:
        """streams [B, T, M, C] -> [B, T, C]."""
        flat = streams.flatten(2).float()
        flat = F.rms_norm(flat, flat.shape[-1:], eps=self.rms_eps)
        pre = torch.sigmoid(F.linear(flat, self.fn.float()) * self.scale + self.base) + self.eps
        return collapse(streams, pre)
