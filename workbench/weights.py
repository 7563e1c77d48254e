"""What the weights of a model come to: parameters counted from its shape, the bytes they take and the bytes a step reads.

Matrices only: norms, biases, sinks and position biases are below a thousandth of any of these models.
(reference/deepseek-v4.md, sections 0, 1.4 and 7; reference/deepseek-v41.md, section 9.2)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from workbench.config import DenseConfig, HybridConfig, LatentConfig, ModelConfig, SharedStreamConfig

FP4_BYTES = 1 / 2 + 1 / 32  # of a value: half a byte, and a scale byte for each 32
FP8_BYTES = 1.0  # scales of 128 x 128 blocks come to nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Bytes of the weights an accelerator must hold; a token reads ``always`` and its share of ``experts``."""

    always_bytes: float
    expert_bytes: float
    n_routed_experts: int
    num_experts_per_tok: int
    host_bytes: float  # Engram tables, which may stay in host memory
    origin: Literal["published", "modelled"]

    @property
    def device_bytes(self) -> float:
        return self.always_bytes + self.expert_bytes

    def expert_bytes_read(self, batch: int) -> float:
        """What a decode step of ``batch`` sequences reads of the experts if routing is even: each sequence draws its own."""
        untouched = (1 - self.num_experts_per_tok / self.n_routed_experts) ** batch
        return self.expert_bytes * (1 - untouched)

    def bytes_read(self, batch: int) -> float:
        """What one decode step of ``batch`` sequences reads of all weights."""
        return self.always_bytes + self.expert_bytes_read(batch)


def modelled_weights(config: HybridConfig | SharedStreamConfig | LatentConfig, expert_value_bytes: float) -> Weights:
    """Weights counted from the shape: routed experts at so many bytes a value, embedding and head in BF16, the rest in FP8."""
    ends = 2 * config.vocab_size * config.hidden_size
    active_experts = _moe_layers(config) * config.num_experts_per_tok * _expert(config)
    rest = active_parameters(config) - active_experts - ends // 2  # the head counts as active, the embedding is a look-up
    return Weights(
        always_bytes=2.0 * ends + FP8_BYTES * rest,
        expert_bytes=routed_parameters(config) * expert_value_bytes,
        n_routed_experts=config.n_routed_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        host_bytes=0.0,
        origin="modelled",
    )


def total_parameters(config: ModelConfig) -> int:
    """All weights of the backbone, Engram tables left out."""
    total = active_parameters(config) + config.vocab_size * config.hidden_size
    if isinstance(config, DenseConfig):
        return total
    return total + routed_parameters(config) - _moe_layers(config) * config.num_experts_per_tok * _expert(config)


def routed_parameters(config: HybridConfig | SharedStreamConfig | LatentConfig) -> int:
    """Weights of all routed experts, of which a token visits a few."""
    return _moe_layers(config) * config.n_routed_experts * _expert(config)


def active_parameters(config: ModelConfig) -> int:
    """Weights that multiply one decoded token on its way through the model; the embedding is a look-up and not counted."""
    layers = config.num_hidden_layers
    total = config.vocab_size * config.hidden_size  # the head
    if isinstance(config, DenseConfig):
        return total + layers * (_dense_attention(config) + 3 * config.hidden_size * config.intermediate_size)
    if isinstance(config, LatentConfig):
        dense = layers - _moe_layers(config)
        total += layers * _latent_attention(config) + dense * 3 * config.hidden_size * config.intermediate_size
    else:
        total += layers * (_grouped_attention(config) + _stream_mixes(config))
        total += _hybrid_compression(config) if isinstance(config, HybridConfig) else _shared_compression(config)
        if config.engram:  # a key for each stream and one value
            total += len(config.engram.layer_ids) * config.engram.memory_width * config.hidden_size * (config.hc_mult + 1)
    experts = config.num_experts_per_tok + config.n_shared_experts
    return total + _moe_layers(config) * (experts * _expert(config) + config.hidden_size * config.n_routed_experts)


def _expert(config: HybridConfig | SharedStreamConfig | LatentConfig) -> int:
    return 3 * config.hidden_size * config.moe_intermediate_size


def _moe_layers(config: HybridConfig | SharedStreamConfig | LatentConfig) -> int:
    dense = config.first_k_dense_replace if isinstance(config, LatentConfig) else 0
    return max(0, config.num_hidden_layers - dense)


def _dense_attention(config: DenseConfig) -> int:
    return 2 * config.hidden_size * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)


def _latent_attention(config: LatentConfig) -> int:
    """Queries and keys through their latents; absorbed or not, each matrix meets a token once."""
    d, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    queries = d * rank + rank * heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    latent = d * (config.kv_lora_rank + config.qk_rope_head_dim)
    latent += config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    index = config.index_n_heads * config.index_head_dim
    indexer = rank * index + d * config.index_head_dim + d * config.index_n_heads if config.index_topk else 0
    return queries + latent + heads * config.v_head_dim * d + indexer


def _grouped_attention(config: HybridConfig | SharedStreamConfig) -> int:
    """Low-rank queries, one key that is the value too, and the grouped low-rank output."""
    d, heads, dim, rank = config.hidden_size, config.num_attention_heads, config.head_dim, config.q_lora_rank
    return d * rank + rank * heads * dim + d * dim + (heads * dim + config.o_groups * d) * config.o_lora_rank


def _stream_mixes(config: HybridConfig | SharedStreamConfig) -> int:
    """mHC: for each of two sublayers, what goes in, what comes out, and the mixing matrix, from all streams."""
    streams = config.hc_mult
    return 2 * streams * config.hidden_size * streams * (streams + 2)


def _hybrid_compression(config: HybridConfig) -> int:
    """Compressors and indexers of V4 (CSA has two of the first, each with two series), and the merge of its streams."""
    d, dim, index = config.hidden_size, config.head_dim, config.index_head_dim
    csa = 4 * d * (dim + index) + (config.q_lora_rank * index + d) * config.index_n_heads
    hca = 2 * d * dim
    merge = config.hc_mult * d * config.hc_mult
    return config.layer_kinds.count("csa") * csa + config.layer_kinds.count("hca") * hca + merge


def _shared_compression(config: SharedStreamConfig) -> int:
    """V4.1: an indexer in each index source; in each KV source the entries, gates where a group is pooled, and index keys."""
    d, dim, index = config.hidden_size, config.head_dim, config.index_head_dim
    queries = (config.q_lora_rank * index + d) * config.index_n_heads
    made = sum(d * dim * (2 if ratio > 1 else 1) + dim * index for ratio in config.stream_ratios)
    return len(config.index_source_layer_ids) * queries + made
