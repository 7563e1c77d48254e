from dataclasses import FrozenInstanceError, fields, replace

import pytest

import workbench as wb
from workbench.config import read_config
from workbench.errors import InputError

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


@pytest.mark.parametrize("name", LAYERS)
def test_a_preset_carries_a_configuration_that_survives_config_json(name):
    config = wb.presets[name].config
    assert read_config(config.to_dict()) == config


def test_v41_has_the_released_engram_and_schedule():
    config = wb.presets["v4.1-flash"].config
    assert config.engram.rows_per_token == 24 and config.engram.memory_width == 6144 and config.engram.conv_state_length == 0
    assert config.stream_ratios == (2, 2, 2, 1) and config.candidate_source_layer_id == 20
    assert config.candidate_topk_blocks * config.candidate_block_size == 16384


@pytest.mark.parametrize("name", LAYERS)
def test_every_number_of_a_preset_has_a_source(name):
    preset = wb.presets[name]
    for record in (preset, preset.config):
        for field in fields(record):
            source = preset.source_of(field.name)
            assert source.text and source.certainty
    assert set(preset.exceptions) <= {field.name for record in (preset, preset.config) for field in fields(record)}
    with pytest.raises(InputError, match="no number 'colour'"):
        preset.source_of("colour")


def test_doubtful_numbers_say_so():
    assert wb.presets["v4-pro"].source_of("index_topk").certainty == "uncertain"
    assert wb.presets["v4-pro"].source_of("head_dim").certainty == "read in code"
    assert wb.devices["dgx-spark"].source_of("tflop_per_s.fp8").certainty == "uncertain"
    assert wb.devices["dgx-spark"].source_of("memory_bytes").certainty == "secondary"
    assert wb.devices["rubin-2026"].source_of("tflop_per_s.bf16").certainty == "uncertain"
    assert wb.devices["rubin-2026"].source_of("tflop_per_s.fp4").certainty == "secondary"
    assert wb.presets["v3.2"].source_of("n_group").certainty == "secondary"
    assert wb.presets["gqa-8"].source_of("intermediate_size").certainty == "derived"


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


def test_presets_and_devices_stay_mappings_after_the_modules_of_those_names_are_imported():
    import workbench.devices
    import workbench.presets  # noqa: F401

    assert list(wb.presets) == list(LAYERS) and "h100" in list(wb.devices)


def test_only_machines_without_a_host_link_have_unified_memory():
    unified = {name for name, device in wb.devices.items() if device.unified_memory}
    assert unified == {"dgx-spark", "strix-halo", "m3-ultra"}
    assert all(wb.devices[name].host_link_bytes_per_s is None for name in unified)
