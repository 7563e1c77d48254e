"""Recipes of the checkpoints that ship: shape, data, schedule and seed in one record, stored beside the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from workbench.config import EngramConfig, HybridConfig, ModelConfig, RopeConfig, SharedStreamConfig
from workbench.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """``steps`` optimiser steps on ``batch`` sequences of ``length`` tokens.

    With a ``hit_target`` CSA attends to every visible entry at first, while its indexer learns to imitate that attention, and
    goes over to the indexer's top-k when three evaluations in a row find that share of the needles among them: sparse
    selection from the start, or too early, stalls. Without one the phase is sparse throughout.
    """

    steps: int
    length: int
    batch: int
    hit_target: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    name: str
    seed: int
    phases: tuple[Phase, ...]
    family: Literal["deepseek_v4", "deepseek_v41"] = "deepseek_v4"
    engram: bool = False
    vocab_size: int = 1536
    plain_share: float = 0.25  # of the sequences of a batch, text without needles
    short_share: float = 0.5  # of the needles in the other streams, said in short
    once_share: float = 0.25  # and streams that ask for each key once, over all distances
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
        """The tiny shape: small window, ratios and top-k, so that 256 tokens already need selection; ratios as released."""
        shape = _tiny_v41 if self.family == "deepseek_v41" else _tiny_v4
        return shape(self, compressed_vocab_size)


_ROPE = RopeConfig(theta=160000.0, factor=16.0, original_max_position_embeddings=8192)
_BACKBONE: dict[str, Any] = {
    "hidden_size": 96,
    "num_attention_heads": 4,
    "head_dim": 64,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 64,
    "o_groups": 2,
    "o_lora_rank": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "sliding_window": 16,
    "compress_rope": _ROPE,
    "max_position_embeddings": 131072,
}


def _tiny_v4(recipe: Recipe, compressed_vocab_size: int) -> HybridConfig:
    engram = EngramConfig(layer_ids=(1,), vocab_size=8192, compressed_vocab_size=compressed_vocab_size, n_heads=4, head_dim=16)
    return HybridConfig(
        **_BACKBONE,
        vocab_size=recipe.vocab_size,
        layer_kinds=("window", "csa", "hca", "csa"),
        mlp_kinds=("hash", "score", "score", "score"),
        index_topk=8,
        csa_ratio=4,
        hca_ratio=128,
        engram=engram if recipe.engram else None,
    )


def _tiny_v41(recipe: Recipe, compressed_vocab_size: int) -> SharedStreamConfig:
    """Every mode in five layers: window, Full at ratio 2, then Full with a candidate pool, Reindex and Reuse at ratio 1.

    Engram tables are half as large as V4's, because 4-grams make three of them a head.
    """
    engram = EngramConfig(
        layer_ids=(1,),
        vocab_size=4096,
        compressed_vocab_size=compressed_vocab_size,
        max_ngram_size=4,
        n_heads=4,
        head_dim=16,
        conv_kernel_size=0,
    )
    return SharedStreamConfig(
        **_BACKBONE,
        vocab_size=recipe.vocab_size,
        compress_ratios=(0, 2, 1, 1, 1),
        kv_source_layer_ids=(1, 2),
        index_source_layer_ids=(1, 2, 3),
        index_topk=16,
        candidate_source_layer_id=2,
        candidate_topk_blocks=24,
        candidate_block_size=4,
        engram=engram if recipe.engram else None,
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
_TINY = (
    _TINY_V4,
    replace(_TINY_V4, name="tiny-v4-engram", engram=True),
    replace(_TINY_V4, name="tiny-v41", family="deepseek_v41", engram=True),
)
RECIPES = {recipe.name: recipe for recipe in _TINY}


def recipe_named(name: str) -> Recipe:
    if name not in RECIPES:
        raise InputError(f"recipe {name!r} is unknown; choose one of {sorted(RECIPES)}")
    return RECIPES[name]
