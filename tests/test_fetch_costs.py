"""Fetch times, windows and break-even points: the worked numbers of reference/engram-and-overlap.md, sections 3 and 7."""

import math
from dataclasses import replace

import pytest

from workbench.cost.fetch import (
    Costs,
    Setting,
    block_seconds,
    break_even_table,
    bytes_fetched,
    engram_models,
    fetch_of,
    ids_known_s,
    link_seconds,
    masked_tokens,
    modelled,
    required_bandwidth,
    stall_alone,
    window_s,
    zipf_hit_rate,
)
from workbench.devices import devices, drives, link_of, links
from workbench.errors import InputError
from workbench.presets import presets

H100 = Setting(model=engram_models["engram-27b"], device=devices["h100"], tokens=8192)


@pytest.mark.parametrize(
    ("model", "device", "gb_per_s"),
    [("engram-27b", "h100", 4.0), ("engram-27b", "a100-80gb", 1.3), ("v4.1-flash", "h100", 5.8), ("dense-8b", "h800", 2.3)],
)
def test_break_even_bandwidth_of_the_reference(model, device, gb_per_s):
    for tokens in (2048, 65536):  # n cancels
        setting = Setting(model=engram_models[model], device=devices[device], tokens=tokens)
        assert required_bandwidth(setting, 1) / 1e9 == pytest.approx(gb_per_s, abs=0.05)
        assert required_bandwidth(setting, 2) == pytest.approx(required_bandwidth(setting, 1) / 2)
        assert required_bandwidth(setting, 0) == math.inf


def test_the_window_of_one_block_when_decoding():
    paper = replace(H100, tokens=1, phase="decode")
    assert 1e6 * window_s(paper, 1) == pytest.approx(108, abs=0.5)
    # The reference does not name the device of its V4.1 figures; 8 TB/s and a byte a weight give them.
    v41 = Setting(model=engram_models["v4.1-flash"], device=devices["b200"], tokens=1, phase="decode")
    assert 1e6 * block_seconds(v41) == pytest.approx(67, abs=0.5)
    assert 1e6 * block_seconds(replace(v41, cards=8)) == pytest.approx(8, abs=0.5)


# Microseconds for n = 1, 64, 512, 8192: Engram-27B / V4.1, as printed there, so to within half a unit of the last digit.
TRANSFER_US = {
    "pcie3": ("0.2/0.5", "14/34", "109/270", "1748/4325"),
    "pcie4": ("0.1/0.3", "6.6/16", "52/130", "839/2076"),
    "pcie5": ("0.05/0.1", "3.2/7.8", "25/62", "403/998"),
    "nvlink-c2c": (None, "0.5/1.2", "3.7/9.3", "60/148"),
    "nvlink-c2c-rubin": (None, "0.2/0.6", "1.9/4.6", "30/74"),
    "cxl2": ("0.1/0.3", "6.6/16", "52/130", "839/2076"),
}
READ_US = {
    "nvme-gen4": (None, "1024/1536", "8192/12288", "131000/197000"),
    "nvme-gen5": (None, "410/614", "3277/4915", "52000/79000"),
}
SIZES = (1, 64, 512, 8192)
PRINTED = [(engram_models["engram-27b"], 0), (engram_models["v4.1-flash"], 1)]


def close_as_printed(value, printed):
    digits = len(printed.partition(".")[2])
    step = 1000 if printed.endswith("000") else 10**-digits
    assert value == pytest.approx(float(printed), abs=0.55 * step), (value, printed)


@pytest.mark.parametrize("name", TRANSFER_US)
def test_the_transfer_times_of_the_reference(name):
    for n, cell in zip(SIZES, TRANSFER_US[name], strict=True):
        for model, place in PRINTED if cell else ():
            setting = Setting(model=model, device=devices["h100"], tokens=n)
            close_as_printed(1e6 * link_seconds(links[name], bytes_fetched(setting)), cell.split("/")[place])


