"""DeepSeek-V4's text backbone: embedding copied to M streams, blocks of attention and MoE under mHC, one merged head.

Parameter names are the released ones; experts are stacked. Letters: B batch, T new tokens, M streams, C model dim, V words.
(reference/deepseek-v4.md, section 1)
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from workbench.config import ModelConfig
from workbench.errors import InputError
from workbench.memory.prefetch import POLICIES, Fetch, RowFetcher
from workbench.model.attention.hybrid import HybridAttention, Positions
from workbench.model.engram import Engram
from workbench.model.hyper_connections import HyperConnection, HyperHead
from workbench.model.kv_cache import EngramState, KVCache, LayerCache
from workbench.model.layers import RMSNorm, Rotary, Tap
from workbench.model.moe import MoE

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Block(nn.Module):
    """One layer: Engram rows join the streams (where the layer has them), then attention and MoE, each wrapped in mHC."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
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
            x = self._remember(x, fetch, memory)
        y, post, mix = self.hc_attn(x)
        x = self.hc_attn.write(x, self.attn(self.attn_norm(y), at, cache), post, mix)
        y, post, mix = self.hc_ffn(x)
        return self.hc_ffn.write(x, self.ffn(self.ffn_norm(y), ids), post, mix)

    def _remember(self, x: Tensor, fetch: Fetch, memory: EngramState | None) -> Tensor:
        lookup = self.lookup_tap(fetch.result())
        past = memory.conv[self.layer] if memory else None
        x, keep = self.engram(x, lookup.rows, lookup.memory.to(x), past)
        if memory:
            memory.conv[self.layer] = keep.detach().to(torch.float32, copy=True)  # a view would keep the whole call alive
        return x


class V4Model(nn.Module):
    """DeepSeek-V4 at any size, optionally with Engram layers. ``tokenizer`` is None unless a checkpoint brought one."""

    engram_canonical_ids: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: Tokenizer | None = None
        self.name, self.what = "model", "random weights"
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.hc_head = HyperHead(config)
        self.window_rotary = Rotary(config, compressed=False)
        self.compressed_rotary = Rotary(config, compressed=True)
        if config.engram:
            canonical = torch.arange(config.vocab_size).clamp(max=config.engram.compressed_vocab_size - 1)
            self.register_buffer("engram_canonical_ids", canonical)
        self.fetcher = RowFetcher()

    @classmethod
    def untrained(cls, config: ModelConfig, seed: int = 0) -> V4Model:
        """A model with the random weights training starts from; the caller's own random state is left alone."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = cls(config)
            model.embed.weight.normal_(std=0.5)
            model.head.weight.copy_(0.2 * model.embed.weight)  # untied, but copying a token it has seen works from the start
        model.what = "toy, untrained"
        return model.eval()

    @property
    def blocks(self) -> list[Block]:
        """The layers, typed."""
        return list(self.layers)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def new_cache(self, batch_size: int = 1, storage: str = "fp32") -> KVCache:
        """An empty KV cache for sequences of this model; storage "fp32" or "bf16"."""
        return KVCache(self.config, batch_size, storage, self.device)

    def forward(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        logits: Literal["all", "last"] = "all",
        *,
        topk: int | None = None,
        prefetch: str = "prefetch",
    ) -> Tensor:
        """Token ids [B, T] -> float32 logits [B, T, V], or [B, 1, V] with logits="last".

        ``cache`` holds the tokens before these and grows by T. ``topk`` keeps another number of CSA entries than configured;
        ``prefetch`` says when Engram rows are fetched ("prefetch" or "serial"), which changes time and no value.
        Raises InputError for ids of another shape or range, a cache of another batch size, or more positions than the limit.
        """
        start = cache.length if cache is not None else 0
        self._check(ids, cache, start, logits, topk, prefetch)
        ids = ids.to(self.device)
        if cache is not None:
            cache.whole = False  # until every layer has taken in the new tokens
        fetches = self._start_lookups(ids, cache, prefetch)
        positions = torch.arange(start, start + ids.shape[1], device=self.device)
        at = Positions(start, self.window_rotary(positions), self.compressed_rotary(positions), topk)
        x = self.embed(ids).unsqueeze(2).expand(-1, -1, self.config.hc_mult, -1)
        memory = cache.engram if cache is not None else None
        for layer, block in enumerate(self.blocks):
            x = block(x, ids, at, cache.layers[layer] if cache is not None else None, fetches.get(layer), memory)
        if cache is not None:
            cache.length += ids.shape[1]
            cache.whole = True
        if logits == "last":
            x = x[:, -1:]
        return self.head(self.norm(self.hc_head(x))).float()

    def _start_lookups(self, ids: Tensor, cache: KVCache | None, policy: str) -> dict[int, Fetch]:
        """Hash and gather depend on token ids alone, so they can begin before the first layer does."""
        engram = self.config.engram
        if engram is None:
            return {}
        if torch.is_grad_enabled():
            policy = "serial"  # autograd records in the thread that trains
        canonical = self.engram_canonical_ids[ids].cpu()
        pad = int(self.engram_canonical_ids[engram.pad_token_id])
        memory = cache.engram if cache is not None else None
        lookback = memory.ids if memory else canonical[:, :0]
        if memory:
            joined = torch.cat([lookback, canonical], dim=1)
            memory.ids = joined[:, max(0, joined.shape[1] - memory.lookback) :].clone()
        fetches = {}
        for layer in engram.layer_ids:
            module = self.blocks[layer].engram
            hash_rows = partial(module.hash, canonical, lookback, pad)
            fetches[layer] = self.fetcher.start(layer, hash_rows, module.table.gather, policy)
        return fetches

    def _check(self, ids: Tensor, cache: KVCache | None, start: int, logits: str, topk: int | None, prefetch: str) -> None:
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.numel() == 0:
            got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise InputError(f"ids must be a non-empty integer tensor [batch, tokens], got {got}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise InputError(f"token ids must lie in 0..{self.config.vocab_size - 1}, got {low}..{high}")
        if start + ids.shape[1] > self.config.max_position_embeddings:
            limit = self.config.max_position_embeddings
            raise InputError(f"{start} + {ids.shape[1]} tokens exceed this model's limit of {limit}; shorten the text")
        if logits not in ("all", "last"):
            raise InputError(f"logits must be 'all' or 'last', got {logits!r}")
        if topk is not None and topk < 1:
            raise InputError(f"topk must be positive, got {topk}")
        if prefetch not in POLICIES:
            raise InputError(f"prefetch policy {prefetch!r} is unknown; choose one of {POLICIES}")
        if cache is not None:
            if cache.batch_size != ids.shape[0]:
                raise InputError(f"the cache was made for {cache.batch_size} sequences, got {ids.shape[0]}")
            cache.check_whole()
