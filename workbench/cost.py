"""Closed-form bytes and FLOPs of one sequence, and whether it fits: arithmetic only, no torch.

Sources: reference/deepseek-v4.md, sections 4 to 6, and for V4.1 reference/deepseek-v41.md, section 9. L tokens, W window,
D head dim, R rotary dims, I bytes of an index key, E bytes of an entry, m and m' the CSA and HCA block sizes, k entries
kept. Three storages: "fp32", "bf16", and "released", the packed mixed format of the published model.

Everywhere a model is a HybridConfig, a Preset or a preset's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from workbench.config import HybridConfig
from workbench.errors import InputError
from workbench.presets import (
    DenseShape,
    Device,
    LatentShape,
    Preset,
    Shape,
    SharedStreamShape,
    active_parameters,
    devices,
    presets,
)

Model = HybridConfig | Preset | str

STORAGES = ("fp32", "bf16", "released")
PARTS = ("window", "compressed", "index", "tail", "engram")
KV_PART = "kv"  # one row for every token: the keys and values of MHA and GQA, the latents of MLA
WEIGHTINGS = ("plain", "fp8-equivalent")
VALUE_BYTES = {"fp32": 4, "bf16": 2}
FP32_BYTES = 4  # the open block is summed in float32 whatever the entries are stored in
TOKEN_ID_BYTES = 8  # int64
FP8_SCALE_BLOCK, FP4_SCALE_BLOCK, ENTRY_ALIGNMENT = 64, 32, 8
LATENT_SCALE_BLOCK = 128  # V3.2: a float32 scale for each 128 FP8 values of a latent, and one for an index key
STREAM_SCALE_BLOCK, STREAM_WINDOW_SCALE_BLOCK = 16, 32  # V4.1: FP4 entries of the shared streams, FP8 window entries
FORMULA = "modelled (formula)"
LENGTH_CAP = 2**40  # of shapes that have no limit of their own


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


def entry_bytes(config: HybridConfig, storage: str = "released") -> int:
    """Bytes of one window or compressed entry, which is key and value at once.

    "released": D - R values in FP8, one scale byte for each 64 of them, R values in BF16, padded to a multiple of 8
    (584 for 512 / 64).
    """
    if _checked(storage) != "released":
        return config.head_dim * VALUE_BYTES[storage]
    plain = config.head_dim - config.qk_rope_head_dim
    packed = plain + _ceil(plain, FP8_SCALE_BLOCK) + 2 * config.qk_rope_head_dim
    return _ceil(packed, ENTRY_ALIGNMENT) * ENTRY_ALIGNMENT


def index_key_bytes(config: HybridConfig, storage: str = "released") -> int:
    """Bytes of one lightning-indexer key; "released": FP4, two values a byte, and a scale byte for each 32 (68 for 128)."""
    if _checked(storage) != "released":
        return config.index_head_dim * VALUE_BYTES[storage]
    return _ceil(config.index_head_dim, 2) + _ceil(config.index_head_dim, FP4_SCALE_BLOCK)


def terms(model: Model, length: int, storage: str = "released") -> tuple[Term, ...]:
    """The products whose sum is what one sequence of ``length`` tokens holds; parts the model lacks are left out.

    Raises InputError for a length that is no whole number from 0 to the model's limit, or an unknown storage.
    """
    shape = _shape_for(model, length)
    _checked(storage)
    if isinstance(shape, HybridConfig):
        return _hybrid_terms(shape, length, storage)
    layers = shape.num_hidden_layers
    if isinstance(shape, DenseShape):
        row = _row_bytes(shape, storage)
        return (Term(KV_PART, "layers × L × 2 × H_kv × D × value bytes", (layers, length, row)),)
    if isinstance(shape, LatentShape):
        row, key = _row_bytes(shape, storage), _key_bytes(shape, storage)
        return Term(KV_PART, "layers × L × E", (layers, length, row)), Term("index", "layers × L × I", (layers, length, key))
    entries, width = shape.stream_ratios, shape.head_dim
    row, key, closed = _row_bytes(shape, storage), _key_bytes(shape, storage), sum(length // m for m in entries)
    started = sum(length % m for m in entries)
    return (
        Term(
            "window",
            "layers × min(L, W) × E_window",
            (layers, min(length, shape.sliding_window), _window_bytes(shape, storage)),
        ),
        Term("compressed", "Σ ⌊L/m⌋ over the shared streams × E", (closed, row)),
        Term("index", "Σ ⌊L/m⌋ over the shared streams × I", (closed, key)),
        Term("tail", "Σ (L mod m) over the streams × 2·D × 4 B", (started, 2, width, FP32_BYTES)),
        Term("engram", "min(L, N − 1) ids × 8 B", (min(length, shape.engram_max_ngram_size - 1), TOKEN_ID_BYTES)),
    )


def _hybrid_terms(config: HybridConfig, length: int, storage: str) -> tuple[Term, ...]:
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
    if config.engram:
        layers, state = len(config.engram.layer_ids), min(length, config.engram.conv_state_length)
        look_back = min(length, config.engram.max_ngram_size - 1)
        stream = config.hc_mult * config.hidden_size
        found += [
            Term("engram", "min(L, N − 1) ids × 8 B", (look_back, TOKEN_ID_BYTES)),
            Term("engram", "n_engram × min(L, conv state) × streams·d × 4 B", (layers, state, stream, FP32_BYTES)),
        ]
    return tuple(found)


def kv_bytes(model: Model, length: int, storage: str = "released") -> dict[str, int]:
    """Part -> bytes one sequence of ``length`` tokens holds, and their "total"; the same numbers a live cache counts.

    Published totals leave out ``tail``. Caches with a row for every token have it in a part of its own, "kv". InputError for a
    bad length or storage, or a model that is none.
    """
    held = _no_bytes(model)
    for term in terms(model, length, storage):
        held[term.part] += term.nbytes
    return held | {"total": sum(held.values())}


def kv_bytes_per_token(model: Model, storage: str = "released") -> dict[str, float]:
    """Growing part -> bytes each further token adds on average in a long context, and their "total".

    Window, tail and Engram state stop growing and are left out.
    """
    shape = _shape(model)
    _checked(storage)
    grown: dict[str, float]
    if isinstance(shape, HybridConfig):
        csa, hca = shape.layer_kinds.count("csa"), shape.layer_kinds.count("hca")
        entry, key = entry_bytes(shape, storage), index_key_bytes(shape, storage)
        grown = {"compressed": entry * (csa / shape.csa_ratio + hca / shape.hca_ratio), "index": key * csa / shape.csa_ratio}
    elif isinstance(shape, SharedStreamShape):
        rows = sum(1 / m for m in shape.stream_ratios)
        grown = {"compressed": rows * _row_bytes(shape, storage), "index": rows * _key_bytes(shape, storage)}
    else:
        grown = {KV_PART: shape.num_hidden_layers * _row_bytes(shape, storage)}
        if isinstance(shape, LatentShape):
            grown["index"] = shape.num_hidden_layers * _key_bytes(shape, storage)
    return grown | {"total": sum(grown.values())}


def decode_bytes(model: Model, length: int, storage: str = "released") -> dict[str, int]:
    """Part -> bytes of its cache that one decoded token must read in a context of ``length`` tokens, and their "total".

    Every index key is read, but of the entries only those the indexer keeps; windows, HCA entries and dense caches are read
    whole. The open block (``tail``), read once a block, is left out as in the published figures; so are weights and the rows
    of an Engram table. InputError as for ``kv_bytes``.
    """
    shape = _shape_for(model, length)
    read = kv_bytes(model, length, storage)
    del read["total"]
    read["tail"] = 0
    read["engram"] = kv_bytes(model, max(0, length - 1), storage)["engram"]  # as it was left by the token before
    if isinstance(shape, HybridConfig):
        read["compressed"] = _attended(shape, length)["compressed"] * entry_bytes(shape, storage)
    elif isinstance(shape, LatentShape):
        read[KV_PART] = _attended(shape, length)[KV_PART] * _row_bytes(shape, storage)
    elif isinstance(shape, SharedStreamShape):
        read["compressed"] = _attended(shape, length)["compressed"] * _row_bytes(shape, storage)
        read["index"] = _scored_keys(shape, length) * _key_bytes(shape, storage)
    return read | {"total": sum(read.values())}


def decode_flops(model: Model, length: int, weighting: str = "plain") -> dict[str, float]:
    """ "projections", "core" (attention itself) and "indexer" -> FLOPs of one decoded token, and their "total".

    A multiply-add is 2 FLOPs. Projections are 2 × active parameters: as published for a released preset, counted from the
    shape for a HybridConfig, and for the baselines only those of attention. "fp8-equivalent" counts BF16 work twice and FP4
    half: the core twice, the FP4 indexer of V4 and V4.1 half, V3.2's FP8 indexer once, all of a BF16 baseline twice. This
    weighting is inferred: it matches both factors of the V4 report (reference/deepseek-v4.md, section 6). InputError for a
    bad length or weighting.
    """
    if weighting not in WEIGHTINGS:
        raise InputError(f"weighting must be one of {WEIGHTINGS}, got {weighting!r}")
    shape = _shape_for(model, length)
    attended, heads = sum(_attended(shape, length).values()), shape.num_attention_heads
    scored, indexer, per_row = _scored_keys(shape, length), 0, 0
    if isinstance(shape, LatentShape):  # absorbed: scores over latent and rotary key, values over the latent
        per_row = 2 * heads * (2 * shape.kv_lora_rank + shape.qk_rope_head_dim)
    else:
        per_row = 4 * heads * shape.head_dim
    if not isinstance(shape, DenseShape):
        indexer = 2 * shape.index_n_heads * shape.index_head_dim * scored
    flops: dict[str, float] = {"projections": 2 * _active(model, shape), "core": per_row * attended, "indexer": indexer}
    if weighting == "fp8-equivalent":
        flops["core"] *= 2
        flops["projections"] *= 2 if isinstance(shape, DenseShape) else 1
        flops["indexer"] *= 1 if isinstance(shape, LatentShape) else 0.5
    return flops | {"total": sum(flops.values())}


def _active(model: Model, shape: Shape) -> float:
    preset = presets[model] if isinstance(model, str) else model
    if isinstance(preset, Preset) and preset.active_parameters:
        return preset.active_parameters
    if isinstance(shape, HybridConfig):
        return active_parameters(shape)
    assert isinstance(shape, DenseShape)  # the other shapes come only with a preset
    query_and_output = 2 * shape.num_attention_heads * shape.head_dim
    return shape.num_hidden_layers * shape.hidden_size * (query_and_output + 2 * shape.num_key_value_heads * shape.head_dim)


def _attended(shape: Shape, length: int) -> dict[str, int]:
    """Part -> rows that the one query of a decode step attends to, summed over the layers."""
    if isinstance(shape, HybridConfig):
        csa, hca = shape.layer_kinds.count("csa"), shape.layer_kinds.count("hca")
        kept = csa * min(shape.index_topk, length // shape.csa_ratio) + hca * (length // shape.hca_ratio)
        return {"window": shape.num_hidden_layers * min(length, shape.sliding_window), "compressed": kept}
    if isinstance(shape, SharedStreamShape):
        kept = sum(min(shape.index_topk, length // m) for m in shape.compress_ratios if m)
        return {"window": shape.num_hidden_layers * min(length, shape.sliding_window), "compressed": kept}
    seen = min(length, shape.index_topk) if isinstance(shape, LatentShape) else length
    return {KV_PART: shape.num_hidden_layers * seen}


def _scored_keys(shape: Shape, length: int) -> int:
    """Index keys that are scored for one query, summed over the layers that run an indexer."""
    if isinstance(shape, HybridConfig):
        return shape.layer_kinds.count("csa") * (length // shape.csa_ratio)
    if isinstance(shape, SharedStreamShape):  # reindexing layers choose inside the candidate pool
        pool = shape.candidate_topk_blocks * shape.candidate_block_size
        return sum(length // m for m in shape.stream_ratios) + shape.layer_kinds.count("csa2-reindex") * min(length, pool)
    return shape.num_hidden_layers * length if isinstance(shape, LatentShape) else 0


def _row_bytes(shape: DenseShape | LatentShape | SharedStreamShape, storage: str) -> int:
    """Bytes of a token's keys and values in one dense layer, of one latent, or of one entry of a shared stream."""
    value = VALUE_BYTES.get(storage)
    if isinstance(shape, DenseShape):
        return 2 * shape.num_key_value_heads * shape.head_dim * (value or VALUE_BYTES["bf16"])
    if isinstance(shape, LatentShape):
        latent, rope = shape.kv_lora_rank, shape.qk_rope_head_dim
        return (latent + rope) * value if value else latent + 4 * _ceil(latent, LATENT_SCALE_BLOCK) + 2 * rope
    width = shape.head_dim
    return width * value if value else _ceil(width, 2) + _ceil(width, STREAM_SCALE_BLOCK)


