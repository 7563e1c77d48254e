"""Closed-form bytes and FLOPs of one sequence: arithmetic only, no torch.

Sources: reference/deepseek-v4.md, sections 4 to 6, and for V4.1 reference/deepseek-v41.md, section 9. L tokens, W window,
D head dim, R rotary dims, I bytes of an index key, E bytes of an entry, m and m' the CSA and HCA block sizes, k entries
kept. Three storages: "fp32", "bf16", and "released", the packed mixed format of the published model.

Everywhere a model is a configuration such as ``model.config``, a Preset or a preset's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import get_args

from workbench.config import DenseConfig, HybridConfig, LatentConfig, ModelConfig, SharedStreamConfig
from workbench.config.parts import KV_PART, PARTS, STORAGES
from workbench.errors import InputError
from workbench.presets import Preset, presets
from workbench.weights import active_parameters

Model = ModelConfig | Preset | str

WEIGHTINGS = ("plain", "fp8-equivalent")
VALUE_BYTES = {"fp32": 4, "bf16": 2}
FP32_BYTES = 4  # the open block is summed in float32 whatever the entries are stored in
TOKEN_ID_BYTES = 8  # int64
FP8_SCALE_BLOCK, FP4_SCALE_BLOCK, ENTRY_ALIGNMENT = 64, 32, 8
LATENT_SCALE_BLOCK = 128  # V3.2: a float32 scale for each 128 FP8 values of a latent, and one for an index key
STREAM_SCALE_BLOCK, STREAM_WINDOW_SCALE_BLOCK = 16, 32  # V4.1: FP4 entries of the shared streams, FP8 window entries
LENGTH_CAP = 2**40  # of models with a row for every token, whose formula goes on beyond what they were made for


@dataclass(frozen=True, slots=True)
class Term:
    """One product of the formula: ``symbols`` in the reports' letters, and the same with its ``factors`` put in."""

    part: str
    symbols: str
    factors: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.factors)

    @property
    def numbers(self) -> str:
        return " × ".join(f"{factor:,}" for factor in self.factors)


def entry_bytes(config: ModelConfig, storage: str = "released") -> int:
    """Bytes of one compressed entry, which is key and value at once; of a token's latent; of its keys and values if dense.

    "released": V4 D - R values in FP8, one scale byte for each 64 of them, R values in BF16, padded to a multiple of 8 (584
    for 512 / 64); V4.1 FP4 and a scale byte for each 16 (288); V3.2 an FP8 latent with a float32 scale for each 128, and R
    values in BF16 (656 for 512 + 64); dense BF16.
    """
    value = VALUE_BYTES.get(_checked(storage))
    if isinstance(config, DenseConfig):
        return 2 * config.num_key_value_heads * config.head_dim * (value or VALUE_BYTES["bf16"])
    if isinstance(config, LatentConfig):
        latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
        return (latent + rope) * value if value else latent + 4 * _ceil(latent, LATENT_SCALE_BLOCK) + 2 * rope
    if value:
        return config.head_dim * value
    if isinstance(config, SharedStreamConfig):
        return _ceil(config.head_dim, 2) + _ceil(config.head_dim, STREAM_SCALE_BLOCK)
    plain = config.head_dim - config.qk_rope_head_dim
    packed = plain + _ceil(plain, FP8_SCALE_BLOCK) + 2 * config.qk_rope_head_dim
    return _ceil(packed, ENTRY_ALIGNMENT) * ENTRY_ALIGNMENT


def window_entry_bytes(config: HybridConfig | SharedStreamConfig, storage: str = "released") -> int:
    """Bytes of one token in a layer's window: in V4 an entry, in V4.1 FP8 and a scale byte for each 32 (528 for 512)."""
    if storage != "released" or isinstance(config, HybridConfig):
        return entry_bytes(config, storage)
    return config.head_dim + _ceil(config.head_dim, STREAM_WINDOW_SCALE_BLOCK)


