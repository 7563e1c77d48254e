"""DeepSeek-V3.2: multi-head latent attention (MLA), with DeepSeek Sparse Attention or, at ``index_topk`` 0, without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from workbench.config.common import RopeConfig, check_positive


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentConfig:
    """MLA at any size: one latent and one rotary key a token and layer; DSA adds an index key to choose tokens by.

    ``index_topk`` 0 means plain MLA: no indexer, every token is attended to. Field names are the released ones.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048
    first_k_dense_replace: int = 3
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 2048
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig(theta=10000.0)
    max_position_embeddings: int = 163840
    model_type: ClassVar[str] = "deepseek_v32"

    def __post_init__(self) -> None:
        check_positive(self, "index_topk", "first_k_dense_replace", "n_shared_experts")

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        return ("mla-dsa" if self.index_topk else "mla",) * self.num_hidden_layers

    @property
    def compress_ratios(self) -> tuple[int, ...]:
        """One cached row per token in every layer."""
        return (1,) * self.num_hidden_layers

    @property
    def sliding_window(self) -> int:
        return 0

    @property
    def engram(self) -> None:
        return None
