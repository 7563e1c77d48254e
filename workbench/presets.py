"""Published model shapes and devices: frozen records, each number with its source and how certain it is.

`presets` and `devices` are mappings by name; case, spaces and dashes do not matter ("RTX 4090" is "rtx-4090"). To try a
number of your own, change a record with ``dataclasses.replace``. Bytes are plain bytes: 80 GB is 80e9.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from workbench.config import HybridConfig, LayerKind, RopeConfig
from workbench.errors import InputError

Certainty = Literal["read in code", "published", "derived", "secondary", "uncertain"]
Format = Literal["bf16", "fp8", "fp4", "int8"]


class UnknownNameError(InputError, KeyError):
    """No record has this name; the message lists those there are."""

    __str__ = Exception.__str__  # KeyError would show the message in quotes


@dataclass(frozen=True, slots=True)
class Source:
    """Where a number comes from, and how far to trust it."""

    text: str
    certainty: Certainty


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseShape:
    """MHA and GQA: every token leaves a key and a value per layer and KV head. BF16 throughout, no length limit."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    kind: str
    max_length: int | None = None

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        return (self.kind,) * self.num_hidden_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentShape:
    """MLA with DSA: one latent (key and value at once, plus a rotary key) a token and layer, and an index key to choose by.

    ``max_length`` None: the formula goes on beyond what the model was trained for, as the V4 report's comparison does.
    """

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    max_length: int | None = None

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        return ("mla-dsa",) * self.num_hidden_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedStreamShape:
    """CSA2 of V4.1: window in every layer; compressed entries and selections made by some layers and read by those after.

    ``compress_ratios`` is the ratio a layer reads, 0 for none (reference/deepseek-v41.md, section 1.1).
    """

    hidden_size: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    sliding_window: int
    compress_ratios: tuple[int, ...]
    kv_source_layer_ids: tuple[int, ...]
    index_source_layer_ids: tuple[int, ...]
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    candidate_topk_blocks: int
    candidate_block_size: int
    engram_max_ngram_size: int
    max_length: int | None

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