def index_key_bytes(config: HybridConfig | SharedStreamConfig | LatentConfig, storage: str = "released") -> int:
    """Bytes of one lightning-indexer key.

    "released": FP4, two values a byte, and a scale byte for each 32 (68 for 128); V3.2 FP8 and a float32 scale (132).
    """
    value, width = VALUE_BYTES.get(_checked(storage)), config.index_head_dim
    if value:
        return width * value
    if isinstance(config, LatentConfig):
        return width + 4 * _ceil(width, LATENT_SCALE_BLOCK)
    return _ceil(width, 2) + _ceil(width, FP4_SCALE_BLOCK)


def terms(model: Model, length: int, storage: str = "released") -> tuple[Term, ...]:
    """The products whose sum is what one sequence of ``length`` tokens holds; parts the model lacks are left out.

    Raises InputError for a length that is no whole number from 0 to the model's limit, or an unknown storage.
    """
    config = config_for(model, length)
    _checked(storage)
    if isinstance(config, HybridConfig):
        return (*_hybrid_terms(config, length, storage), *_engram_terms(config, length))
    if isinstance(config, SharedStreamConfig):
        return (*_shared_terms(config, length, storage), *_engram_terms(config, length))
    layers, row = config.num_hidden_layers, entry_bytes(config, storage)
    if isinstance(config, DenseConfig):
        return (Term(KV_PART, "layers × L × 2 × H_kv × D × value bytes", (layers, length, row)),)
    rows = Term(KV_PART, "layers × L × E", (layers, length, row))
    if not config.index_topk:
        return (rows,)
    return rows, Term("index", "layers × L × I", (layers, length, index_key_bytes(config, storage)))


