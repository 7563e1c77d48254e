"""DeepSeek-V4.1's text backbone: M streams under single-pass mHC, shared compressed entries, score-routed MoE, Engram.

Single pass: a sublayer reads the streams with the weights that the sublayer before it worked out, so one pass over the streams
can update them, work out the next weights and form the next input. The last weights do the final merge.
Parameter names are the released ones; experts are stacked. Letters: B batch, T new tokens, M streams, C model dim.
(reference/deepseek-v41.md, sections 2, 5 and 10)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from workbench.config import SharedStreamConfig
from workbench.errors import InputError
from workbench.memory.prefetch import Fetch
from workbench.model.attention.hybrid import Positions
from workbench.model.attention.shared_stream import SharedStreamAttention, Stream
from workbench.model.engram import Engram
from workbench.model.hyper_connections import HyperConnection, collapse
from workbench.model.kv_cache import KVCache, LayerCache
from workbench.model.language_model import LanguageModel
from workbench.model.layers import RMSNorm, Rotary, Tap
from workbench.model.moe import MoE


class Flow(NamedTuple):
    """What goes from block to block: streams [B, T, M, C], the weights to read them with [B, T, M], the shared entries."""

    streams: Tensor
    pre: Tensor
    shared: Stream | None


class SinglePassBlock(nn.Module):
    """One layer: Engram rows join the streams (where the layer has them), then attention and MoE, each under mHC."""

    def __init__(self, config: SharedStreamConfig, layer: int) -> None:
        super().__init__()
        if config.engram and layer in config.engram.layer_ids:
            self.engram = Engram(config, layer)
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = SharedStreamAttention(config, layer)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = MoE(config, hashed=False)
        self.hc_attn = HyperConnection(config)
        self.hc_ffn = HyperConnection(config)
        self.lookup_tap = Tap()

    def forward(
        self,
        flow: Flow,
        ids: Tensor,
        at: Positions,
        cache: LayerCache | None,
        fetch: Fetch | None = None,
        masked: Tensor | None = None,
        *,
        publish: bool = True,
    ) -> Flow:
        """``publish=False``: this Full layer's entries are in ``flow.shared`` already."""
        x, pre, shared = flow
        if fetch is not None:
            with fetch as lookup:
                self.lookup_tap(lookup)
                x, _ = self.engram(x, lookup.rows, lookup.memory.to(x), masked=masked)
        read = self.attn_norm(collapse(x, pre))
        pre, post, mix = self.hc_attn.weights(x)
        y, shared = self.attn(read, at, cache, shared, publish=publish)
        x = self.hc_attn.write(x, y, post, mix)
        read = self.ffn_norm(collapse(x, pre))
        pre, post, mix = self.hc_ffn.weights(x)
        return Flow(self.hc_ffn.write(x, self.ffn(read, ids), post, mix), pre, shared)