def _window_bytes(shape: SharedStreamShape, storage: str) -> int:
    value, width = VALUE_BYTES.get(storage), shape.head_dim
    return width * value if value else width + _ceil(width, STREAM_WINDOW_SCALE_BLOCK)


def _key_bytes(shape: LatentShape | SharedStreamShape, storage: str) -> int:
    value, width = VALUE_BYTES.get(storage), shape.index_head_dim
    if value:
        return width * value
    if isinstance(shape, LatentShape):
        return width + 4 * _ceil(width, LATENT_SCALE_BLOCK)
    return _ceil(width, 2) + _ceil(width, FP4_SCALE_BLOCK)


def dense_kv_bytes(config: HybridConfig, length: int, kv_heads: int, storage: str = "released") -> int:
    """Bytes a dense cache "of the same width" would hold: a key and a value per token, layer and KV head.

    It keeps this model's layer count, query heads and head_dim, and shares the query heads among
    min(kv_heads, num_attention_heads) KV heads: 8 is GQA-8, num_attention_heads is MHA. "released" means BF16, the
    usual format of dense caches. Published baselines use heads of 128 instead of 512, so their totals are smaller.
    """
    _shape_for(config, length)
    if isinstance(kv_heads, bool) or not isinstance(kv_heads, int) or kv_heads < 1:
        raise InputError(f"kv_heads must be a positive whole number, got {kv_heads!r}")
    value = VALUE_BYTES.get(_checked(storage), VALUE_BYTES["bf16"])
    return config.num_hidden_layers * length * 2 * min(kv_heads, config.num_attention_heads) * config.head_dim * value