def _hybrid_terms(config: HybridConfig, length: int, storage: str) -> list[Term]:
    entry, key = entry_bytes(config, storage), index_key_bytes(config, storage)
    csa, hca = config.layer_kinds.count("csa"), config.layer_kinds.count("hca")
    m, heavy = config.csa_ratio, config.hca_ratio
    found = [Term("window", "layers × min(L, W) × E", (config.num_hidden_layers, min(length, config.sliding_window), entry))]
    if csa:
        found += [
            Term("compressed", "n_csa × ⌊L/m⌋ × E", (csa, length // m, entry)),
            Term("index", "n_csa × ⌊L/m⌋ × I", (csa, length // m, key)),
        ]
    if hca:
        found.append(Term("compressed", "n_hca × ⌊L/m′⌋ × E", (hca, length // heavy, entry)))
    if csa:  # projected values and gate scores of two series (a, b), for the entry and for the index key
        width = config.head_dim + config.index_head_dim
        before = m if length >= m else 0  # the overlap: the a-series of the block before the open one
        found += [
            Term("tail", "n_csa × (L mod m) × 2·2·(D + D_index) × 4 B", (csa, length % m, 4, width, FP32_BYTES)),
            Term("tail", "n_csa × m × 2·(D + D_index) × 4 B, once L ≥ m", (csa, before, 2, width, FP32_BYTES)),
        ]
    if hca:
        found.append(Term("tail", "n_hca × (L mod m′) × 2·D × 4 B", (hca, length % heavy, 2, config.head_dim, FP32_BYTES)))
    return found


def _shared_terms(config: SharedStreamConfig, length: int, storage: str) -> list[Term]:
    ratios, width = config.stream_ratios, config.head_dim
    window = config.num_hidden_layers, min(length, config.sliding_window), window_entry_bytes(config, storage)
    closed, started = sum(length // m for m in ratios), sum(length % m for m in ratios)
    found = [Term("window", "layers × min(L, W) × E_window", window)]
    if ratios:
        found += [
            Term("compressed", "Σ ⌊L/m⌋ over the shared streams × E", (closed, entry_bytes(config, storage))),
            Term("index", "Σ ⌊L/m⌋ over the shared streams × I", (closed, index_key_bytes(config, storage))),
            Term("tail", "Σ (L mod m) over the streams × 2·D × 4 B", (started, 2, width, FP32_BYTES)),
        ]
    return found


def _engram_terms(config: HybridConfig | SharedStreamConfig, length: int) -> list[Term]:
    if not config.engram:
        return []
    layers, state = len(config.engram.layer_ids), config.engram.conv_state_length
    look_back, stream = min(length, config.engram.max_ngram_size - 1), config.hc_mult * config.hidden_size
    found = [Term("engram", "min(L, N − 1) ids × 8 B", (look_back, TOKEN_ID_BYTES))]
    if state:
        convolved = (layers, min(length, state), stream, FP32_BYTES)
        found.append(Term("engram", "n_engram × min(L, conv state) × streams·d × 4 B", convolved))
    return found


def kv_bytes(model: Model, length: int, storage: str = "released") -> dict[str, int]:
    """Part -> bytes one sequence of ``length`` tokens holds, and their "total"; the same numbers a live cache counts.

    Published totals leave out ``tail``. Caches with a row for every token have it in a part of its own, "kv". InputError for a
    bad length or storage, or a model that is none.
    """
    row_each = isinstance(config_of(model), DenseConfig | LatentConfig)
    held = dict.fromkeys((*PARTS, KV_PART) if row_each else PARTS, 0)
    for term in terms(model, length, storage):
        held[term.part] += term.nbytes
    return held | {"total": sum(held.values())}


def kv_bytes_per_token(model: Model, storage: str = "released") -> dict[str, float]:
    """Growing part -> bytes each further token adds on average in a long context, and their "total".

    Window, tail and Engram state stop growing and are left out.
    """
    config = config_of(model)
    entry = entry_bytes(config, storage)
    grown: dict[str, float]
    if isinstance(config, HybridConfig):
        csa, hca = config.layer_kinds.count("csa"), config.layer_kinds.count("hca")
        key = index_key_bytes(config, storage)
        grown = {"compressed": entry * (csa / config.csa_ratio + hca / config.hca_ratio), "index": key * csa / config.csa_ratio}
    elif isinstance(config, SharedStreamConfig):
        rows = sum(1 / m for m in config.stream_ratios)
        grown = {"compressed": rows * entry, "index": rows * index_key_bytes(config, storage)}
    else:
        grown = {KV_PART: config.num_hidden_layers * entry}
        if isinstance(config, LatentConfig) and config.index_topk:
            grown["index"] = config.num_hidden_layers * index_key_bytes(config, storage)
    return grown | {"total": sum(grown.values())}


def decode_bytes(model: Model, length: int, storage: str = "released") -> dict[str, int]:
    """Part -> bytes of its cache that one decoded token must read in a context of ``length`` tokens, and their "total".

    Every index key is read (in V3.2 only once there are more tokens than are kept; in V4.1's reindexing layers those of the
    candidate pool), but of the entries only those the indexer keeps; windows, HCA entries and dense caches are read whole.
    The open block (``tail``), read once a block, is left out as in the published figures; so are weights and the rows
    of an Engram table. InputError as for ``kv_bytes``.
    """
    config = config_for(model, length)
    read = kv_bytes(model, length, storage)
    del read["total"]
    read["tail"] = 0
    read["engram"] = kv_bytes(model, max(0, length - 1), storage)["engram"]  # as it was left by the token before
    if not isinstance(config, DenseConfig):
        attended = _attended(config, length)
        for part in attended.keys() & {"compressed", KV_PART}:
            read[part] = attended[part] * entry_bytes(config, storage)
        read["index"] = _scored_keys(config, length) * index_key_bytes(config, storage)
    return read | {"total": sum(read.values())}


def decode_flops(model: Model, length: int, weighting: str = "plain") -> dict[str, float]:
    """ "projections", "core" (attention itself) and "indexer" -> FLOPs of one decoded token, and their "total".

    A multiply-add is 2 FLOPs. Projections are 2 × active parameters: as published for a released preset, counted from the
    shape for a configuration and for the baselines. "fp8-equivalent" counts BF16 work twice and FP4 half: the core twice, the
    FP4 indexer of V4 and V4.1 half, V3.2's FP8 indexer once, all of a BF16 dense model twice. This weighting is inferred: it
    matches both factors of the V4 report (reference/deepseek-v4.md, section 6). InputError for a bad length or weighting.
    """
    if weighting not in WEIGHTINGS:
        raise InputError(f"weighting must be one of {WEIGHTINGS}, got {weighting!r}")
    config = config_for(model, length)
    attended, heads = sum(_attended(config, length).values()), config.num_attention_heads
    if isinstance(config, LatentConfig):  # absorbed: scores over latent and rotary key, values over the latent
        per_row = 2 * heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
    else:
        per_row = 4 * heads * config.head_dim
    indexer = 0
    if not isinstance(config, DenseConfig):
        indexer = 2 * config.index_n_heads * config.index_head_dim * _scored_keys(config, length)
    preset = presets[model] if isinstance(model, str) else model
    active = preset.active_parameters if isinstance(preset, Preset) else None
    flops: dict[str, float] = {
        "projections": 2 * (active or active_parameters(config)),
        "core": per_row * attended,
        "indexer": indexer,
    }
    if weighting == "fp8-equivalent":
        flops["core"] *= 2
        flops["projections"] *= 2 if isinstance(config, DenseConfig) else 1
        flops["indexer"] *= 1 if isinstance(config, LatentConfig) else 0.5
    return flops | {"total": sum(flops.values())}


def _attended(config: ModelConfig, length: int) -> dict[str, int]:
    """Part -> rows that the one query of a decode step attends to, summed over the layers."""
    if isinstance(config, DenseConfig | LatentConfig):
        seen = min(length, config.index_topk or length)
        return {KV_PART: config.num_hidden_layers * seen}
    if isinstance(config, HybridConfig):
        csa, hca = config.layer_kinds.count("csa"), config.layer_kinds.count("hca")
        kept = csa * min(config.index_topk, length // config.csa_ratio) + hca * (length // config.hca_ratio)
    else:
        kept = sum(min(config.index_topk, length // m) for m in config.compress_ratios if m)
    return {"window": config.num_hidden_layers * min(length, config.sliding_window), "compressed": kept}


def _scored_keys(config: HybridConfig | SharedStreamConfig | LatentConfig, length: int) -> int:
    """Index keys that are scored for one query, summed over the layers that run an indexer."""
    if isinstance(config, HybridConfig):
        return config.layer_kinds.count("csa") * (length // config.csa_ratio)
    if isinstance(config, LatentConfig):
        return config.num_hidden_layers * length if 0 < config.index_topk < length else 0
    scored = 0
    for layer in config.index_source_layer_ids:
        entries, pool = length // config.compress_ratios[layer], config.candidate_pool(layer)
        scored += min(entries, pool) if pool else entries
    return scored


def dense_kv_bytes(config: ModelConfig, length: int, kv_heads: int, storage: str = "released") -> int:
    """Bytes a dense cache "of the same width" would hold: a key and a value per token, layer and KV head.

    It keeps this model's layer count, query heads and widths of a head's key and value, and shares the query heads among
    min(kv_heads, num_attention_heads) KV heads: 8 is GQA-8, num_attention_heads is MHA. "released" means BF16, the
    usual format of dense caches. Published baselines use heads of 128 instead of V4's 512, so their totals are smaller.
    """
    config_for(config, length)
    if isinstance(kv_heads, bool) or not isinstance(kv_heads, int) or kv_heads < 1:
        raise InputError(f"kv_heads must be a positive whole number, got {kv_heads!r}")
    value = VALUE_BYTES.get(_checked(storage), VALUE_BYTES["bf16"])
    if isinstance(config, LatentConfig):
        width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    else:
        width = 2 * config.head_dim
    return config.num_hidden_layers * length * min(kv_heads, config.num_attention_heads) * width * value


def formula(config: ModelConfig, length: int, storage: str = "released") -> list[str]:
    """Lines to read: what E and I stand for, then each product in symbols, in numbers, and its result in bytes."""
    lines = [units(config, storage)]
    lines += [f"{t.part}: {t.symbols} = {t.numbers} = {t.nbytes:,} B" for t in terms(config, length, storage)]
    return [*lines, f"total: {kv_bytes(config, length, storage)['total']:,} B"]


def units(config: ModelConfig, storage: str = "released") -> str:
    """One line saying where the bytes of an entry (E) and of an index key (I) come from."""
    said = [_entry_unit(config, storage)]
    if isinstance(config, SharedStreamConfig) and storage == "released":
        scales = _ceil(config.head_dim, STREAM_WINDOW_SCALE_BLOCK)
        said.insert(0, f"E_window = {config.head_dim} FP8 + {scales} scale bytes = {window_entry_bytes(config)} B")
    if not isinstance(config, DenseConfig) and config.index_topk:
        said.append(_key_unit(config, storage))
    return "; ".join(said)


def _entry_unit(config: ModelConfig, storage: str) -> str:
    entry, rope = entry_bytes(config, storage), config.qk_rope_head_dim
    if isinstance(config, DenseConfig):
        heads, dim = config.num_key_value_heads, config.head_dim
        value = entry // (2 * heads * dim)
        return f"keys and values of a token = 2 × H_kv × D × {value} B = 2 × {heads} × {dim} × {value} = {entry} B"
    latent = isinstance(config, LatentConfig)
    width = config.kv_lora_rank if isinstance(config, LatentConfig) else config.head_dim
    if storage in VALUE_BYTES:
        value, symbol, number = VALUE_BYTES[storage], "D", str(width)
        if latent:
            symbol, number = "(D_latent + R)", f"({width} + {rope})"
        return f"E = {symbol} × {value} B = {number} × {value} = {entry} B"
    if latent:
        return f"E = {width} FP8 + {4 * _ceil(width, LATENT_SCALE_BLOCK)} scale bytes + {rope} BF16 = {entry} B"
    if isinstance(config, SharedStreamConfig):
        return f"E = {width} FP4 + {_ceil(width, STREAM_SCALE_BLOCK)} scale bytes = {entry} B"
    scales = _ceil(width - rope, FP8_SCALE_BLOCK)
    return f"E = {width - rope} FP8 + {scales} scale bytes + {rope} BF16, padded = {entry} B"


def _key_unit(config: HybridConfig | SharedStreamConfig | LatentConfig, storage: str) -> str:
    key, index = index_key_bytes(config, storage), config.index_head_dim
    if storage in VALUE_BYTES:
        return f"I = D_index × {VALUE_BYTES[storage]} B = {index} × {VALUE_BYTES[storage]} = {key} B"
    if isinstance(config, LatentConfig):
        return f"I = {index} FP8 + {4 * _ceil(index, LATENT_SCALE_BLOCK)} scale bytes = {key} B"
    return f"I = {index} FP4 + {_ceil(index, FP4_SCALE_BLOCK)} scale bytes = {key} B"


def extrapolated(model: Model, length: int) -> bool:
    """Whether ``length`` tokens are more than the model was made for; InputError for a length it cannot have at all."""
    return length > config_for(model, length).max_position_embeddings


def length_limit(config: ModelConfig) -> int:
    """Tokens up to which bytes and FLOPs are counted.

    V4 and V4.1 end at ``max_position_embeddings``. A row for every token goes on, as the V4 report does when it compares V3.2
    at a million tokens; ``extrapolated`` says so.
    """
    return LENGTH_CAP if isinstance(config, DenseConfig | LatentConfig) else config.max_position_embeddings


def config_of(model: Model) -> ModelConfig:
    """The configuration behind a preset's name, a preset, or itself; InputError for anything else."""
    found = presets[model] if isinstance(model, str) else model
    config = found.config if isinstance(found, Preset) else found
    if not isinstance(config, get_args(ModelConfig)):
        raise InputError(f"expected a configuration such as model.config, a preset or its name, got {type(model).__name__}")
    return config


def config_for(model: Model, length: int) -> ModelConfig:
    """The model's configuration, once ``length`` is known to be one it can have."""
    config = config_of(model)
    limit = length_limit(config)
    if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= limit:
        raise InputError(f"length must be a whole number from 0 to {limit} tokens, got {length!r}")
    return config


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _checked(storage: str) -> str:
    if storage not in STORAGES:
        raise InputError(f"storage must be one of {STORAGES}, got {storage!r}")
    return storage
