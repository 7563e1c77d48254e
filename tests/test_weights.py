"""Parameters counted from a shape are those of the model, and those published; a step reads what its sequences touch."""

from dataclasses import replace

import pytest
import torch

import workbench as wb
from workbench.config import DenseConfig, EngramConfig, HybridConfig, LatentConfig
from workbench.model.families import MODELS, model_class
from workbench.weights import FP4_BYTES, active_parameters, modelled_weights, routed_parameters, total_parameters

HYBRID = HybridConfig(
    vocab_size=53, hidden_size=22, num_attention_heads=4, head_dim=14, qk_rope_head_dim=6, q_lora_rank=10, o_groups=2,
    o_lora_rank=6, layer_kinds=("window", "csa", "hca"), mlp_kinds=("hash", "score", "score"), n_routed_experts=5,
    num_experts_per_tok=3, moe_intermediate_size=8, index_n_heads=2, index_head_dim=10, index_topk=3, csa_ratio=3,
    hca_ratio=7, sliding_window=5, hc_mult=2,
)  # fmt: skip
ENGRAM = EngramConfig(layer_ids=(1,), vocab_size=11, compressed_vocab_size=31, n_heads=2, head_dim=3)
LATENT = LatentConfig(
    vocab_size=53, hidden_size=22, num_hidden_layers=3, num_attention_heads=5, q_lora_rank=7, kv_lora_rank=11,
    qk_nope_head_dim=9, qk_rope_head_dim=4, v_head_dim=13, intermediate_size=17, index_n_heads=3, index_head_dim=6,
    index_topk=3, first_k_dense_replace=1, n_routed_experts=6, num_experts_per_tok=3, moe_intermediate_size=8, n_group=3,
    topk_group=2,
)  # fmt: skip
DENSE = DenseConfig(
    vocab_size=53, hidden_size=22, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=10,
    intermediate_size=17,
)  # fmt: skip
SMALL = {
    "hybrid": HYBRID,
    "hybrid with Engram": replace(HYBRID, engram=ENGRAM),
    "MLA and DSA": LATENT,
    "MLA": replace(LATENT, index_topk=0),
    "MLA, all layers dense": replace(LATENT, first_k_dense_replace=9),
    "GQA": DENSE,
}
# Looked up, added or scaled by, not multiplied as a matrix.
NO_MATRIX = ("ape", "table", "conv", "norm", "engram.q_weight", "engram.k_weight")


@pytest.mark.parametrize("name", SMALL)
def test_counted_parameters_are_the_matrices_of_a_live_model(name):
    config = SMALL[name]
    matrices = {
        name: parameter.numel()
        for name, parameter in model_class(config)(config).named_parameters()
        if parameter.dim() > 1 and not any(word in name for word in NO_MATRIX)
    }
    assert sum(matrices.values()) == total_parameters(config), matrices


def test_an_active_parameter_is_one_of_the_head_the_layers_or_a_visited_expert():
    unvisited = replace(HYBRID, num_experts_per_tok=5)
    expert = 3 * 22 * 8
    assert active_parameters(unvisited) - active_parameters(HYBRID) == 3 * 2 * expert
    assert total_parameters(unvisited) == total_parameters(HYBRID) == active_parameters(unvisited) + 53 * 22
    assert routed_parameters(HYBRID) == 3 * 5 * expert and routed_parameters(LATENT) == 2 * 6 * expert


@pytest.mark.parametrize("name", [name for name, preset in wb.presets.items() if type(preset.config) in MODELS])
def test_the_model_of_a_preset_can_be_built_and_has_the_parameters_counted(name):
    config = wb.presets[name].config
    with torch.device("meta"):  # shapes without memory
        model = model_class(config)(config)
    engram = sum(p.numel() for n, p in model.named_parameters() if "table" in n)
    held = sum(p.numel() for p in model.parameters()) - engram
    assert held == pytest.approx(total_parameters(config), rel=1e-4)  # vectors (norms, biases, sinks) are not counted


def test_counted_parameters_are_those_published():
    for name in ("v4-flash", "v4-pro", "v4.1-flash", "v3.2"):
        preset = wb.presets[name]  # published to two or three digits
        assert active_parameters(preset.config) == pytest.approx(preset.active_parameters, rel=0.03)
        assert total_parameters(preset.config) == pytest.approx(preset.total_parameters, rel=0.03)
    assert total_parameters(wb.presets["v4.1-flash"].config) == pytest.approx(551.88e9, rel=1e-5)
    assert active_parameters(wb.presets["v4.1-flash"].config) == pytest.approx(16.07e9, rel=5e-3)


def test_modelled_weights_are_near_the_published_checkpoint_where_that_is_known():
    preset = wb.presets["v4.1-flash"]
    modelled = modelled_weights(preset.config, FP4_BYTES)
    assert modelled.expert_bytes == pytest.approx(40 * 384 * 18_800_640)  # bytes of a released expert
    assert modelled.expert_bytes == pytest.approx(preset.weights.expert_bytes, rel=2e-3)
    assert modelled.always_bytes < preset.weights.always_bytes  # which has drafting stages and the vision tower too
    assert modelled.origin == "modelled" and preset.weights.origin == "published"


def test_v4_weights_are_mostly_fp4_and_v32_ones_fp8():
    share = {
        name: wb.presets[name].weights.device_bytes / wb.presets[name].total_parameters
        for name in ("v4-flash", "v4-pro", "v3.2")
    }
    assert 0.5 < share["v4-flash"] < 0.6 and 0.5 < share["v4-pro"] < 0.6 and 1.0 <= share["v3.2"] < 1.01


def test_a_step_reads_more_experts_the_more_sequences_it_decodes():
    weights = wb.presets["v4-flash"].weights
    one = weights.always_bytes + weights.expert_bytes * 6 / 256
    assert weights.bytes_read(1) == pytest.approx(one)
    assert one < weights.bytes_read(8) < weights.bytes_read(1000) <= weights.device_bytes