def formula(config: HybridConfig, length: int, storage: str = "released") -> list[str]:
    """Lines to read: what E and I stand for, then each product in symbols, in numbers, and its result in bytes."""
    lines = [units(config, storage)]
    lines += [f"{t.part}: {t.symbols} = {t.numbers} = {t.nbytes:,} B" for t in terms(config, length, storage)]
    return [*lines, f"total: {kv_bytes(config, length, storage)['total']:,} B"]


def units(config: HybridConfig, storage: str = "released") -> str:
    """One line saying where the bytes of an entry (E) and of an index key (I) come from."""
    entry, key = entry_bytes(config, storage), index_key_bytes(config, storage)
    dim, rope, index = config.head_dim, config.qk_rope_head_dim, config.index_head_dim
    if storage == "released":
        scales = f"{_ceil(dim - rope, FP8_SCALE_BLOCK)} scale bytes"
        return (
            f"E = {dim - rope} FP8 + {scales} + {rope} BF16, padded = {entry} B;"
            f" I = {index} FP4 + {_ceil(index, FP4_SCALE_BLOCK)} scale bytes = {key} B"
        )
    value = VALUE_BYTES[storage]
    return f"E = D × {value} B = {dim} × {value} = {entry} B; I = D_index × {value} B = {index} × {value} = {key} B"