@pytest.mark.parametrize("name", READ_US)
def test_the_read_times_of_the_reference(name):
    for n, cell in zip(SIZES, READ_US[name], strict=True):
        for model, place in PRINTED if cell else ():
            fetch = fetch_of(Setting(model=model, device=devices["h100"], tokens=n, drive=drives[name]), 1)
            close_as_printed(1e6 * (fetch.gather_s - drives[name].latency_s), cell.split("/")[place])
    assert 50e-6 <= drives[name].latency_s <= 100e-6


@pytest.mark.parametrize(("keys", "share", "hits"), [(1e7, 1e-2, 0.72), (1e7, 0.1, 0.86), (1e9, 1e-4, 0.57), (1e9, 1e-2, 0.78)])
def test_the_zipf_hit_rates_of_the_reference(keys, share, hits):
    assert zipf_hit_rate(share * keys, keys) == pytest.approx(hits, abs=0.005)


def test_the_zipf_hit_rate_is_close_to_summing_the_law():
    keys, kept = 20_000, 300
    exact = sum(1 / k for k in range(1, kept + 1)) / sum(1 / k for k in range(1, keys + 1))
    assert zipf_hit_rate(kept, keys) == pytest.approx(exact, abs=1e-3)
    assert zipf_hit_rate(0, keys) == 0.0 and zipf_hit_rate(keys, keys) == 1.0
    with pytest.raises(InputError, match="got 5 of 4"):
        zipf_hit_rate(5, 4)


def test_v41_rows_are_those_of_the_preset():
    model, engram = engram_models["v4.1-flash"], presets["v4.1-flash"].config.engram
    assert (model.rows_per_token, model.row_bytes, model.bytes_per_token) == (24, 264, 6336)
    assert model.engram_layers == engram.layer_ids == (1, 14) and model.blocks == len(presets["v4.1-flash"].layer_kinds)


def test_a_fetch_is_the_sum_of_its_formulas():
    costs = Costs(hash_fixed_s=3e-6, hash_row_s=7e-9, row_s=90e-9, copy_fixed_s=11e-6, uva_fixed_s=2e-6, host_bytes_per_s=1e11)
    setting = replace(H100, tokens=100, hit_rate=0.25, unique=0.5, threads=3, costs=costs)
    read = 100 * 16 * 0.5 * 0.75
    fetch = fetch_of(setting, 1)
    assert fetch.hash_s == pytest.approx(3e-6 + 1600 * 7e-9) and fetch.gather_s == pytest.approx(read * 90e-9 / 3)
    assert fetch.link_s == pytest.approx(11e-6 + read * 160 / 52e9)
    assert fetch.total_s == pytest.approx(fetch.hash_s + fetch.gather_s + fetch.link_s)
    chunked = fetch_of(replace(setting, path="chunked"), 1)
    assert chunked.total_s == pytest.approx(fetch.hash_s + max(fetch.gather_s, fetch.link_s))
    uva = fetch_of(replace(setting, path="uva"), 1)  # no host thread, no hash on the host
    assert uva.total_s == pytest.approx(max(2e-6 + read * 160 / 52e9, read * 160 / 1e11))
    drive = fetch_of(replace(setting, drive=drives["nvme-gen5"]), 1)
    assert drive.gather_s == pytest.approx(65e-6 + read / 2.5e6) and drive.link_s == fetch.link_s


def test_links_come_from_devices_and_unified_memory_has_none():
    assert [link_of(devices[d]).name for d in ("a100-80gb", "h100", "gh200", "rubin-2026")] == [
        "pcie4", "pcie5", "nvlink-c2c", "nvlink-c2c-rubin",
    ]  # fmt: skip
    assert link_of(devices["m3-ultra"]) is None
    assert fetch_of(replace(H100, device=devices["m3-ultra"]), 1).link_s == 0.0
    with pytest.raises(InputError, match=r"host link of Ascend 910C .*choose one of pcie3"):
        modelled(replace(H100, device=devices["ascend-910c"]))
    assert modelled(replace(H100, device=devices["ascend-910c"], link=links["pcie4"])).total_s > 0