Shape = HybridConfig | DenseShape | LatentShape | SharedStreamShape


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

    def bytes_read(self, batch: int) -> float:
        """What one decode step of ``batch`` sequences reads if routing is even: each touches its own experts."""
        untouched = (1 - self.num_experts_per_tok / self.n_routed_experts) ** batch
        return self.always_bytes + self.expert_bytes * (1 - untouched)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One published model: its shape, what its authors say of its size, and where every number comes from.

    ``config`` is there when this library has the model (V4). ``kv_format``: what a device must read to keep the cache as
    released. ``trained_length``: tokens the released model is made for, None for the baselines.
    """

    name: str
    title: str
    shape: Shape
    kv_format: Format
    source: Source
    exceptions: Mapping[str, Source] = field(default_factory=dict)  # numbers with a source of their own
    total_parameters: float | None = None
    active_parameters: float | None = None  # read to decode one token
    trained_length: int | None = None
    weights: Weights | None = None

    @property
    def config(self) -> HybridConfig | None:
        return self.shape if isinstance(self.shape, HybridConfig) else None

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of attention of each layer, first layer first."""
        return tuple(self.shape.layer_kinds)

    def source_of(self, number: str) -> Source:
        """Source of one number, named as the field that holds it, here or in the shape; InputError if there is none."""
        if not hasattr(self, number) and not hasattr(self.shape, number):
            raise InputError(f"preset {self.name!r} has no number {number!r}; give a field of it or of its shape")
        return self.exceptions.get(number, self.source)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator, dense peaks without sparsity. ``kv_formats``: cache formats its matrix units read.

    ``host_link_bytes_per_s`` is per direction; None where memory is unified and there is no link, or where none was found.
    """

    name: str
    title: str
    memory_bytes: float
    bandwidth_bytes_per_s: float
    tflop_per_s: Mapping[Format, float]
    kv_formats: tuple[Format, ...]
    host_link: str
    host_link_bytes_per_s: float | None
    source: Source
    exceptions: Mapping[str, Source] = field(default_factory=dict)
    note: str = ""

    def source_of(self, number: str) -> Source:
        """Source of one number by field name, "tflop_per_s.fp8" for one format; InputError if there is no such field."""
        if not hasattr(self, number.partition(".")[0]):
            raise InputError(f"device {self.name!r} has no number {number!r}")
        return self.exceptions.get(number, self.source)


Record = TypeVar("Record", Preset, Device)


class Records(Mapping[str, Record], Generic[Record]):
    """Records by name, forgiving about case, spaces and dashes; an unknown name raises InputError with those there are."""

    def __init__(self, what: str, records: Iterable[Record]) -> None:
        self._what = what
        self._records: dict[str, Record] = {record.name: record for record in records}
        self._by_key: dict[str, Record] = {_key(name): record for name, record in self._records.items()}

    def __getitem__(self, name: str) -> Record:
        found = self._by_key.get(_key(name)) if isinstance(name, str) else None
        if found is None:
            raise UnknownNameError(f"no {self._what} {name!r}; there are {', '.join(self._records)}")
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


def _key(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum() or letter == ".")


_V4_CODE = Source(
    "released config.json and inference code of DeepSeek-V4 (reference/deepseek-v4.md, section 0)", "read in code"
)
_V4_TOTALS = Source("DeepSeek-V4 report, parameter counts (reference/deepseek-v4.md, section 0)", "published")
_V41_CODE = Source("released config.json of DeepSeek-V4.1-Flash (reference/deepseek-v41.md, section 1)", "read in code")
_V41_SIZE = Source("DeepSeek-V4.1-Flash report (reference/deepseek-v41.md, sections 0 and 9.2)", "published")
_V41_WEIGHTS = Source("bytes of the released checkpoint (reference/deepseek-v41.md, section 9.2)", "derived")
_V32_SHAPE = Source("DeepSeek-V3.2 config as the V4 report's baseline (reference/deepseek-v4.md, section 0)", "secondary")
_V32_WEIGHTS = Source("671B parameters at about one byte (FP8) each", "derived")
_BASELINE = Source("baseline defined in reference/deepseek-v4.md, section 5: no released model", "derived")
_V4_SIZES = {"total_parameters": _V4_TOTALS, "active_parameters": _V4_TOTALS}
_V4_WEIGHTS = Source("counted from the shape, in the released formats (reference/deepseek-v4.md, section 0)", "derived")

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


def _v4_weights(config: HybridConfig) -> Weights:
    """Routed experts in FP4 (half a byte and a scale byte for each 32), embedding and head in BF16, the rest about a byte."""
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    experts = config.num_hidden_layers * config.n_routed_experts * expert * (1 / 2 + 1 / 32)
    ends = 2 * config.vocab_size * config.hidden_size
    active_routed = config.num_hidden_layers * config.num_experts_per_tok * expert
    rest = active_parameters(config) - active_routed - ends // 2  # the head counts as active, the embedding is a look-up
    return Weights(
        always_bytes=2.0 * ends + rest,
        expert_bytes=experts,
        n_routed_experts=config.n_routed_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        host_bytes=0.0,
        origin="modelled",
    )


def active_parameters(config: HybridConfig) -> int:
    """Weights that multiply one token on its way through the model: matrices only, the embedding being a look-up."""
    d, heads, dim, rank = config.hidden_size, config.num_attention_heads, config.head_dim, config.q_lora_rank
    index = config.index_n_heads * config.index_head_dim
    attention = d * rank + rank * heads * dim + d * dim + heads * dim * config.o_lora_rank
    attention += config.o_groups * config.o_lora_rank * d
    csa = 4 * d * (dim + config.index_head_dim) + rank * index + d * config.index_n_heads  # two compressors, the indexer
    hca = 2 * d * dim
    experts = config.num_experts_per_tok + config.n_shared_experts
    mlp = experts * 3 * d * config.moe_intermediate_size + d * config.n_routed_experts
    streams = config.hc_mult
    mixes = 2 * streams * d * streams * (streams + 2)  # mHC: two sublayers, each with pre, post and the mixing matrix
    layers, kinds = config.num_hidden_layers, config.layer_kinds
    total = layers * (attention + mlp + mixes) + kinds.count("csa") * csa + kinds.count("hca") * hca
    total += config.vocab_size * d + streams * d * streams  # the head, and the merge of the streams before it
    if config.engram:
        total += len(config.engram.layer_ids) * config.engram.memory_width * d * (streams + 1)  # a key per stream, one value
    return total


presets: Records[Preset] = Records(
    "preset",
    (
        Preset(
            name="v4-flash",
            title="DeepSeek-V4-Flash",
            shape=_FLASH,
            kv_format="fp8",
            source=_V4_CODE,
            exceptions=_V4_SIZES | {"weights": _V4_WEIGHTS},
            total_parameters=284e9,
            active_parameters=13e9,
            trained_length=1048576,
            weights=_v4_weights(_FLASH),
        ),
        Preset(
            name="v4-pro",
            title="DeepSeek-V4-Pro",
            shape=_PRO,
            kv_format="fp8",
            source=_V4_CODE,
            exceptions=_V4_SIZES
            | {
                "weights": _V4_WEIGHTS,
                "index_topk": Source("1024 in most sources, 512 in one mirrored config (section 0, note a)", "uncertain"),
                "moe_intermediate_size": Source("reference/deepseek-v41.md, section 14 leaves it unchecked", "secondary"),
            },
            total_parameters=1.6e12,
            active_parameters=49e9,
            trained_length=1048576,
            weights=_v4_weights(_PRO),
        ),
        Preset(
            name="v4.1-flash",
            title="DeepSeek-V4.1-Flash",
            shape=SharedStreamShape(
                hidden_size=5120,
                num_attention_heads=64,
                head_dim=512,
                qk_rope_head_dim=64,
                sliding_window=128,
                compress_ratios=(0, 0) + (2,) * 18 + (1,) * 20,
                kv_source_layer_ids=(2, 8, 14, 20),
                index_source_layer_ids=(2, 8, 14, 20, 24, 28, 32, 36),
                index_n_heads=32,
                index_head_dim=128,
                index_topk=512,
                candidate_topk_blocks=2048,
                candidate_block_size=8,
                engram_max_ngram_size=4,
                max_length=1048576,
            ),
            kv_format="fp4",
            source=_V41_CODE,
            exceptions={"total_parameters": _V41_SIZE, "active_parameters": _V41_SIZE, "weights": _V41_WEIGHTS},
            total_parameters=552e9,  # 196e9 more in Engram tables
            active_parameters=16e9,  # decoding; prefill 8e9
            trained_length=1048576,
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
            shape=LatentShape(
                num_hidden_layers=61,
                hidden_size=7168,
                num_attention_heads=128,
                kv_lora_rank=512,
                qk_rope_head_dim=64,
                index_n_heads=64,
                index_head_dim=128,
                index_topk=2048,
            ),
            kv_format="fp8",
            source=_V32_SHAPE,
            exceptions={"weights": _V32_WEIGHTS},
            total_parameters=671e9,
            active_parameters=37e9,
            trained_length=163840,
            weights=Weights(  # total and active bytes, solved for what every token reads
                always_bytes=671e9 - (671e9 - 37e9) / (1 - 8 / 256),
                expert_bytes=(671e9 - 37e9) / (1 - 8 / 256),
                n_routed_experts=256,
                num_experts_per_tok=8,
                host_bytes=0.0,
                origin="modelled",
            ),
        ),
        *(
            Preset(
                name=name,
                title=title,
                shape=DenseShape(
                    num_hidden_layers=61,
                    hidden_size=7168,
                    num_attention_heads=128,
                    num_key_value_heads=kv_heads,
                    head_dim=128,
                    kind=kind,
                ),
                kv_format="bf16",
                source=_BASELINE,
            )
            for name, title, kind, kv_heads in (
                ("gqa-8", "baseline with GQA, 8 KV heads", "gqa", 8),
                ("mha", "baseline with MHA, 128 KV heads", "mha", 128),
            )
        ),
    ),
)

_DATASHEET = Source("vendor's data sheet, from general knowledge (reference/engram-and-overlap.md, section 7)", "published")
_AGREED = Source("secondary sources agree (reference/engram-and-overlap.md, section 7)", "secondary")
_DOUBTFUL = Source("few or conflicting sources (reference/engram-and-overlap.md, section 7)", "uncertain")
_ARTICLE = Source("announced 2025 and quoted by the article (reference/engram-and-overlap.md, section 7)", "published")
_PCIE4, _PCIE5, _C2C = ("PCIe 4.0 x16", 31.5e9), ("PCIe 5.0 x16", 63e9), ("NVLink-C2C", 450e9)
_UNIFIED: tuple[str, float | None] = ("none: unified memory", None)
_BF16: tuple[Format, ...] = ("bf16",)
_FP8: tuple[Format, ...] = ("bf16", "fp8")
_FP4: tuple[Format, ...] = ("bf16", "fp8", "fp4")


def _device(
    name: str,
    title: str,
    memory_gb: float,
    bandwidth_tb_per_s: float,
    tflop_per_s: Mapping[Format, float],
    kv_formats: tuple[Format, ...],
    link: tuple[str, float | None],
    source: Source,
    doubtful: tuple[str, ...] = (),
    note: str = "",
) -> Device:
    return Device(
        name=name,
        title=title,
        memory_bytes=memory_gb * 1e9,
        bandwidth_bytes_per_s=bandwidth_tb_per_s * 1e12,
        tflop_per_s=tflop_per_s,
        kv_formats=kv_formats,
        host_link=link[0],
        host_link_bytes_per_s=link[1],
        source=source,
        exceptions=dict.fromkeys(doubtful, _DOUBTFUL),
        note=note,
    )


# fmt: off
devices: Records[Device] = Records("device", (
    _device("a100-40gb", "A100 40 GB SXM", 40, 1.56, {"bf16": 312, "int8": 624}, _BF16, _PCIE4, _DATASHEET),
    _device("a100-80gb", "A100 80 GB SXM", 80, 2.04, {"bf16": 312, "int8": 624}, _BF16, _PCIE4, _DATASHEET),
    _device("h100", "H100 SXM", 80, 3.35, {"bf16": 989, "fp8": 1979}, _FP8, _PCIE5, _DATASHEET),
    _device("h800", "H800 SXM", 80, 3.35, {"bf16": 989, "fp8": 1979}, _FP8, _PCIE5, _AGREED),
    _device("h20", "H20", 96, 4.0, {"bf16": 148, "fp8": 296}, _FP8, _PCIE5, _AGREED),
    _device("h200", "H200 SXM", 141, 4.8, {"bf16": 989, "fp8": 1979}, _FP8, _PCIE5, _DATASHEET),
    _device("gh200", "GH200 144 GB", 144, 4.9, {"bf16": 989, "fp8": 1979}, _FP8, _C2C, _DATASHEET),
    _device("b200", "B200", 180, 8.0, {"bf16": 2250, "fp8": 4500, "fp4": 9000}, _FP4, _PCIE5, _AGREED,
            note="180 to 192 GB and 7.7 to 8 TB/s by variant"),
    _device("gb200", "GB200, one of two GPUs", 186, 8.0, {"bf16": 2500, "fp8": 5000}, _FP4, _C2C, _AGREED,
            note="the link is shared by the two GPUs of a superchip"),
    _device("gb300", "GB300 / B300, one GPU", 288, 8.0, {"bf16": 2250, "fp8": 4500, "fp4": 13500}, _FP4, _C2C, _AGREED,
            note="about 279 GB usable; BF16 to 2500, FP8 to 5000, FP4 to 15000 TFLOP/s by variant; B300 has PCIe 6.0"),
    _device("rubin-article", "Rubin, figures of 2025", 288, 13.0, {"bf16": 4000, "fp8": 17500, "fp4": 50000}, _FP4,
            ("NVLink-C2C", 900e9), _ARTICLE, ("tflop_per_s", "host_link_bytes_per_s"),
            note="bandwidth as announced in 2025; compute and link are the preliminary figures of 2026"),
    _device("rubin-2026", "Rubin, preliminary figures of 2026", 288, 22.0, {"bf16": 4000, "fp8": 17500, "fp4": 50000}, _FP4,
            ("NVLink-C2C", 900e9), _AGREED, ("tflop_per_s", "tflop_per_s.bf16", "tflop_per_s.fp8"),
            note="FP4 as for inference; 35000 TFLOP/s for training; the link is per superchip"),
    _device("ascend-910b", "Ascend 910B", 64, 1.6, {"bf16": 376}, _BF16, _PCIE4, _DOUBTFUL,
            note="280 to 414 TFLOP/s by variant; one source gives far less bandwidth"),
    _device("ascend-910c", "Ascend 910C", 128, 3.2, {"bf16": 752, "int8": 1500}, _BF16, ("PCIe", None), _AGREED,
            note="BF16 752 to 800 TFLOP/s; 784 GB/s between cards of a supernode"),
    _device("ascend-950pr", "Ascend 950PR, plan", 128, 1.6, {"bf16": 500, "fp8": 1000, "fp4": 2000}, _FP4,
            ("PCIe", None), _DOUBTFUL, note="shipping cards are quoted with 112 GB and 1.4 TB/s"),
    _device("ascend-950dt", "Ascend 950DT, plan", 144, 4.0, {"bf16": 500, "fp8": 1000, "fp4": 2000}, _FP4,
            ("PCIe", None), _DOUBTFUL),
    _device("mi300x", "MI300X", 192, 5.3, {"bf16": 1307, "fp8": 2615}, _FP8, _PCIE5, _DATASHEET),
    _device("mi355x", "MI355X", 288, 8.0, {"bf16": 2500, "fp8": 5000, "fp4": 10000}, _FP4, _PCIE5, _DATASHEET),
    _device("rtx-4090", "GeForce RTX 4090", 24, 1.01, {"bf16": 165, "fp8": 330}, _FP8, _PCIE4, _DATASHEET,
            note="with FP32 accumulation"),
    _device("rtx-5090", "GeForce RTX 5090", 32, 1.79, {"bf16": 210, "fp8": 419}, _FP4, _PCIE5, _DATASHEET,
            note="with FP32 accumulation"),
    _device("dgx-spark", "DGX Spark GB10", 128, 0.273, {"bf16": 125, "fp8": 250}, _FP4, _UNIFIED, _AGREED,
            ("tflop_per_s", "tflop_per_s.bf16", "tflop_per_s.fp8")),
    _device("strix-halo", "Ryzen AI Max+ 395", 128, 0.256, {"bf16": 59}, _BF16, _UNIFIED, _AGREED, ("tflop_per_s",)),
    _device("m3-ultra", "Apple M3 Ultra", 512, 0.819, {"bf16": 28}, _BF16, _UNIFIED, _AGREED, note="later sold with 96 GB"),
))
# fmt: on
