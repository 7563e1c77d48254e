"""DeepSeek-V4: window, CSA and HCA layers. Field names are the released ones; ``transformers``' spellings are translated.

(reference/deepseek-v4.md, section 0)
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from workbench.config.common import (
    EngramConfig,
    RopeConfig,
    check_fixed,
    check_positive,
    read_engram,
    read_rope,
    write_engram,
    write_rope,
)
from workbench.errors import InputError

LayerKind = Literal["window", "csa", "hca"]

_KIND_OF_LAYER_TYPE: dict[str, LayerKind] = {
    "sliding_attention": "window",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}
_LAYER_TYPE_OF_KIND = {kind: name for name, kind in _KIND_OF_LAYER_TYPE.items()}
# A released config lists one ratio per layer; the reference code treats exactly ratio 4 as the overlapping compressor.
RELEASED_CSA_RATIO = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridConfig:
    """The text backbone of DeepSeek-V4 at any size; defaults are the released constants that seldom change."""

    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    layer_kinds: tuple[LayerKind, ...]
    mlp_kinds: tuple[Literal["hash", "score"], ...]
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    csa_ratio: int = 4
    hca_ratio: int = 128
    sliding_window: int = 128
    n_shared_experts: int = 1
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope: RopeConfig = RopeConfig()
    max_position_embeddings: int = 1048576
    engram: EngramConfig | None = None
    model_type: ClassVar[str] = "deepseek_v4"

    def __post_init__(self) -> None:
        check_positive(self)
        for name, allowed in (("layer_kinds", ("window", "csa", "hca")), ("mlp_kinds", ("hash", "score"))):
            unknown = sorted(set(getattr(self, name)) - set(allowed))
            if unknown or not getattr(self, name):
                raise InputError(f"{name} must list one of {allowed} per layer, got {unknown or 'nothing'}")
        if len(self.layer_kinds) != len(self.mlp_kinds):
            raise InputError(
                f"{len(self.layer_kinds)} layer_kinds but {len(self.mlp_kinds)} mlp_kinds; give one each per layer"
            )
        if self.qk_rope_head_dim % 2 or not 2 <= self.qk_rope_head_dim <= self.head_dim:
            raise InputError(f"qk_rope_head_dim must be even and at most head_dim={self.head_dim}, got {self.qk_rope_head_dim}")
        if "csa" in self.layer_kinds and self.qk_rope_head_dim > self.index_head_dim:
            raise InputError(f"index_head_dim={self.index_head_dim} is below qk_rope_head_dim={self.qk_rope_head_dim}")
        if (self.num_attention_heads * self.head_dim) % self.o_groups:
            raise InputError(
                f"o_groups={self.o_groups} must divide heads x head_dim = {self.num_attention_heads * self.head_dim}"
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise InputError(f"num_experts_per_tok={self.num_experts_per_tok} exceeds n_routed_experts={self.n_routed_experts}")
        if self.engram and not 0 <= min(self.engram.layer_ids) <= max(self.engram.layer_ids) < self.num_hidden_layers:
            raise InputError(f"engram_layer_ids {self.engram.layer_ids} must lie in 0..{self.num_hidden_layers - 1}")

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_kinds)

    @property
    def compress_ratios(self) -> tuple[int, ...]:
        """Tokens per compressed entry, layer by layer; 0 where a layer has only its window."""
        return tuple({"window": 0, "csa": self.csa_ratio, "hca": self.hca_ratio}[kind] for kind in self.layer_kinds)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> HybridConfig:
        """Read a ``config.json`` in the released spelling or the one ``transformers`` saves.

        Raises InputError for another ``model_type``, a missing key, or a setting this model does not implement.
        """
        if config.get("model_type", "deepseek_v4") != "deepseek_v4":
            raise InputError(f"model_type {config['model_type']!r} is not supported here; expected 'deepseek_v4'")
        check_fixed(config, scoring_func="sqrtsoftplus", norm_topk_prob=True, hidden_act="silu")
        try:
            return cls(**_read_fields(config))
        except KeyError as missing:
            raise InputError(f"config.json has no {missing}; is this a DeepSeek-V4 model folder?") from None
        except (TypeError, AttributeError) as error:
            raise InputError(f"config.json has a setting of the wrong type: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The same configuration as ``config.json`` would hold it, readable by ``from_dict`` and by ``transformers``."""
        out: dict[str, Any] = {"architectures": ["DeepseekV4ForCausalLM"], "model_type": self.model_type}
        for field in fields(self):
            if field.name not in ("layer_kinds", "mlp_kinds", "csa_ratio", "hca_ratio", "compress_rope", "engram"):
                out[field.name] = getattr(self, field.name)
        rope = self.compress_rope
        out |= {
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": 1,
            "compress_ratios": list(self.compress_ratios),
            "layer_types": [_LAYER_TYPE_OF_KIND[kind] for kind in self.layer_kinds],
            "mlp_layer_types": ["hash_moe" if kind == "hash" else "moe" for kind in self.mlp_kinds],
            "compress_rates": {_LAYER_TYPE_OF_KIND["csa"]: self.csa_ratio, _LAYER_TYPE_OF_KIND["hca"]: self.hca_ratio},
            "partial_rotary_factor": self.qk_rope_head_dim / self.head_dim,
            "compress_rope_theta": rope.theta,
            "rope_scaling": write_rope(rope),
            "scoring_func": "sqrtsoftplus",
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
        }
        return out | write_engram(self.engram)


