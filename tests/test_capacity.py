"""What fits on which device: longest contexts and largest batches are maximal, and every byte lies where it is said to."""

import json
import random
from dataclasses import replace

import pytest

from workbench.cost import decode_bytes, decode_flops, fit, kv_bytes, report
from workbench.devices import devices
from workbench.errors import InputError
from workbench.presets import presets

MILLION = 1_048_576


def random_case(seed):
    """A preset, a length, cards, groups and a batch, and a device whose memory is anything from too little to plenty."""
    draw = random.Random(seed)
    preset = presets[draw.choice(list(presets))]
    length, tp, groups = draw.randrange(1, 200_000), draw.choice([1, 2, 3, 8]), draw.choice([1, 2, 5])
    batch, weights = draw.randrange(1, 20), preset.weights
    held = weights.always_bytes / tp + weights.expert_bytes / (tp * groups) if weights else 0
    room = kv_bytes(preset, length)["total"] * draw.uniform(0.5, 40)
    device = replace(devices[draw.choice(["h100", "b200", "ascend-910b"])], memory_bytes=held + room)
    return preset, length, device, {"cards": tp * groups, "tp": tp}, batch


@pytest.mark.parametrize("seed", range(40))
def test_the_largest_batch_fits_and_one_sequence_more_does_not(seed):
    preset, length, device, split, batch = random_case(seed)
    found = fit(preset, length, device, batch=batch, **split)
    most, groups = found.most_sequences, split["cards"] // split["tp"]
    assert most == found.largest_batch * groups and found.fits == (batch <= most)
    assert not fit(preset, length, device, batch=most + 1, **split).fits
    assert most == 0 or fit(preset, length, device, batch=most, **split).fits
    counts = [rate.sequences for rate in found.rates]
    assert counts == sorted({*(2**n for n in range(30) if 2**n <= most), *([most] if most else [])})


@pytest.mark.parametrize("seed", range(40, 80))
def test_the_longest_context_fits_and_no_longer_one_does(seed):
    preset, length, device, split, batch = random_case(seed)
    longest = fit(preset, length, device, batch=batch, **split)
    assert longest.longest_context >= length or not longest.fits
    if longest.longest_context:
        assert fit(preset, longest.longest_context, device, batch=batch, **split).fits
    if longest.at_limit:
        assert longest.longest_context == preset.config.max_position_embeddings
    else:
        for more in (1, 2, 3, 129):  # within a block and beyond one: the tail comes and goes
            try:
                assert not fit(preset, longest.longest_context + more, device, batch=batch, **split).fits
            except InputError:  # just below the model's limit
                assert longest.longest_context + more > preset.config.max_position_embeddings


def test_every_length_beyond_the_longest_holds_more_than_there_is():
    small = replace(devices["h200"], memory_bytes=presets["v4-flash"].weights.device_bytes + 1.0005e9)
    found = fit("v4-flash", 5000, small)
    assert found.fits and not found.at_limit and found.step.bound == "bandwidth"
    longer = range(found.longest_context + 1, found.longest_context + 600)
    assert all(kv_bytes("v4-flash", length)["total"] > 1.0005e9 for length in longer)