class V41Model(LanguageModel):
    """DeepSeek-V4.1 at any size; ``prefill`` can leave the upper half of the layers to the last tokens of a prompt."""

    config: SharedStreamConfig

    def __init__(self, config: SharedStreamConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(SinglePassBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.window_rotary = Rotary(config, compressed=False)
        self.compressed_rotary = Rotary(config, compressed=True)

    def prefill(
        self,
        ids: Tensor,
        cache: KVCache,
        mode: Literal["exact", "replay"] = "exact",
        *,
        split: int | None = None,
        topk: int | None = None,
        prefetch: str = "prefetch",
    ) -> Tensor:
        """Take a prompt [B, T] into the cache; float32 logits [B, 1, V] after its last token.

        "exact" is the forward pass. "replay" runs the layers before ``split``, the encoder, on all tokens, forms the last
        shared stream from what comes out, and runs the decoder, ``split`` and above, on the last window of tokens only. The
        shared stream and what the decoder may choose from stay exact; the decoder's own windows do not reach back before the
        replayed tokens, which is what is approximate. ``split`` is the last KV source unless given.
        Raises InputError for a model that has none, a split that is no KV source, and a KV source or Engram layer in the
        decoder beside it.
        """
        if mode not in ("exact", "replay"):
            raise InputError(f"prefill mode must be 'exact' or 'replay', got {mode!r}")
        if cache is None:
            raise InputError("prefill fills a cache; make one with model.new_cache()")
        run = self.run_layers if mode == "exact" else partial(self._replay, self.replay_split(split))
        return self._call(run, ids, cache, "last", topk, prefetch)

    def replay_split(self, split: int | None = None) -> int:
        """The first decoder layer of a bounded replay. Raises InputError where the configuration does not allow one."""
        sources = self.config.kv_source_layer_ids
        if not sources:
            raise InputError("replay needs a shared stream, and this model has no KV source; use mode='exact'")
        split = sources[-1] if split is None else split
        if split not in sources:
            raise InputError(f"split must be one of the KV sources {sources}, got {split!r}")
        if later := [layer for layer in sources if layer > split]:
            raise InputError(f"KV sources {later} after the split {split} need every token; use mode='exact' or a later split")
        remembering = self.config.engram.layer_ids if self.config.engram else ()
        if later := [layer for layer in remembering if layer >= split]:
            raise InputError(f"Engram layers {later} at or after the split {split} need every token; use mode='exact'")
        return split

    def run_layers(
        self, ids: Tensor, start: int, cache: KVCache | None, fetches: Mapping[int, Fetch], topk: int | None
    ) -> Tensor:
        """What the last weights read from the streams, [B, T, C]."""
        at, flow = self._begin(ids, start, topk)
        flow = self._through(range(self.config.num_hidden_layers), flow, ids, at, cache, fetches)
        return collapse(flow.streams, flow.pre)

    def _replay(
        self, split: int, ids: Tensor, start: int, cache: KVCache | None, fetches: Mapping[int, Fetch], topk: int | None
    ) -> Tensor:
        """The encoder on all tokens, the decoder on the last window of them: [B, up to W, C]."""
        assert cache is not None
        at, flow = self._begin(ids, start, topk)
        flow = self._through(range(split), flow, ids, at, cache, fetches)
        owner, count = self.blocks[split], min(ids.shape[1], self.config.sliding_window)
        shared = owner.attn.publish(owner.attn_norm(collapse(flow.streams, flow.pre)), cache.layers[split])
        if count < ids.shape[1]:  # tokens are left out, so what the decoder's windows hold is no longer next to the new ones
            for layer in range(split, self.config.num_hidden_layers):
                cache.layers[layer].restart_window()
        last = slice(-count, None)
        at = self._positions(start + ids.shape[1] - count, count, topk)
        flow = Flow(flow.streams[:, last], flow.pre[:, last], shared)
        flow = owner(flow, ids[:, last], at, cache.layers[split], publish=False)
        flow = self._through(range(split + 1, self.config.num_hidden_layers), flow, ids[:, last], at, cache, {})
        return collapse(flow.streams, flow.pre)

    def _begin(self, ids: Tensor, start: int, topk: int | None) -> tuple[Positions, Flow]:
        x = self.embed(ids).unsqueeze(2).repeat(1, 1, self.config.hc_mult, 1)  # products of expanded streams are slow
        pre = torch.zeros(*ids.shape, self.config.hc_mult, device=self.device)
        pre[..., 0] = 1.0  # all streams are equal yet: read the first
        return self._positions(start, ids.shape[1], topk), Flow(x, pre, None)

    def _positions(self, start: int, count: int, topk: int | None) -> Positions:
        positions = torch.arange(start, start + count, device=self.device)
        return Positions(start, self.window_rotary(positions), self.compressed_rotary(positions), topk)

    def _through(
        self, layers: range, flow: Flow, ids: Tensor, at: Positions, cache: KVCache | None, fetches: Mapping[int, Fetch]
    ) -> Flow:
        masked = None if self.config.image_token_id is None else ids == self.config.image_token_id
        for layer in layers:
            mine = cache.layers[layer] if cache is not None else None
            flow = self.blocks[layer](flow, ids, at, mine, fetches.get(layer), masked)
        return flow

    def canonical_ids(self, ids: Tensor) -> Tensor:
        canonical = self.engram_canonical_ids[ids]
        image = self.config.image_token_id
        return canonical if image is None else canonical.masked_fill(ids == image, -1)
