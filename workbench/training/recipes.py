"""Recipes of the checkpoints that ship: shape, data, schedule and seed in one record, stored beside the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from workbench.config import (
    DenseConfig,
    EngramConfig,
    HybridConfig,
    LatentConfig,
    ModelConfig,
    RopeConfig,
    SharedStreamConfig,
)
from workbench.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """``steps`` optimiser steps on ``batch`` sequences of ``length`` tokens.

    With a ``hit_target`` layers that select attend to every visible entry at first, while their indexers learn to imitate that
    attention, and go over to the indexers' top-k when three evaluations in a row find that share of the needles among them:
    sparse selection from the start, or too early, stalls. Without one the phase is sparse throughout. ``recall_target`` asks
    for that share of answers as well: where an entry is a token, an indexer that keeps every value finds the needle too, long
    before it can tell one key from another.
    """

    steps: int
    length: int
    batch: int
    hit_target: float | None = None
    recall_target: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    name: str
    seed: int
    phases: tuple[Phase, ...]
    family: Literal["v4", "v41", "mla-dsa", "gqa"] = "v4"
    start_from: str | None = None  # a shipped checkpoint whose weights and tokenizer training starts from; else the seed
    engram: bool = False
    vocab_size: int = 1536
    plain_share: float = 0.25  # of the sequences of a batch, text without needles
    short_share: float = 0.5  # of the needles in the other streams, said in short
    once_share: float = 0.25  # and streams that ask for each key once, over all distances
    tally_share: float = 0.0  # and sequences that ask for the most frequent of many values (training/tally.py)
    index_topk: int = 8  # of the "v4" family
    held_steps: int = 0  # at the start, in which the first layer's attention keeps its head start (training/head_start.py)
    muon_lr: float = 1e-2
    adam_lr: float = 5e-3
    table_lr: float = 1e-2
    weight_decay: float = 0.05
    warmup_steps: int = 40
    final_lr: float = 0.05  # share of the peak
    clip: float = 1.0
    balance: float = 1e-3  # step of the router biases, aux-loss-free balancing

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def config(self, compressed_vocab_size: int) -> ModelConfig:
        """The tiny shape of the family; all have the same width, depth, heads and, where they have experts, experts."""
        if self.family == "gqa":
            return _grouped(self.vocab_size)
        if self.family == "mla-dsa":
            return _latent(self.vocab_size)
        if self.family == "v41":
            return _shared_stream(self.vocab_size, compressed_vocab_size)
        return self._hybrid(compressed_vocab_size)

    def _hybrid(self, compressed_vocab_size: int) -> HybridConfig:
        """V4: small window, ratios and top-k, so that 256 tokens already need selection; ratios as released."""
        engram = EngramConfig(
            layer_ids=(1,), vocab_size=8192, compressed_vocab_size=compressed_vocab_size, n_heads=4, head_dim=16
        )
        return HybridConfig(
            vocab_size=self.vocab_size,
            hidden_size=96,
            num_attention_heads=4,
            head_dim=64,
            qk_rope_head_dim=8,
            q_lora_rank=64,
            o_groups=2,
            o_lora_rank=64,
            layer_kinds=("window", "csa", "hca", "csa"),
            mlp_kinds=("hash", "score", "score", "score"),
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            index_n_heads=4,
            index_head_dim=32,
            index_topk=self.index_topk,
            csa_ratio=4,
            hca_ratio=128,
            sliding_window=16,
            compress_rope=RopeConfig(theta=160000.0, factor=16.0, original_max_position_embeddings=8192),
            max_position_embeddings=131072,
            engram=engram if self.engram else None,
        )


def _grouped(vocab_size: int) -> DenseConfig:
    return DenseConfig(
        vocab_size=vocab_size,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=256,
        rope=RopeConfig(theta=1e6),  # half of the channels turn by less than a radian in 256 tokens and can compare words
        max_position_embeddings=131072,
    )


def _shared_stream(vocab_size: int, compressed_vocab_size: int) -> SharedStreamConfig:
    """V4.1 with every mode: window, Full at ratio 2, then Full with a candidate pool, Reindex and Reuse at ratio 1.

    Its Engram tables are half as large as V4's, because 4-grams make three of them a head.
    """
    return SharedStreamConfig(
        vocab_size=vocab_size,
        hidden_size=96,
        num_attention_heads=4,
        head_dim=64,
        qk_rope_head_dim=16,
        q_lora_rank=64,
        o_groups=2,
        o_lora_rank=64,
        compress_ratios=(0, 2, 1, 1, 1),
        kv_source_layer_ids=(1, 2),
        index_source_layer_ids=(1, 2, 3),
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        index_n_heads=4,
        index_head_dim=32,
        index_topk=16,
        candidate_source_layer_id=2,
        candidate_topk_blocks=24,
        candidate_block_size=4,
        sliding_window=16,
        compress_rope=RopeConfig(theta=160000.0, factor=16.0, original_max_position_embeddings=8192),
        max_position_embeddings=131072,
        engram=EngramConfig(
            layer_ids=(1,),
            vocab_size=4096,
            compressed_vocab_size=compressed_vocab_size,
            max_ngram_size=4,
            n_heads=4,
            head_dim=16,
            conv_kernel_size=0,
        ),
    )


def _latent(vocab_size: int) -> LatentConfig:
    """V3.2: rows a little wider than the tiny V4's entries, as in the releases; 32 tokens are what 8 entries stand for."""
    return LatentConfig(
        vocab_size=vocab_size,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        intermediate_size=256,
        index_n_heads=4,
        index_head_dim=64,
        index_topk=32,
        first_k_dense_replace=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.5,
        rope=RopeConfig(theta=10000.0, factor=16.0, original_max_position_embeddings=8192),
        max_position_embeddings=131072,
    )


