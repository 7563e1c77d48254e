"""Closed-form bytes of one sequence's KV cache: arithmetic only, no torch (reference/deepseek-v4.md, sections 4 and 5).

L tokens, W window, D head dim, R rotary dims, I bytes of an index key, E bytes of an entry, m and m' the CSA and HCA
block sizes. Three storages: "fp32", "bf16", and "released", the packed mixed format of the published model.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from workbench.config import ModelConfig
from workbench.errors import InputError

STORAGES = ("fp32", "bf16", "released")
PARTS = ("window", "compressed", "index", "tail", "engram")
VALUE_BYTES = {"fp32": 4, "bf16": 2}
FP32_BYTES = 4  # the open block is summed in float32 whatever the entries are stored in
TOKEN_ID_BYTES = 8  # int64
FP8_SCALE_BLOCK, FP4_SCALE_BLOCK, ENTRY_ALIGNMENT = 64, 32, 8


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
    """Bytes of one window or compressed entry, which is key and value at once.

    "released": D - R values in FP8, one scale byte for each 64 of them, R values in BF16, padded to a multiple of 8
    (584 for 512 / 64).
    """
    if _checked(storage) != "released":
        return config.head_dim * VALUE_BYTES[storage]
    plain = config.head_dim - config.qk_rope_head_dim
    packed = plain + _ceil(plain, FP8_SCALE_BLOCK) + 2 * config.qk_rope_head_dim
    return _ceil(packed, ENTRY_ALIGNMENT) * ENTRY_ALIGNMENT


def index_key_bytes(config: ModelConfig, storage: str = "released") -> int:
    """Bytes of one lightning-indexer key; "released": FP4, two values a byte, and a scale byte for each 32 (68 for 128)."""
    if _checked(storage) != "released":
        return config.index_head_dim * VALUE_BYTES[storage]
    return _ceil(config.index_head_dim, 2) + _ceil(config.index_head_dim, FP4_SCALE_BLOCK)


def terms(config: ModelConfig, length: int, storage: str = "released") -> tuple[Term, ...]:
    """The products whose sum is what one sequence of ``length`` tokens holds; parts the model lacks are left out.

    Raises InputError for a length that is no whole number from 0 to the model's limit, or an unknown storage.
    """
    _check(config, length)
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


def kv_bytes(config: ModelConfig, length: int, storage: str = "released") -> dict[str, int]:
    """Part -> bytes one sequence of ``length`` tokens holds, and their "total"; the same numbers a live cache counts.

    Published totals leave out ``tail``. InputError for a bad length or storage.
    """
    held = dict.fromkeys(PARTS, 0)
    for term in terms(config, length, storage):
        held[term.part] += term.nbytes
    return held | {"total": sum(held.values())}


def kv_bytes_per_token(config: ModelConfig, storage: str = "released") -> dict[str, float]:
    """Growing part -> bytes each further token adds on average in a long context, and their "total".

    Window, tail and Engram state stop growing and are left out.
    """
    csa, hca = config.layer_kinds.count("csa"), config.layer_kinds.count("hca")
    entry, key = entry_bytes(config, storage), index_key_bytes(config, storage)
    grown = {"compressed": entry * (csa / config.csa_ratio + hca / config.hca_ratio), "index": key * csa / config.csa_ratio}
    return grown | {"total": sum(grown.values())}


def dense_kv_bytes(config: ModelConfig, length: int, kv_heads: int, storage: str = "released") -> int:
    """Bytes a dense cache "of the same width" would hold: a key and a value per token, layer and KV head.

    It keeps this model's layer count, query heads and head_dim, and shares the query heads among
    min(kv_heads, num_attention_heads) KV heads: 8 is GQA-8, num_attention_heads is MHA. "released" means BF16, the
    usual format of dense caches. Published baselines use heads of 128 instead of 512, so their totals are smaller.
    """
    _check(config, length)
    if isinstance(kv_heads, bool) or not isinstance(kv_heads, int) or kv_heads < 1:
        raise InputError(f"kv_heads must be a positive whole number, got {kv_heads!r}")
    value = VALUE_BYTES.get(_checked(storage), VALUE_BYTES["bf16"])
    return config.num_hidden_layers * length * 2 * min(kv_heads, config.num_attention_heads) * config.head_dim * value


def formula(config: ModelConfig, length: int, storage: str = "released") -> list[str]:
    """Lines to read: what E and I stand for, then each product in symbols, in numbers, and its result in bytes."""
    lines = [units(config, storage)]
    lines += [f"{t.part}: {t.symbols} = {t.numbers} = {t.nbytes:,} B" for t in terms(config, length, storage)]
    return [*lines, f"total: {kv_bytes(config, length, storage)['total']:,} B"]


def units(config: ModelConfig, storage: str = "released") -> str:
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


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _checked(storage: str) -> str:
    if storage not in STORAGES:
        raise InputError(f"storage must be one of {STORAGES}, got {storage!r}")
    return storage


def _check(config: ModelConfig, length: int) -> None:
    if not isinstance(config, ModelConfig):
        raise InputError(f"expected a ModelConfig such as model.config, got {type(config).__name__}")
    if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= config.max_position_embeddings:
        raise InputError(f"length must be a whole number from 0 to {config.max_position_embeddings} tokens, got {length!r}")
