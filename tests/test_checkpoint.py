"""Model folders: every spelling and format of the weights loads to the same model, and nothing unsound loads at all."""

import dataclasses
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from tests import oracles
from workbench.checkpoint import load, released_name, save
from workbench.config import EngramConfig, HybridConfig, RopeConfig
from workbench.errors import InputError
from workbench.model.quant import dequantise_fp4, dequantise_fp8_blocks, quantise_fp4, quantise_fp8_blocks
from workbench.model.transformer import V4Model

CONFIG = HybridConfig(
    vocab_size=31,
    hidden_size=32,
    num_attention_heads=2,
    head_dim=12,
    qk_rope_head_dim=4,
    q_lora_rank=11,
    o_groups=2,
    o_lora_rank=5,
    layer_kinds=("window", "csa", "hca"),
    mlp_kinds=("hash", "score", "score"),
    n_routed_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    index_n_heads=16,
    index_head_dim=8,
    index_topk=3,
    hca_ratio=7,
    sliding_window=5,
    max_position_embeddings=64,
    compress_rope=RopeConfig(factor=4, original_max_position_embeddings=16),
)
IDS = torch.arange(29).unsqueeze(0)
SENSITIVE = ("hc_", "norm", "ape", "attn_sink", "gate.bias")


def toy(config: HybridConfig = CONFIG, seed: int = 0) -> V4Model:
    """A model with every value random, also those that start at zero."""
    torch.manual_seed(seed)
    model = V4Model(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn(tensor.shape))
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(toy(), tmp_path / "toy", dtype=torch.float32)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return folder


def settings(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def same_weights(one: V4Model, other: V4Model) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- out and in again ---


def test_a_saved_model_loads_bit_for_bit(folder):
    model = load(folder)
    assert same_weights(model, toy()) and model.config == CONFIG and model.tokenizer is None
    assert torch.equal(model(IDS), toy()(IDS))


def test_half_precision_rounds_matrices_and_keeps_small_terms_and_tables(tmp_path):
    original, loaded = toy().state_dict(), load(save(toy(), tmp_path)).state_dict()
    for name, tensor in original.items():
        exact = any(part in name for part in SENSITIVE) or not tensor.is_floating_point()
        assert torch.equal(loaded[name], tensor if exact else tensor.half().float()), name


def test_saved_files_have_one_released_tensor_per_expert(folder):
    names = stored(folder)
    assert {"layers.2.ffn.experts.1.w3.weight", "hc_head_fn", "layers.1.hc_ffn_scale", "layers.0.ffn.gate.tid2eid"} <= set(
        names
    )
    assert torch.equal(names["layers.2.ffn.experts.1.w3.weight"], toy().state_dict()["layers.2.ffn.experts.w13"][1, 32:])


def test_engram_layers_and_tokenizer_come_back(tmp_path):
    config = dataclasses.replace(
        CONFIG, engram=EngramConfig(layer_ids=(1,), vocab_size=23, compressed_vocab_size=29, n_heads=2, head_dim=6)
    )
    model = toy(config)
    model.tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "key": 2}, unk_token="<unk>"))
    model.tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    loaded = load(save(model, tmp_path, dtype=torch.float32))
    assert same_weights(loaded, model) and loaded.config == config
    assert loaded.tokenizer.encode("key a box").ids == [2, 1, 0]
    assert torch.equal(loaded(IDS), model(IDS))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_matrices_compute_in_the_dtype_asked_for(tmp_path, dtype):
    config = dataclasses.replace(
        CONFIG, engram=EngramConfig(layer_ids=(1,), vocab_size=23, compressed_vocab_size=29, n_heads=2, head_dim=6)
    )
    folder = save(toy(config), tmp_path, dtype=torch.float32)
    model = load(folder, dtype=dtype)
    assert model.head.weight.dtype == dtype and model.layers[0].hc_attn.base.dtype != torch.bfloat16
    reference = load(folder)(IDS)
    # Low precision flips a few selections; nearly all logits stay within the rounding of a handful of layers.
    assert (model(IDS) - reference).abs().median() < {torch.float64: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]


def test_extra_files_are_written_beside_the_model(tmp_path):
    save(toy(), tmp_path, extra={"recipe.json": {"seed": 3}, "NOTES.md": "how it was made\n"})
    assert json.loads((tmp_path / "recipe.json").read_text()) == {"seed": 3}
    assert (tmp_path / "NOTES.md").read_text() == "how it was made\n"
    for name in ("../recipe.json", "config.json", "", "a\\b"):
        with pytest.raises(InputError, match="plain file name"):
            save(toy(), tmp_path, extra={name: "x"})


