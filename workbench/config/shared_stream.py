"""DeepSeek-V4.1: a window in every layer, and compressed streams that some layers make and those after them read (CSA2).

Field names are the released ones. (reference/deepseek-v41.md, section 1)
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

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
from workbench.config.primes import table_primes
from workbench.errors import InputError

# What V4.1 uses where a config.json leaves it out: 2- to 4-grams in rows of 256, and no convolution.
_ENGRAM_DEFAULTS = {"engram_max_ngram_size": 4, "engram_head_dim": 256, "engram_pad_token_id": 2, "engram_conv_kernel_size": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedStreamConfig:
    """The text backbone of DeepSeek-V4.1 at any size; defaults are the released constants that seldom change.

    ``compress_ratios`` is the ratio a layer *reads*, 0 for none; only ``kv_source_layer_ids`` make entries and index keys, only
    ``index_source_layer_ids`` choose among them. ``candidate_source_layer_id`` -1: no candidate pool. ``image_token_id`` stands
    for pieces of an image, which Engram neither reads nor looks back across; None in a model without such a token.
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
    image_token_id: int | None = None
    model_type: ClassVar[str] = "deepseek_v41"

    def __post_init__(self) -> None:
        check_positive(self, "candidate_source_layer_id", "image_token_id", minus_one="candidate_source_layer_id")
        if self.num_attention_heads % self.o_groups:
            raise InputError(f"o_groups={self.o_groups} must divide num_attention_heads={self.num_attention_heads}")
        widest = min(self.head_dim, self.index_head_dim)
        if self.qk_rope_head_dim % 2 or self.qk_rope_head_dim > widest:
            raise InputError(
                f"qk_rope_head_dim must be even and at most {widest} (the smaller of head_dim={self.head_dim} and "
                f"index_head_dim={self.index_head_dim}), got {self.qk_rope_head_dim}"
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise InputError(f"num_experts_per_tok={self.num_experts_per_tok} exceeds n_routed_experts={self.n_routed_experts}")
        self._check_schedule()
        layers = self.num_hidden_layers
        if self.engram and not 0 <= min(self.engram.layer_ids) <= max(self.engram.layer_ids) < layers:
            raise InputError(f"engram_layer_ids {self.engram.layer_ids} must lie in 0..{layers - 1}")
        if self.engram and not 0 <= self.engram.pad_token_id < self.vocab_size:
            raise InputError(f"engram_pad_token_id must lie in 0..{self.vocab_size - 1}, got {self.engram.pad_token_id}")
        if self.image_token_id is not None and self.image_token_id >= self.vocab_size:
            raise InputError(f"image_token_id must lie in 0..{self.vocab_size - 1}, got {self.image_token_id}")

    def _check_schedule(self) -> None:
        """Who makes entries, who chooses and who reads must fit together (reference, section 1)."""
        ratios, layers = self.compress_ratios, len(self.compress_ratios)
        if not ratios or any(type(ratio) is not int or ratio < 0 for ratio in ratios):
            raise InputError(f"compress_ratios must list a whole number from 0 up per layer, got {ratios}")
        for name in ("kv_source_layer_ids", "index_source_layer_ids"):
            sources = getattr(self, name)
            if list(sources) != sorted(set(sources)) or any(type(s) is not int or not 0 <= s < layers for s in sources):
                raise InputError(f"{name} must be strictly increasing layers of 0..{layers - 1}, got {sources}")
            idle = [layer for layer in sources if not ratios[layer]]
            if idle:
                raise InputError(f"{name} lists layers {idle}, whose compress_ratios are 0: they read no stream")
        if lacking := sorted(set(self.kv_source_layer_ids) - set(self.index_source_layer_ids)):
            raise InputError(f"kv_source_layer_ids {lacking} must be in index_source_layer_ids too, whose keys they make")
        made = 0
        for layer, ratio in enumerate(ratios):
            made = ratio if layer in self.kv_source_layer_ids else made
            if ratio and ratio != made:
                held = f"ratio {made}" if made else "no stream yet"
                raise InputError(f"layer {layer} reads ratio {ratio}, but the latest KV source before it makes {held}")
        if self.candidate_source_layer_id not in (-1, *self.kv_source_layer_ids):
            raise InputError(
                f"candidate_source_layer_id must be one of kv_source_layer_ids {self.kv_source_layer_ids}, or -1 for no "
                f"candidate pool, got {self.candidate_source_layer_id}"
            )

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

    def candidate_pool(self, layer: int) -> int:
        """Entries a layer may choose among at most; 0 where it chooses among all.

        Layers that reindex the candidate source's stream have a pool; a later KV source drops it with the stream.
        """
        source = self.candidate_source_layer_id
        if source < 0 or layer <= source or any(source < other <= layer for other in self.kv_source_layer_ids):
            return 0
        return self.candidate_topk_blocks * self.candidate_block_size

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> SharedStreamConfig:
        """Read a ``config.json`` as released, the text settings nested in ``text_config`` or not.

        Raises InputError for another ``model_type``, a missing key, a setting this model does not implement, and Engram tables
        of another size than the hash rules give. Drafting stages (DSpark) and image settings are left aside.
        """
        if config.get("model_type", cls.model_type) != cls.model_type:
            raise InputError(f"model_type {config['model_type']!r} is not supported here; expected {cls.model_type!r}")
        text = config.get("text_config", config)
        if not isinstance(text, dict):
            raise InputError(f"text_config must be an object of settings, got {type(text).__name__}")
        text = text | {"image_token_id": text.get("image_token_id", config.get("image_token_id"))}
        check_fixed(
            text,
            scoring_func="sqrtsoftplus",
            topk_method="noaux_tc",
            norm_topk_prob=True,
            hidden_act="silu",
            num_key_value_heads=1,
            attention_bias=False,
        )
        try:
            return _read(cls, text)
        except KeyError as missing:
            raise InputError(f"config.json has no {missing}; is this a DeepSeek-V4.1 model folder?") from None
        except InputError:
            raise
        except (TypeError, AttributeError, ValueError) as error:
            raise InputError(f"config.json has a setting of the wrong type: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The same configuration as ``config.json`` would hold it, readable by ``from_dict``."""
        out: dict[str, Any] = {"architectures": ["DeepseekV41ForCausalLM"], "model_type": self.model_type}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("compress_rope", "engram") and value is not None:
                out[field.name] = list(value) if isinstance(value, tuple) else value
        out |= {
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": 1,
            "compress_rope_theta": self.compress_rope.theta,
            "rope_scaling": write_rope(self.compress_rope),
            "scoring_func": "sqrtsoftplus",
            "topk_method": "noaux_tc",
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
        }
        if self.engram:
            out["engram_num_embeddings"] = [sum(primes) for primes in table_primes(self.engram)]
        return out | write_engram(self.engram)


def _read(cls: type[SharedStreamConfig], config: dict[str, Any]) -> SharedStreamConfig:
    """Translate a flat ``config.json`` into the fields; a missing one raises KeyError."""
    out: dict[str, Any] = {"compress_rope": read_rope(config)}
    for field in fields(cls):
        if field.name in ("compress_rope", "engram"):
            continue
        if config.get(field.name) is not None:
            value = config[field.name]
            out[field.name] = tuple(value) if isinstance(value, list) else value
        elif field.default is MISSING:
            raise KeyError(field.name)
    layers = config.get("num_hidden_layers", len(out["compress_ratios"]))
    if layers > len(out["compress_ratios"]):
        raise InputError(f"num_hidden_layers is {layers} but compress_ratios describes {len(out['compress_ratios'])}")
    out["compress_ratios"] = out["compress_ratios"][:layers]  # released lists go on with the drafting stages' ratios
    engram = read_engram(_ENGRAM_DEFAULTS | config)
    found = cls(**out, engram=engram)
    rows = config.get("engram_num_embeddings")
    if engram and rows is not None and list(rows) != (due := [sum(primes) for primes in table_primes(engram)]):
        raise InputError(f"engram_num_embeddings is {rows}, but the hash rules give tables of {due} rows")
    return found