_TINY_V4 = Recipe(
    name="tiny-v4",
    seed=1,
    phases=(
        Phase(steps=1300, length=256, batch=8, hit_target=0.98),
        Phase(steps=150, length=1024, batch=2),
        Phase(steps=25, length=4096, batch=1),
    ),
)
# Goes on from a model that finds one record, so that it only has to learn to weigh many; keeps more entries, as it needs them.
_TALLY = replace(
    _TINY_V4,
    name="tiny-v4-tally",
    start_from="tiny-v4",
    phases=(
        Phase(steps=350, length=512, batch=8, hit_target=0.98),
        Phase(steps=80, length=1024, batch=4),
        Phase(steps=10, length=4096, batch=1),
    ),
    short_share=0.3,
    once_share=0.125,
    tally_share=0.625,
    index_topk=16,
    muon_lr=4e-3,
    adam_lr=2e-3,
    warmup_steps=20,
)
# Dense attention has no indexer to wait for; the same steps on the same data all the same.
_DENSE_PHASES = tuple(replace(phase, hit_target=None) for phase in _TINY_V4.phases)
_RECALLING_PHASES = (replace(_TINY_V4.phases[0], recall_target=0.9), *_TINY_V4.phases[1:])
RECIPES = {
    recipe.name: recipe
    for recipe in (
        _TINY_V4,
        replace(_TINY_V4, name="tiny-v4-engram", engram=True),
        replace(_TINY_V4, name="tiny-v41", family="v41", engram=True, phases=_RECALLING_PHASES, held_steps=400),
        replace(_TINY_V4, name="tiny-mla-dsa", family="mla-dsa", phases=_RECALLING_PHASES, held_steps=400),
        replace(_TINY_V4, name="tiny-gqa", family="gqa", phases=_DENSE_PHASES, held_steps=400),
        _TALLY,
    )
}


def recipe_named(name: str) -> Recipe:
    if name not in RECIPES:
        raise InputError(f"recipe {name!r} is unknown; choose one of {sorted(RECIPES)}")
    return RECIPES[name]
