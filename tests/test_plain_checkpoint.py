"""Folders of dense llama and V3.2 models: names of the release and of our own modules, experts stacked or not, FP8 and ties."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.model.test_plain import CONFIGS, SPARSE, random_plain
from workbench.checkpoint import load, released_name, save, saved_name
from workbench.errors import InputError
from workbench.model.quant import dequantise_fp8_blocks, quantise_fp8_blocks

IDS = torch.arange(29).unsqueeze(0)
EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)

# family, the release's name, ours
NAMES = """
llama         model.embed_tokens.weight                                    embed.weight
llama         lm_head.weight                                               head.weight
llama         model.norm.weight                                            norm.weight
llama         model.layers.7.input_layernorm.weight                        layers.7.attn_norm.weight
llama         model.layers.7.post_attention_layernorm.weight               layers.7.ffn_norm.weight
llama         model.layers.7.self_attn.q_proj.weight                       layers.7.attn.wq.weight
llama         model.layers.7.self_attn.k_proj.weight                       layers.7.attn.wk.weight
llama         model.layers.7.self_attn.v_proj.weight                       layers.7.attn.wv.weight
llama         model.layers.7.self_attn.o_proj.weight                       layers.7.attn.wo.weight
llama         model.layers.7.mlp.gate_proj.weight                          layers.7.ffn.w1.weight
llama         model.layers.7.mlp.up_proj.weight                            layers.7.ffn.w3.weight
llama         model.layers.7.mlp.down_proj.weight                          layers.7.ffn.w2.weight
deepseek_v32  model.layers.7.self_attn.q_a_proj.weight                     layers.7.attn.wq_a.weight
deepseek_v32  model.layers.7.self_attn.q_a_layernorm.weight                layers.7.attn.q_norm.weight
deepseek_v32  model.layers.7.self_attn.q_b_proj.weight                     layers.7.attn.wq_b.weight
deepseek_v32  model.layers.7.self_attn.kv_a_proj_with_mqa.weight           layers.7.attn.wkv_a.weight
deepseek_v32  model.layers.7.self_attn.kv_a_layernorm.weight               layers.7.attn.kv_norm.weight
deepseek_v32  model.layers.7.self_attn.kv_b_proj.weight                    layers.7.attn.wkv_b.weight
deepseek_v32  model.layers.7.self_attn.o_proj.weight                       layers.7.attn.wo.weight
deepseek_v32  model.layers.7.self_attn.indexer.wq_b.weight                 layers.7.attn.indexer.wq_b.weight
deepseek_v32  model.layers.7.self_attn.indexer.wk.weight                   layers.7.attn.indexer.wk.weight
deepseek_v32  model.layers.7.self_attn.indexer.k_norm.weight               layers.7.attn.indexer.k_norm.weight
deepseek_v32  model.layers.7.self_attn.indexer.k_norm.bias                 layers.7.attn.indexer.k_norm.bias
deepseek_v32  model.layers.7.self_attn.indexer.weights_proj.weight         layers.7.attn.indexer.weights_proj.weight
deepseek_v32  model.layers.7.mlp.gate.weight                               layers.7.ffn.gate.weight
deepseek_v32  model.layers.7.mlp.gate.e_score_correction_bias              layers.7.ffn.gate.bias
deepseek_v32  model.layers.7.mlp.experts.gate_up_proj                      layers.7.ffn.experts.w13
deepseek_v32  model.layers.7.mlp.experts.down_proj                         layers.7.ffn.experts.w2
deepseek_v32  model.layers.7.mlp.experts.31.gate_proj.weight               layers.7.ffn.experts.31.w1.weight
deepseek_v32  model.layers.7.mlp.experts.31.down_proj.weight               layers.7.ffn.experts.31.w2.weight
deepseek_v32  model.layers.7.mlp.experts.31.up_proj.weight                 layers.7.ffn.experts.31.w3.weight
deepseek_v32  model.layers.7.mlp.shared_experts.gate_proj.weight           layers.7.ffn.shared_experts.w1.weight
deepseek_v32  model.layers.2.mlp.down_proj.weight                          layers.2.ffn.w2.weight
"""


@pytest.mark.parametrize(("family", "released", "ours"), [tuple(line.split()) for line in NAMES.strip().splitlines()])
def test_every_spelling_becomes_ours_and_ours_is_saved_as_released(family, released, ours):
    assert released_name(released, family) == ours == released_name(ours, family)
    assert saved_name(ours, family) == released


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], **settings) -> Path:
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@EVERY
def test_a_saved_model_loads_bit_for_bit(tmp_path, config):
    model = random_plain(config)
    loaded = load(save(model, tmp_path, dtype=torch.float32))
    assert same_weights(loaded, model) and loaded.config == config
    assert torch.equal(loaded(IDS), model(IDS))


@EVERY
def test_our_own_names_load_too(tmp_path, config):
    """They are those of DeepSeek's own code, and have the experts stacked."""
    model = random_plain(config)
    save(model, tmp_path)
    assert same_weights(load(rewrite(tmp_path, model.state_dict())), model)


