"""Independent implementations that ours are compared with: DeepSeek-V4 as ``transformers`` has it, at toy sizes.

``transformers`` is slow to import and needed by tests only, so it is imported inside the functions.
"""

from __future__ import annotations

import os
import random
from typing import Any

import torch

WINDOW, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"


def random_v4_config(seed: int) -> dict[str, Any]:
    """Keyword arguments of a tiny ``DeepseekV4Config`` that differs with the seed and has every kind of layer.

    There are 16 index heads, since with few of them many index scores are exactly 0 and a tie may be broken either way.
    Matrices have multiples of 32 columns, so that experts can be stored in FP4; other sizes avoid dividing each other.
    """
    draw = random.Random(seed)
    kinds = [WINDOW, CSA, HCA, draw.choice([CSA, HCA]), *draw.choices([WINDOW, CSA, HCA], k=draw.randint(0, 2))]
    draw.shuffle(kinds)
    hashed = draw.randint(1, 2)
    heads, head_dim = draw.choice([2, 4, 6, 8]), draw.choice([24, 32, 40])
    return {
        "vocab_size": draw.choice([97, 101]),
        "hidden_size": draw.choice([32, 64]),
        "num_hidden_layers": len(kinds),
        "layer_types": kinds,
        "mlp_layer_types": ["hash_moe"] * hashed + ["moe"] * (len(kinds) - hashed),
        "compress_rates": {CSA: 4, HCA: draw.choice([11, 13, 16])},
        "sliding_window": draw.choice([5, 7, 8, 11]),
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "head_dim": head_dim,
        "partial_rotary_factor": 8 / head_dim,
        "q_lora_rank": draw.choice([24, 32]),
        "o_groups": draw.choice([1, 2]),
        "o_lora_rank": draw.choice([16, 20]),
        "index_n_heads": 16,
        "index_head_dim": 16,
        "index_topk": draw.choice([3, 4, 5]),
        "n_routed_experts": draw.choice([5, 7, 8]),
        "num_experts_per_tok": draw.choice([2, 3]),
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
        "routed_scaling_factor": draw.choice([1.5, 2.5]),
        "hc_mult": draw.choice([2, 4]),
        "max_position_embeddings": 1024,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 64,
        },
    }


def oracle_model(seed: int = 0, **overrides: Any) -> tuple[Any, Any]:
    """(config, model in float32 and eval mode) of ``transformers``, sizes from ``random_v4_config(seed)`` with ``overrides``.

    Every weight is random: the library starts sinks, biases and mHC terms at zero, where a mistake in them would not show.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    settings = random_v4_config(seed) | {"attn_implementation": "eager", "experts_implementation": "eager"} | overrides
    config = DeepseekV4Config(**settings)
    model = DeepseekV4ForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            weight.copy_(_random_weight(name, weight.shape, config.n_routed_experts, generator))
    return config, model


def _random_weight(name: str, shape: torch.Size, experts: int, generator: torch.Generator) -> torch.Tensor:
    leaf = name.rpartition(".")[2]
    if leaf == "tid2eid":  # distinct experts for each token id
        return torch.rand(shape[0], experts, generator=generator).argsort(1)[:, : shape[1]]
    noise = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1 + 0.1 * noise
    if leaf in ("scale", "hc_scale"):
        return 0.75 + 0.1 * noise
    if leaf in ("sinks", "position_bias", "e_score_correction_bias", "base", "hc_base"):
        return 0.5 * noise
    return noise * shape[-1] ** -0.5
