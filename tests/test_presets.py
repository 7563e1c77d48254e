from dataclasses import FrozenInstanceError, fields, replace

import pytest

import workbench as wb
from workbench.config import EngramConfig, HybridConfig
from workbench.errors import InputError
from workbench.model.transformer import V4Model
from workbench.presets import active_parameters

LAYERS = {"v4-flash": 43, "v4-pro": 61, "v4.1-flash": 40, "v3.2": 61, "gqa-8": 61, "mha": 61}
NO_FP8 = ("a100-80gb", "ascend-910b", "ascend-910c", "m3-ultra")
NAMED = (
    "A100 80GB", "H100", "H200", "B200", "GB300", "Rubin article", "Rubin 2026", "Ascend 910B", "Ascend 910C", "MI300X",
    "RTX 4090", "RTX 5090", "DGX Spark", "M3 Ultra",
)  # fmt: skip


def test_every_preset_names_the_kind_of_each_layer():
    assert {name: len(preset.layer_kinds) for name, preset in wb.presets.items()} == LAYERS
    flash, pro, shared = (wb.presets[name].layer_kinds for name in ("v4-flash", "v4-pro", "v4.1-flash"))
    assert flash[:4] == ("window", "window", "csa", "hca") and flash[-1] == "csa"
    assert [flash.count(kind) for kind in ("window", "csa", "hca")] == [2, 21, 20]
    assert [pro.count(kind) for kind in ("window", "csa", "hca")] == [0, 30, 31]
    modes = ("window", "csa2-full", "csa2-reindex", "csa2-reuse")
    assert [shared.count(mode) for mode in modes] == [2, 4, 4, 30]
    assert [layer for layer, kind in enumerate(shared) if kind == "csa2-full"] == [2, 8, 14, 20]


def test_v4_presets_carry_a_configuration_that_survives_config_json():
    for name in ("v4-flash", "v4-pro"):
        config = wb.presets[name].config
        assert config is not None and HybridConfig.from_dict(config.to_dict()) == config
    assert all(wb.presets[name].config is None for name in ("v4.1-flash", "v3.2", "gqa-8", "mha"))


@pytest.mark.parametrize("name", LAYERS)
def test_every_number_of_a_preset_has_a_source(name):
    preset = wb.presets[name]
    for record in (preset, preset.shape):
        for field in fields(record):
            source = preset.source_of(field.name)
            assert source.text and source.certainty
    assert set(preset.exceptions) <= {field.name for record in (preset, preset.shape) for field in fields(record)}
    with pytest.raises(InputError, match="no number 'colour'"):
        preset.source_of("colour")


def test_doubtful_numbers_say_so():
    assert wb.presets["v4-pro"].source_of("index_topk").certainty == "uncertain"
    assert wb.presets["v4-pro"].source_of("head_dim").certainty == "read in code"
    assert wb.devices["dgx-spark"].source_of("tflop_per_s.fp8").certainty == "uncertain"
    assert wb.devices["dgx-spark"].source_of("memory_bytes").certainty == "secondary"


def test_every_device_is_there_with_units_sources_and_sane_numbers():
    for name in NAMED:
        assert wb.devices[name].source.text
    for device in wb.devices.values():
        assert 1e10 < device.memory_bytes < 1e12 and 1e11 < device.bandwidth_bytes_per_s < 1e14
        rising = [device.tflop_per_s[name] for name in ("bf16", "fp8", "fp4") if name in device.tflop_per_s]
        assert rising == sorted(rising) and "bf16" in device.tflop_per_s and "bf16" in device.kv_formats
        assert "fp8" not in device.kv_formats or "fp8" in device.tflop_per_s
        assert device.host_link_bytes_per_s is None or 3e10 < device.host_link_bytes_per_s < 1e12


def test_devices_without_fp8_units_keep_their_cache_in_bf16():
    assert {name: wb.devices[name].kv_formats for name in NO_FP8} == dict.fromkeys(NO_FP8, ("bf16",))
    assert wb.devices["h100"].kv_formats == ("bf16", "fp8") and "fp4" in wb.devices["b200"].kv_formats


def test_names_are_forgiving_and_an_unknown_one_lists_the_others():
    assert wb.devices["RTX 4090"] is wb.devices["rtx_4090"] is wb.devices["rtx-4090"]
    assert "V4-Flash" in wb.presets and "v5" not in wb.presets and wb.presets.get("v5") is None
    for wrong in ("v5", 4, None):
        with pytest.raises(InputError, match="v4-flash, v4-pro"):
            wb.presets[wrong]
    with pytest.raises(KeyError):
        wb.devices["abacus"]


def test_records_are_frozen_but_can_be_varied():
    with pytest.raises(FrozenInstanceError):
        wb.devices["h200"].memory_bytes = 1.0  # type: ignore[misc]
    assert replace(wb.devices["h200"], memory_bytes=1e9).memory_bytes == 1e9


def test_presets_stay_a_mapping_after_the_module_of_that_name_is_imported():
    import workbench.presets  # noqa: F401

    assert list(wb.presets) == list(LAYERS)


def test_parameters_counted_from_the_shape_are_those_published():
    for name in ("v4-flash", "v4-pro"):
        preset = wb.presets[name]
        config, weights = preset.config, preset.weights
        assert active_parameters(config) == pytest.approx(preset.active_parameters, rel=0.03)
        routed = 3 * config.hidden_size * config.moe_intermediate_size * config.num_hidden_layers
        unused = routed * (config.n_routed_experts - config.num_experts_per_tok)
        assert active_parameters(config) + unused == pytest.approx(preset.total_parameters, rel=0.03)
        assert 0.5 * preset.total_parameters < weights.device_bytes < 0.6 * preset.total_parameters  # mostly FP4


def test_active_parameters_are_the_matrices_of_a_live_model_whose_experts_all_work():
    config = HybridConfig(
        vocab_size=53, hidden_size=22, num_attention_heads=4, head_dim=14, qk_rope_head_dim=6, q_lora_rank=10, o_groups=2,
        o_lora_rank=6, layer_kinds=("window", "csa", "hca"), mlp_kinds=("score",) * 3, n_routed_experts=5,
        num_experts_per_tok=5, moe_intermediate_size=8, index_n_heads=2, index_head_dim=10, index_topk=3, csa_ratio=3,
        hca_ratio=7, sliding_window=5, hc_mult=2,
        engram=EngramConfig(layer_ids=(1,), vocab_size=11, compressed_vocab_size=31, n_heads=2, head_dim=3),
    )  # fmt: skip
    model = V4Model(config)
    left_out = (
        "embed",
        "ape",
        "table",
        "conv",
        "norm",
        "engram.q_weight",
        "engram.k_weight",
    )  # looked up or added, not multiplied as a matrix
    counted = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and not any(word in name for word in left_out)
    }
    assert sum(counted.values()) == active_parameters(config), counted


def test_a_step_reads_more_experts_the_more_sequences_it_decodes():
    weights = wb.presets["v4-flash"].weights
    one = weights.always_bytes + weights.expert_bytes * 6 / 256
    assert weights.bytes_read(1) == pytest.approx(one)
    assert one < weights.bytes_read(8) < weights.bytes_read(1000) <= weights.device_bytes