def test_one_kv_head_stays_whole_on_each_card_of_a_group_and_eight_are_shared_out():
    whole = kv_bytes("v4-pro", MILLION)
    for tp in (1, 2, 8):
        found = fit("v4-pro", MILLION, "b200", cards=8, tp=tp, batch=8 // tp)  # one sequence a group
        assert found.kv_bytes == whole
    assert fit("v3.2", 1001, "b200", cards=8, tp=8).kv_bytes == kv_bytes("v3.2", 1001)  # nor does a latent split
    dense = kv_bytes("gqa-8", MILLION)["total"]
    share = {tp: fit("gqa-8", MILLION, "h200", cards=tp, tp=tp).kv_bytes["total"] / dense for tp in (1, 3, 4, 8, 16)}
    assert share == {1: 1, 3: 3 / 8, 4: 1 / 4, 8: 1 / 8, 16: 1 / 8}  # whole heads: three cards hold 3, 3 and 2


def test_groups_share_the_sequences_of_a_batch():
    one = fit("v4-pro", MILLION, "b200", cards=16, tp=8)
    held = {batch: fit("v4-pro", MILLION, "b200", cards=16, tp=8, batch=batch).kv_bytes["total"] for batch in range(1, 6)}
    assert [held[batch] / one.kv_bytes["total"] for batch in held] == [1, 1, 2, 2, 3]  # of the fuller group


def test_experts_are_spread_over_all_cards_and_other_weights_over_those_of_a_group():
    weights = presets["v4-pro"].weights
    for cards, tp in ((1, 1), (16, 8), (16, 1), (16, 16)):
        found = fit("v4-pro", 1000, "b200", cards=cards, tp=tp)
        assert found.weight_bytes == pytest.approx(weights.always_bytes / tp + weights.expert_bytes / cards)
    alone = fit("v4-pro", MILLION, "b200")
    assert not alone.fits and alone.longest_context == alone.most_sequences == 0 and alone.rates == ()
    assert fit("mha", 1000, "b200").weight_bytes is None


def test_engram_tables_take_room_only_where_the_memory_is_one():
    weights = presets["v4.1-flash"].weights
    assert fit("v4.1-flash", 1000, "gb300", cards=2).weight_bytes == weights.always_bytes + weights.expert_bytes / 2
    unified = fit("v4.1-flash", 1000, "m3-ultra")
    assert unified.weight_bytes == weights.device_bytes + weights.host_bytes == 510e9


def test_a_device_without_the_released_format_keeps_bf16():
    for name, storage in (("ascend-910b", "bf16"), ("ascend-910c", "bf16"), ("h100", "released")):
        found = fit("v4-flash", MILLION, name)
        assert found.storage == storage and found.kv_bytes == kv_bytes("v4-flash", MILLION, storage)
    ascend = fit("v4-flash", MILLION, "ascend-910b").kv_bytes
    assert f"{(ascend['total'] - ascend['tail']) / 2**30:.2f}" == "6.72"  # 3.43 as released
    assert fit("v4.1-flash", 9001, "h100").storage == "bf16" and fit("v4.1-flash", 9001, "b200").storage == "released"


@pytest.mark.parametrize("name", presets)
def test_a_step_takes_as_long_as_the_slower_of_reading_and_computing(name):
    preset, device = presets[name], devices["h100"]
    step = fit(preset, 9001, device, cards=4, tp=2, batch=3).step  # two sequences in the fuller group
    split = 1 / 2 if name in ("gqa-8", "mha") else 1
    weights = preset.weights
    read = weights.always_bytes / 2 + weights.expert_bytes_read(3) / 4 if weights else 0
    assert step.weight_bytes == read and step.kv_bytes == 2 * split * decode_bytes(preset, 9001, STORED[name])["total"]
    assert step.flops == 2 * decode_flops(preset, 9001, "fp8-equivalent")["total"] / 2
    assert step.read_s == (step.weight_bytes + step.kv_bytes) / 3.35e12 and step.compute_s == step.flops / 1979e12
    assert step.seconds == max(step.read_s, step.compute_s)
    assert step.tokens_per_s == 1 / step.seconds and step.tokens_per_s_per_card == pytest.approx(3 / step.seconds / 4)


STORED = dict.fromkeys(presets, "released") | {"v4.1-flash": "bf16"}  # an H100 does not read FP4


def test_a_device_without_fp8_computes_plain_flops_in_bf16():
    step = fit("v4-flash", 9001, "a100-80gb").step
    assert step.flops == decode_flops("v4-flash", 9001)["total"] and step.compute_s == step.flops / 312e12


def test_a_large_batch_of_short_contexts_is_bound_by_compute():
    assert fit("v4-flash", 100, "h200").step.bound == "bandwidth"
    assert fit("v4-flash", 100, "h200", batch=30000).step.bound == "compute"


def test_an_empty_sequence_sets_no_limit():
    found = fit("v4-flash", 0, "b200", batch=5)
    assert found.most_sequences is None and found.largest_batch is None and [r.sequences for r in found.rates] == [1, 2, 4, 5]


@pytest.mark.parametrize("name", presets)
def test_a_report_is_plain_and_says_where_each_figure_comes_from(name):
    found = report(name, 4096, ["h100", "m3-ultra"], cards=4, tp=2)
    assert json.loads(json.dumps(found)) == found
    counted = [found[key] for key in ("kv_bytes", "decode_bytes", "decode_flops", "kv_bytes_per_token")]
    assert all(block["origin"] == "modelled (formula)" for block in counted + found["devices"])
    for device in found["devices"]:
        assert len(device["sources"]) == 3 and all(s["text"] and s["certainty"] for s in device["sources"].values())
    assert (found["weights"] is None) == (name in ("gqa-8", "mha"))


def test_a_report_tells_published_from_modelled_and_extrapolated():
    found = report("v4.1-flash", 4096)
    assert (
        found["weights"]["origin"] == "published" and found["weights"]["device_bytes"] + found["weights"]["host_bytes"] == 510e9
    )
    assert report("v4-pro", 4096)["weights"]["origin"] == "modelled (formula)"
    assert report("v3.2", MILLION)["extrapolated"] and not report("v4-pro", MILLION)["extrapolated"]
    (beyond,) = report("v3.2", 4096, ["b200"], cards=8)["devices"]
    assert beyond["longest_context"] > 163840 and beyond["longest_context_is_extrapolated"]


@pytest.mark.parametrize("count", [fit, report])
def test_bad_input_is_refused_by_name(count):
    on = "h200" if count is fit else ["h200"]
    for wrong in ({"cards": 0}, {"batch": 1.5}, {"cards": True}, {"tp": 0}, {"tp": -2}, {"batch": "4"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            count("v4-pro", 5, on, **wrong)
    with pytest.raises(InputError, match="tp=8 and cards=12"):
        count("v4-pro", 5, on, cards=12, tp=8)
    with pytest.raises(InputError, match="tp=256 exceeds the model's 128"):
        count("v4-pro", 5, on, cards=256, tp=256)
    with pytest.raises(InputError, match="h200"):
        count("v4-pro", 5, "abacus" if count is fit else ["abacus"])
    with pytest.raises(InputError, match="v4-flash"):
        count("v5", 5, on)
    with pytest.raises(InputError, match="length.*-5"):
        count("v4-pro", -5, on)
