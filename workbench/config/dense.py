"""Dense attention, MHA and GQA, in the ``llama`` layout: the ancestors the compressed caches are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from workbench.config.common import RopeConfig, check_positive
from workbench.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseConfig:
    """A dense decoder: every token leaves a key and a value per layer and KV head. As many KV as query heads is MHA."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig(theta=10000.0)
    max_position_embeddings: int = 131072
    model_type: ClassVar[str] = "llama"

    def __post_init__(self) -> None:
        check_positive(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_key_value_heads={self.num_key_value_heads} must divide num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim must be even for RoPE, got {self.head_dim}")

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        kind = "mha" if self.num_key_value_heads == self.num_attention_heads else "gqa"
        return (kind,) * self.num_hidden_layers

    @property
    def compress_ratios(self) -> tuple[int, ...]:
        """One cached row per token in every layer."""
        return (1,) * self.num_hidden_layers

    @property
    def sliding_window(self) -> int:
        return 0

    @property
    def index_topk(self) -> None:
        """Nothing chooses here: every token is attended to."""
        return None

    @property
    def engram(self) -> None:
        return None