@dataclass(frozen=True, slots=True)
class Fit:
    """A decode step of ``batch`` sequences on ``cards`` equal devices, modelled. Bytes and seconds are of one card.

    ``weight_bytes`` is None where the model's weights are unknown; then only the cache is counted. ``bound`` is what takes
    longer, reading memory or computing: "bandwidth" or "compute"; times assume peak rates and no communication.
    """

    device: Device
    cards: int
    batch: int
    storage: Literal["released", "bf16"]
    kv_bytes: float
    weight_bytes: float | None
    longest_context: int  # tokens, up to the model's limit; 0 if not even the weights fit
    at_limit: bool  # the model's limit, not the memory, ends the context
    read_s: float
    compute_s: float

    @property
    def fits(self) -> bool:
        return self.kv_bytes + (self.weight_bytes or 0) <= self.device.memory_bytes

    @property
    def bound(self) -> Literal["bandwidth", "compute"]:
        return "bandwidth" if self.read_s >= self.compute_s else "compute"


def fit(preset: Preset | str, length: int, device: Device | str, *, cards: int = 1, batch: int = 1) -> Fit:
    """Does the model with ``batch`` sequences of ``length`` tokens fit, how long could they be, and what bounds a step?

    Weights are split evenly over the cards; Engram tables stay in host memory. A sequence's cache lies whole on one card,
    because a single KV head (or latent) does not split under tensor parallelism; several KV heads do. A device that does not
    read the released format keeps the cache in BF16. InputError for unknown names, a bad length, or cards and batch below 1.
    """
    preset = presets[preset] if isinstance(preset, str) else preset
    device = devices[device] if isinstance(device, str) else device
    shape = _shape_for(preset, length)
    _check_counts(cards, batch)
    storage: Literal["released", "bf16"] = "released" if preset.kv_format in device.kv_formats else "bf16"
    pieces = min(cards, shape.num_key_value_heads) if isinstance(shape, DenseShape) else 1
    share = _ceil(batch * pieces, cards) / pieces  # sequences' worth of cache on the fullest card
    weights = preset.weights
    held = weights.device_bytes / cards if weights else 0.0
    room = device.memory_bytes - held

    def needed(tokens: int, tail: bool = True) -> float:
        by_part = kv_bytes(preset, tokens, storage)
        return share * (by_part["total"] - (0 if tail else by_part["tail"]))

    low, high = 0, length_limit(shape)
    while low < high:  # what a cache holds beside its tail only grows
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle, tail=False) <= room else (low, middle - 1)
    while low and needed(low) > room:  # the tail rises and falls with the block; a few thousand tokens at most
        low -= 1
    read = (weights.bytes_read(batch) / cards if weights else 0.0) + share * decode_bytes(preset, length, storage)["total"]
    fast = "fp8" in device.tflop_per_s
    flops = decode_flops(preset, length, "fp8-equivalent" if fast else "plain")["total"] * batch / cards
    return Fit(
        device=device,
        cards=cards,
        batch=batch,
        storage=storage,
        kv_bytes=needed(length),
        weight_bytes=held if weights else None,
        longest_context=low,
        at_limit=low == length_limit(shape),
        read_s=read / device.bandwidth_bytes_per_s,
        compute_s=flops / (device.tflop_per_s["fp8" if fast else "bf16"] * 1e12),
    )


