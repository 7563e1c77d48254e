"""A context that fills a card: agrees with `fit`, and with sums and quotients done the slow way."""

from __future__ import annotations

import pytest

from workbench import cost
from workbench.cost.filling import CARDS, all_cards_needed, cards_needed, filling, prefill_flops, when_full
from workbench.devices import devices, link_of
from workbench.errors import InputError
from workbench.presets import presets
from workbench.training.recipes import RECIPES


@pytest.mark.parametrize(("name", "device", "cards", "tp"), [("v4-flash", "h200", 8, 8), ("gqa-8", "a100-80gb", 8, 4)])
@pytest.mark.parametrize("batch", [1, 5])
def test_it_is_full_at_the_first_context_that_does_not_fit(name, device, cards, tp, batch):
    contexts = [7919 * n for n in range(1, 130)]
    fill = filling(contexts, name, device, cards=cards, tp=tp, batch=batch)
    fits = [cost.fit(name, n, device, cards=cards, tp=tp, batch=batch).fits for n in contexts]
    assert fill.full_at == (fits.index(False) if False in fits else None)
    assert fill.kv_bytes[40] == cost.fit(name, contexts[40], device, cards=cards, tp=tp, batch=batch).kv_bytes["total"]
    assert fill.origin.startswith("modelled")


def test_a_card_too_small_for_the_weights_is_full_at_once():
    fill = filling([5, 100], "v4-pro", "rtx-4090")
    assert fill.full_at == 0 and fill.room_bytes < 0


def test_contexts_a_model_cannot_have_are_left_out():
    assert filling([100, 2**21], "v4-flash", "h200").contexts == (100,)
    with pytest.raises(InputError, match="up to 1048576 tokens"):
        filling([2**21], "v4-flash", "h200")


@pytest.mark.parametrize(
    ("name", "device"), [("v4-flash", "h100"), ("v4.1-flash", "m3-ultra"), ("gqa-8", "b200"), ("v3.2", "h20")]
)
@pytest.mark.parametrize("batch", [1, 16])
def test_the_fewest_cards_fit_and_half_of_them_do_not(name, device, batch):
    found, length = cards_needed(name, device, 2**20, batch), 2**20
    heads = presets[name].config.num_attention_heads

    def fits(cards):
        groups = [tp for tp in CARDS if tp <= min(cards, heads)]
        return [tp for tp in groups if cost.fit(name, length, device, cards=cards, tp=tp, batch=batch).fits]

    assert found.cards and found.tp == fits(found.cards)[0]
    assert found.cards == 1 or not fits(found.cards // 2)


def test_where_64_cards_do_not_do_none_is_said():
    found = cards_needed("mha", "rtx-4090", 2**20)
    assert found.cards is None and found.tp is None and not found.weights_known


def test_every_device_is_asked_for_every_model():
    found = all_cards_needed(8192)
    assert [(each.device.name, each.preset.name) for each in found] == [(d, p) for d in devices for p in presets]


@pytest.mark.parametrize("name", ["tiny-v4", "tiny-v41", "tiny-gqa"])
@pytest.mark.parametrize("length", [1, 2, 37, 403, 1009])
def test_work_of_a_prefill_is_the_sum_over_its_tokens(name, length):
    config = RECIPES[name].config(RECIPES[name].vocab_size)
    slow = sum(cost.decode_flops(config, n)["total"] for n in range(1, length + 1))
    assert prefill_flops(config, length) == pytest.approx(slow, rel=2e-3)  # whole blocks, and knees between the points


@pytest.mark.parametrize("name", ["v4-pro", "v4.1-flash", "v3.2", "mha"])
def test_work_of_a_published_prefill_too(name):
    slow = sum(cost.decode_flops(name, n, "fp8-equivalent")["total"] for n in range(1, 5001))
    assert prefill_flops(name, 5000, "fp8-equivalent") == pytest.approx(slow, rel=3e-3)  # V3.2's indexer starts at once
    assert prefill_flops(name, 0) == 0


def choices(*args, **kwargs):
    return {choice.what: choice for choice in when_full(*args, **kwargs)}


def test_swapping_is_bytes_over_the_link_and_recomputing_flops_over_the_rate():
    found, device = choices("v4-flash", 100_000, "h100", cards=8, tp=8), devices["h100"]
    held = cost.kv_bytes("v4-flash", 100_000)["total"]
    assert found["swap"].moved_bytes == 2 * held and found["swap"].freed_bytes == held
    assert found["swap"].seconds == pytest.approx(2 * held / link_of(device).effective_bytes_per_s)
    work = prefill_flops("v4-flash", 100_000, "fp8-equivalent") / 8
    assert found["recompute"].flops == work and found["recompute"].seconds == pytest.approx(work / 1979e12)
    assert found["refuse"].seconds == 0 and found["refuse"].freed_bytes == 0
    assert [what for what, choice in found.items() if choice.exact] == ["recompute", "swap"]
    assert all(choice.origin.startswith("modelled") for choice in found.values())


def test_forgetting_frees_what_the_rest_does_not_hold():
    found = choices("v4-pro", 65_536, "h200", cards=8, keep=1000)["forget"]
    assert found.freed_bytes == cost.kv_bytes("v4-pro", 65_536)["total"] - cost.kv_bytes("v4-pro", 1000)["total"]
    assert found.tokens == 1000 and choices("v4-pro", 65_536, "h200", cards=8)["forget"].tokens == 32_768


def test_a_dense_cache_is_swapped_in_parts_a_latent_whole():
    one, four = (choices("gqa-8", 10_000, "h100", cards=n, tp=n)["swap"].moved_bytes for n in (1, 4))
    assert one == 4 * four
    one, four = (choices("v3.2", 10_000, "h100", cards=n, tp=n)["swap"].moved_bytes for n in (1, 4))
    assert one == four


def test_without_a_link_or_its_rate_nothing_is_invented():
    unified = choices("v4-flash", 10_000, "m3-ultra")["swap"]
    assert unified.seconds is None and unified.freed_bytes == 0 and "one memory" in unified.note
    unknown = choices("v4-flash", 10_000, "ascend-910c", cards=2)["swap"]
    assert unknown.seconds is None and "no rate is known" in unknown.note


@pytest.mark.parametrize("keep", [-1, 100, 1.5, True])
def test_keeping_what_is_not_there_is_one_clear_error(keep):
    with pytest.raises(InputError, match="keep must be"):
        when_full("v4-flash", 100, "h100", keep=keep)


@pytest.mark.parametrize(("cards", "tp", "batch"), [(3, 2, 1), (0, 1, 1), (1, 1, 0)])
def test_counts_that_cannot_be_are_one_clear_error(cards, tp, batch):
    with pytest.raises(InputError, match="must"):
        filling([100], "v4-flash", "h100", cards=cards, tp=tp, batch=batch)
