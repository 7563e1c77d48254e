"""DeepSeek-V4.1: a window in every layer, and compressed streams that some layers make and those after them read (CSA2).

Field names are the released ones. (reference/deepseek-v41.md, section 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from workbench.config.common import EngramConfig, RopeConfig, check_positive
from workbench.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedStreamConfig:
    """The text backbone of DeepSeek-V4.1 at any size; defaults are the released constants that seldom change.

    ``compress_ratios`` is the ratio a layer *reads*, 0 for none; only ``kv_source_layer_ids`` make entries and index keys, only
    ``index_source_layer_ids`` choose among them. ``candidate_source_layer_id`` -1: no candidate pool.
    """

    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    compress_ratios: tuple[int, ...]
    kv_source_layer_ids: tuple[int, ...]
    index_source_layer_ids: tuple[int, ...]
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    candidate_source_layer_id: int = -1
    candidate_topk_blocks: int = 2048
    candidate_block_size: int = 8
    sliding_window: int = 128
    n_shared_experts: int = 1
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-20
    rope_theta: float = 10000.0
    compress_rope: RopeConfig = RopeConfig()
    max_position_embeddings: int = 1048576
    engram: EngramConfig | None = None
    model_type: ClassVar[str] = "deepseek_v41"

    def __post_init__(self) -> None:
        if self.candidate_source_layer_id < -1:
            raise InputError(f"candidate_source_layer_id must be a layer, or -1 for none, got {self.candidate_source_layer_id}")
        check_positive(self, "candidate_source_layer_id") if self.candidate_source_layer_id >= 0 else None

    @property
    def num_hidden_layers(self) -> int:
        return len(self.compress_ratios)

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """ "window", or "csa2-" and the mode: full (own stream), reindex (own selection) or reuse."""
        return tuple(
            "window"
            if not ratio
            else "csa2-full"
            if layer in self.kv_source_layer_ids
            else "csa2-reindex"
            if layer in self.index_source_layer_ids
            else "csa2-reuse"
            for layer, ratio in enumerate(self.compress_ratios)
        )

    @property
    def stream_ratios(self) -> tuple[int, ...]:
        """Tokens per entry of each shared stream."""
        return tuple(self.compress_ratios[layer] for layer in self.kv_source_layer_ids)
