"""DeepSeek-V4's text backbone: embedding copied to M streams, blocks of attention and MoE under mHC, one merged head.

Parameter names are the released ones; experts are stacked. Letters: B batch, T new tokens, M streams, C model dim, V words.
(reference/deepseek-v4.md, section 1)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from workbench.config import HybridConfig
from workbench.memory.prefetch import Fetch
from workbench.model import one_token
from workbench.model.attention.hybrid import HybridAttention, Positions
from workbench.model.engram import Engram
from workbench.model.hyper_connections import HyperConnection, HyperHead
from workbench.model.kv_cache import EngramState, KVCache, LayerCache
from workbench.model.language_model import LanguageModel
from workbench.model.layers import RMSNorm, Rotary, Tap
from workbench.model.moe import MoE


class Block(nn.Module):
    """One layer: Engram rows join the streams (where the layer has them), then attention and MoE, each wrapped in mHC."""

    def __init__(self, config: HybridConfig, layer: int) -> None:
        super().__init__()
        if config.engram and layer in config.engram.layer_ids:
            self.engram = Engram(config, layer)
        self.layer = layer
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = HybridAttention(config, config.layer_kinds[layer])
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = MoE(config, hashed=config.mlp_kinds[layer] == "hash")
        self.hc_attn = HyperConnection(config)
        self.hc_ffn = HyperConnection(config)
        self.lookup_tap = Tap()

    def forward(
        self, x: Tensor, ids: Tensor, at: Positions, cache: LayerCache | None, fetch: Fetch | None, memory: EngramState | None
    ) -> Tensor:
        """streams x [B, T, M, C] -> [B, T, M, C]."""
        if fetch is not None:
            x = self.remember(x, fetch, memory)
        y, post, mix = self.hc_attn(x)
        x = self.hc_attn.write(x, self.attn(self.attn_norm(y), at, cache), post, mix)
        y, post, mix = self.hc_ffn(x)
        return self.hc_ffn.write(x, self.ffn(self.ffn_norm(y), ids), post, mix)

    def remember(self, x: Tensor, fetch: Fetch, memory: EngramState | None) -> Tensor:
        """Engram's rows join the streams x [B, T, M, C]."""
        past = memory.conv.get(self.layer) if memory else None
        with fetch as lookup:
            self.lookup_tap(lookup)
            x, keep = self.engram(x, lookup.rows, lookup.memory.to(x), past)
        if memory and keep is not None:
            memory.conv[self.layer] = keep.detach().to(torch.float32, copy=True)  # a view would keep the whole call alive
        return x


class V4Model(LanguageModel):
    """DeepSeek-V4 at any size, optionally with Engram layers in the paper's form."""

    config: HybridConfig

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.hc_head = HyperHead(config)
        self.window_rotary = Rotary(config, compressed=False)
        self.compressed_rotary = Rotary(config, compressed=True)

    def run_layers(
        self, ids: Tensor, start: int, cache: KVCache | None, fetches: Mapping[int, Fetch], topk: int | None
    ) -> Tensor:
        """The M streams after the last layer, [B, T, M, C]."""
        positions = torch.arange(start, start + ids.shape[1], device=self.device)
        at = Positions(start, self.window_rotary(positions), self.compressed_rotary(positions), topk)
        if cache is not None and one_token.applies(self, ids, cache):
            return one_token.run_layers(self, ids, at, cache, fetches)
        x = self.embed(ids).unsqueeze(2).repeat(1, 1, self.config.hc_mult, 1)  # products of expanded streams are slow
        memory = cache.engram if cache is not None else None
        for layer, block in enumerate(self.blocks):
            x = block(x, ids, at, cache.layers[layer] if cache is not None else None, fetches.get(layer), memory)
        return x

    def merge(self, hidden: Tensor) -> Tensor:
        if hidden.shape[:3] == (1, 1, one_token.STREAMS) and one_token.plain(hidden):
            return one_token.merge(self.hc_head, hidden)
        return self.hc_head(hidden)
