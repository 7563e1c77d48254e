"""Engram, conditional memory: n-grams of token ids are hashed to rows of a large table on the host, gated into the streams.

The paper's form: tokenizer compression, 2- and 3-grams, several hash heads, one gate per stream, short convolution. DeepSeek-V4
as released has none. Letters: B batch, T tokens, N largest n-gram, R rows per token, M streams, C model dim.
(reference/engram-and-overlap.md, section 1; arXiv 2601.07372)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.config import EngramConfig, HybridConfig
from workbench.errors import InputError
from workbench.model.layers import Tap

# Witnesses that make Miller-Rabin exact for every number below 3.3e24.
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


def is_prime(n: int) -> bool:
    if n < 2:
        return False
    for p in _WITNESSES:
        if n % p == 0:
            return n == p
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for a in _WITNESSES:
        x = pow(a, odd, n)
        if x not in (1, n - 1) and all((x := x * x % n) != n - 1 for _ in range(twos - 1)):
            return False
    return True


def table_primes(engram: EngramConfig) -> list[list[int]]:
    """Rows of every (order, head) table, per Engram layer: distinct primes from ``vocab_size`` up, order by order."""
    used: set[int] = set()
    layers = []
    for _ in engram.layer_ids:
        primes = []
        for _ in range(2, engram.max_ngram_size + 1):
            candidate = engram.vocab_size - 1
            for _ in range(engram.n_heads):
                candidate += 1
                while candidate in used or not is_prime(candidate):
                    candidate += 1
                used.add(candidate)
                primes.append(candidate)
        layers.append(primes)
    return layers


def hash_multipliers(layer: int, orders: int, compressed_vocab_size: int, seed: int = 0) -> list[int]:
    """One odd multiplier per look-back, small enough that canonical id times multiplier never overflows int64."""
    half = max(1, (2**63 - 1) // compressed_vocab_size // 2)
    draws = np.random.default_rng(seed + 10007 * layer).integers(0, half, size=orders, dtype=np.int64)
    return [2 * int(r) + 1 for r in draws]


class NgramHash:
    """Turns canonical ids into row numbers of one layer's table."""

    def __init__(self, engram: EngramConfig, layer: int) -> None:
        self.orders, self.heads = engram.max_ngram_size, engram.n_heads
        primes = table_primes(engram)[engram.layer_ids.index(layer)]
        self.primes = torch.tensor(primes)
        self.offsets = torch.tensor([0, *np.cumsum(primes[:-1]).tolist()])
        self.rows = sum(primes)
        self.multipliers = hash_multipliers(layer, self.orders, engram.compressed_vocab_size, engram.seed)

    def __call__(self, ids: Tensor, lookback: Tensor, pad: int) -> Tensor:
        """Canonical ids [B, T] and those just before them [B, up to N - 1] -> rows [B, T, R] int64, order-major then head.

        mix_n = x_t m_0 XOR x_{t-1} m_1 XOR ...; row = mix_n mod prime + offset. Before the sequence stands ``pad``.
        """
        missing = self.orders - 1 - lookback.shape[1]
        line = torch.cat([F.pad(lookback, (missing, 0), value=pad), ids], dim=1)  # [B, N - 1 + T]
        t = ids.shape[1]
        mix = ids * self.multipliers[0]
        per_order = []
        for back in range(1, self.orders):
            earlier = line[:, self.orders - 1 - back : self.orders - 1 - back + t]
            mix = mix ^ (earlier * self.multipliers[back])
            per_order.append(mix.unsqueeze(-1).expand(-1, -1, self.heads))
        return torch.cat(per_order, dim=-1) % self.primes + self.offsets


class HostTable(nn.Module):
    """Rows that stay in host memory whatever device the model moves to."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(rows, width))

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]  # model.to(device) must not move the table
        return self

    def gather(self, rows: Tensor) -> Tensor:
        """rows [B, T, R] -> values [B, T, R * width]; index_select releases the interpreter lock while it works."""
        return torch.index_select(self.weight, 0, rows.flatten()).view(*rows.shape[:2], -1)


class EngramGates(NamedTuple):
    """rows [B, T, R] that were fetched and gates [B, T, M] that were applied."""

    rows: Tensor
    gates: Tensor


class Engram(nn.Module):
    """H_m <- H_m + Y_m with Y = SiLU(DWConv(RMSNorm(V))) + V, V_m = gate_m W_V e, at the start of its block."""

    def __init__(self, config: HybridConfig, layer: int) -> None:
        super().__init__()
        engram = config.engram
        assert engram is not None
        m, c = config.hc_mult, config.hidden_size
        self.layer, self.streams, self.width, self.eps = layer, m, c, config.rms_norm_eps
        self.dilation, self.kernel = engram.max_ngram_size, engram.conv_kernel_size
        self.state_length = engram.conv_state_length
        self.hash = NgramHash(engram, layer)
        self.table = HostTable(self.hash.rows, engram.head_dim)
        self.wkv = nn.Linear(engram.memory_width, (m + 1) * c, bias=False)  # one key per stream, the shared value last
        self.q_weight = nn.Parameter(torch.ones(m, c))
        self.k_weight = nn.Parameter(torch.ones(m, c))
        self.conv_norm = nn.Parameter(torch.ones(m, c))
        self.conv = nn.Parameter(torch.zeros(m * c, self.kernel))  # silent at first: then Y = V
        self.gate_tap = Tap()

    def gates(self, streams: Tensor, keys: Tensor) -> Tensor:
        """sigmoid(sign(s) sqrt(max(|s|, 1e-6))), s = <RMSNorm(k), RMSNorm(h)> / sqrt(C), per stream; [B, T, M]."""
        q = F.rms_norm(streams.float(), (self.width,), eps=self.eps) * self.q_weight
        k = F.rms_norm(keys.float(), (self.width,), eps=self.eps) * self.k_weight
        s = (q * k).sum(-1) / math.sqrt(self.width)
        return torch.sigmoid(s.sign() * s.abs().clamp(min=1e-6).sqrt())

    def forward(self, streams: Tensor, rows: Tensor, memory: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """streams [B, T, M, C], fetched rows [B, T, R] with their values memory [B, T, R * width], earlier convolution
        inputs past [B, up to 9, M * C] -> the streams with Y added and the convolution inputs to keep.
        """
        batch, t = streams.shape[:2]
        kv = self.wkv(memory).view(batch, t, self.streams + 1, self.width)
        gates = self.gates(streams, kv[:, :, :-1])
        self.gate_tap(EngramGates(rows, gates))
        value = gates.to(kv.dtype).unsqueeze(-1) * kv[:, :, -1:]  # [B, T, M, C]
        normed = (F.rms_norm(value, (self.width,), eps=self.eps) * self.conv_norm).flatten(2)
        line = normed if past is None else torch.cat([past.to(normed.dtype), normed], dim=1)
        keep = line[:, max(0, line.shape[1] - self.state_length) :]
        line = F.pad(line, (0, 0, self.state_length + t - line.shape[1], 0))
        mixed = sum(line[:, i * self.dilation : i * self.dilation + t] * self.conv[:, i] for i in range(self.kernel))
        return streams + F.silu(mixed).view_as(value) + value, keep  # type: ignore[arg-type]


def check_canonical_ids(canonical: Tensor, engram: EngramConfig) -> None:
    """Raises InputError unless the ids are dense and as many as the configuration says: every hash depends on that number."""
    found = int(canonical.max()) + 1
    if found != engram.compressed_vocab_size or int(canonical.min()) < 0:
        raise InputError(f"tokenizer compression gives {found} ids, the config says {engram.compressed_vocab_size}")
