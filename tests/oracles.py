"""Independent implementations that ours are compared with, at toy sizes: models as ``transformers`` has them, and V4.1 as
``nemo-automodel`` has it.

Both are slow to import and needed by tests only, so they are imported inside the functions.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from workbench.config.common import EngramConfig
from workbench.config.primes import table_primes

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
    if ("norm" in name and leaf != "bias") or leaf in ("q_weight", "k_weight"):
        return 1 + 0.1 * noise
    if "engram.embed" in name:
        return noise
    if leaf in ("gate_and_up_projs", "down_projs"):  # stored for x @ W
        return noise * shape[-2] ** -0.5
    if leaf in ("scale", "hc_scale"):
        return 0.75 + 0.1 * noise
    biases = ("sinks", "position_bias", "e_score_correction_bias", "bias_vl", "base", "hc_base", "bias")
    if leaf in biases or "sinks_param" in name:
        return 0.5 * noise
    return noise * shape[-1] ** -0.5


# Schedules of V4.1 that have every kind of layer between them: ratios, KV sources, index sources, candidate source.
V41_SCHEDULES: tuple[tuple[list[int], list[int], list[int], int], ...] = (
    ([0, 0, 2, 2, 1, 1, 1, 1], [2, 4], [2, 4, 6], 4),
    ([0, 1, 1, 1, 1], [1], [1, 3], 1),
    ([2, 2, 0, 2, 1, 0, 1, 1], [0, 4], [0, 3, 4, 6], 4),
    ([1, 1, 2, 2, 2], [0, 2], [0, 2, 3], -1),
    ([0, 3, 3, 2, 2, 2], [1, 3], [1, 2, 3, 4, 5], 3),
    ([0, 0], [], [], -1),
    ([1], [0], [0], 0),
    ([2, 2, 1, 1, 1], [0, 2], [0, 2, 4], -1),
)


def random_v41_config(seed: int) -> dict[str, Any]:
    """Text settings of a tiny V4.1, as a released ``config.json`` has them, that differ with the seed.

    There are 16 index heads, for the reason given above. Engram tables have as many rows as the hash rules give.
    """
    draw = random.Random(5000 + seed)
    ratios, sources, index_sources, candidate = V41_SCHEDULES[seed % len(V41_SCHEDULES)]
    heads, head_dim = draw.choice([2, 4, 6]), draw.choice([24, 32, 40])
    settings = {
        "vocab_size": 64,
        "hidden_size": draw.choice([32, 64]),
        "moe_intermediate_size": 32,
        "num_hidden_layers": len(ratios),
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "qk_rope_head_dim": draw.choice([4, 8]),
        "q_lora_rank": draw.choice([24, 32]),
        "o_lora_rank": draw.choice([16, 20]),
        "o_groups": draw.choice([1, 2]),
        "sliding_window": draw.choice([3, 4, 7, 11]),
        "n_routed_experts": draw.choice([5, 8]),
        "num_experts_per_tok": draw.choice([2, 3]),
        "routed_scaling_factor": draw.choice([1.5, 2.5]),
        "swiglu_limit": draw.choice([1.0, 10.0]),
        "compress_ratios": ratios,
        "kv_source_layer_ids": sources,
        "index_source_layer_ids": index_sources,
        "index_n_heads": 16,
        "index_head_dim": 16,
        "index_topk": draw.choice([2, 3, 5]),
        "candidate_source_layer_id": candidate,
        "candidate_topk_blocks": draw.choice([2, 3]),
        "candidate_block_size": draw.choice([2, 3, 4]),
        "hc_mult": draw.choice([2, 4]),
        "hc_sinkhorn_iters": draw.choice([3, 20]),
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "compress_rope_theta": 160000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 64,
        },
        "num_nextn_predict_layers": 0,
        "dspark_noise_token_id": 0,
        "engram_layer_ids": [],
        "engram_num_embeddings": [],
    }
    if draw.random() < 0.75:
        engram = EngramConfig(
            layer_ids=tuple(sorted(draw.sample(range(len(ratios)), min(2, len(ratios))))),
            vocab_size=draw.choice([23, 50]),
            compressed_vocab_size=V41_WORDS - len(V41_TWINS),
            max_ngram_size=draw.choice([2, 3, 4]),
            n_heads=draw.choice([1, 2]),
            head_dim=draw.choice([8, 16]),
            pad_token_id=draw.choice([0, 9]),
        )
        settings |= {
            "engram_layer_ids": list(engram.layer_ids),
            "engram_num_embeddings": [sum(primes) for primes in table_primes(engram)],
            "engram_vocab_size": engram.vocab_size,
            "engram_compressed_vocab_size": engram.compressed_vocab_size,
            "engram_max_ngram_size": engram.max_ngram_size,
            "engram_n_heads": engram.n_heads,
            "engram_head_dim": engram.head_dim,
            "engram_pad_token_id": engram.pad_token_id,
        }
    return settings


V41_WORDS, V41_TWINS = 64, ("W1", "W7", "Ẃ12", "ẅ3", "w20 ")  # tokens that tokenizer compression makes equal to others


def v41_tokenizer() -> Tokenizer:
    """64 words, five of which differ from others only by case, accents or white space."""
    words = [f"w{n}" for n in range(V41_WORDS - len(V41_TWINS))]
    vocabulary = {word: i for i, word in enumerate([*words, *V41_TWINS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def v41_oracle(folder: Path, seed: int = 0, **overrides: Any) -> tuple[dict[str, Any], Any]:
    """(text settings, model in float32 and eval mode) of ``nemo-automodel``; the same model as a folder that ``load`` reads.

    Every weight is random and large enough that a mistake shows. The cache's number formats are switched off, because a value
    near the edge of a bin may fall to either side of it.
    """
    torch.compiler.set_stance("force_eager")  # the expert activation would be compiled for a minute
    from nemo_automodel.components.models.common import BackendConfig
    from nemo_automodel.components.models.deepseek_v41 import attention, config, model
    from transformers import PreTrainedTokenizerFast

    attention.quantize_cache = lambda values, **_: values
    settings = random_v41_config(seed) | overrides
    tokenizer = v41_tokenizer()
    vision = config.DeepseekV41VisionConfig(num_hidden_layers=0)
    whole = config.DeepseekV41Config(
        text_config=config.DeepseekV41TextConfig(dtype="float32", **settings), vision_config=vision, dtype="float32"
    )
    backend = BackendConfig(attn="eager", linear="torch", rms_norm="torch_fp32", experts="torch_mm", dispatcher="torch")
    oracle = model.DeepseekV41ForCausalLM(whole, backend=backend, tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    oracle.initialize_weights(dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    state = {name: weight for name, weight in oracle.state_dict().items() if isinstance(weight, torch.Tensor)}
    with torch.no_grad():
        for name, weight in state.items():
            weight.copy_(_random_weight(name, weight.shape, settings["n_routed_experts"], generator))
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({n: w.contiguous() for n, w in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v41", "text_config": settings}))
    tokenizer.save(str(folder / "tokenizer.json"))
    return settings, oracle.eval()
