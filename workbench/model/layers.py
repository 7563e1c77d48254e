"""The small parts every layer is made of: RMS norms, rotary tables, the grouped output projection, and taps.

Letters: B batch, T tokens, H heads, D head dim, R rotary channels.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.config import DenseConfig, LatentConfig, ModelConfig, RopeConfig


class Tap(nn.Module):
    """Hands a value through unchanged. A recorder listens with a forward hook; nobody listening costs nothing."""

    def __call__(self, value):  # type: ignore[no-untyped-def]  # whatever passes, passes
        return super().__call__(value) if self._forward_hooks else value

    def forward(self, value):  # type: ignore[no-untyped-def]
        return value

    @property
    def listening(self) -> bool:
        """True while somebody records here, so that values made only for recording can be left out otherwise."""
        return bool(self._forward_hooks)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps) * self.weight if _two_passes(x) else F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def rms_scale(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis, kept: [..., 1]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(_constant(eps, norm.dtype, norm.device), norm, norm, value=1 / x.shape[-1]).rsqrt_()


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis."""
    if _two_passes(x):
        return x * rms_scale(x, eps)
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def rotary_frequencies(channels: int, theta: float, rope: RopeConfig | None = None) -> Tensor:
    """Angles per token, one per channel pair, [channels / 2] float32; YaRN-stretched when ``rope.factor`` is above 1.

    YaRN only changes frequencies here: V4 multiplies neither cos/sin nor the softmax scale (reference section 1.1).
    """
    pairs = torch.arange(0, channels, 2, dtype=torch.float32)
    frequencies = theta ** -(pairs / channels)
    if rope is None or rope.factor == 1:
        return frequencies

    def pair_with_turns(turns: float) -> float:
        return channels * math.log(rope.original_max_position_embeddings / (2 * math.pi * turns)) / (2 * math.log(theta))

    low = max(math.floor(pair_with_turns(rope.beta_fast)), 0)
    high = min(math.ceil(pair_with_turns(rope.beta_slow)), channels - 1)
    span = high - low or 0.001
    ramp = ((torch.arange(channels // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return frequencies / rope.factor * ramp + frequencies * (1 - ramp)


class Rotary(nn.Module):
    """Turns positions into unit complex numbers for ``rotate``; V4's window-only layers use another base and no YaRN."""

    frequencies: Tensor

    def __init__(self, config: ModelConfig, compressed: bool = False) -> None:
        super().__init__()
        if isinstance(config, DenseConfig | LatentConfig):
            rope: RopeConfig | None = config.rope
            theta = config.rope.theta
        else:
            rope = config.compress_rope if compressed else None
            theta = rope.theta if rope else config.rope_theta
        frequencies = rotary_frequencies(config.qk_rope_head_dim, theta, rope)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        """positions [T] -> e^(i * position * frequency) [T, R / 2] complex64."""
        angles = positions.float().unsqueeze(-1) * self.frequencies
        return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the trailing R channels of x, pairs (2i, 2i+1), by ``turns``; its conjugate rotates back.

    x [..., D]; turns complex, broadcastable to [..., R / 2].
    """
    channels = 2 * turns.shape[-1]
    if x.dtype == torch.float32 and x.shape[-1] % 2 == 0 and not (x.requires_grad and torch.is_grad_enabled()):
        out = x.clone(memory_format=torch.contiguous_format)
        torch.view_as_complex(out[..., -channels:].unflatten(-1, (-1, 2))).mul_(turns)  # in place: fewer operations and copies
        return out
    still, moving = x[..., :-channels], x[..., -channels:]
    pairs = moving.float().unflatten(-1, (-1, 2)).contiguous()
    if pairs.storage_offset() % 2:  # a single row after an odd number of channels: contiguous as it is, but no complex number
        pairs = pairs.clone()
    turned = torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2).to(x.dtype)
    return torch.cat([still, turned], dim=-1)


def rotate_halves(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the leading R channels of x, pairs (i, i + R / 2), by ``turns``: the layout of llama and of V3.2's indexer.

    x [..., D]; turns complex, broadcastable to [..., R / 2].
    """
    channels = 2 * turns.shape[-1]
    moving, still = x[..., :channels], x[..., channels:]
    turned = torch.complex(*moving.float().chunk(2, dim=-1)) * turns
    return torch.cat([turned.real.to(x.dtype), turned.imag.to(x.dtype), still], dim=-1)


class GroupedProjection(nn.Module):
    """The first half of V4's output projection: each group of heads is projected by itself (reference section 1.3).

    Stored as one matrix [groups * rank, inputs per group], as released.
    """

    def __init__(self, groups: int, inputs: int, rank: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(groups * rank, inputs // groups))
        nn.init.uniform_(self.weight, -((inputs // groups) ** -0.5), (inputs // groups) ** -0.5)

    def forward(self, heads: Tensor) -> Tensor:
        """heads [B, T, inputs] -> [B, T, groups * rank]."""
        grouped = heads.reshape(-1, self.groups, heads.shape[-1] // self.groups).transpose(0, 1)  # [G, B * T, inputs / G]
        weight = self.weight.view(self.groups, -1, grouped.shape[-1])  # [G, rank, inputs / G]
        return torch.bmm(grouped, weight.mT).transpose(0, 1).reshape(*heads.shape[:-1], -1)


@cache
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a tensor, made once: making one costs as much as the operation that reads it."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device=device)


def _two_passes(x: Tensor) -> bool:
    """On a CPU torch puts rms_norm together from six passes over x, where two do; elsewhere it is one kernel."""
    return x.is_cpu and x.dtype == torch.float32