def test_a_save_that_fails_leaves_the_old_folder_as_it_was(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    class Broken:
        def save(self, path: str) -> None:
            raise OSError("no space left")

    model = toy(seed=1)
    model.tokenizer = Broken()
    with pytest.raises(OSError, match="no space"):
        save(model, folder)
    model.tokenizer = None
    with torch.no_grad():
        model.embed.weight[3, 5] = 1e6
    with pytest.raises(InputError, match=r"embed.weight.*not finite in torch.float16"):
        save(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# --- spellings ---

RELEASED_AND_LIVE = """
embed.weight                                    model.embed_tokens.weight
head.weight                                     lm_head.weight
norm.weight                                     model.norm.weight
hc_head_fn                                      model.hc_head.hc_fn
hc_head_scale                                   model.hc_head.hc_scale
layers.7.attn_norm.weight                       model.layers.7.input_layernorm.weight
layers.7.ffn_norm.weight                        model.layers.7.post_attention_layernorm.weight
layers.7.hc_attn_fn                             model.layers.7.attn_hc.fn
layers.7.hc_ffn_scale                           model.layers.7.ffn_hc.scale
layers.7.attn.wq_a.weight                       model.layers.7.self_attn.q_a_proj.weight
layers.7.attn.q_norm.weight                     model.layers.7.self_attn.q_a_norm.weight
layers.7.attn.wq_b.weight                       model.layers.7.self_attn.q_b_proj.weight
layers.7.attn.wkv.weight                        model.layers.7.self_attn.kv_proj.weight
layers.7.attn.kv_norm.weight                    model.layers.7.self_attn.kv_norm.weight
layers.7.attn.attn_sink                         model.layers.7.self_attn.sinks
layers.7.attn.wo_a.weight                       model.layers.7.self_attn.o_a_proj.weight
layers.7.attn.wo_b.weight                       model.layers.7.self_attn.o_b_proj.weight
layers.7.attn.compressor.wkv.weight             model.layers.7.self_attn.compressor.kv_proj.weight
layers.7.attn.compressor.wgate.weight           model.layers.7.self_attn.compressor.gate_proj.weight
layers.7.attn.compressor.ape                    model.layers.7.self_attn.compressor.position_bias
layers.7.attn.compressor.norm.weight            model.layers.7.self_attn.compressor.kv_norm.weight
layers.7.attn.indexer.wq_b.weight               model.layers.7.self_attn.compressor.indexer.q_b_proj.weight
layers.7.attn.indexer.weights_proj.weight       model.layers.7.self_attn.compressor.indexer.scorer.weights_proj.weight
layers.7.attn.indexer.compressor.wkv.weight     model.layers.7.self_attn.compressor.indexer.kv_proj.weight
layers.7.attn.indexer.compressor.wgate.weight   model.layers.7.self_attn.compressor.indexer.gate_proj.weight
layers.7.attn.indexer.compressor.ape            model.layers.7.self_attn.compressor.indexer.position_bias
layers.7.attn.indexer.compressor.norm.weight    model.layers.7.self_attn.compressor.indexer.kv_norm.weight
layers.7.ffn.gate.weight                        model.layers.7.mlp.gate.weight
layers.7.ffn.gate.bias                          model.layers.7.mlp.gate.e_score_correction_bias
layers.7.ffn.gate.tid2eid                       model.layers.7.mlp.gate.tid2eid
layers.7.ffn.experts.w13                        model.layers.7.mlp.experts.gate_up_proj
layers.7.ffn.experts.w2                         model.layers.7.mlp.experts.down_proj
layers.7.ffn.experts.31.w3.weight               model.layers.7.mlp.experts.31.up_proj.weight
layers.7.ffn.shared_experts.w1.weight           model.layers.7.mlp.shared_experts.gate_proj.weight
layers.7.ffn.shared_experts.w2.weight           model.layers.7.mlp.shared_experts.down_proj.weight
layers.7.ffn.shared_experts.w3.weight           model.layers.7.mlp.shared_experts.up_proj.weight
"""
NAMES = [tuple(line.split()) for line in RELEASED_AND_LIVE.strip().splitlines()]
HALF_RENAMED = [
    ("layers.0.attn.kv_norm.weight", "model.layers.0.attn.norm.weight"),
    ("layers.0.attn.q_norm.weight", "model.layers.0.attn.q_norm.weight"),
    ("layers.1.attn.compressor.norm.weight", "model.layers.1.attn.compressor.norm.weight"),
    ("layers.1.attn.indexer.compressor.ape", "model.layers.1.attn.indexer.compressor.ape"),
    ("layers.1.ffn.experts.3.w1.weight", "model.layers.1.ffn.experts.3.w1.weight"),
    ("layers.1.hc_attn_fn", "model.layers.1.hc_attn_fn"),
    ("layers.1.attn_norm.weight", "model.layers.1.attn_norm.weight"),
]


@pytest.mark.parametrize(("released", "other"), NAMES + HALF_RENAMED)
def test_every_spelling_becomes_the_released_one(released, other):
    assert released_name(other) == released == released_name(released)


@pytest.mark.parametrize("name", ["mtp.0.attn.wq_a.weight", "model.mtp.0.e_proj.weight", "model.rotary_emb.main_inv_freq"])
def test_weights_this_model_does_not_use_are_ignored(folder, name):
    assert released_name(name) is None
    assert same_weights(
        load(rewrite(folder, stored(folder) | {name: torch.zeros(3), f"{name}_scale_inv": torch.ones(1)})), toy()
    )


def test_stacked_experts_and_our_own_names_load(folder):
    assert same_weights(load(rewrite(folder, toy().state_dict())), toy())


# --- files and formats ---


def shard(folder: Path) -> Path:
    """Split the weights in two shards with an index."""
    tensors = stored(folder)
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    weight_map = {}
    for i in range(2):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        safetensors.torch.save_file({name: tensors[name] for name in names[i::2]}, folder / file)
        weight_map |= dict.fromkeys(names[i::2], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_shards_load_with_and_without_their_index(folder):
    assert same_weights(load(shard(folder)), toy())
    (folder / "model.safetensors.index.json").unlink()
    assert same_weights(load(folder), toy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_formats_are_converted(folder, dtype):
    narrowed = {name: t.to(dtype) if t.is_floating_point() else t.int() for name, t in stored(folder).items()}
    loaded = load(rewrite(folder, narrowed)).state_dict()
    for name, tensor in toy().state_dict().items():
        assert torch.equal(loaded[name], tensor.to(dtype).float() if tensor.is_floating_point() else tensor), name
        assert loaded[name].dtype == tensor.dtype


def test_a_tied_head_is_the_embedding(folder):
    tensors = stored(folder)
    del tensors["head.weight"]
    rewrite(folder, tensors)
    with pytest.raises(InputError, match="1 missing: head.weight"):
        load(folder)
    (folder / "config.json").write_text(json.dumps(settings(folder) | {"tie_word_embeddings": True}))
    model = load(folder)
    assert torch.equal(model.head.weight, model.embed.weight)


@pytest.mark.parametrize("suffix", [".weight_scale_inv", ".weight.scale", ".scale"])
def test_fp8_companions_are_found_under_each_name(folder, suffix):
    tensors = stored(folder)
    name = "layers.1.attn.wq_b"
    codes, scale = quantise_fp8_blocks(tensors[f"{name}.weight"], (16, 8))
    rewrite(folder, tensors | {f"{name}.weight": codes, name + suffix: scale.float()})
    for declared in ({}, {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 8]}}):
        (folder / "config.json").write_text(json.dumps(settings(folder) | declared))
        expected = dequantise_fp8_blocks(codes, scale, (16, 8))
        assert torch.equal(load(folder).state_dict()[f"{name}.weight"], expected)


@pytest.mark.parametrize("container", [torch.int8, torch.uint8, torch.float4_e2m1fn_x2])
def test_fp4_experts_are_unpacked_into_the_stack(folder, container):
    tensors = stored(folder)
    name = "layers.2.ffn.experts.1.w3"
    codes, scale = quantise_fp4(tensors[f"{name}.weight"])
    rewrite(folder, tensors | {f"{name}.weight": codes.view(container), f"{name}.scale": scale})
    loaded = load(folder).layers[2].ffn.experts.w13
    original = toy().layers[2].ffn.experts.w13
    assert torch.equal(loaded[1, 32:], dequantise_fp4(codes, scale))
    assert torch.equal(loaded[1, :32], original[1, :32]) and torch.equal(loaded[2], original[2])


# --- against transformers ---

FP8_WEIGHTS = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "w1", "w2", "w3")
FP8_BLOCK = (32, 32)


def released_format(name: str) -> str:
    """Which number format the release stores a tensor in (reference/deepseek-v4.md, section 0), by its released name."""
    if ".ffn.experts." in name:
        return "fp4"
    if name.split(".")[-2:-1] and name.split(".")[-2] in FP8_WEIGHTS and ".compressor." not in name:
        return "fp8"
    if any(part in name for part in ("hc_", "ape", "attn_sink", "gate.bias", "tid2eid")):
        return "exact"
    return "bf16"


def to_released_folder(hf_model, folder: Path) -> Path:
    """Round the transformers model to the released formats, in place, and write it as a release looks."""
    hf_model.save_pretrained(folder / "once")  # the library's own unstacking and renaming
    names = safetensors.torch.load_file(folder / "once" / "model.safetensors")
    live = {released_name(name): tensor for name, tensor in hf_model.state_dict().items()}
    out = {}
    for name, tensor in names.items():
        name = name.removeprefix("model.").replace("attn.norm.", "attn.kv_norm.").replace("embed_tokens", "embed")
        name = name.replace("hc_head.hc_", "hc_head_")
        kind, scale = released_format(name), f"{name.removesuffix('.weight')}.scale"
        if kind == "fp4":
            codes, scales = quantise_fp4(tensor)
            out |= {name: codes.view(torch.int8), scale: scales}
            rounded = dequantise_fp4(codes, scales)
        elif kind == "fp8":
            codes, scales = quantise_fp8_blocks(tensor, FP8_BLOCK)
            out |= {name: codes, scale: scales}
            rounded = dequantise_fp8_blocks(codes, scales, FP8_BLOCK)
        else:
            out[name] = tensor.bfloat16() if kind == "bf16" else tensor
            rounded = out[name].to(tensor.dtype)
        place_in(live, name, rounded)
    safetensors.torch.save_file(out | {"mtp.0.norm.weight": torch.ones(3)}, folder / "model.safetensors")
    return shard(folder)


def place_in(live: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    if ".ffn.experts." not in name:
        live[name].copy_(value)
        return
    experts, _, rest = name.partition(".experts.")
    number, part, _ = rest.split(".")
    if part == "w2":
        live[f"{experts}.experts.w2"][int(number)] = value
    else:
        live[f"{experts}.experts.w13"][int(number)].chunk(2)[part == "w3"].copy_(value)


def released_settings(hf_config) -> dict:
    """config.json in the released spelling."""
    ratios = {oracles.WINDOW: 0, oracles.CSA: 4, oracles.HCA: hf_config.compress_rates[oracles.HCA]}
    rope = hf_config.rope_parameters["compress"]
    same = (
        "model_type vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim qk_rope_head_dim "
        "q_lora_rank o_groups o_lora_rank index_n_heads index_head_dim index_topk n_routed_experts num_experts_per_tok "
        "n_shared_experts moe_intermediate_size scoring_func norm_topk_prob routed_scaling_factor swiglu_limit sliding_window "
        "hc_mult hc_sinkhorn_iters hc_eps rms_norm_eps rope_theta compress_rope_theta max_position_embeddings"
    )
    return {name: getattr(hf_config, name) for name in same.split()} | {
        "compress_ratios": [*(ratios[kind] for kind in hf_config.layer_types), 0],  # the last one is the MTP block's
        "num_hash_layers": hf_config.mlp_layer_types.count("hash_moe"),
        "num_nextn_predict_layers": 1,
        "rope_scaling": {"type": "yarn"}
        | {k: rope[k] for k in ("factor", "beta_fast", "beta_slow")}
        | {"original_max_position_embeddings": rope["original_max_position_embeddings"]},
        "quantization_config": {"quant_method": "fp8", "weight_block_size": list(FP8_BLOCK), "scale_fmt": "ue8m0"},
    }


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("spelling", ["save_pretrained", "live", "released, quantised"])
def test_logits_equal_transformers_whichever_way_the_weights_are_stored(transformers_oracle, tmp_path, seed, spelling):
    hf_config, hf_model = oracles.oracle_model(seed)
    if spelling == "released, quantised":
        to_released_folder(hf_model, tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(released_settings(hf_config)))
    else:
        hf_model.save_pretrained(tmp_path)
        if spelling == "live":
            rewrite(tmp_path, hf_model.state_dict())
    ids = torch.randint(0, hf_config.vocab_size, (2, 61), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        expected = hf_model(ids, use_cache=False).logits
        ours = load(tmp_path)(ids)
    assert expected.std() > 0.3  # logits that say something
    assert (ours - expected).abs().max() < 1e-4  # float32 rounding over a few layers is about 1e-5


def test_transformers_reads_the_configuration_we_save(transformers_oracle, tmp_path):
    hf_config, hf_model = oracles.oracle_model(5)
    hf_model.save_pretrained(tmp_path / "theirs")
    ours = save(load(tmp_path / "theirs"), tmp_path / "ours", dtype=torch.float32)
    again = transformers_oracle.DeepseekV4Config.from_pretrained(ours)
    for name in ("layer_types", "mlp_layer_types", "compress_rates", "hidden_size", "qk_rope_head_dim", "sliding_window"):
        assert getattr(again, name) == getattr(hf_config, name), name
    assert load(ours).config == load(tmp_path / "theirs").config
