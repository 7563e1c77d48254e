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
from workbench.model.layers import Tap, rms_scale

FEW_MATRICES = 4  # up to here plain numbers are faster than tensors


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Sinkhorn-Knopp: [N, M, M] logits -> matrices whose columns sum to one and whose rows nearly do.

    Starts from a row softmax plus eps and ends on a column step, so rows are only approximately one.
    """
    a = torch.softmax(logits, dim=-1) + eps
    if len(a) <= FEW_MATRICES and a.shape[-1] == 4 and a.is_cpu and not a.requires_grad:
        return torch.tensor([balance_4x4(rows, iterations, eps) for rows in a.tolist()], dtype=a.dtype)
    # Sums over tiny trailing axes are slow; with the many matrices last, every operation runs along long contiguous rows.
    a = a.permute(1, 2, 0).contiguous()  # [row, column, N]
    a = a / (a.sum(0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        a = a / (a.sum(1, keepdim=True) + eps)
        a = a / (a.sum(0, keepdim=True) + eps)
    return a.permute(2, 0, 1)


Row = list[float]


def balance_4x4(rows: list[Row], iterations: int, eps: float) -> list[Row]:
    """Sinkhorn's steps on one matrix, in plain numbers: a decoded token's share of the work.

    Four streams are what every released model has, and 120 tensor operations on 16 numbers cost four times as much. The rows
    stay as they are; what is kept is what each row and column has been divided by so far, r and s. A row step divides row i
    by its sum plus eps: sum_j a_ij / (r_i s_j) + eps, which makes the new r_i = sum_j a_ij / s_j + eps r_i.
    """
    (a0, a1, a2, a3), (b0, b1, b2, b3), (c0, c1, c2, c3), (d0, d1, d2, d3) = rows
    ra = rb = rc = rd = 1.0
    pa = pb = pc = pd = 1.0  # 1 / r
    s0, s1, s2, s3 = (sum(column) + eps for column in zip(*rows, strict=True))
    p0, p1, p2, p3 = 1 / s0, 1 / s1, 1 / s2, 1 / s3
    for _ in range(iterations - 1):
        ra = a0 * p0 + a1 * p1 + a2 * p2 + a3 * p3 + eps * ra
        rb = b0 * p0 + b1 * p1 + b2 * p2 + b3 * p3 + eps * rb
        rc = c0 * p0 + c1 * p1 + c2 * p2 + c3 * p3 + eps * rc
        rd = d0 * p0 + d1 * p1 + d2 * p2 + d3 * p3 + eps * rd
        pa, pb, pc, pd = 1 / ra, 1 / rb, 1 / rc, 1 / rd
        s0 = a0 * pa + b0 * pb + c0 * pc + d0 * pd + eps * s0
        s1 = a1 * pa + b1 * pb + c1 * pc + d1 * pd + eps * s1
        s2 = a2 * pa + b2 * pb + c2 * pc + d2 * pd + eps * s2
        s3 = a3 * pa + b3 * pb + c3 * pc + d3 * pd + eps * s3
        p0, p1, p2, p3 = 1 / s0, 1 / s1, 1 / s2, 1 / s3
    return [
        [a0 * pa * p0, a1 * pa * p1, a2 * pa * p2, a3 * pa * p3],
        [b0 * pb * p0, b1 * pb * p1, b2 * pb * p2, b3 * pb * p3],
        [c0 * pc * p0, c1 * pc * p1, c2 * pc * p2, c3 * pc * p3],
        [d0 * pd * p0, d1 * pd * p1, d2 * pd * p2, d3 * pd * p3],
    ]


def collapse(streams: Tensor, pre: Tensor) -> Tensor:
    """sum_m pre_m X_m: streams [B, T, M, C] read with weights [B, T, M] -> [B, T, C]."""
    batch, t, m, c = streams.shape
    return torch.bmm(pre.to(streams.dtype).reshape(-1, 1, m), streams.reshape(-1, m, c)).view(batch, t, c)


class HyperConnection(nn.Module):
    """How one sublayer reads from and writes to the M streams: weights pre, post and the residual mix."""

    parts: Tensor

    def __init__(self, config: DeepSeekV4Config) -> None:
        super().__init__()
        m = self.streams = config.hc_mult
        self.eps, self.rms_eps, self.iterations = config.hc_eps, config.rms_norm_eps, config.hc_sinkhorn_iters
        self.fn = nn.Parameter(0.02 * torch.randn(m * m + 2 * m, m * config.hidden_size))
        self.base = nn.Parameter(torch.zeros(m * m + 2 * m))
        self.scale = nn.Parameter(torch.full((3,), 0.1))
        with torch.no_grad():  # start with streams that mostly keep to themselves
            self.base[2 * m :] = 2.0 * torch.eye(m).flatten()
        parts = torch.tensor([0] * m + [1] * m + [2] * m * m)  # which scale each row of fn has
        self.register_buffer("parts", parts, persistent=False)
        self.mix_tap = Tap()

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """streams [B, T, M, C] -> the sublayer's input [B, T, C], post [B, T, M] and mix [B, T, M, M]."""
        pre, post, mix = self.weights(streams)
        return collapse(streams, pre), post, mix

    def weights(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """streams [B, T, M, C] -> pre [B, T, M], post [B, T, M] and mix [B, T, M, M], float32."""
        m = self.streams
        flat = streams.flatten(2).float()
        # The norm has no weight, so it commutes with fn: its factor goes to 24 numbers instead of M * C.
        z = F.linear(flat, self.fn.float()) * rms_scale(flat, self.rms_eps)
        z = torch.addcmul(self.base, z, self.scale.index_select(0, self.parts))
        gates = torch.sigmoid(z[..., : 2 * m])
        pre, post = gates[..., :m] + self.eps, 2 * gates[..., m:]
        mix = sinkhorn(z[..., 2 * m :].reshape(-1, m, m), self.iterations, self.eps).view(*streams.shape[:2], m, m)
        return pre, post, self.mix_tap(mix)

    def write(self, streams: Tensor, y: Tensor, post: Tensor, mix: Tensor) -> Tensor:
        """X'_k = post_k y + sum_j mix[j, k] X_j: the sublayer's output y [B, T, C] joins the mixed streams."""
        turned = mix.to(streams.dtype).flatten(0, 1).mT.contiguous()  # a strided batch would be copied matrix by matrix
        mixed = torch.bmm(turned, streams.flatten(0, 1)).view_as(streams)
        return mixed.addcmul_(post.to(streams.dtype).unsqueeze(-1), y.unsqueeze(-2))


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
        z = F.linear(flat, self.fn.float()) * rms_scale(flat, self.rms_eps)
        pre = torch.sigmoid(z * self.scale + self.base) + self.eps
        return collapse(streams, pre)