def test_half_precision_rounds_matrices_and_keeps_norms_and_router_biases(tmp_path):
    original, loaded = random_plain(SPARSE).state_dict(), load(save(random_plain(SPARSE), tmp_path)).state_dict()
    for name, tensor in original.items():
        exact = "norm" in name or name.endswith("gate.bias")
        assert torch.equal(loaded[name], tensor if exact else tensor.half().float()), name


@pytest.mark.parametrize("kind", ["gqa", "mla-dsa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_matrices_compute_in_the_dtype_asked_for(tmp_path, kind, dtype):
    model = random_plain(CONFIGS[kind])
    loaded = load(save(model, tmp_path, dtype=torch.float32), dtype=dtype)
    assert loaded.head.weight.dtype == dtype
    assert (loaded(IDS) - model(IDS)).abs().median() < {torch.float64: 1e-5, torch.bfloat16: 0.1}[dtype]


@pytest.mark.parametrize("kind", ["gqa", "mla-dsa"])
def test_a_tied_head_is_the_embedding(tmp_path, kind):
    tensors = stored(save(random_plain(CONFIGS[kind]), tmp_path))
    del tensors["lm_head.weight"]
    rewrite(tmp_path, tensors)
    with pytest.raises(InputError, match="1 missing: head.weight"):
        load(tmp_path)
    model = load(rewrite(tmp_path, tensors, tie_word_embeddings=True))
    assert torch.equal(model.head.weight, model.embed.weight)


def test_stacked_experts_of_transformers_load(tmp_path):
    model = random_plain(SPARSE)
    tensors = stored(save(model, tmp_path, dtype=torch.float32))
    loose = {name: t for name, t in tensors.items() if ".mlp.experts." not in name}
    for layer in (1, 2):
        experts = model.layers[layer].ffn.experts
        loose[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = experts.w13.detach().clone()
        loose[f"model.layers.{layer}.mlp.experts.down_proj"] = experts.w2.detach().clone()
    assert same_weights(load(rewrite(tmp_path, loose)), model)


def test_fp8_weights_are_dequantised(tmp_path):
    tensors = stored(save(random_plain(SPARSE), tmp_path, dtype=torch.float32))
    names = {
        "model.layers.1.self_attn.kv_b_proj.weight": "layers.1.attn.wkv_b.weight",
        "model.layers.0.mlp.up_proj.weight": "layers.0.ffn.w3.weight",
    }
    packed, expected = dict(tensors), {}
    for name, ours in names.items():
        codes, scale = quantise_fp8_blocks(tensors[name], (4, 8))
        packed |= {name: codes, f"{name}_scale_inv": scale.float()}
        expected[ours] = dequantise_fp8_blocks(codes, scale, (4, 8))
    declared = {"quant_method": "fp8", "weight_block_size": [4, 8]}
    found = load(rewrite(tmp_path, packed, quantization_config=declared)).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_layer_for_multi_token_prediction_is_left_out(tmp_path):
    model = random_plain(SPARSE)
    tensors = stored(save(model, tmp_path, dtype=torch.float32))
    extra = {"model.layers.3.eh_proj.weight": torch.zeros(3, 5), "model.layers.3.self_attn.o_proj.weight": torch.zeros(7, 2)}
    assert same_weights(load(rewrite(tmp_path, tensors | extra, num_nextn_predict_layers=1)), model)
    with pytest.raises(InputError, match="2 unexpected"):
        load(rewrite(tmp_path, tensors | extra, num_nextn_predict_layers=0))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.1.self_attn.indexer.wk.weight", None, "1 missing: layers.1.attn.indexer.wk.weight"),
        ("model.layers.1.self_attn.kv_b_proj.bias", torch.zeros(3), "1 unexpected: model.layers.1.self_attn.kv_b_proj.bias"),
        ("model.layers.1.mlp.gate.weight", torch.zeros(2, 2), r"has shape \[2, 2\] instead of \[6, 24\]"),
        ("model.norm.weight", torch.full((24,), torch.nan), "NaN or infinity"),
        ("layers.1.attn.wo.weight", torch.zeros(24, 15), "twice"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, name, value, message):
    tensors = stored(save(random_plain(SPARSE), tmp_path))
    tensors.pop(name, None)
    with pytest.raises(InputError, match=message):
        load(rewrite(tmp_path, tensors | ({} if value is None else {name: value})))