def _read_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Translate the two spellings of ``config.json`` into the fields of HybridConfig."""
    layers = config["num_hidden_layers"]
    rates = config.get("compress_rates") or {}
    csa_ratio, hca_ratio = rates.get(_LAYER_TYPE_OF_KIND["csa"]), rates.get(_LAYER_TYPE_OF_KIND["hca"])
    if config.get("layer_types"):
        unknown = sorted(set(config["layer_types"]) - set(_KIND_OF_LAYER_TYPE))
        if unknown:
            raise InputError(f"layer_types {unknown} are unknown; expected {sorted(_KIND_OF_LAYER_TYPE)}")
        kinds: list[LayerKind] = [_KIND_OF_LAYER_TYPE[name] for name in config["layer_types"]][:layers]
    else:
        ratios = list(config["compress_ratios"])[:layers]  # released lists go on with the MTP block's ratio
        kinds = ["window" if ratio == 0 else "csa" if ratio == RELEASED_CSA_RATIO else "hca" for ratio in ratios]
        heavy = {ratio for ratio in ratios if ratio not in (0, RELEASED_CSA_RATIO)}
        if len(heavy) > 1:
            raise InputError(f"compress_ratios has several heavy ratios {sorted(heavy)}; one is supported")
        csa_ratio, hca_ratio = csa_ratio or RELEASED_CSA_RATIO, hca_ratio or (heavy.pop() if heavy else None)
    if len(kinds) != layers:
        raise InputError(f"num_hidden_layers is {layers} but {len(kinds)} layers are described")
    if config.get("mlp_layer_types"):
        mlp = ["hash" if name == "hash_moe" else "score" for name in config["mlp_layer_types"]][:layers]
    else:
        hashed = min(config.get("num_hash_layers", 3), layers)
        mlp = ["hash"] * hashed + ["score"] * (layers - hashed)
    rotary = config.get("qk_rope_head_dim") or int(config["head_dim"] * config.get("partial_rotary_factor", 0.125))
    same = {f.name for f in fields(HybridConfig)} - {"layer_kinds", "mlp_kinds", "compress_rope", "engram", "qk_rope_head_dim"}
    out = {name: config[name] for name in same if config.get(name) is not None}
    required = {f.name for f in fields(HybridConfig) if f.default is f.default_factory} & same  # both MISSING
    for name in sorted(required):
        config[name]  # a KeyError here names the missing setting
    return out | {
        "layer_kinds": tuple(kinds),
        "mlp_kinds": tuple(mlp),
        "csa_ratio": csa_ratio or RELEASED_CSA_RATIO,
        "hca_ratio": hca_ratio or 128,
        "qk_rope_head_dim": rotary,
        "compress_rope": read_rope(config),
        "engram": read_engram(config),
    }