def report(
    preset: Preset | str, length: int, on: Sequence[Device | str] = (), *, cards: int = 1, batch: int = 1
) -> dict[str, Any]:
    """All that is counted of a preset at one length, and its fit on each device ``on``, as plain values for JSON.

    Bytes and FLOPs are of one sequence, a device's figures of one card with its share of ``batch`` sequences. Every block
    says its ``origin``. InputError as for ``fit``.
    """
    preset = presets[preset] if isinstance(preset, str) else preset
    _check_counts(cards, batch)
    weights = preset.weights
    found: dict[str, Any] = {
        "preset": preset.name,
        "title": preset.title,
        "preset_kv_format": preset.kv_format,
        "length": length,
        "beyond_trained_length": preset.trained_length is not None and length > preset.trained_length,
        "cards": cards,
        "batch": batch,
        "kv_bytes": {"origin": FORMULA, "storage": "released", **kv_bytes(preset, length)},
        "kv_terms": [f"{t.symbols} = {t.numbers} = {t.nbytes:,} B" for t in terms(preset, length)],
        "kv_bytes_per_token": {"origin": FORMULA, **kv_bytes_per_token(preset)},
        "decode_bytes": {"origin": FORMULA, **decode_bytes(preset, length)},
        "decode_flops": {"origin": FORMULA, **decode_flops(preset, length)},
        "decode_flops_fp8_equivalent": {"origin": FORMULA, **decode_flops(preset, length, "fp8-equivalent")},
        "weights": None,
        "devices": [],
    }
    if weights:
        found["weights"] = {
            "origin": "published" if weights.origin == "published" else FORMULA,
            "source": preset.source_of("weights").text,
            "device_bytes": weights.device_bytes,
            "host_bytes": weights.host_bytes,
            "read_bytes_per_step": weights.bytes_read(batch),
        }
    for device in on:
        result = fit(preset, length, device, cards=cards, batch=batch)
        found["devices"].append(
            {
                "device": result.device.name,
                "title": result.device.title,
                "origin": FORMULA,
                "certainty": result.device.source.certainty,
                "source": result.device.source.text,
                "note": result.device.note,
                "storage": result.storage,
                "memory_bytes": result.device.memory_bytes,
                "kv_bytes_per_card": result.kv_bytes,
                "weight_bytes_per_card": result.weight_bytes,
                "fits": result.fits,
                "longest_context": result.longest_context,
                "longest_context_is_the_limit": result.at_limit,
                "read_s": result.read_s,
                "compute_s": result.compute_s,
                "bound": result.bound,
            }
        )
    return found


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _checked(storage: str) -> str:
    if storage not in STORAGES:
        raise InputError(f"storage must be one of {STORAGES}, got {storage!r}")
    return storage


def _check_counts(cards: int, batch: int) -> None:
    for name, number in (("cards", cards), ("batch", batch)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise InputError(f"{name} must be a whole number of 1 or more, got {number!r}")


def _no_bytes(model: Model) -> dict[str, int]:
    return dict.fromkeys((*PARTS, KV_PART) if isinstance(_shape(model), DenseShape | LatentShape) else PARTS, 0)


def _shape(model: Model) -> Shape:
    if isinstance(model, str):
        return presets[model].shape
    if isinstance(model, Preset):
        return model.shape
    if not isinstance(model, HybridConfig):
        raise InputError(f"expected a HybridConfig such as model.config, a preset or its name, got {type(model).__name__}")
    return model


def _shape_for(model: Model, length: int) -> Shape:
    """The model's shape, once ``length`` is known to be one it can have."""
    shape = _shape(model)
    limit = length_limit(shape)
    if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= limit:
        raise InputError(f"length must be a whole number from 0 to {limit} tokens, got {length!r}")
    return shape


def length_limit(shape: Shape) -> int:
    return shape.max_position_embeddings if isinstance(shape, HybridConfig) else shape.max_length or LENGTH_CAP
