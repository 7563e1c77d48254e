"""Decoders with one residual stream and pre-norm layers: llama's dense layers, and V3.2's MLA with a mixture of experts.

Letters: B batch, T new tokens, C model dim.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from workbench.config import DenseConfig, LatentConfig
from workbench.memory.prefetch import Fetch
from workbench.model.attention.dense import DenseAttention, TokenPositions
from workbench.model.attention.latent import LatentAttention
from workbench.model.kv_cache import KVCache, LayerCache
from workbench.model.language_model import LanguageModel
from workbench.model.layers import RMSNorm, Rotary
from workbench.model.moe import MoE, SwiGLU


class PlainBlock(nn.Module):
    """One layer: x + attention(norm(x)), then x + ffn(norm(x)); the ffn is an MoE from V3.2's first sparse layer on."""

    def __init__(self, config: DenseConfig | LatentConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = LatentAttention(config) if isinstance(config, LatentConfig) else DenseAttention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if isinstance(config, LatentConfig) and layer >= config.first_k_dense_replace:
            self.ffn: nn.Module = MoE(config)
        else:
            self.ffn = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, ids: Tensor, at: TokenPositions, cache: LayerCache | None) -> Tensor:
        """x [B, T, C] -> [B, T, C]."""
        x = x + self.attn(self.attn_norm(x), at, cache)
        y = self.ffn_norm(x)
        return x + (self.ffn(y, ids) if isinstance(self.ffn, MoE) else self.ffn(y))


class PlainModel(LanguageModel):
    """MHA, GQA, MLA, or MLA with DSA, at any size; parameter names are those of DeepSeek's own code where it has one."""

    config: DenseConfig | LatentConfig

    def __init__(self, config: DenseConfig | LatentConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(PlainBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.rotary = Rotary(config)

    def run_layers(
        self, ids: Tensor, start: int, cache: KVCache | None, fetches: Mapping[int, Fetch], topk: int | None
    ) -> Tensor:
        """The residual stream after the last layer, [B, T, C]."""
        at = TokenPositions(start, self.rotary(torch.arange(start, start + ids.shape[1], device=self.device)), topk)
        x = self.embed(ids)
        for layer, block in enumerate(self.blocks):
            x = block(x, ids, at, cache.layers[layer] if cache is not None else None)
        return x
