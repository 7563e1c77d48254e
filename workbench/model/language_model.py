"""What every model family shares: token ids in, logits out, a cache that grows, Engram look-ups begun before the first layer.

Letters: B batch, T new tokens, M streams, C model dim, V words.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from workbench.config import ModelConfig
from workbench.errors import InputError
from workbench.memory.prefetch import POLICIES, TRAINING, Fetch, RowFetcher
from workbench.model.kv_cache import KVCache
from workbench.model.layers import RMSNorm, Tap

if TYPE_CHECKING:
    from tokenizers import Tokenizer


RunLayers = Callable[[Tensor, int, KVCache | None, Mapping[int, Fetch], int | None], Tensor]  # ids, start, cache, rows, topk


class LanguageModel(nn.Module):
    """A decoder of any family; the families say how their layers run (``run_layers``) and what the head reads (``merge``).

    ``tokenizer`` is None unless a checkpoint brought one. Recorders rely on what every layer has: ``attn.attention_tap``,
    ``attn.indexer.index_tap`` where it runs an indexer, ``engram.gate_tap`` and ``lookup_tap`` where it has Engram, and
    the model's own ``canonical_tap`` if any layer has it.
    """

    engram_canonical_ids: Tensor
    layers: nn.ModuleList

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config: Any = config  # a ModelConfig; each family narrows it
        self.tokenizer: Tokenizer | None = None
        self.name, self.what = "model", "random weights"
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.engram:
            canonical = torch.arange(config.vocab_size).clamp(max=config.engram.compressed_vocab_size - 1)
            self.register_buffer("engram_canonical_ids", canonical)
            self.canonical_tap = Tap()
        self.fetcher = RowFetcher()

    def run_layers(
        self, ids: Tensor, start: int, cache: KVCache | None, fetches: Mapping[int, Fetch], topk: int | None
    ) -> Tensor:
        """All layers on ids [B, T] at positions from ``start``: hidden states [B, T, ...], whatever ``merge`` takes."""
        raise NotImplementedError

    def merge(self, hidden: Tensor) -> Tensor:
        """Hidden states as the layers leave them -> [B, T, C], what the last norm reads."""
        return hidden

    @classmethod
    def untrained(cls, config: Any, seed: int = 0) -> Self:
        """A model with the random weights training starts from; the caller's own random state is left alone."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = cls(config)
            model.embed.weight.normal_(std=0.5)
            model.head.weight.copy_(0.2 * model.embed.weight)  # untied, but copying a token it has seen works from the start
        model.what = "toy, untrained"
        return model.eval()

    @property
    def blocks(self) -> list[Any]:
        """The layers, typed."""
        return list(self.layers)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def new_cache(self, batch_size: int = 1, storage: str = "fp32") -> KVCache:
        """An empty KV cache for sequences of this model; storage "fp32", "bf16" or "released", the published packed formats."""
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

        ``cache`` holds the tokens before these and grows by T. ``topk`` keeps another number of entries than configured;
        ``prefetch`` says when Engram rows are fetched ("prefetch", "serial" or "resident"), which changes time and no value.
        Raises InputError for ids of another shape or range, a cache of another model or batch size, more positions than the
        limit, or a ``topk`` for a model that attends to everything.
        """
        return self._call(self.run_layers, ids, cache, logits, topk, prefetch)

    def _call(
        self, run_layers: RunLayers, ids: Tensor, cache: KVCache | None, logits: str, topk: int | None, prefetch: str
    ) -> Tensor:
        began, start = time.perf_counter(), cache.length if cache is not None else 0
        self._check(ids, cache, start, logits, topk, prefetch)
        ids = ids.to(self.device)
        if cache is not None:
            cache.whole = False  # until every layer has taken in the new tokens
        fetches: dict[int, Fetch] = {}
        try:
            self._start_lookups(ids, cache, prefetch, fetches, began)
            hidden = run_layers(ids, start, cache, fetches, topk)
        except BaseException:
            self.fetcher.retire()  # an interrupt may have come while a read hung; the next call gets another worker
            raise
        finally:
            for fetch in fetches.values():
                fetch.release()
        if cache is not None:
            cache.length += ids.shape[1]
            cache.whole = True
        if logits == "last":
            hidden = hidden[:, -1:]
        return self.head(self.norm(self.merge(hidden))).float()

    def canonical_ids(self, ids: Tensor) -> Tensor:
        """What Engram hashes for token ids [B, T]; negative where a token is masked from it."""
        return self.engram_canonical_ids[ids]

    def _start_lookups(
        self, ids: Tensor, cache: KVCache | None, policy: str, fetches: dict[int, Fetch], began_s: float
    ) -> None:
        """Hash and gather depend on token ids alone, so they can begin before the first layer does. Fills ``fetches``."""
        engram = self.config.engram
        if engram is None:
            return
        if torch.is_grad_enabled():
            policy = TRAINING  # autograd records in the thread that trains
        canonical = self.canonical_tap(self.canonical_ids(ids).cpu())
        pad = int(self.engram_canonical_ids[engram.pad_token_id])
        memory = cache.engram if cache is not None else None
        lookback = memory.ids if memory else canonical[:, :0]
        if memory:
            memory.count_read()
            joined = torch.cat([lookback, canonical], dim=1)
            memory.ids = joined[:, max(0, joined.shape[1] - memory.lookback) :].clone()
        for layer in sorted(engram.layer_ids):  # in the order of need: one worker serves them in turn
            module = self.blocks[layer].engram
            hash_rows = partial(module.hash, canonical, lookback, pad)
            fetches[layer] = self.fetcher.start(layer, hash_rows, module.table, policy, self.device, began_s)

    def _check(self, ids: Tensor, cache: KVCache | None, start: int, logits: str, topk: int | None, prefetch: str) -> None:
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.numel() == 0:
            got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise InputError(f"ids must be a non-empty integer tensor [batch, tokens], got {got}")
        low, high = (int(ids), int(ids)) if ids.numel() == 1 else (int(ids.min()), int(ids.max()))
        if low < 0 or high >= self.config.vocab_size:
            raise InputError(f"token ids must lie in 0..{self.config.vocab_size - 1}, got {low}..{high}")
        if start + ids.shape[1] > self.config.max_position_embeddings:
            limit = self.config.max_position_embeddings
            raise InputError(f"{start} + {ids.shape[1]} tokens exceed this model's limit of {limit}; shorten the text")
        if logits not in ("all", "last"):
            raise InputError(f"logits must be 'all' or 'last', got {logits!r}")
        if topk is not None and not self.config.index_topk:
            raise InputError("this model attends to every token, so there is no topk to set; leave it out")
        if topk is not None and topk < 1:
            raise InputError(f"topk must be positive, got {topk}")
        if prefetch not in POLICIES:
            raise InputError(f"prefetch policy {prefetch!r} is unknown; choose one of {POLICIES}")
        if cache is not None:
            if cache.config != self.config:
                raise InputError("the cache was made for a model of another shape; make one with this model's new_cache()")
            if cache.batch_size != ids.shape[0]:
                raise InputError(f"the cache was made for {cache.batch_size} sequences, got {ids.shape[0]}")
            cache.check_whole()
