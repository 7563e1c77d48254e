"""DeepSeek-V3.2: multi-head latent attention (MLA), with DeepSeek Sparse Attention or, at ``index_topk`` 0, without it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from workbench.config.common import RopeConfig, check_fixed, check_positive, read_fields, read_token_rope, write_rope
from workbench.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentConfig:
    """MLA at any size: one latent and one rotary key a token and layer; DSA adds an index key to choose tokens by.

    ``index_topk`` 0 means plain MLA as in DeepSeek-V3: no indexer, every token is attended to. Field names are the released
    ones. ``mscale_all_dim`` is how much a YaRN-stretched model sharpens its softmax, see ``softmax_scale``.
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
    mscale_all_dim: float = 1.0
    max_position_embeddings: int = 163840
    model_type: ClassVar[str] = "deepseek_v32"

    def __post_init__(self) -> None:
        check_positive(self, "index_topk", "first_k_dense_replace")
        if self.qk_rope_head_dim % 2:
            raise InputError(f"qk_rope_head_dim must be even for RoPE, got {self.qk_rope_head_dim}")
        if self.index_topk and self.qk_rope_head_dim > self.index_head_dim:
            raise InputError(f"index_head_dim={self.index_head_dim} is below qk_rope_head_dim={self.qk_rope_head_dim}")
        if self.mscale_all_dim <= 0:
            raise InputError(f"mscale_all_dim must be above 0, got {self.mscale_all_dim}")
        group, rest = divmod(self.n_routed_experts, self.n_group)
        if rest or group < 2:
            raise InputError(
                f"n_group={self.n_group} must split n_routed_experts={self.n_routed_experts} into equal groups of 2 or more"
            )
        if self.topk_group > self.n_group:
            raise InputError(f"topk_group={self.topk_group} exceeds n_group={self.n_group}")
        if self.num_experts_per_tok > self.topk_group * group:
            raise InputError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds the {self.topk_group * group} experts of "
                f"topk_group={self.topk_group} groups"
            )

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """Read a ``config.json`` of model_type ``deepseek_v32``, or ``deepseek_v3`` for MLA alone.

        The released spelling or that of ``transformers``. Raises InputError for missing or contradicting settings, and for
        variants that are not computed here.
        """
        plain = config.get("model_type") == "deepseek_v3"
        heads, layers = config.get("num_attention_heads"), config.get("num_hidden_layers") or 0
        nope, rotary = config.get("qk_nope_head_dim") or 0, config.get("qk_rope_head_dim")
        check_fixed(config, model_type="deepseek_v3" if plain else "deepseek_v32", attention_bias=False, mlp_bias=False)
        check_fixed(config, scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=True, hidden_act="silu")
        check_fixed(config, moe_layer_freq=1, num_key_value_heads=heads, head_dim=rotary, qk_head_dim=nope + (rotary or 0))
        check_fixed(config, layer_types=[("full_attention" if plain else "indexed_attention")] * layers)
        given: dict[str, Any] = {"index_topk": 0} if plain else {}
        kinds = config.get("mlp_layer_types")
        if kinds is not None:
            dense = kinds.count("dense")
            told = config.get("first_k_dense_replace", dense)
            if kinds != ["dense"] * dense + ["sparse"] * (layers - dense) or min(told, layers) != dense:
                raise InputError(
                    f"mlp_layer_types {kinds} must be 'dense' in the first first_k_dense_replace={told} of {layers} layers, "
                    "then 'sparse'"
                )
            given["first_k_dense_replace"] = dense
        rope, settings = read_token_rope(config, "default", "yarn")
        if settings:
            sharper = settings.get("mscale_all_dim") or 0.0
            if settings.get("mscale") != sharper or settings.get("attention_factor", 1.0) not in (None, 1.0):
                raise InputError(
                    "YaRN is computed for equal mscale and mscale_all_dim without an attention_factor, as released; got "
                    f"mscale={settings.get('mscale')}, mscale_all_dim={settings.get('mscale_all_dim')}, "
                    f"attention_factor={settings.get('attention_factor')}"
                )
            given["mscale_all_dim"] = sharper
        return cls(**read_fields(cls, config, rope=rope, **given))

    def to_dict(self) -> dict[str, Any]:
        """The same configuration as ``config.json`` would hold it, readable by ``from_dict`` and by ``transformers``."""
        family = self.model_type if self.index_topk else "deepseek_v3"
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        del settings["rope"], settings["mscale_all_dim"]
        rope = write_rope(self.rope) | {"rope_theta": self.rope.theta}
        if self.rope.factor > 1:
            rope |= {"mscale": self.mscale_all_dim, "mscale_all_dim": self.mscale_all_dim}
        else:
            rope = {"rope_type": "default", "rope_theta": self.rope.theta}
        return {
            "architectures": ["DeepseekV32ForCausalLM" if self.index_topk else "DeepseekV3ForCausalLM"],
            "model_type": family,
            **settings,
            "num_key_value_heads": self.num_attention_heads,
            "rope_theta": self.rope.theta,
            "rope_parameters": rope,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "norm_topk_prob": True,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": False,
        }

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(key width); a context stretched ``factor`` times multiplies it by (1 + 0.1 mscale ln factor)^2."""
        sharper = 1.0 + 0.1 * self.mscale_all_dim * math.log(self.rope.factor)
        return (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5 * sharper**2

    @property
    def swiglu_limit(self) -> float:
        """Experts are not clamped here, unlike V4's."""
        return math.inf

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