def test_a_decoded_id_must_come_to_the_host_first_unless_the_device_hashes():
    decode = replace(H100, phase="decode")
    assert (ids_known_s(H100), ids_known_s(decode), ids_known_s(replace(decode, path="uva"))) == (0.0, 15e-6, 0.0)
    ids = modelled(decode).timeline.spans[0]
    assert ids.name == "token ids" and ids.end_s == 15e-6


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("drive", [None, "nvme-gen4"])
def test_break_even_points_are_exactly_where_hiding_begins_and_ends(phase, drive):
    setting = replace(H100, phase=phase, drive=drives[drive] if drive else None, threads=5, link=links["pcie3"])
    found = 0
    for layer in (1, 2, 14):
        for first, last in masked_tokens(setting, layer, most=4096):
            found += 1
            inside, outside = (first, last), [n for n in (first - 1, last + 1) if 1 <= n <= 4096]
            assert all(stall_alone(replace(setting, tokens=n), layer) == 0 for n in inside)
            assert all(stall_alone(replace(setting, tokens=n), layer) > 0 for n in outside)
    assert found
    by_hand = {n for n in range(1, 601) if stall_alone(replace(setting, tokens=n), 2) == 0}
    assert by_hand == {n for a, b in masked_tokens(setting, 2, most=600) for n in range(a, b + 1)}


def test_the_break_even_table_is_layer_by_batch_by_link_and_agrees_with_the_clock():
    lines = break_even_table(H100, (1, 14), (1, 8192), [links["pcie4"], drives["nvme-gen4"]])
    assert [(x.link, x.layer, x.tokens) for x in lines] == [
        (link, layer, n) for link in ("PCIe 4.0 x16", "NVMe Gen4") for layer in (1, 14) for n in (1, 8192)
    ]
    for line in lines:
        drive = drives["nvme-gen4"] if line.link == "NVMe Gen4" else None
        link = None if drive else links["pcie4"]
        clock = modelled(replace(H100, tokens=line.tokens, layers=(line.layer,), drive=drive, link=link)).layers[0]
        assert line.stall_s == pytest.approx(clock.stall_s, abs=1e-12)
        assert line.hidden_fraction == pytest.approx(clock.hidden_fraction, abs=1e-9)
        assert (line.stall_s == 0) == any(a <= line.tokens <= b for a, b in line.masked_tokens)
    assert lines[0].hidden_fraction == 1.0 and lines[-1].hidden_fraction < 0.6


def test_what_breaks_the_overlap():
    assert modelled(H100).hidden_fraction == 1.0
    worse = [
        replace(H100, drive=drives["nvme-gen4"]),
        replace(H100, layers=(1,), threads=1),
        replace(H100, layers=(1,), tokens=1, phase="decode", cards=8),
    ]
    assert all(modelled(setting).hidden_fraction < 0.9 for setting in worse)
    nvme = worse[0]
    stalls = [modelled(replace(nvme, hit_rate=h)).stall_s for h in (0.0, 0.5, 0.9, 0.99)]
    assert stalls == sorted(stalls, reverse=True) and stalls[0] > stalls[-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": 0}, "tokens must be a whole number"),
        ({"hit_rate": 1.5}, "hit_rate is a share"),
        ({"unique": math.nan}, "unique is a share"),
        ({"layers": (30,)}, r"blocks 0\.\.29"),
        ({"path": "uva", "drive": drives["nvme-gen4"]}, "cannot read rows from a drive"),
        ({"phase": "train"}, "'train'"),
    ],
)
def test_bad_settings_are_one_clear_error(change, said):
    with pytest.raises(InputError, match=said):
        replace(H100, **change)
