"""Folders of V4.1: released names, nested settings, FP8 blocks of 32 x 32, FP4 experts and Engram rows with their scales."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.oracles import random_v41_config, v41_tokenizer
from tests.slow_reference import random_ids, random_model
from workbench.checkpoint import load, save
from workbench.config import SharedStreamConfig, read_config
from workbench.errors import InputError
from workbench.model.quant import dequantise_fp4, dequantise_fp8_blocks, quantise_fp4, quantise_fp8_blocks

ENGRAM = {
    "engram_layer_ids": [1],
    "engram_num_embeddings": None,
    "engram_vocab_size": 23,
    "engram_compressed_vocab_size": 59,
    "engram_n_heads": 2,
    "engram_head_dim": 64,
    "engram_max_ngram_size": 4,
    "engram_pad_token_id": 0,
}
SETTINGS = random_v41_config(0) | ENGRAM | {"hidden_size": 64, "q_lora_rank": 32}
CONFIG = SharedStreamConfig.from_dict(SETTINGS)


def rewrite(folder: Path, change: Any) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(change(weights), folder / "model.safetensors")


def test_a_saved_model_has_the_released_names_and_comes_back(tmp_path):
    model, ids = random_model(CONFIG), random_ids(CONFIG, 2, 29)
    save(model, tmp_path, dtype=torch.float32)
    names = set(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    layer = {name.removeprefix("layers.4.") for name in names if name.startswith("layers.4.")}
    assert {"embed.weight", "head.weight", "norm.weight", "layers.1.engram.embed.weight", "layers.1.engram.wkv.weight"} < names
    assert {
        "attn.attn_sink",
        "attn.compressor.wkv.weight",
        "attn.indexer.wk.weight",
        "attn.indexer.weights_proj.weight",
    } < layer
    assert {"hc_attn_fn", "hc_ffn_scale", "ffn.gate.bias", "ffn.experts.3.w1.weight", "ffn.shared_experts.w2.weight"} < layer
    assert "attn.compressor.wgate.weight" not in layer and "layers.2.attn.compressor.wgate.weight" in names  # ratios 1 and 2
    back = load(tmp_path, device="cpu")
    with torch.inference_mode():
        assert back.config == CONFIG and torch.equal(back(ids), model(ids))


def test_a_release_loads_with_nested_settings_drafting_stages_and_images_left_aside(tmp_path):
    model = random_model(CONFIG)
    tokenizer = v41_tokenizer()
    save(model, tmp_path, dtype=torch.float32)
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    def as_released(weights: dict) -> dict:
        del weights["engram_canonical_ids"]  # a release leaves them to its tokenizer
        for name in ("mtp.0.attn.wq_a.weight", "vision.blocks.0.weight", "image_start", "layers.0.ffn.gate.bias_vl"):
            weights[name] = torch.zeros(3)
        return weights

    rewrite(tmp_path, as_released)
    text = CONFIG.to_dict() | {"compress_ratios": [*CONFIG.compress_ratios, 0, 0, 0]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v41", "text_config": text, "image_token_id": 63}))
    loaded = load(tmp_path, device="cpu")
    assert loaded.config == replace(CONFIG, image_token_id=63)
    twins = tokenizer.get_vocab()
    assert loaded.engram_canonical_ids[twins["W7"]] == loaded.engram_canonical_ids[twins["w7"]]
    assert loaded.engram_canonical_ids.unique().numel() == 59


def test_fp8_blocks_fp4_experts_and_engram_rows_are_dequantised(tmp_path):
    model = random_model(CONFIG)
    save(model, tmp_path, dtype=torch.float32)
    expected: dict[str, torch.Tensor] = {}

    def quantise(weights: dict) -> dict:
        out = {}
        for name, value in weights.items():
            if ".experts." in name and ".shared_" not in name:
                out[name], scale = quantise_fp4(value)
                expected[name] = dequantise_fp4(out[name], scale)
            elif name.endswith((".wq_a.weight", ".wo_b.weight", "engram.embed.weight")):
                block = (1, 32) if "engram" in name else (32, 32)
                out[name], scale = quantise_fp8_blocks(value, block)
                expected[name] = dequantise_fp8_blocks(out[name], scale, block)
            else:
                out[name] = value
                continue
            out[name.removesuffix(".weight") + ".scale"] = scale.view(torch.uint8)
        return out

    rewrite(tmp_path, quantise)
    settings = CONFIG.to_dict() | {"quantization_config": {"weight_block_size": [32, 32], "quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    loaded = load(tmp_path, device="cpu")
    assert torch.equal(loaded.blocks[1].engram.table.weight, expected["layers.1.engram.embed.weight"])
    assert torch.equal(loaded.blocks[2].attn.wo_b.weight, expected["layers.2.attn.wo_b.weight"])
    assert torch.equal(loaded.blocks[5].ffn.experts.w2[3], expected["layers.5.ffn.experts.3.w2.weight"])
    gate_up = torch.cat([expected[f"layers.5.ffn.experts.3.{part}.weight"] for part in ("w1", "w3")])
    assert torch.equal(loaded.blocks[5].ffn.experts.w13[3], gate_up)


RELEASED = {
    "model_type": "deepseek_v41",
    "text_config": SETTINGS
    | {
        "vocab_size": 129280,
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "compress_ratios": [0, 0] + [2] * 18 + [1] * 20 + [0] * 3,
        "kv_source_layer_ids": [2, 8, 14, 20],
        "index_source_layer_ids": [2, 8, 14, 20, 24, 28, 32, 36],
        "candidate_source_layer_id": 20,
        "engram_layer_ids": [1, 14],
        "engram_num_embeddings": [384006168, 384016682],
        "engram_vocab_size": 16000000,
        "engram_compressed_vocab_size": 99092,
        "engram_n_heads": 8,
        "engram_head_dim": 256,
        "engram_pad_token_id": 2,
    },
}


def test_the_released_schedule_is_read():
    config = read_config(RELEASED)
    kinds = config.layer_kinds
    assert [kinds.count(kind) for kind in ("window", "csa2-full", "csa2-reindex", "csa2-reuse")] == [2, 4, 4, 30]
    assert config.stream_ratios == (2, 2, 2, 1) and config.engram.max_ngram_size == 4
    assert config.engram.conv_kernel_size == 0 and config.engram.rows_per_token == 24
    assert read_config(config.to_dict()) == config
    assert config.to_dict()["engram_num_embeddings"] == [384006168, 384016682]


@pytest.mark.parametrize("seed", range(16))
def test_any_configuration_comes_back_from_its_own_json(seed):
    config = SharedStreamConfig.from_dict(random_v41_config(seed))
    assert read_config(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compress_ratios": [0, 0, 2, 2, 1, 1, 1]}, "num_hidden_layers is 8 but compress_ratios describes 7"),
        ({"compress_ratios": [0, 0, 2, 2, 1, 1, 1, -1]}, r"whole number from 0 up per layer, got \(0, 0, 2, 2, 1, 1, 1, -1\)"),
        (
            {"compress_ratios": [0, 0, 2, 2, 1, 1, 1, 2]},
            "layer 7 reads ratio 2, but the latest KV source before it makes ratio 1",
        ),
        ({"compress_ratios": [0, 2, 2, 2, 1, 1, 1, 1]}, "layer 1 reads ratio 2, .* makes no stream yet"),
        ({"kv_source_layer_ids": [4, 2]}, r"kv_source_layer_ids must be strictly increasing layers of 0..7, got \(4, 2\)"),
        ({"kv_source_layer_ids": [2, 4, 8]}, r"got \(2, 4, 8\)"),
        ({"kv_source_layer_ids": [1, 2, 4]}, r"kv_source_layer_ids lists layers \[1\], whose compress_ratios are 0"),
        ({"index_source_layer_ids": [2, 6]}, r"kv_source_layer_ids \[4\] must be in index_source_layer_ids too"),
        ({"index_source_layer_ids": [0, 2, 4, 6]}, r"index_source_layer_ids lists layers \[0\]"),
        ({"candidate_source_layer_id": 6}, r"one of kv_source_layer_ids \(2, 4\), or -1 .* got 6"),
        ({"candidate_source_layer_id": -2}, "candidate_source_layer_id must be at least -1, got -2"),
        ({"candidate_block_size": 0}, "candidate_block_size must be positive, got 0"),
        ({"num_attention_heads": 3, "o_groups": 2}, "o_groups=2 must divide num_attention_heads=3"),
        ({"qk_rope_head_dim": 5}, "even and at most 16 .* got 5"),
        ({"qk_rope_head_dim": 18}, "index_head_dim=16.*, got 18"),
        ({"num_experts_per_tok": 99}, "num_experts_per_tok=99 exceeds"),
        ({"engram_layer_ids": [8]}, r"engram_layer_ids \(8,\) must lie in 0..7"),
        ({"engram_pad_token_id": 64}, "engram_pad_token_id must lie in 0..63, got 64"),
        ({"engram_num_embeddings": [384]}, r"engram_num_embeddings is \[384\], but the hash rules give tables of \["),
        ({"image_token_id": 64}, "image_token_id must lie in 0..63, got 64"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"num_key_value_heads": 8}, "num_key_value_heads=8"),
        ({"head_dim": None}, "no 'head_dim'"),
        ({"kv_source_layer_ids": 2}, "wrong type"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_value(change, message):
    with pytest.raises(InputError, match=message):
        SharedStreamConfig.from_dict(SETTINGS | change)


def test_text_settings_must_be_settings():
    with pytest.raises(InputError, match="text_config must be an object of settings, got list"):
        read_config({"model_type": "deepseek_v41", "text_config": []})
