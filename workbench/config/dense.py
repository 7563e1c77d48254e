"""Dense attention, MHA and GQA, in the ``llama`` layout: the ancestors the compressed caches are compared with."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from workbench.config.common import RopeConfig, check_fixed, check_positive, read_fields, read_token_rope
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
        if self.rope.factor != 1:
            raise InputError(f"dense attention is computed without YaRN here, got a rope factor of {self.rope.factor}")

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """Read a ``config.json`` of model_type ``llama``, old and new spelling of the rotary settings.

        Raises InputError for a missing setting, biases, a stretched rotation, and other variants that are not computed here.
        """
        check_fixed(config, model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False)
        rope, _ = read_token_rope(config, "default")
        heads = config.get("num_attention_heads") or 0
        given: dict[str, Any] = {"rope": rope}
        if config.get("num_key_value_heads") is None and heads:
            given["num_key_value_heads"] = heads
        if config.get("head_dim") is None and heads and config.get("hidden_size"):
            if config["hidden_size"] % heads:
                raise InputError(f"hidden_size={config['hidden_size']} is no multiple of {heads} heads; give a head_dim")
            given["head_dim"] = config["hidden_size"] // heads
        return cls(**read_fields(cls, config, **given))

    def to_dict(self) -> dict[str, Any]:
        """The same configuration as ``config.json`` would hold it, readable by ``from_dict`` and by ``transformers``."""
        settings = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "rope"}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": self.model_type,
            **settings,
            "rope_theta": self.rope.theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope.theta},
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
        }

    @property
    def qk_rope_head_dim(self) -> int:
        """Channels of a head that RoPE turns: all of them."""
        return self.head_dim

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
