"""Published models, and the baselines they are compared with: frozen records, each number with its source.

`presets` is a mapping by name; case, spaces and dashes do not matter. To try a number of your own, change a record with
``dataclasses.replace``. Bytes are plain bytes: 80 GB is 80e9.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from workbench.config import (
    DenseConfig,
    EngramConfig,
    HybridConfig,
    LatentConfig,
    LayerKind,
    ModelConfig,
    RopeConfig,
    SharedStreamConfig,
)
from workbench.errors import InputError
from workbench.sources import Format, Records, Source
from workbench.weights import FP4_BYTES, FP8_BYTES, Weights, modelled_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One published model: its configuration, what its authors say of its size, and where every number comes from.

    ``config`` is of the class that a loaded model of this family has, at full size. ``kv_format``: what a device must read to
    keep the cache as released. ``weights`` is None for baselines, which nobody released.
    """

    name: str
    title: str
    config: ModelConfig
    kv_format: Format
    source: Source
    exceptions: Mapping[str, Source] = field(default_factory=dict)  # numbers with a source of their own
    total_parameters: float | None = None
    active_parameters: float | None = None  # read to decode one token
    weights: Weights | None = None

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of attention of each layer, first layer first."""
        return tuple(self.config.layer_kinds)

    def source_of(self, number: str) -> Source:
        """Source of one number, named as the field that holds it, here or in ``config``; InputError if there is none."""
        if not hasattr(self, number) and not hasattr(self.config, number):
            raise InputError(f"preset {self.name!r} has no number {number!r}; give a field of it or of its config")
        return self.exceptions.get(number, self.source)


_V4_CODE = Source(
    "released config.json and inference code of DeepSeek-V4 (reference/deepseek-v4.md, section 0)", "read in code"
)
_V4_TOTALS = Source("DeepSeek-V4 report, parameter counts (reference/deepseek-v4.md, section 0)", "published")
_V41_CODE = Source("released config.json of DeepSeek-V4.1-Flash (reference/deepseek-v41.md, section 1)", "read in code")
_V41_SIZE = Source("DeepSeek-V4.1-Flash report (reference/deepseek-v41.md, sections 0 and 9.2)", "published")
_V41_WEIGHTS = Source("bytes of the released checkpoint (reference/deepseek-v41.md, section 9.2)", "derived")
_V32_SHAPE = Source("DeepSeek-V3.2 config as the V4 report's baseline (reference/deepseek-v4.md, section 0)", "secondary")
_V32_DETAILS = Source("released config.json of DeepSeek-V3.2, from general knowledge", "secondary")
_COUNTED = "counted from the shape, in the released formats"
_V32_WEIGHTS = Source(f"{_COUNTED} (FP8 throughout but for embedding and head)", "derived")
_V4_WEIGHTS = Source(f"{_COUNTED} (reference/deepseek-v4.md, section 0)", "derived")
_V4_SIZES = {"total_parameters": _V4_TOTALS, "active_parameters": _V4_TOTALS, "weights": _V4_WEIGHTS}
_BASELINE = Source("baseline defined in reference/deepseek-v4.md, section 5: no released model", "derived")
_BASELINE_REST = Source("taken over from DeepSeek-V3.2, because the baseline defines attention only", "derived")

_V4_COMPRESS_ROPE = RopeConfig(theta=160000.0, factor=16.0, original_max_position_embeddings=65536)
_FLASH_KINDS: tuple[LayerKind, ...] = ("window", "window", *(("csa", "hca") * 20), "csa")
_PRO_KINDS: tuple[LayerKind, ...] = ("hca", "hca", *(("csa", "hca") * 29), "csa")

_FLASH = HybridConfig(
    vocab_size=129280,
    hidden_size=4096,
    num_attention_heads=64,
    head_dim=512,
    qk_rope_head_dim=64,
    q_lora_rank=1024,
    o_groups=8,
    o_lora_rank=1024,
    layer_kinds=_FLASH_KINDS,
    mlp_kinds=("hash",) * 3 + ("score",) * 40,
    n_routed_experts=256,
    num_experts_per_tok=6,
    moe_intermediate_size=2048,
    index_n_heads=64,
    index_head_dim=128,
    index_topk=512,
    routed_scaling_factor=1.5,
    compress_rope=_V4_COMPRESS_ROPE,
)
_PRO = HybridConfig(
    vocab_size=129280,
    hidden_size=7168,
    num_attention_heads=128,
    head_dim=512,
    qk_rope_head_dim=64,
    q_lora_rank=1536,
    o_groups=16,
    o_lora_rank=1024,
    layer_kinds=_PRO_KINDS,
    mlp_kinds=("hash",) * 3 + ("score",) * 58,
    n_routed_experts=384,
    num_experts_per_tok=6,
    moe_intermediate_size=3072,
    index_n_heads=64,
    index_head_dim=128,
    index_topk=1024,
    routed_scaling_factor=2.5,
    compress_rope=_V4_COMPRESS_ROPE,
)
_V41_FLASH = SharedStreamConfig(
    vocab_size=129280,
    hidden_size=5120,
    num_attention_heads=64,
    head_dim=512,
    qk_rope_head_dim=64,
    q_lora_rank=1280,
    o_groups=8,
    o_lora_rank=1024,
    compress_ratios=(0, 0) + (2,) * 18 + (1,) * 20,
    kv_source_layer_ids=(2, 8, 14, 20),
    index_source_layer_ids=(2, 8, 14, 20, 24, 28, 32, 36),
    n_routed_experts=384,
    num_experts_per_tok=6,
    moe_intermediate_size=2304,
    index_n_heads=32,
    index_head_dim=128,
    index_topk=512,
    candidate_source_layer_id=20,
    compress_rope=_V4_COMPRESS_ROPE,
    engram=EngramConfig(
        layer_ids=(1, 14),
        vocab_size=16000000,
        compressed_vocab_size=99092,
        max_ngram_size=4,
        n_heads=8,
        head_dim=256,
        pad_token_id=2,
        conv_kernel_size=0,
    ),
    image_token_id=129264,
)
_V32 = LatentConfig(
    vocab_size=129280,
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=18432,
    rope=RopeConfig(theta=10000.0, factor=40.0, original_max_position_embeddings=4096),
)


def _baseline(kv_heads: int) -> DenseConfig:
    """As deep and wide as V3.2, with dense attention; the context is the one it is compared at."""
    return DenseConfig(
        vocab_size=129280,
        hidden_size=7168,
        num_hidden_layers=61,
        num_attention_heads=128,
        num_key_value_heads=kv_heads,
        head_dim=128,
        intermediate_size=18432,
        max_position_embeddings=1048576,
    )


presets: Records[Preset] = Records(
    "preset",
    (
        Preset(
            name="v4-flash",
            title="DeepSeek-V4-Flash",
            config=_FLASH,
            kv_format="fp8",
            source=_V4_CODE,
            exceptions=_V4_SIZES,
            total_parameters=284e9,
            active_parameters=13e9,
            weights=modelled_weights(_FLASH, FP4_BYTES),
        ),
        Preset(
            name="v4-pro",
            title="DeepSeek-V4-Pro",
            config=_PRO,
            kv_format="fp8",
            source=_V4_CODE,
            exceptions=_V4_SIZES
            | {
                "index_topk": Source("1024 in most sources, 512 in one mirrored config (section 0, note a)", "uncertain"),
                "moe_intermediate_size": Source("reference/deepseek-v41.md, section 14 leaves it unchecked", "secondary"),
            },
            total_parameters=1.6e12,
            active_parameters=49e9,
            weights=modelled_weights(_PRO, FP4_BYTES),
        ),
        Preset(
            name="v4.1-flash",
            title="DeepSeek-V4.1-Flash",
            config=_V41_FLASH,
            kv_format="fp4",
            source=_V41_CODE,
            exceptions={"total_parameters": _V41_SIZE, "active_parameters": _V41_SIZE, "weights": _V41_WEIGHTS},
            total_parameters=552e9,  # 196e9 more in Engram tables
            active_parameters=16e9,  # decoding; prefill 8e9
            weights=Weights(  # 510 GB in all
                always_bytes=18e9,
                expert_bytes=289e9,
                n_routed_experts=384,
                num_experts_per_tok=6,
                host_bytes=203e9,
                origin="published",
            ),
        ),
        Preset(
            name="v3.2",
            title="DeepSeek-V3.2",
            config=_V32,
            kv_format="fp8",
            source=_V32_SHAPE,
            exceptions=dict.fromkeys(("n_group", "topk_group", "intermediate_size", "rope", "mscale_all_dim"), _V32_DETAILS)
            | {"weights": _V32_WEIGHTS},
            total_parameters=671e9,
            active_parameters=37e9,
            weights=modelled_weights(_V32, FP8_BYTES),
        ),
        *(
            Preset(
                name=name,
                title=title,
                config=_baseline(kv_heads),
                kv_format="bf16",
                source=_BASELINE,
                exceptions=dict.fromkeys(("vocab_size", "intermediate_size", "rms_norm_eps", "rope"), _BASELINE_REST),
            )
            for name, title, kv_heads in (
                ("gqa-8", "baseline with GQA, 8 KV heads", 8),
                ("mha", "baseline with MHA, 128 KV heads", 128),
            )
        ),
    ),
)
