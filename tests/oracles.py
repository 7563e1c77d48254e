"""Independent implementations that ours are compared with: models as ``transformers`` has them, at toy sizes.

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
    return _oracle("DeepseekV4", seed, random_v4_config(seed) | {"experts_implementation": "eager"} | overrides)


def random_v32_config(seed: int) -> dict[str, Any]:
    """Keyword arguments of a tiny ``DeepseekV32Config``: YaRN and not, groups of experts and not, dense layers before MoE.

    16 index heads or more, because with few of them many index scores are exactly 0 and a tie may be broken either way.
    """
    draw = random.Random(seed)
    layers, heads = draw.randint(1, 4), draw.choice([2, 3, 4, 6])
    groups = draw.choice([1, 2, 4])
    mscale = draw.choice([0.7, 1.0])
    stretched = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": draw.choice([4.0, 16.0, 40.0]),
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "original_max_position_embeddings": 64,
    }
    return {
        "vocab_size": draw.choice([97, 101]),
        "hidden_size": draw.choice([40, 56]),
        "intermediate_size": draw.choice([52, 76]),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": draw.choice([20, 28]),
        "kv_lora_rank": draw.choice([12, 20, 36]),
        "qk_nope_head_dim": draw.choice([6, 10, 17]),
        "qk_rope_head_dim": draw.choice([4, 8]),
        "v_head_dim": draw.choice([5, 11, 18]),
        "index_n_heads": draw.choice([16, 19]),
        "index_head_dim": draw.choice([8, 14]),
        "index_topk": draw.choice([3, 5, 7, 13, 200]),
        "first_k_dense_replace": draw.randint(0, layers),
        "n_routed_experts": 8,
        "num_experts_per_tok": draw.choice([2, 3, 4]),
        "n_shared_experts": draw.choice([1, 2]),
        "moe_intermediate_size": draw.choice([24, 32]),
        "n_group": groups,
        "topk_group": draw.randint((groups + 1) // 2, groups),
        "routed_scaling_factor": draw.choice([1.0, 2.5]),
        "rms_norm_eps": draw.choice([1e-6, 1e-5]),
        "max_position_embeddings": 1024,
        "rope_parameters": draw.choice([stretched, stretched, {"rope_type": "default", "rope_theta": 5000.0}]),
    }


def v32_oracle(seed: int = 0, **overrides: Any) -> tuple[Any, Any]:
    """(config, model) as ``oracle_model``, of DeepSeek-V3.2: MLA with DSA."""
    return _oracle("DeepseekV32", seed, random_v32_config(seed) | {"experts_implementation": "eager"} | overrides)


def v3_oracle(seed: int = 0, **overrides: Any) -> tuple[Any, Any]:
    """(config, model) as ``oracle_model``, of DeepSeek-V3: MLA alone."""
    settings = {k: v for k, v in random_v32_config(seed).items() if not k.startswith("index_")}
    return _oracle("DeepseekV3", seed, settings | {"experts_implementation": "eager"} | overrides)


def random_llama_config(seed: int) -> dict[str, Any]:
    """Keyword arguments of a tiny ``LlamaConfig``: multi-query, grouped and multi-head attention, heads of any width."""
    draw = random.Random(seed)
    kv_heads, groups = draw.choice([1, 2, 3]), draw.choice([1, 2, 3])
    return {
        "vocab_size": draw.choice([97, 101]),
        "hidden_size": 12 * kv_heads * groups,
        "intermediate_size": draw.choice([52, 76]),
        "num_hidden_layers": draw.randint(1, 4),
        "num_attention_heads": kv_heads * groups,
        "num_key_value_heads": kv_heads,
        "head_dim": draw.choice([10, 12, 26]),
        "rms_norm_eps": draw.choice([1e-6, 1e-5]),
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": draw.choice([500.0, 10000.0])},
    }


def llama_oracle(seed: int = 0, **overrides: Any) -> tuple[Any, Any]:
    """(config, model) as ``oracle_model``, of a dense llama."""
    return _oracle("Llama", seed, random_llama_config(seed) | overrides)


def _oracle(family: str, seed: int, settings: dict[str, Any]) -> tuple[Any, Any]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    config = getattr(transformers, f"{family}Config")(**{"attn_implementation": "eager"} | settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    experts = getattr(config, "n_routed_experts", 0)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            weight.copy_(_random_weight(name, weight.shape, experts, generator))
    return config, model


def _random_weight(name: str, shape: torch.Size, experts: int, generator: torch.Generator) -> torch.Tensor:
    leaf = name.rpartition(".")[2]
    if leaf == "tid2eid":  # distinct experts for each token id
        return torch.rand(shape[0], experts, generator=generator).argsort(1)[:, : shape[1]]
    noise = torch.randn(shape, generator=generator)
    if "norm" in name and leaf != "bias":
        return 1 + 0.1 * noise
    if leaf in ("scale", "hc_scale"):
        return 0.75 + 0.1 * noise
    if leaf in ("sinks", "position_bias", "e_score_correction_bias", "base", "hc_base", "bias"):
        return 0.5 * noise
    return noise * shape[-1] ** -0.5
