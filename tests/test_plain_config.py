"""Configurations of dense, MLA and V3.2 models: read in every spelling, written for everybody, contradictions refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from tests.model.test_plain import CONFIGS, SPARSE
from workbench.config import DenseConfig, LatentConfig, RopeConfig, read_config
from workbench.errors import InputError

# As published in the model folders of DeepSeek-V3.2-Exp and of a Llama, leaving out what no model needs.
V32: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "attention_bias": False,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v32",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}


def test_the_released_v32_is_read():
    config = read_config(V32)
    assert isinstance(config, LatentConfig) and config.layer_kinds == ("mla-dsa",) * 61 and config.index_topk == 2048
    assert config.rope == RopeConfig(theta=10000.0, factor=40, original_max_position_embeddings=4096)
    # The released code multiplies 192^-0.5 by the square of 0.1 ln 40 + 1.
    assert config.softmax_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert config.softmax_scale / 192**-0.5 == pytest.approx(1.8738, abs=1e-4)


def test_v3_is_read_as_mla_alone():
    settings = {name: value for name, value in V32.items() if not name.startswith("index_")} | {"model_type": "deepseek_v3"}
    config = read_config(settings)
    assert config.layer_kinds == ("mla",) * 61 and config.to_dict()["model_type"] == "deepseek_v3"


def test_a_llama_without_kv_heads_or_head_width_has_as_many_heads_of_even_shares():
    config = read_config(LLAMA)
    assert isinstance(config, DenseConfig) and (config.num_key_value_heads, config.head_dim) == (32, 128)
    assert config.layer_kinds == ("mha",) * 32 and config.rope == RopeConfig(theta=10000.0)
    grouped = read_config(LLAMA | {"num_key_value_heads": 8, "head_dim": 64, "rope_theta": 500000})
    assert grouped.layer_kinds == ("gqa",) * 32 and (grouped.head_dim, grouped.rope.theta) == (64, 500000)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_written_reads_back_equal(config):
    assert read_config(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "rope",
    [RopeConfig(theta=777.0), RopeConfig(theta=500.0, factor=7, original_max_position_embeddings=11, beta_fast=9, beta_slow=2)],
)
def test_rotations_read_back_equal(rope):
    config = replace(SPARSE, rope=rope, mscale_all_dim=0.7 if rope.factor > 1 else 1.0)
    assert LatentConfig.from_dict(config.to_dict()) == config
    old = {"rope_scaling": config.to_dict()["rope_parameters"], "rope_parameters": None}
    assert LatentConfig.from_dict(config.to_dict() | old) == config


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_transformers_understands_what_is_written(transformers_oracle, config):
    settings = config.to_dict()
    theirs = transformers_oracle.AutoConfig.for_model(**settings).to_dict()
    family = type(config)
    assert family.from_dict(theirs) == config


def yarn(**changes: Any) -> dict[str, Any]:
    return {"rope_scaling": V32["rope_scaling"] | changes}


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (LLAMA, {"attention_bias": True}, "attention_bias=True"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias=True"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope type 'llama3' is not supported"),
        (LLAMA, {"rope_parameters": {"rope_type": "yarn", "factor": 8.0}}, "rope type 'yarn' is not supported"),
        (LLAMA, {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, r"two rotary bases.*10000.*500000"),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        (LLAMA, {"num_key_value_heads": 5}, "num_key_value_heads=5 must divide num_attention_heads=32"),
        (LLAMA, {"head_dim": 127}, "head_dim must be even for RoPE, got 127"),
        (LLAMA, {"hidden_size": 4100}, "hidden_size=4100 is no multiple of 32"),
        (LLAMA, {"vocab_size": None}, "config.json has no vocab_size"),
        (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers must be positive, got 0"),
        (LLAMA, {"num_attention_heads": "many"}, "setting of the wrong type"),
        (LLAMA, {"model_type": "mistral"}, "model_type 'mistral' is not supported"),
        (V32, {"attention_bias": True}, "attention_bias=True"),
        (V32, {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        (V32, {"topk_method": "greedy"}, "topk_method='greedy'"),
        (V32, {"norm_topk_prob": False}, "norm_topk_prob=False"),
        (V32, {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        (V32, {"num_key_value_heads": 8}, "num_key_value_heads=8"),
        (V32, {"qk_head_dim": 128}, "qk_head_dim=128"),
        (V32, {"head_dim": 56}, "head_dim=56"),
        (V32, {"layer_types": ["full_attention"] * 61}, "layer_types="),
        (V32, {"rope_interleave": False}, "rope_interleave=False"),
        (V32, {"mlp_layer_types": ["dense"] * 4 + ["sparse"] * 57}, "first first_k_dense_replace=3 of 61 layers"),
        (V32, {"mlp_layer_types": ["sparse", "dense"] + ["sparse"] * 59, "first_k_dense_replace": 1}, "then 'sparse'"),
        (V32, {"n_group": 7}, "n_group=7 must split n_routed_experts=256"),
        (V32, {"n_group": 256, "topk_group": 256}, "equal groups of 2 or more"),
        (V32, {"topk_group": 9}, "topk_group=9 exceeds n_group=8"),
        (V32, {"num_experts_per_tok": 129}, "num_experts_per_tok=129 exceeds the 128 experts"),
        (V32, {"index_head_dim": 32}, "index_head_dim=32 is below qk_rope_head_dim=64"),
        (V32, {"qk_rope_head_dim": 63}, "qk_rope_head_dim must be even for RoPE, got 63"),
        (V32, {"index_topk": -1}, "index_topk must be at least 0, got -1"),
        (V32, {"q_lora_rank": None}, "config.json has no q_lora_rank"),
        (V32, {"kv_lora_rank": None, "v_head_dim": None}, "config.json has no kv_lora_rank, v_head_dim"),
        (V32, yarn(type="linear"), "rope type 'linear' is not supported"),
        (V32, yarn(factor=None), "needs factor"),
        (V32, yarn(mscale=0.7), "equal mscale and mscale_all_dim.*mscale=0.7, mscale_all_dim=1.0"),
        (V32, yarn(mscale=None, mscale_all_dim=None), "equal mscale and mscale_all_dim"),
        (V32, yarn(attention_factor=1.2), "attention_factor=1.2"),
        (V32, yarn(truncate=False), "truncate=False"),
        (V32, yarn(factor=0.5), "factor >= 1, got theta=10000.0, factor=0.5"),
    ],
)
def test_settings_that_contradict_or_are_not_computed_are_refused_in_one_line(base, changes, message):
    with pytest.raises(InputError, match=message) as refused:
        read_config(base | changes)
    assert "\n" not in str(refused.value)


def test_a_dense_configuration_with_a_stretched_rotation_is_refused():
    with pytest.raises(InputError, match="without YaRN here, got a rope factor of 4"):
        replace(CONFIGS["gqa"], rope=RopeConfig(factor=4))
